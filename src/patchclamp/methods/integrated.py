"""Integrated: the mean slope in each gate along the line from all closed to all open (integrated gradients; Sundararajan 1703.01365).

score(part) = mean over k of d benefit / d gate at gate = (k + 1/2) / m, every gate alike. The scores of all parts add up to
benefit(open) - benefit(closed), to the midpoint rule's error.

Cost: m forward and m backward passes (m = 16), the first alone and the others side by side as memory allows; the fallback's values
once, and the model's own run where columns before the first difference are shared: 2.2 m + 3 plain forward passes at most.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.metrics import Metric
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks._batch import Batch

STEPS = 16


def passes(layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch."""
    return STEPS + 2, STEPS


def samples(
    parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int, steps: int = STEPS
) -> Float[Tensor, "part example"]:
    """[part, example]; more `steps` narrow the gap to completeness."""
    share = (torch.arange(steps, device=parts.model.device) + 0.5) / steps
    gates = torch.lerp(parts.closed(steps), parts.open(steps), share[:, None, None, None])
    slopes = parts.gradient(batch, gates, fallback, metric)[1].mean(0)
    return metric.sign * slopes[:, list(parts.counted)].T
