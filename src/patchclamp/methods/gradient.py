"""Gradient: the slope of the benefit in each gate with every gate open (attribution patching; Nanda 2023, Syed et al. 2310.10348).

score(part) = d benefit / d gate at gate = 1, which is <value - fallback, d benefit / d value>: the first-order estimate of what
closing the gate takes.

Cost: one forward and one backward pass (weights require no gradients, so each costs at most what a plain forward pass does), and one
forward pass for the fallback: 3.2 plain forward passes at most. Where memory is short, up to one forward pass more.
"""

from jaxtyping import Float
from torch import Tensor

from patchclamp.methods._slopes import first_order
from patchclamp.metrics import Metric
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks._batch import Batch


def passes(layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch."""
    return 2, 1


def samples(parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int) -> Float[Tensor, "part example"]:
    """[part, example]; raises `MetricError` for a metric whose slope is identically zero at the open run (KL to it)."""
    first_order(metric, "gradient")
    slopes = parts.gradient(batch, parts.open(), fallback, metric)[1][0]
    return metric.sign * slopes[:, list(parts.counted)].T
