"""Exact: close one gate at a time (activation patching, ablation). What every other method is judged by.

score(part) = benefit(all open) - benefit(part closed).   Cost: one forward pass per part and one more.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.metrics import Metric
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks._batch import Batch


def samples(parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int) -> Float[Tensor, "part example"]:
    """[part, example]: what closing each part takes from each example's benefit."""
    counted = torch.tensor(parts.counted, device=parts.model.device)
    gates = parts.open(len(counted) + 1)
    gates[torch.arange(len(counted), device=gates.device), :, :, counted] = 0  # the last setting stays open
    values = metric.sign * parts.measure(batch, gates, fallback, metric)
    return values[-1] - values[:-1]
