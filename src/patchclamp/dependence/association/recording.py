"""Outputs of parts over the tokens of many prompts: what statistical association looks at."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.errors import PatchclampError
from patchclamp.methods import groups_of
from patchclamp.models.model import Model
from patchclamp.models.norms import scale_of
from patchclamp.models.scope import unobserved
from patchclamp.parts import Parts
from patchclamp.parts.contract import sites_of
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

WHATS = ("contribution", "norm", "z", "vector")


@dataclass(frozen=True, eq=False)
class Recorded:
    """What parts put out, a row per token.

    Args:
        parts: names, in forward order.
        values: of each part, [row, width]; width 1 where it was reduced to a number. Widths may differ.
        example: of each row, a number.
        position: of each row, counted from the prompt's first token.
        token: of each row, the token id there.
        groups: of each example: those of one group are not independent.
        spans: name of a span -> the id of its first token in each example; -1 where an example lacks it.
        about: model, task, what was recorded.
    """

    parts: tuple[str, ...]
    values: tuple[Float[np.ndarray, "row _"], ...]
    example: Int[np.ndarray, " row"]
    position: Int[np.ndarray, " row"]
    token: Int[np.ndarray, " row"]
    groups: tuple[str, ...]
    spans: Mapping[str, Int[np.ndarray, " example"]]
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.example)

    def __repr__(self) -> str:
        return f"Recorded({len(self.parts)} parts, {len(self)} tokens of {len(self.groups)} prompts)"

    def __getitem__(self, part: str | Site) -> Float[np.ndarray, "row _"]:
        """One part's output."""
        if str(part) not in self.parts:
            raise PatchclampError(f"{part} was not recorded: there are {', '.join(self.parts[:6])} ... ({len(self.parts)} parts)")
        return self.values[self.parts.index(str(part))]

    def with_values(self, values: tuple[Float[np.ndarray, "row _"], ...], parts: tuple[str, ...] | None = None) -> "Recorded":
        """The same tokens with other numbers."""
        return replace(self, values=values, parts=self.parts if parts is None else parts)

    def only(self, parts: "list[str] | tuple[str, ...]") -> "Recorded":
        """Some of the parts."""
        return self.with_values(tuple(self[part] for part in parts), tuple(parts))


def recorded(
    parts: Parts,
    examples: Examples,
    what: str | Float[Tensor, " width"] = "contribution",
    *,
    last: int | None = None,
    batch_size: int = 32,
) -> Recorded:
    """The outputs of parts at every prompt token, as numbers or vectors.

    What a part puts out is what it adds to the residual stream: a head's write, an MLP's write; of other sites, their value.

    Args:
        parts: heads, MLPs or other sites (no edges, no single positions); the embedding is left out.
        examples: on which clean prompts.
        what: "contribution": its direct share of the metric's logit difference, write . d / s, with d the right answer's minus
            the wrong answer's unembedding pulled back through the final norm, and s what that norm divides by at this token (before a
            family's logit scaling or cap; the first token of longer answers; the mean over alternatives; without wrong
            answers, the mean over the vocabulary stands for them). "norm": the length of the write. "z": the length of a head's
            output before its projection. "vector": all of it. Or a direction of the residual stream: write . direction.
        last: the last so many prompt tokens only, by default all.
        batch_size: examples at once.

    Cost: one forward pass over the examples; what is kept is parts x tokens numbers (x width for "vector").

    Raises:
        PatchclampError: `what` is none of these, or answers are needed and the task has none.
        GateError: the parts are edges.
    """
    pieces = list(stream(parts, examples, what, last=last, batch_size=batch_size))
    first, values = pieces[0], zip(*(piece.values for piece in pieces), strict=True)
    spans = set.intersection(*({*piece.spans} for piece in pieces))

    def joined(name: str) -> Any:
        return np.concatenate([getattr(piece, name) for piece in pieces])

    return Recorded(
        first.parts, tuple(np.concatenate(part) for part in values), joined("example"), joined("position"), joined("token"),
        tuple(groups_of(examples)), {name: np.concatenate([piece.spans[name] for piece in pieces]) for name in sorted(spans)},
        first.about,
    )  # fmt: skip


def stream(
    parts: Parts,
    examples: Examples,
    what: str | Float[Tensor, " width"] = "contribution",
    *,
    last: int | None = None,
    batch_size: int = 32,
) -> Iterator[Recorded]:
    """As `recorded`, a batch of examples at a time (numbers of examples run on): for what need not be in memory at once."""
    if isinstance(what, str) and what not in WHATS:
        raise PatchclampError(f"parts can be recorded as {', '.join(WHATS)} or along a direction, not as {what!r}")
    sites = sites_of(parts)
    if placed := [site for site in sites if site.position is not None]:
        raise PatchclampError(f"association looks at every token, and {placed[0]} is one position: give parts without positions")
    about = {"model": parts.model.name, "task": examples.task, "what": what if isinstance(what, str) else "direction"}
    groups, done = groups_of(examples), 0
    for batch in examples.batches(batch_size):
        outputs = _outputs(parts.model, batch, sites, what)
        rows, columns = _cells(batch, last)
        values = tuple(value[rows, columns].double().cpu().numpy() for value in outputs)
        values = tuple(value if value.ndim == 2 else value[:, None] for value in values)
        tokens = batch.tokens
        mine = torch.zeros(len(batch), dtype=torch.long).index_put((batch.example[batch.sign > 0],), _own(batch))
        spans = {name: tokens[mine, span[mine, 0].clamp(max=tokens.shape[1] - 1)].numpy() for name, span in batch.spans.items()}
        yield Recorded(
            tuple(map(str, sites)), values, (batch.example[rows] + done).numpy(), batch.position_ids[rows, columns].numpy(),
            tokens[rows, columns].numpy(), tuple(groups[done : done + len(batch)]), spans, about,
        )  # fmt: skip
        done += len(batch)


def _own(batch: Batch) -> Int[Tensor, " row"]:
    """Rows of right answers: rows that wrong answers need repeat their prompt."""
    return torch.arange(len(batch.sign))[batch.sign > 0]


def _cells(batch: Batch, last: int | None) -> tuple[Int[Tensor, " cell"], Int[Tensor, " cell"]]:
    """Rows and columns of the prompts' tokens, prompt by prompt."""
    column = torch.arange(batch.tokens.shape[1])[None]
    end = batch.spans["end"][:, :1] if "end" in batch.spans else torch.full((len(batch.tokens), 1), batch.tokens.shape[1] - 1)
    inside = batch.mask & (column <= end) & (batch.sign > 0)[:, None]
    if last is not None:
        inside &= column > end - last
    rows, columns = inside.nonzero(as_tuple=True)
    return rows, columns


def _outputs(model: Model, batch: Batch, sites: list[Site], what: str | Tensor) -> list[Tensor]:
    """[row, column] or [row, column, width] of each site."""
    where = [_source(site, what == "z") for site in sites]
    wanted = {place for place, _ in where}
    final = Site("resid.post", model.layers - 1)
    with torch.no_grad():
        kept = model.record(batch, [*wanted, *([final] if what == "contribution" else [])])
    raw = [kept[place] if index is None else kept[place][:, :, index] for place, index in where]
    if what == "vector":
        return raw
    if what in ("norm", "z"):
        return [value.norm(dim=-1) if value.dim() > 2 else value.abs() for value in raw]
    if isinstance(what, Tensor):
        return [value @ what.to(value) for value in raw]
    if narrow := [site for site, value in zip(sites, raw, strict=True) if value.shape[-1] != model.width]:
        raise PatchclampError(f"{narrow[0]} does not write to the residual stream itself: record its 'norm' or 'vector'")
    direction, scale = answer_directions(model, batch), scale_of(model.anatomy.norm, model.width)(kept[final])
    return [(value * direction[:, None]).sum(-1) / scale[..., 0] for value in raw]


def _source(site: Site, z: bool) -> tuple[Site, int | None]:
    """The whole-layer site whose slice is the part's output."""
    if site.kind == "head":
        return Site("z" if z else "write", site.layer), site.index
    if site.kind in ("mlp", "attn"):
        return Site(f"{site.kind}.write", site.layer), None
    if site.kind in ("scores", "pattern", "logits"):
        raise PatchclampError(f"{site} has no output per token that could be compared: give heads, MLPs or the residual stream")
    return site.place, site.index


def answer_directions(model: Model, batch: Batch) -> Float[Tensor, "row width"]:
    """d: a residual vector x at a target adds x . d / s(x) to the logit difference, s being what the final norm divides by.

    The gradient of the unembedding's logit difference through the final norm with its scale taken away, which is linear.
    """
    norm, width = model.anatomy.norm, model.width
    scale = scale_of(norm, width)
    if not batch.answers.numel() or any(not item.answers for item in batch.examples):
        raise PatchclampError(
            "a contribution is to the right answer's logit, and plain text has none: record 'norm' or a direction"
        )
    first = torch.zeros(len(batch.tokens), dtype=torch.long)
    for target in range(len(batch.target_row) - 1, -1, -1):  # the first target of each row stays
        first[batch.target_row[target]] = target
    draw = torch.randn(len(first), 1, width, generator=torch.Generator().manual_seed(0)) + 2
    at = draw.to(device=model.device, dtype=model.dtype).requires_grad_()
    with torch.enable_grad(), unobserved():
        linear = (norm(at) - norm(torch.zeros_like(at))) * scale(at).to(at.dtype)
        logits = model.anatomy.unembed(linear)[:, 0]
        right = _mean_of(logits, batch.answers[first].to(logits.device))
        wrong = logits.mean(-1) if batch.wrong is None else _mean_of(logits, batch.wrong[first].to(logits.device))
        (slope,) = torch.autograd.grad((right - wrong).sum(), at)
    return slope[:, 0].detach()


def _mean_of(logits: Float[Tensor, "row token"], tokens: Int[Tensor, "row choice"]) -> Float[Tensor, " row"]:
    there = (tokens >= 0).to(logits.dtype)
    return (logits.gather(1, tokens.clamp(min=0)) * there).sum(1) / there.sum(1)
