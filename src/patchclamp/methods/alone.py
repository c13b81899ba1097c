"""Alone: integrated gradients of each part by itself, every other part open. It converges to the exact effect.

score(part) = integral over g from 0 to 1 of d benefit / d gate with this gate at g and all others open = exact(part), to the error
of the quadrature, which is `segments`' with a segment a part.

Of heads and MLPs the exact effect costs one forward pass and this at least ten: it is here as what gradients along a line come to
when the line is right, and to tell a method's path from its number of steps.

Cost: per part at least 5 forward and 5 backward passes, and 5 forward passes for the intervals' ends.
"""

from jaxtyping import Float
from torch import Tensor

from patchclamp.methods.segments import STEPS, segmented, told
from patchclamp.metrics import Metric
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks._batch import Batch


def passes(layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch, at least."""
    return 2 * parts * STEPS + 1, parts * STEPS


def samples(parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int) -> Float[Tensor, "part example"]:
    """[part, example]; warns where the gap that is left is larger than asked for."""
    return told(segmented(parts, batch, fallback, metric, [[number] for number in parts.counted]))
