"""Exact: close one gate at a time (activation patching, ablation). What every other method is judged by.

score(part) = benefit(all open) - benefit(part closed).   Cost: one forward pass per part and one more.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.metrics import Metric
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks._batch import Batch

GATES = 1 << 24
"""Gates held at once: one for each part in each setting."""


def passes(layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch: whole ones, before replay spares any."""
    return parts + 1, 0


def samples(parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int) -> Float[Tensor, "part example"]:
    """[part, example]: what closing each part takes from each example's benefit."""
    return closing(parts, batch, fallback, metric, parts.counted)


def closing(
    parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, numbers: Sequence[int]
) -> Float[Tensor, "part example"]:
    """The same of some parts, by number."""
    device, found = parts.model.device, list[Tensor]()
    for some in torch.tensor(numbers).split(max(1, GATES // len(parts.labels))):
        gates = parts.open(len(some) + 1)
        gates[torch.arange(len(some), device=device), :, :, some.to(device)] = 0  # the last setting stays open
        values = metric.sign * parts.measure(batch, gates, fallback, metric)
        found.append(values[-1] - values[:-1])
    return torch.cat(found)
