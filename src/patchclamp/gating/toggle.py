"""The toggle check: close parts in the order of each score and watch the answer's log-probability."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch

from patchclamp.gating.descent import full_gates
from patchclamp.gating.fit import Gated
from patchclamp.methods import groups_of
from patchclamp.metrics import METRICS
from patchclamp.parts import Fallback, Parts, benefits
from patchclamp.scores.statistics import mean_interval
from patchclamp.tasks import Examples

ORDERS = ("facilitation", "irrelevance", "interference")
POINTS = 16


def toggle(parts: Parts, gated: Gated, examples: Examples, fallback: Fallback, points: int = POINTS) -> pl.DataFrame:
    """Close the k parts of highest score, for each score and a range of k: down, flat, up where the scores are right.

    Orders are of scores averaged over seeds. Parts that the order has not reached yet are open: G+ itself has its interfering
    parts closed already, so that starting from it the order of interference would be flat whatever its parts do.

    Returns:
        Columns order (facilitation, irrelevance, interference), k, value (log-probability of the answer, mean over examples),
        low, high (95 % interval over groups of examples).

    Cost: one forward pass over the examples per order and point; one `measure`.
    """
    count = len(gated.labels)
    sizes = steps(count, points)
    rows: list[np.ndarray] = []
    for name in ORDERS:
        order = np.argsort(-getattr(gated, name).mean(0), kind="stable")
        for size in sizes:
            row = np.ones(count)
            row[order[:size]] = 0
            rows.append(row)
    gates = full_gates(parts, torch.from_numpy(np.stack(rows)))
    values = benefits(parts, examples, gates, fallback, METRICS["log_probability"]).double().numpy()
    groups, found = groups_of(examples), list[dict[str, object]]()
    for number, value in enumerate(values):
        interval = mean_interval(value, groups)
        found.append(
            {"order": ORDERS[number // len(sizes)], "k": sizes[number % len(sizes)], "value": interval.mean, "low": interval.low,
             "high": interval.high}
        )  # fmt: skip
    return pl.DataFrame(
        found, schema={"order": pl.String, "k": pl.Int64, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    )


def steps(count: int, points: int) -> Sequence[int]:
    """From 0 to `count`, every one at first and further apart then, about `points` of them."""
    if count < points:
        return range(count + 1)
    return sorted({round(count * (i / (points - 1)) ** 1.5) for i in range(points)})
