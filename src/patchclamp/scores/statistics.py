"""Intervals and p-values of means over examples, or over groups of examples that belong together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

# What the products of sign flips may cost, in multiplications: above it p-values get coarser, never the machine slower.
_FLIP_BUDGET = 4e10
_EXACT_GROUPS = 12  # up to 2^12 sign flips all of them are tried, and p is exact


class Interval(NamedTuple):
    """A mean with its 95 % interval (both ends None where there are fewer than 2 groups) and the number of examples."""

    mean: float
    low: float | None
    high: float | None
    n: int


def mean_interval(
    values: Float[np.ndarray, " example"], groups: Sequence[object] | None = None, resamples: int = 1000, seed: int = 0
) -> Interval:
    """Mean of one number per example with its 95 % percentile bootstrap interval over groups."""
    sums, sizes = grouped(np.asarray(values, dtype=np.float64)[None], names_of(groups))
    mean = float(sums.sum() / sizes.sum())
    if len(sizes) < 2:
        return Interval(mean, None, None, len(values))
    low, high = bootstrap(sums, sizes, resamples, seed)
    return Interval(mean, float(low[0]), float(high[0]), len(values))


def names_of(groups: Sequence[object] | None) -> list[str] | None:
    """Group names as text; None where there are none, or all are empty."""
    return [str(group) for group in groups] if groups is not None and any(map(str, groups)) else None


def bootstrap(
    sums: Float[np.ndarray, "part group"], sizes: Float[np.ndarray, " group"], resamples: int, seed: int
) -> tuple[Float[np.ndarray, " part"], Float[np.ndarray, " part"]]:
    """95 % percentile interval of sum over drawn groups / size of drawn groups; one matrix product for all resamples."""
    groups = len(sizes)
    counts = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(np.float64)
    means = (sums @ counts.T) / (counts @ sizes)
    low, high = np.percentile(means, [2.5, 97.5], axis=1)
    return low, high


def grouped(
    values: Float[np.ndarray, "part example"], groups: list[str] | None
) -> tuple[Float[np.ndarray, "part group"], Float[np.ndarray, " group"]]:
    """Sum per part and group, and the size of each group; every example on its own without names."""
    if groups is None:
        return values, np.ones(values.shape[1])
    names, member = np.unique(groups, return_inverse=True)
    one_hot = (member[:, None] == np.arange(len(names))).astype(np.float64)
    return values @ one_hot, one_hot.sum(0)


def _flips(parts: int, groups: int) -> int:
    """Random flips: enough for p = .05 / parts / 2, within the budget, and never fewer than 2000."""
    return int(max(2000, min(max(10_000, 40 * parts), _FLIP_BUDGET / (parts * groups))))


def smallest_p(groups: int) -> float:
    """The smallest p that this many groups can give: all signs as they are, or all turned, of 2^groups."""
    return min(1.0, 2.0 ** (1 - groups))


def sign_flip(sums: Float[np.ndarray, "part group"], seed: int) -> Float[np.ndarray, " part"]:
    """Two-sided p of the sum under random signs of the groups."""
    parts, groups = sums.shape
    seen = np.abs(sums.sum(1)) * (1 - 1e-9)  # a flip that gives the same sum counts, whatever its rounding
    if groups <= _EXACT_GROUPS:
        signs = 1.0 - 2.0 * ((np.arange(2**groups)[:, None] >> np.arange(groups)) & 1)
        return (np.abs(sums @ signs.T) >= seen[:, None]).mean(1)
    draws, hits = np.random.default_rng([seed, 1]), np.zeros(parts)
    left = total = _flips(parts, groups)
    while left:
        step = min(left, max(1, 2_000_000 // max(parts, groups)))
        signs = 1.0 - 2.0 * draws.integers(0, 2, size=(groups, step))
        hits += (np.abs(sums @ signs) >= seen[:, None]).sum(1)
        left -= step
    return (1 + hits) / (1 + total)


@dataclass(frozen=True, eq=False)
class Judged:
    """Means over examples, one per row, with what is known of each; all but `mean` are NaN with fewer than 2 groups.

    Args:
        mean: over examples.
        low: of the 95 % percentile bootstrap interval over groups.
        high: of the same.
        p: two-sided, from flipping the signs of groups.
        q: Benjamini and Hochberg's over all rows.
        groups: how many there are.
    """

    mean: Float[np.ndarray, " row"]
    low: Float[np.ndarray, " row"]
    high: Float[np.ndarray, " row"]
    p: Float[np.ndarray, " row"]
    q: Float[np.ndarray, " row"]
    groups: int

    def clear(self, floor: float = 0.0, alpha: float = 0.05) -> Float[np.ndarray, " row"]:
        """The sign, where q is at most `alpha`, the interval leaves zero out and |mean| is above `floor`; else 0."""
        sure = (self.q <= alpha) & ((self.low > 0) | (self.high < 0)) & (np.abs(self.mean) > floor)
        return np.where(sure, np.sign(self.mean), 0.0)

    def within(self, margin: float) -> Bool[np.ndarray, " row"]:
        """Whether the whole interval lies between -margin and margin."""
        return (self.low >= -margin) & (self.high <= margin)


def judged(
    samples: Float[np.ndarray, "row example"], groups: Sequence[object] | None = None, seed: int = 0, resamples: int = 1000
) -> Judged:
    """Mean, interval, p and q of every row of samples, over groups of examples where they are named."""
    mean, nothing = samples.mean(1), np.full(len(samples), np.nan)
    sums, sizes = grouped(samples, names_of(groups))
    if len(sizes) < 2 or not len(samples):
        return Judged(mean, nothing, nothing, nothing, nothing, len(sizes))
    from scipy.stats import false_discovery_control

    low, high = bootstrap(sums, sizes, resamples, seed)
    p = sign_flip(sums, seed)
    return Judged(mean, low, high, p, false_discovery_control(p), len(sizes))
