"""Phase changes: where a learning curve turns, how wide the turn is, and whether there is one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Num
from numpy.typing import NDArray

from patchclamp.errors import TrainingError

Points = Sequence[float | int] | Num[np.ndarray, " point"]
CRITERION = 10.0
"""By how much the sigmoid's information criterion must be below the straight line's."""
SHARE = 0.5
"""Of the straight line's squared residuals, the most that the sigmoid may leave."""
SPREAD = math.log(81)
"""A logistic goes from a tenth to nine tenths of its height in log(81) of its scales."""
ENDS = 3
"""Points that must lie on either side of a middle."""
WIDTHS = 24
MIDDLES = 96
ROUNDS = 8
BLOCK = 4_000_000
"""Numbers that a search holds at once, of all its sigmoids."""


@dataclass(frozen=True)
class Phase:
    """Where a curve turns.

    Args:
        step: middle of the sigmoid; None: there is no phase change.
        low, high: its interval over resamples; None where there is no change.
        width: factor in steps over which a tenth to nine tenths of the change happen (2: the step doubles meanwhile).
        before, after: the sigmoid's plateaus.
        direction: "down" or "up".
        gain: by how much the sigmoid's criterion is below the straight line's.
        share: squared residuals of the sigmoid, of the straight line's.
        n: points of the curve.
        confidence: of the interval.
        resamples: that it stands on.
        found: share of resamples in which there is a change.
        seed: of the resampling.
    """

    step: float | None
    low: float | None
    high: float | None
    width: float | None
    before: float
    after: float
    direction: str
    gain: float
    share: float
    n: int
    confidence: float
    resamples: int
    found: float
    seed: int

    @property
    def middle(self) -> float:
        """Height half-way between the plateaus."""
        return (self.before + self.after) / 2

    def __str__(self) -> str:
        if self.step is None:
            return f"no phase change ({self.n} points; a straight line in the logarithm of steps fits as well)"
        return (
            f"{self.direction} at step {self.step:.0f} ({self.confidence:.0%} interval {self.low:.0f} to {self.high:.0f}), a tenth to "
            f"nine tenths within a factor of {self.width:.2f}, from {self.before:.3g} to {self.after:.3g} ({self.n} points)"
        )


def phase_change(
    steps: Points, values: Points, *,
    resamples: int = 200, confidence: float = 0.95, seed: int = 0,
) -> Phase:  # fmt: skip
    """Where a curve turns: the least-squares sigmoid in the logarithm of steps,

        value(t) = before + (after - before) / (1 + exp(-(log(t + 1) - m) / w)),        step = exp(m) - 1

    There is a change where all three hold, and none elsewhere: (1) the sigmoid's Bayesian information criterion,
    n log(residuals / n) + k log n with k = 4, is below that of a straight line in log(t + 1), with k = 2, by more than 10; (2) it
    leaves at most half of the line's squared residuals; (3) the middle and the stretch from a tenth to nine tenths lie within
    the steps that were seen, with at least three points on either side of the middle, and the stretch takes less than half of
    the steps (in the logarithm): a curve that declines all along, or has declined before anybody looked, has no change.

    The interval is that of the middle over curves made of the sigmoid and blocks of its own residuals (moving blocks of
    about the cube root of n points, for neighbours on a curve err alike). With several seeds take the interval over seeds
    (`counterfactual`) instead: this one knows nothing of what another seed would do.

    Args:
        steps: at least 8, from 0 on, in order.
        values: at each step.
        resamples: of the residuals.
        confidence: of the interval.
        seed: of the resampling.

    Cost: a search on a grid of 96 middles x 24 widths, eight times refined; resamples cost the same search.

    Raises:
        TrainingError: fewer than 8 points, steps that are not in order, values that are not finite.
    """
    where, height = _checked(steps, values)
    x = np.log1p(where)
    fit = _fit(x, height[None])
    curve, line = fit.curve(x)[0], _line(x, height)
    sigmoid_rest, line_rest = (float(((height - guess) ** 2).sum()) for guess in (curve, line))
    gain, share = _better(len(x), sigmoid_rest, line_rest)
    m, w, before, after = (float(v[0]) for v in (fit.middle, fit.width, fit.before, fit.after))
    there = gain > CRITERION and share <= SHARE and bool(_inside(x, fit.middle, fit.width)[0])
    low = high = None
    found = 0.0
    if there:
        drawn = _resampled(curve, height - curve, resamples, np.random.default_rng(seed))
        again = _fit(x, drawn)
        found = float(_inside(x, again.middle, again.width).mean())
        tails = np.quantile(again.middle, [(1 - confidence) / 2, (1 + confidence) / 2])
        low, high = (float(np.expm1(tail)) for tail in tails)
    return Phase(
        step=math.expm1(m) if there else None, low=low, high=high, width=math.exp(SPREAD * w) if there else None, before=before,
        after=after, direction="down" if after < before else "up", gain=gain, share=share, n=len(x), confidence=confidence,
        resamples=resamples if there else 0, found=found, seed=seed,
    )  # fmt: skip


def crossing(steps: Points, values: Points, level: float, downward: bool = True) -> float | None:
    """The first step at which a smoothed curve passes a level for good enough: between points, interpolated in log(t + 1).

    The curve is smoothed by running medians of five points, so that one noisy point is no crossing. None: it never does.

    Raises:
        TrainingError: fewer than 8 points, steps that are not in order, values that are not finite.
    """
    where, height = _checked(steps, values)
    padded = np.pad(height, 2, mode="edge")
    smooth = np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1)
    past = smooth <= level if downward else smooth >= level
    if not past.any():
        return None
    at = int(past.argmax())
    if at == 0:
        return float(where[0])
    x, (a, b) = np.log1p(where), (smooth[at - 1], smooth[at])
    share = (a - level) / (a - b)
    return float(np.expm1(x[at - 1] + share * (x[at] - x[at - 1])))


@dataclass(frozen=True, eq=False)
class _Sigmoids:
    """Least-squares sigmoids, one per curve."""

    middle: NDArray[np.float64]
    width: NDArray[np.float64]
    before: NDArray[np.float64]
    after: NDArray[np.float64]

    def curve(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        rise = _logistic((x - self.middle[:, None]) / self.width[:, None])
        return self.before[:, None] + (self.after - self.before)[:, None] * rise


def _fit(x: NDArray[np.float64], curves: NDArray[np.float64]) -> _Sigmoids:
    """Least squares over middles and widths on a grid that closes in on each curve's best point; plateaus in closed form."""
    span, gap = float(x[-1] - x[0]), float(np.diff(x).min())
    middles, widths = np.linspace(x[0], x[-1], MIDDLES), np.geomspace(max(gap / 4, span * 1e-3), span, WIDTHS)
    step, ratio = float(middles[1] - middles[0]), float(widths[1] / widths[0])
    grid = [g.ravel() for g in np.meshgrid(middles, widths, indexing="ij")]
    best = _search(x, curves, grid[0][None], grid[1][None])
    offsets = [g.ravel() for g in np.meshgrid(np.linspace(-1.5, 1.5, 7), np.linspace(-1.5, 1.5, 7), indexing="ij")]
    for _ in range(ROUNDS):
        best = _search(x, curves, best[0][:, None] + offsets[0] * step, best[1][:, None] * ratio ** offsets[1])
        step, ratio = step / 2, ratio**0.5
    m, w = best
    rise = _logistic((x - m[:, None]) / w[:, None])
    mean = rise.mean(1, keepdims=True)
    slope = ((rise - mean) * curves).sum(1) / np.maximum(((rise - mean) ** 2).sum(1), 1e-300)
    before = curves.mean(1) - slope * mean[:, 0]
    return _Sigmoids(m, w, before, before + slope)


def _search(
    x: NDArray[np.float64], curves: NDArray[np.float64], middles: NDArray[np.float64], widths: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """By curve, that pair of a middle and a width (one list for all curves, or one each) whose sigmoid explains most."""
    if len(middles) > 1 and len(curves) * middles.shape[1] * len(x) > BLOCK:  # in pieces that fit into memory
        pieces = -(-len(curves) * middles.shape[1] * len(x) // BLOCK)
        split = [np.array_split(values, pieces) for values in (curves, middles, widths)]
        found = [_search(x, *piece) for piece in zip(*split, strict=True) if len(piece[0])]
        return np.concatenate([m for m, _ in found]), np.concatenate([w for _, w in found])
    rise = _logistic((x - middles[..., None]) / widths[..., None])
    rise -= rise.mean(-1, keepdims=True)
    rise /= np.sqrt(np.maximum((rise**2).sum(-1, keepdims=True), 1e-300))
    centred = curves - curves.mean(1, keepdims=True)
    # squared covariance over variance: what the sigmoid explains
    told = (centred @ rise[0].T) ** 2 if len(middles) == 1 else np.einsum("rgn,rn->rg", rise, centred) ** 2
    top = told.argmax(1)
    rows = np.zeros_like(top) if len(middles) == 1 else np.arange(len(top))
    return middles[rows, top], widths[rows, top]


def _logistic(z: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(z / 2))


def _line(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    slope, base = np.polyfit(x, y, 1)
    return slope * x + base


def _better(n: int, sigmoid: float, line: float) -> tuple[float, float]:
    """By how much the sigmoid's criterion is below the line's; its share of the line's residuals."""
    if line <= 1e-24:
        return 0.0, 1.0  # the curve is the line
    share = sigmoid / line
    return -n * math.log(max(share, 1e-12)) - 2 * math.log(n), share


def _inside(x: NDArray[np.float64], middle: NDArray[np.float64], width: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether a turn lies within what was seen, with points on either side, and takes less than half of it."""
    half = SPREAD * width / 2
    sides = (x[ENDS - 1] < middle) & (middle < x[-ENDS])
    return sides & (middle - half >= x[0]) & (middle + half <= x[-1]) & (2 * half < 0.5 * (x[-1] - x[0]))


def _resampled(
    curve: NDArray[np.float64], rest: NDArray[np.float64], count: int, draw: np.random.Generator
) -> NDArray[np.float64]:
    """The curve with moving blocks of its residuals put anywhere."""
    n = len(rest)
    block = max(1, round(n ** (1 / 3)))
    starts = draw.integers(0, n - block + 1, (count, -(-n // block)))
    taken = (starts[..., None] + np.arange(block)).reshape(count, -1)[:, :n]
    return curve + (rest - rest.mean())[taken]


def _checked(steps: Points, values: Points) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    where, height = np.asarray(steps, float), np.asarray(values, float)
    if where.shape != height.shape or where.ndim != 1 or len(where) < 8:
        raise TrainingError(
            f"a curve of {where.size} steps and {height.size} values was given: a phase change needs at least 8 of each"
        )
    if where[0] < 0 or not bool((np.diff(where) > 0).all()) or not np.isfinite(height).all():
        raise TrainingError("a curve was given whose steps do not grow from 0 on, or whose values are not finite")
    return where, height
