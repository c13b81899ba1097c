"""Random: numbers that know nothing of the model. What any method must beat.   Cost: none."""

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.metrics import Metric
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks._batch import Batch


def passes(layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch."""
    return 0, 0


def samples(parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int) -> Float[Tensor, "part example"]:
    """[part, example], standard normal: one draw a part for all its examples, so that the order of parts is random too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(parts.counted), 1, generator=generator).expand(-1, len(batch)).to(parts.model.device)
