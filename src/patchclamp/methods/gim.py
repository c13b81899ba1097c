"""GIM: attribution patching with a backward pass that softmax's saturation and products do not quench (2505.17630).

score(part) = <value - fallback, d benefit / d value>, taken backward by these rules:

- softmax passes back s * (g - <g, s>) with s = softmax(scores / 2): at temperature 2, so that a saturated row is not a wall;
- norms: the number that a norm divides by is a constant;
- what flows back into queries and keys is multiplied by 1/4, into values by 1/2;
- in a gated MLP, what flows back into gate and up is multiplied by 1/2.

The forward pass is the model's own bit for bit (with eager attention, where scores exist; a model that runs another kind is put to
eager for the time). In which layers each rule was put in is noted with the scores (`rules`); a layer in which one was not is an error.

Cost: that of the gradient: one forward and one backward pass, and the fallback's.
"""

from jaxtyping import Float
from torch import Tensor

from patchclamp.methods._slopes import counted_rows, first_order, slopes
from patchclamp.metrics import Metric
from patchclamp.models.backward import Rules
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks._batch import Batch

RULES = Rules(norm=True, product=0.5, temperature=2.0, queries=0.25, keys=0.25, values=0.5)


def passes(layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch."""
    return 2, 1


def samples(parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int) -> Float[Tensor, "part example"]:
    """[part, example]; raises `MetricError` for a metric that has no slope at the open run."""
    first_order(metric, "gim")
    return counted_rows(parts, metric, slopes(parts, batch, fallback, metric, RULES)[1])
