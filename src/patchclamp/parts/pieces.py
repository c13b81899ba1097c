"""Pieces: a batch taken some prompts after others, where memory does not hold all of them at once."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchclamp.tasks._batch import Batch

if TYPE_CHECKING:
    from patchclamp.parts.gated import Gated


def pieces(parts: "Gated", batch: Batch, gates: Tensor, size: int) -> Iterator[tuple["Gated", Batch, Tensor]]:
    """Parts, prompts and gates, `size` prompts at a time, in order."""
    for examples in torch.arange(len(batch)).split(size):
        rows = torch.isin(batch.example.cpu(), examples).nonzero().flatten().to(batch.tokens.device)
        of = parts if parts.added is None else parts.under(parts.added[rows])
        yield of, only(batch, examples.tolist(), rows), gates if gates.shape[1] == 1 else gates[:, examples]


def only(batch: Batch, examples: list[int], rows: Tensor) -> Batch:
    """Neighbouring examples of a batch, which have the rows `rows`; as wide as the batch, so that columns keep their numbers."""
    targets = torch.isin(batch.target_row, rows)
    return replace(
        batch,
        tokens=batch.tokens[rows],
        mask=batch.mask[rows],
        corrupt=None if batch.corrupt is None else batch.corrupt[rows],
        target_row=torch.searchsorted(rows, batch.target_row[targets]),
        target_position=batch.target_position[targets],
        answers=batch.answers[targets],
        wrong=None if batch.wrong is None else batch.wrong[targets],
        example=batch.example[rows] - examples[0],
        sign=batch.sign[rows],
        spans={name: span[rows] for name, span in batch.spans.items()},
        examples=batch.examples[examples[0] : examples[-1] + 1],
    )
