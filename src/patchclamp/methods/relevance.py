"""Relevance: attribution patching with the coefficients of layer-wise relevance propagation in place of gradients (RelP; P257).

score(part) = <value - fallback, R>,   R = d benefit / d value, taken backward by these rules instead of calculus:

- norms: the number that a norm divides by is a constant (LayerNorm still takes off its mean);
- activations: f(z) passes back f(z) / z, not f'(z) (identity rule; at |z| < 1e-6 the ratio is that at 1e-6);
- gated MLPs: act(gate) * up passes back one half into each factor (half rule);
- attention: as calculus has it. `patterns=True` holds attention weights, which the paper's default does not.

The forward pass is the model's own bit for bit, and in which layers each rule was put in is noted with the scores (`rules`): a
layer in which one was not is an error, because what came out would be the plain gradient under another name. It is not better than
the gradient everywhere: docs/attribution.md says where it was and where it was not.

On patents: the authors of a library of layer-wise relevance propagation (LXT) say of theirs that LRP is patented and free for personal
and scientific use only. This is written from the paper of relevance patching, which is Rezaei Jafari et al. 2508.21258. Whether a
patent covers what you do with it is for you to find out; nothing else in Patchclamp needs it.

Cost: that of the gradient: one forward and one backward pass, and the fallback's.
"""

from jaxtyping import Float
from torch import Tensor

from patchclamp.methods._slopes import counted_rows, first_order, slopes
from patchclamp.metrics import Metric
from patchclamp.models.backward import Rules
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks._batch import Batch


def passes(layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch."""
    return 2, 1


def samples(
    parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int, patterns: bool = False
) -> Float[Tensor, "part example"]:
    """[part, example].

    Raises:
        MetricError: a metric that has no slope at the open run.
        FamilyError: the model computes its activation where no rule reaches (gpt_oss), or has no norms.
    """
    first_order(metric, "relevance")
    rules = Rules(norm=True, ratio=True, product=0.5, pattern=patterns)
    return counted_rows(parts, metric, slopes(parts, batch, fallback, metric, rules)[1])
