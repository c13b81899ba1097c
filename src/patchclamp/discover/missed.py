"""Missed: how large an effect may be that a screen left out, from a random sample of what it left out.

Two statements, of which the first assumes nothing but that the sample was drawn at random:

    count   at most M of the U parts left out have a larger |effect| than the largest of the n sampled.
            M is the smallest number with C(U + n - M - 1, n) / C(U + n, n) <= alpha: if M + 1 parts were larger, the sample would
            have missed them all by a chance of at most alpha.
    size    the largest |effect| of those left out is at most B. Assumes that errors are relative and have a power-law tail:
            e = |effect - slope screen| / (|screen| + floor) is distributed alike whatever |screen| is, and above a threshold t
            P(e > x) = p (x / t)^(-1/xi), with xi from the sample (Hill) at its upper confidence end, and p likewise (Clopper and
            Pearson). B then solves: sum over those left out of P(e > (B - |slope screen|) / (|screen| + floor)) = alpha / 4.

The second follows the calibration of the screen: where exact effects keep to a multiple of it (e small), what has a small screen is
known to be small; where the screen says nothing, B is as large as the effects themselves, and nothing is spared.

Without such an assumption there is no bound on sizes: one large effect among many is in no sample that does not draw it, and inequalities
for means (Hoeffding, empirical Bernstein) need a range, which effects have not. The first is then all there is, and it counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from patchclamp.errors import PatchclampError

TAIL = 5
"""One sampled ratio in so many is taken for the tail."""
ROUNDING = 1e-6
"""Relative errors below this are rounding."""
FEW = 5
"""With fewer in the tail its index is not estimated: it is taken to be 1, as heavy as a Cauchy distribution's."""


@dataclass(frozen=True)
class Missed:
    """What may have been missed.

    Args:
        left: parts without an exact effect (U).
        sampled: parts drawn at random among those that the screen left out (n).
        largest: the largest |effect| among these.
        count: at most so many of those left have a larger one (M).
        size: no |effect| of those left is larger than this (B); infinite where nothing was sampled, or where the tail is so heavy
            (index above 1) that even a mean of errors would not settle.
        confidence: of each statement by itself.
        tail: xi, at its upper end.
        slope: what the screen is multiplied by: the median of effect / screen, weighted by |screen|.
    """

    left: int
    sampled: int
    largest: float
    count: int
    size: float
    confidence: float
    tail: float
    slope: float

    def __str__(self) -> str:
        if not self.left:
            return "every part's effect was measured: nothing can have been missed"
        size = (
            f"none is larger than {self.size:.3g}, if the screen's errors are relative with the tail that these show (index {self.tail:.2f})"
            if np.isfinite(self.size)
            else "that bounds how many were missed, not how large they are, which no draw says by itself, and the tail of the screen's "
            f"errors is too heavy to say it (index {self.tail:.2f})"
        )
        return (
            f"at {self.confidence:.1%} confidence at most {self.count} of the {self.left} parts left out have a larger effect than "
            f"{self.largest:.3g}, the largest of {self.sampled} drawn at random; {size}"
        )


def missed(
    exact: Float[np.ndarray, " sampled"],
    screened: Float[np.ndarray, " sampled"],
    left: Float[np.ndarray, " left"],
    confidence: float = 0.95,
) -> Missed:
    """What a screen may have missed.

    Args:
        exact: effects of parts drawn at random among those that the screen left out.
        screened: what the screen said of them.
        left: what it said of the others, which were not measured.
        confidence: of each of the two statements.

    Raises:
        PatchclampError: a confidence that is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise PatchclampError(f"a confidence of {confidence} was asked for: choose a number between 0 and 1, such as 0.95")
    alpha, largest = 1 - confidence, float(np.abs(exact).max(initial=0.0))
    if not left.size:
        return Missed(0, len(exact), largest, 0, 0.0, confidence, 0.0, 1.0)
    if not len(exact):
        return Missed(len(left), 0, 0.0, len(left), float("inf"), confidence, 1.0, 1.0)
    sizes = np.abs(np.concatenate([screened, left]))
    floor = float(np.median(sizes)) or float(sizes.mean()) or 1.0
    slope = _slope(exact, screened)
    errors = np.abs(exact - slope * screened) / (np.abs(screened) + floor)
    share, start, tail = _tail(errors, alpha)
    size = _largest(np.abs(slope * left), np.abs(left) + floor, share, start, tail, alpha / 4)
    return Missed(len(left), len(exact), largest, _exceeding(len(left), len(exact), alpha), size, confidence, tail, slope)


def _slope(exact: np.ndarray, screened: np.ndarray) -> float:
    """The s for which the sum of |exact - s screened| is smallest; 0 where the screen is zero throughout."""
    known = screened != 0
    if not known.any():
        return 0.0
    ratios, weights = exact[known] / screened[known], np.abs(screened[known])
    order = np.argsort(ratios, kind="stable")
    running = np.cumsum(weights[order])
    return float(ratios[order][int(np.searchsorted(running, running[-1] / 2))])


def _exceeding(left: int, sampled: int, alpha: float) -> int:
    """The smallest M whose M + 1 largest all escape a sample by a chance of at most alpha (hypergeometric)."""
    log, every = 0.0, left + sampled
    for count in range(left + 1):
        log += np.log1p(-sampled / (every - count)) if every - count > sampled else -np.inf
        if log <= np.log(alpha):
            return count
    return left


def _tail(errors: np.ndarray, alpha: float) -> tuple[float, float, float]:
    """p, t and xi of P(e > x) = p (x / t)^(-1/xi), p and xi at the upper ends of intervals of alpha / 4 and alpha / 2."""
    from scipy.stats import beta, chi2

    order = np.sort(errors)[::-1]
    start = max(float(order[min(len(order) - 1, max(FEW, len(order) // TAIL))]), ROUNDING)
    above = order[order > start]
    share = 1.0 if len(above) == len(order) else float(beta.ppf(1 - alpha / 4, len(above) + 1, len(order) - len(above)))
    if len(above) < FEW:
        return share, start, 1.0
    return share, start, 2 * float(np.log(above / start).sum()) / float(chi2.ppf(alpha / 2, 2 * len(above)))


def _largest(centres: np.ndarray, scales: np.ndarray, share: float, start: float, tail: float, alpha: float) -> float:
    """The B that one of centre + scale * e exceeds by a chance of alpha at most (a union over all of them), by bisection."""

    def exceeded(bound: float) -> float:
        far = (bound - centres) / (start * scales)  # below 1 the tail says nothing but that its share is the most
        return float(np.where(far <= 1, 1.0, share * np.maximum(far, 1.0) ** (-1 / tail)).sum())

    if tail > 1:
        return float("inf")
    low = float((centres + start * scales).max())
    high = low
    while exceeded(high) > alpha:
        high = 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if exceeded(middle) > alpha else (low, middle)
    return high


def looks(confidence: float, look: int) -> float:
    """The confidence of one look of several, so that all of them together have `confidence`: alpha halves with each."""
    return 1 - (1 - confidence) / 2 ** (look + 1)


def by_chance(parts: int, wanted: Sequence[int]) -> list[float]:
    """How many of `parts` in random order are looked at on average until all of `k` wanted ones are found: k (n + 1) / (k + 1)."""
    return [k * (parts + 1) / (k + 1) for k in wanted]
