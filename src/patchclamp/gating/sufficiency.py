"""Sufficiency: what share of the behaviour a set of parts keeps when it alone is open."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from patchclamp.errors import MetricError
from patchclamp.gating.descent import full_gates
from patchclamp.methods import groups_of
from patchclamp.metrics import METRICS, metric_named
from patchclamp.parts import Fallback, Parts, benefits
from patchclamp.scores.statistics import grouped, names_of
from patchclamp.tasks import Examples

RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Shares:
    """What sets keep of the behaviour: (m(set) - m(none)) / (m(all) - m(none)), m the mean benefit over examples.

    Args:
        share: [set], a ratio of means: 0 for no part, 1 for all; bounded by neither.
        low, high: [set], 95 % percentile bootstrap over groups of examples; NaN with fewer than 2 groups.
        value: [set], m(set).
        opened, closed: m(all) and m(none).
        metric: by name.
        n: examples.
    """

    share: Float[np.ndarray, " set"]
    low: Float[np.ndarray, " set"]
    high: Float[np.ndarray, " set"]
    value: Float[np.ndarray, " set"]
    opened: float
    closed: float
    metric: str
    n: int


def shares(
    parts: Parts,
    sets: Bool[np.ndarray, "set part"],
    examples: Examples,
    fallback: Fallback,
    metric: str | None = None,
    seed: int = 0,
) -> Shares:
    """What each set keeps when all other parts are closed.

    Args:
        parts: whose gates.
        sets: which of the counted parts are open.
        examples: on which prompts.
        fallback: what closed gates pass.
        metric: by default the task's.
        seed: of the bootstrap.

    Cost: one forward pass over the examples per set, and two.

    Raises:
        MetricError: closing every part changes nothing, so that no share is defined.
    """
    name = metric or examples.metric
    ends = np.stack([np.ones(sets.shape[1]), np.zeros(sets.shape[1])])
    gates = full_gates(parts, torch.from_numpy(np.concatenate([ends, sets.astype(float)])))
    samples = benefits(parts, examples, gates, fallback, metric_named(name)).double().numpy()
    opened, closed, values = samples[0], samples[1], samples[2:]
    span = float((opened - closed).mean())
    if abs(span) < 1e-9:
        raise MetricError(
            f"no share is defined: {name} is the same with every part open and with every part closed. Choose prompts, a metric or "
            "a fallback under which the behaviour goes away"
        )
    rows = np.concatenate([(opened - closed)[None], values - closed])
    sums, sizes = grouped(rows, names_of(groups_of(examples)))
    count = len(sizes)
    low = high = np.full(len(values), np.nan)
    if count > 1:
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(float)
        drawn = sums @ draws.T
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = np.nanpercentile(drawn[1:] / drawn[0], [2.5, 97.5], axis=1)
    share = (values - closed).mean(1) / span
    return Shares(share, low, high, values.mean(1), float(opened.mean()), float(closed.mean()), name, len(examples))


def nll_of(parts: Parts, sets: Bool[np.ndarray, "set part"], examples: Examples, fallback: Fallback) -> Float[np.ndarray, " set"]:
    """Mean NLL of the answers with each set alone open. Cost: one forward pass over the examples per set."""
    gates = full_gates(parts, torch.from_numpy(sets.astype(float)))
    return -benefits(parts, examples, gates, fallback, METRICS["log_probability"]).double().mean(1).numpy()
