"""What every measure of association offers: its number for each pair as the rows stand, and with the right side's rows permuted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from patchclamp.errors import PatchclampError

Values = Sequence[Float[np.ndarray, "row _"]]
"""One array per part."""
Pairs = Sequence[tuple[int, int]]
"""Indices into the left and the right parts."""
Order = Int[np.ndarray, " row"]
"""Right rows that stand beside the left rows."""


@runtime_checkable
class Prepared(Protocol):
    """A measure with its data: what need not be computed again for each permutation is done."""

    def score(self) -> Float[np.ndarray, " pair"]:
        """The number that is reported."""
        ...

    def statistic(self, order: Order | None = None) -> Float[np.ndarray, " pair"]:
        """The number that is compared with its values under permutations (most often the score itself)."""
        ...


@dataclass(frozen=True)
class Measure:
    """A measure of association.

    Args:
        name: what it is called.
        prepare: (left, right, pairs, freedom, seed) -> its numbers; `freedom` is how many degrees of freedom a condition took.
        two_sided: whether both signs count against the null; else large values do.
        vectors: whether outputs may be wider than one number.
        widest: more than so many dimensions on a side make it unreliable: a warning says so.
        subtract: whether the null's mean is taken off the score (what it gives where there is nothing).
    """

    name: str
    prepare: Callable[[Values, Values, Pairs, int, int], Prepared]
    two_sided: bool = False
    vectors: bool = True
    widest: int | None = None
    subtract: bool = False


def columns(values: Values) -> Float[np.ndarray, "part row"]:
    """Parts of width 1 as one array, centred and scaled to length 1; a constant one stays 0."""
    if wide := [value.shape[1] for value in values if value.shape[1] != 1]:
        raise PatchclampError(
            f"this measure compares single numbers, and an output has {wide[0]}: record a contribution, a norm or a direction"
        )
    table = np.stack([value[:, 0] for value in values])
    table = table - table.mean(1, keepdims=True)
    length = np.linalg.norm(table, axis=1, keepdims=True)
    return table / np.where(length > 0, length, 1.0)


def shrink_factor(rows: int, freedom: int) -> float:
    """How much smaller permuted residuals make a correlation than fresh ones would be.

    A condition leaves rows - freedom degrees of freedom; residuals that change places and are not projected again have the
    whole length, so that their correlations come out smaller by sqrt((rows - freedom) / (rows - 1)).
    """
    return float(np.sqrt(max(rows - freedom, 1) / max(rows - 1, 1)))
