"""How massive activations grow in training: the five-parameter curve of the ratio top / median over checkpoints.

    ratio(t) = A e^(-l x) log x + K,        x = g t + t0

Paper: Gallego-Feliciano et al. 2025, Hidden Dynamics of Massive Activations in Transformer Training,
https://arxiv.org/abs/2508.03616 (P249).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from jaxtyping import Float

from patchclamp.errors import MeasureError

FEWEST = 8
PARAMETERS: Sequence[str] = ("amplitude", "decay", "rate", "start", "offset")
_STARTS = tuple(product(np.logspace(-1, 4, 11), np.logspace(-4, 1, 11), (0.1, 0.3, 1.0, 3.0)))
_SEARCHED = 8
_LOWEST, _HIGHEST = np.log([1e-3, 1e-9, 1e-3]), np.log([1e6, 1e2, 1e2])


@dataclass(frozen=True, eq=False)
class Curve:
    """A fitted curve.

    Args:
        amplitude: A.
        decay: l.
        rate: g, per step.
        start: t0.
        offset: K.
        r2: share of the values' variance that the curve explains.
        low: lower end of each parameter's 95 % interval, by name; empty without resamples.
        high: upper end.
        n: checkpoints.
    """

    amplitude: float
    decay: float
    rate: float
    start: float
    offset: float
    r2: float
    low: dict[str, float]
    high: dict[str, float]
    n: int

    def at(self, steps: Float[np.ndarray, " step"]) -> Float[np.ndarray, " step"]:
        """The curve's values."""
        x = self.rate * np.asarray(steps, dtype=np.float64) + self.start
        return self.amplitude * np.exp(-self.decay * x) * np.log(x) + self.offset

    @property
    def peak(self) -> float:
        """The step at which A e^(-l x) log x is farthest from 0 behind x = 1: x log x = 1 / l, x = e^W(1 / l). Before 0: it only falls."""
        from scipy.special import lambertw

        return (math.exp(float(lambertw(1 / self.decay).real)) - self.start) / self.rate


def growth(
    steps: Sequence[int | float] | Float[np.ndarray, " step"],
    values: Sequence[int | float] | Float[np.ndarray, " step"],
    *,
    resamples: int = 100,
    seed: int = 0,
) -> Curve:
    """Fit the curve to a number by checkpoint.

    For given g, l and t0 the curve is linear in A and K, which least squares gives in closed form; so three numbers are searched
    (in their logarithms), from the 8 best of 484 starts. Intervals: residuals are drawn anew with replacement, added to the curve and fitted
    again from where it is. Without decay (l near 0) g and K are not told apart by any data: their intervals are wide then.

    Args:
        steps: of the checkpoints.
        values: `massive`'s ratio (or any other number), at each.
        resamples: fits for the intervals; 0: none.
        seed: of the draws.

    Raises:
        MeasureError: fewer than 8 different checkpoints, values that are not finite, or all alike.
    """
    t, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(t) != len(y) or len(np.unique(t)) < FEWEST or not np.isfinite(y).all() or np.ptp(y) == 0 or t.min() < 0:
        raise MeasureError(
            f"the curve has five parameters: it takes at least {FEWEST} checkpoints at different steps with finite values that are "
            f"not all alike; there are {len(np.unique(t))} steps and {len(y)} values"
        )
    span = float(t.max())
    starts = sorted(np.log(_STARTS), key=lambda start: float(((_linear(t / span, y, start)[1] - y) ** 2).sum()))[:_SEARCHED]
    best = min((_fitted(t / span, y, start) for start in starts), key=lambda fit: fit[1])[0]
    curve = _linear(t / span, y, best)[1]
    drawn: list[list[float]] = []
    for draw in np.random.default_rng(seed).integers(0, len(y), size=(resamples, len(y))):
        again = curve + (y - curve)[draw]
        drawn.append(_parameters(t / span, again, _fitted(t / span, again, best)[0], span))
    amplitude, decay, rate, start, offset = _parameters(t / span, y, best, span)
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0).tolist() if drawn else ([], [])
    r2 = 1 - float(((y - curve) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    return Curve(amplitude, decay, rate, start, offset, r2, _named(low), _named(high), len(t))


def _named(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(PARAMETERS, values, strict=True)) if values else {}


def _linear(
    t: Float[np.ndarray, " step"], y: Float[np.ndarray, " step"], logs: Float[np.ndarray, " 3"]
) -> tuple[Float[np.ndarray, " 2"], Float[np.ndarray, " step"]]:
    """A and K by least squares, and the curve."""
    rate, decay, start = np.exp(logs)
    x = rate * t + start
    shape = np.stack([np.exp(-decay * x) * np.log(x), np.ones_like(x)], 1)
    found = np.linalg.lstsq(shape, y, rcond=None)[0]
    return found, shape @ found


def _fitted(
    t: Float[np.ndarray, " step"], y: Float[np.ndarray, " step"], start: Float[np.ndarray, " 3"]
) -> tuple[Float[np.ndarray, " 3"], float]:
    """Logarithms of rate, decay and start by least squares from one start, and the sum of squares there."""
    from scipy.optimize import least_squares

    size = float(np.std(y)) or 1.0
    inside = np.clip(start, _LOWEST + 1e-6, _HIGHEST - 1e-6)
    fit = least_squares(lambda logs: (_linear(t, y, logs)[1] - y) / size, inside, bounds=(_LOWEST, _HIGHEST), max_nfev=200)
    return fit.x, float(fit.cost)


def _parameters(
    t: Float[np.ndarray, " step"], y: Float[np.ndarray, " step"], logs: Float[np.ndarray, " 3"], span: float
) -> list[float]:
    (amplitude, offset), _ = _linear(t, y, logs)
    rate, decay, start = np.exp(logs)
    return [float(amplitude), float(decay), float(rate) / span, float(start), float(offset)]


def foretell(
    architectures: Float[np.ndarray, "model feature"], parameters: Float[np.ndarray, "model parameter"], ridge: float = 1e-3
) -> tuple[Float[np.ndarray, "model parameter"], Float[np.ndarray, " parameter"]]:
    """Parameters of each model's curve, from its architecture, by ridge regression on all other models (leave one out).

    Args:
        architectures: numbers of each model (layers, width, heads, ...), as they are or their logarithms; standardised here.
        parameters: what was fitted to each model.
        ridge: times the number of models, added to the diagonal.

    Returns:
        The forecast for every model, and by parameter 1 - sum of squared errors / sum of squares about the other models' mean:
        above 0, the architecture says something; 1: everything.

    Raises:
        MeasureError: fewer than 4 models, which leave nothing to learn from.
    """
    count = len(architectures)
    if count < 4 or len(parameters) != count:
        raise MeasureError(f"{count} architectures with {len(parameters)} curves were given: give at least 4, one curve each")
    said, plain = np.empty_like(parameters, dtype=np.float64), np.empty_like(parameters, dtype=np.float64)
    for out in range(count):
        rest = np.arange(count) != out
        mean, spread = architectures[rest].mean(0), architectures[rest].std(0)
        x = (architectures - mean) / np.where(spread > 0, spread, 1)
        centre = parameters[rest].mean(0)
        inner = x[rest].T @ x[rest] + ridge * count * np.eye(x.shape[1])
        said[out] = centre + x[out] @ np.linalg.solve(inner, x[rest].T @ (parameters[rest] - centre))
        plain[out] = centre
    error, about = ((said - parameters) ** 2).sum(0), ((plain - parameters) ** 2).sum(0)
    return said, 1 - error / np.where(about > 0, about, 1)
