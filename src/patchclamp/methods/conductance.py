"""Conductance: what flows through a part while the embeddings go from the corrupt prompts' to the clean ones' (CEAP).

score(part) = sum over k of <value(z_{k+1}) - value(z_k), d benefit / d value at z_{k + 1/2}>,   z_k = z' + k / m (z - z').

The value itself moves along the path, so it is the chain rule's share of what the whole change makes: parts that everything goes
through (all of one layer's residual stream) add up to benefit(clean) - benefit(corrupt), to the midpoint rule's error (Dhamdhere
et al. 1805.12233; on edges 2606.16920). It begins at the corrupt prompts, so the fallback is resample.

Cost: m (2 forward and 1 backward passes) at the midpoints, m + 1 forward passes between them, and two for the line (m = 5).
"""

from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.methods._slopes import along, counted_rows, first_order, input_path, recorded
from patchclamp.metrics import Metric
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks._batch import Batch

STEPS = 5


def passes(layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch."""
    return 3 * STEPS + 3, STEPS


def samples(
    parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int, steps: int = STEPS
) -> Float[Tensor, "part example"]:
    """[part, example]; raises `GateError` for a fallback other than resample."""
    if fallback.kind != "resample":
        raise GateError(
            f"conductance goes from the corrupt prompts to the clean ones, and the fallback {fallback.kind} is not there: use resample"
        )
    if metric.name == "top1":
        first_order(metric, "conductance")
    batch = batch.to(parts.model.device)
    line = input_path(parts, batch)
    before, total = recorded(parts, batch, line.at(0.0)), None
    for step in range(steps):
        after = recorded(parts, batch, line.at((step + 1) / steps))
        moved = {place: value - before[place] for place, value in after.items()}
        found = along(parts, batch, moved, metric, under=line.at((step + 0.5) / steps))
        before, total = after, found if total is None else total + found
    assert total is not None
    return counted_rows(parts, metric, total)
