"""Importance: how strongly the metric depends on a gate, whatever the direction (head importance; Michel et al. 1905.10650).

score(part) = |d benefit / d gate|, example by example, at gate = 1. With the fallback zero this is |<value, d benefit / d value>|,
the paper's sensitivity of the loss to a head's mask. It has no sign: a part that facilitates and one that interferes look alike.

Cost: that of the gradient.
"""

from jaxtyping import Float
from torch import Tensor

from patchclamp.methods import gradient
from patchclamp.metrics import Metric
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks._batch import Batch

SIGNED = False


def passes(layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch."""
    return gradient.passes(layers, parts)


def samples(parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int) -> Float[Tensor, "part example"]:
    """[part, example], never negative; raises `MetricError` for a metric that has no slope at the open run."""
    return gradient.samples(parts, batch, fallback, metric, seed).abs()
