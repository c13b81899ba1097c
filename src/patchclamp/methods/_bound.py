"""How large an effect may be that an attribution has missed, from random subsets closed together (AtP*'s diagnostic; P120).

Parts that were not verified by exact effects are drawn into a subset S, each with probability p, and S is closed as a whole. Let

    r(S) = effect(S) - sum of the estimates of the parts in S,   c(n) = mean over S of effect(S with n) - effect(S without n).

For any part n, r(S with n) - r(S without n) has the mean c(n) - estimate(n), so by the triangle inequality

    min(p, 1 - p) * |c(n) - estimate(n)| <= mean over S of |r(S)|.

No part's error is larger than that mean, divided by min(p, 1 - p); its upper confidence limit is Student's. c(n) is what closing n takes
on average beside random others (p = 1/2: its Banzhaf value), and the same as closing it alone where the parts do not interact.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from patchclamp.errors import PatchclampError
from patchclamp.metrics import Metric, metric_named
from patchclamp.parts import Fallback, Parts
from patchclamp.scores import Part
from patchclamp.tasks import Examples


@dataclass(frozen=True)
class FalseNegatives:
    """A bound on what may have been missed.

    Args:
        bound: no unverified part has a larger |c(n)|, at this confidence.
        error: no unverified part's c(n) is farther from its estimate, at this confidence.
        worst: the part whose |estimate| is largest, which decides `bound`.
        mean: of |r(S)| over the subsets.
        unverified: how many parts.
        subsets: how many subsets were closed.
        share: p, with which a part was drawn.
        confidence: of the limit.
    """

    bound: float
    error: float
    worst: str
    mean: float
    unverified: int
    subsets: int
    share: float
    confidence: float

    def __str__(self) -> str:
        return (
            f"at {self.confidence:.0%} confidence none of the {self.unverified} unverified parts has a larger effect than "
            f"{self.bound:.3g} (beside random others of them; {self.subsets} random subsets)"
        )


def largest_missed(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    verified: Collection[Part],
    estimates: Mapping[Part, float] | None = None,
    *,
    subsets: int = 64,
    share: float = 0.5,
    confidence: float = 0.95,
    metric: str | Metric | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> FalseNegatives:
    """Bounds the effect of the parts that are not among `verified`.

    Args:
        parts: all parts.
        examples: on which prompts; effects are means over them.
        fallback: what a closed gate passes.
        verified: parts whose exact effects are known: they stay open.
        estimates: effects as a method has them (of the benefit, as scores are); left out: 0.
        subsets: how many are drawn.
        share: the probability with which a part is drawn.
        confidence: of the bound.
        metric: by default the task's.
        batch_size: examples at once.
        seed: of the draw.

    Cost: a forward pass for every subset, and one for the open run.

    Raises:
        PatchclampError: fewer than two subsets, a share that is not between 0 and 1, or every part verified.
    """
    if subsets < 2 or not 0 < share < 1:
        raise PatchclampError(f"{subsets} subsets with a share of {share} say nothing: two at least, and a share between 0 and 1")
    known = {str(part) for part in verified}
    left = [number for number in parts.counted if str(parts.labels[number]) not in known]
    if not left:
        raise PatchclampError("every part is verified: nothing can have been missed")
    chosen = metric if isinstance(metric, Metric) else metric_named(metric or examples.metric)
    estimate = np.array([(estimates or {}).get(parts.labels[number], 0.0) for number in left])
    draw = np.random.default_rng(seed).random((subsets, len(left))) < share
    effects = _effects(parts, examples, fallback, chosen, left, draw, batch_size)
    size = np.abs(effects - draw @ estimate)
    from scipy.stats import t

    limit = size.mean() + t.ppf(confidence, subsets - 1) * size.std(ddof=1) / np.sqrt(subsets)
    error, worst = float(limit / min(share, 1 - share)), int(np.abs(estimate).argmax())
    return FalseNegatives(
        bound=error + float(np.abs(estimate).max()), error=error, worst=str(parts.labels[left[worst]]), mean=float(size.mean()),
        unverified=len(left), subsets=subsets, share=share, confidence=confidence,
    )  # fmt: skip


def _effects(
    parts: Parts, examples: Examples, fallback: Fallback, metric: Metric, left: list[int], draw: np.ndarray, batch_size: int
) -> np.ndarray:
    """What closing each subset takes, mean over examples."""
    gates = parts.open(len(draw) + 1)
    for row, chosen in enumerate(draw):
        gates[row + 1, ..., [number for number, drawn in zip(left, chosen, strict=True) if drawn]] = 0
    found = [metric.sign * parts.measure(batch, gates, fallback, metric).double().cpu() for batch in examples.batches(batch_size)]
    values = torch.cat(found, 1).mean(1).numpy()
    return values[0] - values[1:]
