"""Linear: what a part does through the linear map that the model is, once its decisions for this input are held (LinearScope; P138).

Held are attention patterns, what norms divide by, and activations' gates: f(z) / z of an activation, act(gate) of a gated MLP. What
is left is linear in the residual stream (up to biases), equal to the model at this input, and

    score(part) = <value - fallback, M>,   M = the rows of that map that lead from the part to the metric.

So parts that stand side by side, such as everything that writes to the stream before one block, add up exactly: their scores' sum is
what the map makes of the sum of their differences. `linearised` gives the contribution of every input token, with the biases' share.

After Raghu et al. 2019 (A Tour of Convolutional Networks Guided by Linear Interpreters), which freezes ReLUs and pooling.

Cost: that of the gradient: one forward and one backward pass, and the fallback's.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.edits import Add
from patchclamp.methods._slopes import counted_rows, first_order, slopes
from patchclamp.metrics import Metric, metric_named
from patchclamp.models.backward import Rules, ruled
from patchclamp.models.model import Model
from patchclamp.parts import Fallback, Parts
from patchclamp.parts.slopes import frozen
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

RULES = Rules(norm=True, ratio=True, gate=True, pattern=True)


def passes(layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch."""
    return 2, 1


def samples(parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int) -> Float[Tensor, "part example"]:
    """[part, example]; raises `MetricError` for a metric that has no slope at the open run."""
    first_order(metric, "linear")
    return counted_rows(parts, metric, slopes(parts, batch, fallback, metric, RULES)[1])


@dataclass(frozen=True, eq=False)
class Linearised:
    """A metric as the held model's linear map has it: value = sum of tokens' contributions + the biases'.

    Args:
        values: [example], the metric.
        tokens: [row, position], what each column's embedding contributes to its row's metric.
        biases: [example], what is left: what the map makes of all biases on the way.
        map: [row, position, width], what a change of a column's embedding does to it.
    """

    values: Float[Tensor, " example"]
    tokens: Float[Tensor, "row position"]
    biases: Float[Tensor, " example"]
    map: Float[Tensor, "row position width"]


def linearised(model: Model, batch: Batch, metric: Metric | None = None) -> Linearised:
    """The model at each prompt as the linear map that it is there, from the first block's input to a metric.

    Of a model without biases, and a metric that is linear in the logits (logit_diff of single tokens), contributions of tokens
    alone add up to the metric. Cost: one forward and one backward pass.

    Raises:
        MetricError: a metric that has no slope at the model's own run.
        FamilyError: the model computes something where no rule reaches.
    """
    batch, metric = batch.to(model.device), metric or metric_named(batch.metric)
    first_order(metric, "linearised")
    embed = Site("embed")
    stream = model.record(batch, embed)[embed]
    leaf = torch.zeros_like(stream).requires_grad_()
    with frozen(model), torch.enable_grad(), ruled(model.anatomy, RULES) as force:
        values = metric(model.target_logits(batch, force.around({embed: Add(leaf)})), batch)[0]
        (slope,) = torch.autograd.grad(values.sum(), leaf)
    force.fired()
    tokens, values = (stream * slope).sum(-1), values.detach()
    biases = values - torch.zeros_like(values).index_add(0, batch.example, tokens.sum(-1).to(values.dtype))
    return Linearised(values, tokens, biases, slope)
