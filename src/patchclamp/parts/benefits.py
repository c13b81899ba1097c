"""Benefits: a metric over many examples, batch by batch, signed so that more is better."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.metrics import Metric
from patchclamp.parts.contract import Gates, Parts
from patchclamp.parts.fallbacks import Fallback
from patchclamp.tasks import Examples


def benefits(
    parts: Parts,
    examples: Examples,
    gates: Gates,
    fallback: Fallback,
    metric: Metric,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "setting example"]:
    """`metric.sign * parts.measure(...)` of every setting on every example, on the CPU.

    Args:
        parts: whose gates.
        examples: on which prompts.
        gates: shared by all examples.
        fallback: what a closed gate passes.
        metric: what is measured.
        batch_size: examples at once.
        progress: called with (examples done, examples in all).

    Cost: one forward pass over the examples per setting.
    """
    pieces: list[Tensor] = []
    done = 0
    for batch in examples.batches(batch_size):
        pieces.append(metric.sign * parts.measure(batch, gates, fallback, metric).cpu())
        done += len(batch)
        if progress is not None:
            progress(done, len(examples))
    return torch.cat(pieces, 1)
