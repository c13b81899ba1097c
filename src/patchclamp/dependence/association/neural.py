"""Neural mutual information: InfoNCE with a small separable critic, stopped at the best held-out value, extrapolated in 1/N.

    I >= < log [ e^{f(x, y)} / mean over y' of e^{f(x, y')} ] >,   f(x, y) = g(x) . h(y), g and h into 8 dimensions

https://arxiv.org/abs/1807.03748; protocol of https://arxiv.org/abs/2506.00330: the value of held-out rows at its (smoothed) best, at
N, N/2 and N/4 rows, and the intercept of a line in 1/N. It is bounded by log of the held-out rows: near that it says only "much".
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.dependence.association.contract import Measure, Order, Pairs, Values
from patchclamp.errors import PatchclampError

HIDDEN, EMBEDDING = 32, 8
STEPS, EVERY, RATE = 120, 5, 0.01
BATCH = 256
HELD_OUT = 3
"""One row of so many is held out: the last ones, so that tokens of a prompt stay together."""
FEWEST = 24


@dataclass(frozen=True)
class Estimate:
    """Mutual information in nats with what it was extrapolated from.

    `value`: the intercept; `plain`: at all rows; `by_rows`: (rows, mean estimate); `error`: standard error of the intercept, from
    the spread of the subsamples; `bound`: no estimate can be above it; `consistent`: whether the line's intercept lies within
    two errors of what N and N/2 alone give.
    """

    value: float
    plain: float
    by_rows: tuple[tuple[int, float], ...]
    error: float
    bound: float
    consistent: bool


def infonce(
    x: Float[np.ndarray, "row _"], ys: "Float[np.ndarray, 'copy row _']", seed: int = 0, steps: int = STEPS
) -> Float[np.ndarray, " copy"]:
    """Held-out InfoNCE of x with each copy of y (permuted ones, side by side), one critic a copy, all from the same start."""
    if len(x) < FEWEST:
        raise PatchclampError(f"a critic cannot be learned from {len(x)} rows: give at least {FEWEST}")
    draw, cut = torch.Generator().manual_seed(seed), len(x) - len(x) // HELD_OUT
    left, right = _ready(x[None], cut).expand(len(ys), -1, -1), _ready(ys, cut)
    weights = [one.repeat(len(ys), 1, 1).requires_grad_() for one in _start(left.shape[-1], right.shape[-1], draw)]
    optimiser, seen = torch.optim.Adam(weights, lr=RATE, weight_decay=1e-3), list[Tensor]()
    with torch.enable_grad():
        for step in range(steps):
            rows = torch.randperm(cut, generator=draw)[:BATCH]
            loss = -_bound(left[:, rows], right[:, rows], weights).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if step % EVERY == EVERY - 1:
                with torch.no_grad():
                    seen.append(_bound(left[:, cut:], right[:, cut:], weights))
    smooth = torch.stack(seen).unfold(0, min(3, len(seen)), 1).mean(-1)
    return smooth.amax(0).double().numpy()


def _ready(values: Float[np.ndarray, "copy row _"], cut: int) -> Float[Tensor, "copy row _"]:
    """Each coordinate standardised by the rows that are learned from."""
    kept = values[:, :cut]
    spread = kept.std(1, keepdims=True)
    return torch.from_numpy((values - kept.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)).float()


def _start(one: int, two: int, draw: torch.Generator) -> list[Tensor]:
    out: list[Tensor] = []
    for width in (one, two):
        out += [torch.randn(1, width + 1, HIDDEN, generator=draw) / np.sqrt(width + 1)]
        out += [torch.randn(1, HIDDEN, EMBEDDING, generator=draw) / np.sqrt(HIDDEN)]
    return out


def _bound(left: Tensor, right: Tensor, weights: list[Tensor]) -> Float[Tensor, " copy"]:
    g, h = (
        torch.relu(torch.cat([side, side.new_ones(*side.shape[:2], 1)], -1) @ first) @ second
        for side, first, second in ((left, *weights[:2]), (right, *weights[2:]))
    )
    scores = g @ h.mT
    return (scores.diagonal(dim1=-2, dim2=-1) - scores.logsumexp(-1)).mean(-1) + float(np.log(scores.shape[-1]))


def neural_information(x: Float[np.ndarray, "row _"], y: Float[np.ndarray, "row _"], seed: int = 0) -> Estimate:
    """Mutual information of two outputs, extrapolated to many rows. Rows of one prompt should stand side by side.

    Cost: 7 critics (1 on all rows, 2 on halves, 4 on quarters), fewer where rows are few.
    """
    sizes, means, spread = [], [], []
    for parts in (1, 2, 4):
        rows = len(x) // parts
        if rows < FEWEST:
            break
        cuts = [slice(part * rows, (part + 1) * rows) for part in range(parts)]
        found = np.array([infonce(x[cut], y[None, cut], seed)[0] for cut in cuts])
        sizes.append(rows)
        means.append(float(found.mean()))
        spread.append(float(found.std(ddof=1) / np.sqrt(parts)) if parts > 1 else np.nan)
    plain, bound = means[0], float(np.log(max(len(x) // HELD_OUT, 1)))
    by_rows = tuple(zip(sizes, means, strict=True))
    if len(sizes) < 3:  # too few rows to extrapolate from
        return Estimate(plain, plain, by_rows, float("nan"), bound, False)
    design = np.stack([np.ones(3), 1 / np.array(sizes)], 1)
    inverse = np.linalg.inv(design.T @ design) @ design.T
    noise = np.array([spread[1] if np.isnan(one) else one for one in spread])
    value, error = float(inverse[0] @ means), float(np.sqrt((inverse[0] ** 2) @ noise**2))
    two = 2 * means[0] - means[1]  # the line through N and N/2
    return Estimate(value, plain, by_rows, error, bound, abs(value - two) <= 2 * error + 1e-3)


@dataclass(frozen=True, eq=False)
class Critics:
    """Neural information of each pair."""

    left: Values
    right: Values
    pairs: Pairs
    seed: int

    def score(self) -> Float[np.ndarray, " pair"]:
        """Extrapolated, in nats."""
        return np.array([neural_information(self.left[i], self.right[j], self.seed).value for i, j in self.pairs])

    def statistic(self, order: Order | None = None) -> Float[np.ndarray, " pair"]:
        """At all rows, in nats."""
        place = np.arange(len(self.left[0])) if order is None else order
        return self.statistics(place[None])[0]

    def statistics(self, orders: "np.ndarray") -> Float[np.ndarray, "order pair"]:
        """Of several orders at once: their critics are learned side by side."""
        return np.stack([infonce(self.left[i], self.right[j][orders], self.seed) for i, j in self.pairs], 1)


def prepare(left: Values, right: Values, pairs: Pairs, freedom: int, seed: int) -> Critics:
    """See `contract.Measure`."""
    return Critics(left, right, pairs, seed)


NEURAL = Measure("neural information", prepare)
