"""Inputs: gradients averaged along the straight line between the corrupt prompts' embeddings and the clean ones' (EAP-IG's path).

score(part) = <value - fallback, mean over k of d benefit / d value at z_k>,   z_k = z' + alpha_k (z - z'),

with value and fallback as at the clean run, and the midpoints alpha_k = (k + 1/2) / m (m = 5). Hanna et al. 2403.17806 take
k / m for edges (the left rule: the corrupt end is in, the clean one is not) and (k + 1) / m for nodes (the right rule), so that
the two cannot be compared; `rule` gives either. More steps do not lead to the exact effect: the line of the embeddings is not the
line of the part (`segments`, `alone`).

Cost: m (2 forward and 1 backward passes), three forward passes for the line and the values, and the fallback's.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from patchclamp.methods._slopes import along, counted_rows, first_order, input_path, recorded
from patchclamp.metrics import Metric
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks._batch import Batch

STEPS = 5
Rule = Literal["midpoint", "left", "right"]
OFFSETS: dict[Rule, float] = {"midpoint": 0.5, "left": 0.0, "right": 1.0}
"""Where in its step a gradient is taken."""


def passes(layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch."""
    return 2 * STEPS + 3, STEPS


def samples(
    parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int, steps: int = STEPS, rule: Rule = "midpoint"
) -> Float[Tensor, "part example"]:
    """[part, example]; raises `GateError` without corrupt prompts, `MetricError` for a metric without a slope on the line."""
    if rule == "right" or metric.name == "top1":
        first_order(metric, "inputs")  # the right rule's last point is the clean run
    batch = batch.to(parts.model.device)
    line, here, other = input_path(parts, batch), recorded(parts, batch), fallback.at(batch)
    direction = {place: value - other[place].to(value) for place, value in here.items()}
    shares = [(step + OFFSETS[rule]) / steps for step in range(steps)]
    found = [along(parts, batch, direction, metric, under=line.at(share)) for share in shares]
    return counted_rows(parts, metric, sum(found[1:], found[0]) / steps)
