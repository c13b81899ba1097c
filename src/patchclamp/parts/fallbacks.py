"""Fallbacks: rules that say what a closed gate passes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

Values = Mapping[Site, Tensor]
"""By whole-layer place: [row or 1, position or 1, ...], broadcastable to the value there."""
Record = Callable[[Batch], Values]
"""Runs a batch and keeps what its places hold."""


@runtime_checkable
class Fallback(Protocol):
    """A rule, not a tensor: `at(batch)` gives the values for that batch's rows."""

    @property
    def kind(self) -> str:
        """The rule's name."""
        ...

    @property
    def off_distribution(self) -> bool:
        """Whether values are put in that the model never computes itself."""
        ...

    def at(self, batch: Batch | None) -> Values:
        """Values for the rows of a batch; for None (generation) only rules that need no batch have any."""
        ...

    def since(self, batch: Batch) -> int:
        """The first column at which values may differ from what the model computes itself; before it, gates change nothing."""
        ...


@dataclass(frozen=True, eq=False)
class Zero:
    """Zero at every place. Marked off-distribution: few parts ever write zero."""

    places: Sequence[Site]
    device: torch.device
    kind: str = "zero"
    off_distribution: bool = True

    def at(self, batch: Batch | None) -> Values:
        """Zeros that broadcast."""
        zero = torch.zeros(1, device=self.device)
        return dict.fromkeys(self.places, zero)

    def since(self, batch: Batch) -> int:
        """0."""
        return 0


@dataclass(frozen=True, eq=False)
class Resample:
    """The same places' values on each example's own corrupt prompt (token by token). One forward pass per batch, kept."""

    record: Record
    kind: str = "resample"
    off_distribution: bool = False
    kept: "WeakKeyDictionary[Batch, Values]" = field(default_factory=WeakKeyDictionary["Batch", "Values"])

    def at(self, batch: Batch | None) -> Values:
        """The corrupt run's values; raises `GateError` where there are no corrupt prompts."""
        if batch is None:
            raise GateError(
                "the fallback 'resample' has no value on new tokens: they have no corrupt prompt. Use mean or zero to generate"
            )
        if batch.corrupt is None:
            raise GateError("the fallback 'resample' needs corrupt prompts, and this task gives none: use mean or zero")
        if batch not in self.kept:
            self.kept[batch] = self.record(batch.swapped())
        return self.kept[batch]

    def since(self, batch: Batch) -> int:
        """The first column at which some corrupt prompt is another."""
        if batch.corrupt is None:
            return 0
        differs = (batch.tokens != batch.corrupt).any(0)
        return int(differs.int().argmax()) if bool(differs.any()) else batch.tokens.shape[1]


@dataclass(frozen=True, eq=False)
class Mean:
    """Means learned on the fit set, over clean and corrupt prompts, never over padding.

    `by` says what is averaged apart: "position" (prompts of one length), "span" (named spans; other tokens together), or
    "all" (every token together). Tokens that the fit set never showed get the mean over all.
    """

    by: str
    total: Values
    apart: Mapping[int | str, Values]
    kind: str = "mean"
    off_distribution: bool = False

    def at(self, batch: Batch | None) -> Values:
        """[row, position, ...]: each column gets its own mean."""
        if batch is None or not self.apart:
            return self.total
        columns = {key: batch.mask & batch.columns(key) for key in self.apart if not isinstance(key, str) or key in batch.spans}
        values: dict[Site, Tensor] = {}
        for place, mean in self.total.items():
            value = mean.expand(*batch.tokens.shape, *mean.shape[2:]).clone()
            for key, where in columns.items():
                value[where] = self.apart[key][place][0, 0].to(value.dtype)
            values[place] = value
        return values

    def since(self, batch: Batch) -> int:
        """0."""
        return 0


@dataclass(frozen=True, eq=False)
class Own:
    """The same places' values in the model's own run of the same prompt: what is put back where the run itself was changed.

    `span` is where that change begins; before it, values are the same.
    """

    record: Record
    span: str
    kind: str = "own"
    off_distribution: bool = False
    kept: "WeakKeyDictionary[Batch, Values]" = field(default_factory=WeakKeyDictionary["Batch", "Values"])

    def at(self, batch: Batch | None) -> Values:
        """The batch's own values. One forward pass per batch, kept."""
        if batch is None:
            raise GateError("the fallback 'own' has no value on new tokens: they have no run of their own to take it from")
        if batch not in self.kept:
            self.kept[batch] = self.record(batch)
        return self.kept[batch]

    def since(self, batch: Batch) -> int:
        """The first column of the span."""
        covered = batch.columns(self.span).any(0)
        return int(covered.int().argmax()) if bool(covered.any()) else batch.tokens.shape[1]


FALLBACKS = ("resample", "mean", "zero", "optimal")
"""Those that need no more than the task; `model` takes another model's values."""


def learn_mean(record: Record, fit: Examples, size: int = 64, by: str | None = None) -> Mean:
    """Run the fit set (clean, and corrupt where there are pairs) and average.

    Cost: two forward passes over the fit set with pairs, one without.
    """
    sums: dict[int | str, dict[Site, Tensor]] = {}
    counts: dict[int | str, float] = {}
    if by is None:
        lengths = {len(example.clean) for example in fit}
        spans = set.intersection(*({*example.spans} for example in fit))
        by = "position" if len(lengths) == 1 else "span" if spans - {"end"} else "all"
    for whole in fit.batches(size):
        for batch in (whole,) if whole.corrupt is None else (whole, whole.swapped()):
            values = record(batch)
            right = (batch.sign > 0)[:, None]  # rows that wrong answers need repeat their prompt
            for key, cells in _cells(batch, by).items():
                where = cells & right
                counts[key] = counts.get(key, 0.0) + float(where.sum())
                for place, value in values.items():
                    total = value[where].double().sum(0)
                    kept = sums.setdefault(key, {})
                    kept[place] = kept[place] + total if place in kept else total
    means = {
        key: {place: (total / max(counts[key], 1.0))[None, None] for place, total in kept.items()} for key, kept in sums.items()
    }
    total = means.pop("*all*")
    return Mean(by, total, means)


def _cells(batch: Batch, by: str) -> dict[int | str, Tensor]:
    cells: dict[int | str, Tensor] = {"*all*": batch.mask}
    if by == "position":
        longest = int(batch.mask.sum(-1).max())
        shortest_prompt = int((batch.spans["end"][:, 1] - (batch.tokens.shape[1] - batch.mask.sum(-1))).min())
        cells |= {position: batch.columns(position) for position in range(min(shortest_prompt, longest))}
    elif by == "span":
        cells |= {name: batch.columns(name) & batch.mask for name in batch.spans}
    elif by != "all":
        raise GateError(f"means are taken by position, span or all, not by {by!r}")
    return cells


def expand_to_rows(
    gates: Float[Tensor, "setting #example #position part"], batch: Batch
) -> Float[Tensor, "setting row #position part"]:
    """Gates per example as gates per row (an example may have several)."""
    if gates.shape[1] == 1:
        return gates.expand(-1, len(batch.tokens), -1, -1)
    return gates[:, batch.example]
