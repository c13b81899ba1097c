"""Independent units: which tokens belong together, how units are exchanged under the null, and what a condition takes away.

Tokens of one prompt are not independent, and prompts of one group neither. Under the null hypothesis that two parts have
nothing to do with each other, the right part's whole unit may stand beside any other unit of the left part that is of the same
shape (as many prompts, of the same positions).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from patchclamp.errors import PatchclampError

FEWEST = 5
"""Fewer exchangeable units than this have too few permutations: 4! = 24 do not give p = .05 to anything but a perfect match."""


@dataclass(frozen=True, eq=False)
class Units:
    """Rows by independent unit.

    Args:
        rows: of each unit, in order.
        alike: sets of units that may change places.
    """

    rows: tuple[Int[np.ndarray, " _"], ...]
    alike: tuple[Int[np.ndarray, " _"], ...]

    @property
    def size(self) -> int:
        """How many rows there are."""
        return sum(map(len, self.rows))

    def permutation(self, draw: np.random.Generator) -> Int[np.ndarray, " row"]:
        """Rows of the right part that stand beside the left part's rows: units change places, whole."""
        out = np.empty(self.size, dtype=np.int64)
        for units in self.alike:
            for to, origin in zip(units, draw.permutation(units), strict=True):
                out[self.rows[to]] = self.rows[origin]
        return out

    def movable(self) -> Int[np.ndarray, " row"]:
        """Rows of the units that can change places with another, in order."""
        return np.sort(np.concatenate([self.rows[unit] for units in self.alike if len(units) > 1 for unit in units]))

    def without(self, left_out: Sequence[int]) -> Int[np.ndarray, " row"]:
        """Rows of all other units, in order."""
        gone = set(map(int, left_out))
        return np.sort(np.concatenate([rows for unit, rows in enumerate(self.rows) if unit not in gone]))


def units_of(
    unit: Sequence[object], slot: Sequence[object] | Int[np.ndarray, " row"], strata: Sequence[object] | None = None
) -> Units:
    """Units from each row's unit and its slot within the unit (position, number of the prompt).

    Args:
        unit: of each row.
        slot: of each row: units with the same slots in the same order are of the same shape.
        strata: of each row, the same throughout a unit: units change places within a stratum only.

    Raises:
        PatchclampError: fewer than 5 units can change places with another.
    """
    members: dict[object, list[int]] = {}
    for row, name in enumerate(unit):
        members.setdefault(name, []).append(row)
    shapes: dict[object, list[int]] = {}
    for number, rows in enumerate(members.values()):
        stratum = None if strata is None else strata[rows[0]]
        shapes.setdefault((stratum, tuple(map(str, (slot[row] for row in rows)))), []).append(number)
    alike = tuple(np.array(numbers) for numbers in shapes.values())
    if sum(len(one) for one in alike if len(one) > 1) < FEWEST:
        raise PatchclampError(
            f"{len(members)} independent units (groups of prompts) were given, and fewer than {FEWEST} of them have the same "
            "lengths as another: under the null they could not change places. Give more prompts, or their last tokens only (last=1)"
        )
    return Units(tuple(np.array(rows) for rows in members.values()), alike)


def residual(
    values: Float[np.ndarray, "row width"], factors: Sequence[Int[np.ndarray, " row"]]
) -> Float[np.ndarray, "row width"]:
    """What is left of a value once the mean of every level of every factor is taken off: least squares on indicators, exactly.

    The factor with most levels is taken off values and the others' indicators as means; these are then solved for (Frisch, Waugh
    and Lovell). Means taken off in turn would come to the same, but creep where levels hang together in a long chain.
    """
    left = values - values.mean(0)
    if not factors:
        return left
    first, *others = sorted(factors, key=lambda codes: -len(np.unique(codes)))
    left = _without_means(left, first)
    if not others:
        return left
    design = np.hstack([(codes[:, None] == np.unique(codes)).astype(float) for codes in others])
    design = _without_means(design, first)
    return left - design @ np.linalg.lstsq(design, left, rcond=None)[0]


def _without_means(values: Float[np.ndarray, "row width"], codes: Int[np.ndarray, " row"]) -> Float[np.ndarray, "row width"]:
    counts = np.bincount(codes)
    means = np.stack([np.bincount(codes, weights=column) for column in values.T], 1) / np.maximum(counts, 1)[:, None]
    return values - means[codes]


def levels(factors: Sequence[Int[np.ndarray, " row"]]) -> int:
    """Degrees of freedom that the factors take: the mean, and each factor's levels less one."""
    return 1 + sum(len(np.unique(codes)) - 1 for codes in factors)


def codes_of(labels: Sequence[object] | np.ndarray) -> Int[np.ndarray, " row"]:
    """Labels as numbers from 0."""
    return np.unique(np.asarray(labels), return_inverse=True)[1].astype(np.int64)


def blocks_of(units: Units, count: int, seed: int) -> list[Int[np.ndarray, " unit"]]:
    """Units in `count` blocks of about equal size, drawn at random: what a jackknife leaves out in turn."""
    order = np.random.default_rng([seed, 3]).permutation(len(units.rows))
    return [np.sort(block) for block in np.array_split(order, min(count, len(order))) if len(block)]
