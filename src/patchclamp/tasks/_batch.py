"""Batch: token rows ready for a model, with what is to be predicted where."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.errors import TaskError

if TYPE_CHECKING:
    from patchclamp.tasks import Example


@dataclass(frozen=True, eq=False, repr=False)
class Batch:
    """Rows of tokens, left-padded, and the targets that a metric reads.

    An example has one row, except where a wrong answer of several tokens needs a row of its own (`sign` -1): its number is
    then the difference of the rows' numbers. Clean and corrupt rows align token by token and share the mask.

    At row `target_row[t]`, the logits at column `target_position[t]` predict target t: any token of `answers[t]` counts as
    right and any of `wrong[t]` as wrong (-1 fills up). Spans are half-open column ranges, per row; `end` is the last prompt
    token.
    """

    tokens: Int[Tensor, "row position"]
    mask: Bool[Tensor, "row position"]
    corrupt: Int[Tensor, "row position"] | None
    target_row: Int[Tensor, " target"]
    target_position: Int[Tensor, " target"]
    answers: Int[Tensor, "target choice"]
    wrong: Int[Tensor, "target distractor"] | None
    example: Int[Tensor, " row"]
    sign: Float[Tensor, " row"]
    spans: Mapping[str, Int[Tensor, "row 2"]]
    examples: "tuple[Example, ...]"
    metric: str = "logit_diff"
    """The task's metric, by name."""

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        rows, columns = self.tokens.shape
        return (
            f"Batch({len(self)} examples, {rows} rows of {columns} tokens, {len(self.target_row)} targets, metric {self.metric})"
        )

    @property
    def position_ids(self) -> Int[Tensor, "row position"]:
        """Positions counted from each row's first real token (padding gets 0)."""
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    def swapped(self) -> "Batch":
        """Clean and corrupt exchanged, the answers kept: the batch for denoising."""
        if self.corrupt is None:
            raise TaskError("denoising runs the corrupt prompts, and this batch has none: give pairs with 'corrupt'")
        return replace(self, tokens=self.corrupt, corrupt=self.tokens)

    def numbered(self) -> tuple[Int[Tensor, " token"], "Batch"]:
        """The tokens that are right or wrong answers, and the batch with its answers given by their places among these."""
        given = [self.answers] if self.wrong is None else [self.answers, self.wrong]
        tokens = torch.cat([one.flatten() for one in given]).unique()
        tokens = tokens[tokens >= 0]
        places = [torch.where(one < 0, one, torch.searchsorted(tokens, one.clamp(min=0))) for one in given]
        return tokens, replace(self, answers=places[0], wrong=None if self.wrong is None else places[1])

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device (itself, where it is there already)."""
        if self.tokens.device == torch.device(device):
            return self
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved, spans={name: span.to(device) for name, span in self.spans.items()})

    def columns(self, position: int | str) -> Bool[Tensor, "row position"]:
        """Which columns a position (index into the prompt, negative from its end) or a named span covers, per row."""
        n = self.tokens.shape[1]
        column = torch.arange(n, device=self.tokens.device)[None]
        if isinstance(position, str):
            if position not in self.spans:
                raise TaskError(f"there is no span {position!r} here: the task names {', '.join(sorted(self.spans)) or 'none'}")
            span = self.spans[position]
            return (column >= span[:, :1]) & (column < span[:, 1:])
        first = self.mask.long().argmax(-1, keepdim=True)  # rows of a training may be padded on the right
        last = self.spans["end"][:, :1]
        wanted = first + position if position >= 0 else last + 1 + position
        if bool(((wanted < first) | (wanted >= n)).any()):
            raise TaskError(f"position {position} lies outside a prompt of {int((last - first).min()) + 1} tokens")
        return column == wanted
