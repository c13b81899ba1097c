"""Deeplift: differences from the corrupt run passed back in place of derivatives (Shrikumar et al. 1704.02685; P191).

score(part) = <value - value', M>,   M = d benefit / d value taken by multipliers of differences (`models.differences`):

the rescale rule for functions of one number, (f(z) - f(z')) / (z - z'); the Shapley value of each factor for products (queries with
keys, attention weights with values, gated MLPs, what a norm multiplies); the reference is the corrupt prompt. So whatever a cut through
the network holds (the stream before a block; a block's stream and what is written behind it) adds up to benefit(clean) -
benefit(corrupt) exactly, without any steps: summation to delta. It is checked on the stream that enters the first block, at every call.

Of an edge s>d, value is what s writes and M what takes a difference in what d reads to one in the benefit: through d alone, then
onward from what d makes of it. So the edges into a destination add up to the score of what it reads (all into the logits: to delta),
and before any post-norm the edges from a source to that of the source.

The metric must be linear in the logits: logit_diff of single tokens. The fallback is resample. Not mixtures of experts.

Cost: one forward and one backward pass over the clean and the corrupt prompts, two forward passes for the embeddings, and the fallback's.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.edits import Add
from patchclamp.errors import GateError, MetricError, NumericsError
from patchclamp.methods._notes import note
from patchclamp.methods._slopes import counted_rows, input_path, joined
from patchclamp.metrics import Metric
from patchclamp.models.differences import differences
from patchclamp.parts import Edges, Fallback, Parts
from patchclamp.parts.slopes import frozen
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

CLOSE = 1e-3
"""Of the largest difference there is: what summation to delta may miss in float32."""


def passes(layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch."""
    return 5, 2


def samples(parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int) -> Float[Tensor, "part example"]:
    """[part, example].

    Raises:
        MetricError: a metric that is not linear in the logits.
        GateError: another fallback than resample.
        FamilyError: a mixture of experts, or a step of the model that no rule is known for.
        NumericsError: what flows back does not add up to the difference of the metric.
    """
    _check(batch, fallback, metric)
    batch, model = batch.to(parts.model.device), parts.model
    whole = input_path(parts, batch).whole
    if isinstance(parts, Edges):
        values, slopes, rises = parts.multipliers(batch, whole, fallback, metric)
        _check_sum(values, rises, batch)
        return counted_rows(parts, metric, slopes)
    reference = torch.cat([torch.zeros_like(whole), -whole])
    wide = torch.promote_types(model.dtype, torch.float32)
    leaf = parts.open(2).to(wide).expand(-1, len(batch), -1, -1).clone().requires_grad_()
    root = torch.zeros_like(reference).requires_grad_()
    first = {Site("embed"): [Add(reference), Add(root)]}
    with frozen(model), torch.enable_grad(), differences(model.anatomy):
        logits = model.target_logits(batch, joined(first, parts.edits(leaf, fallback, batch)), settings=2)
    value = metric(logits, batch)
    slope, into = torch.autograd.grad(value[0].sum(), [leaf, root])
    _check_sum(value.detach(), (into[: len(whole)] * whole).sum((1, 2)), batch)
    return counted_rows(parts, metric, slope[0, :, 0])


def _check(batch: Batch, fallback: Fallback, metric: Metric) -> None:
    if fallback.kind != "resample":
        raise GateError(f"deeplift compares with the corrupt run, and the fallback {fallback.kind} is not that: use resample")
    single = batch.wrong is not None and batch.answers.shape[1] == 1 and batch.wrong.shape[1] == 1
    if metric.name != "logit_diff" or not single:
        raise MetricError(
            f"deeplift needs a metric that is linear in the logits, and {metric.name} of these answers is not: use logit_diff of single "
            "right and wrong tokens, or integrated"
        )


def _check_sum(values: Float[Tensor, "2 example"], by_row: Float[Tensor, " row"], batch: Batch) -> None:
    wanted = values[0] - values[1]
    found = torch.zeros_like(wanted).index_add(0, batch.example, by_row.to(wanted))
    gap = float((found - wanted).abs().max())
    note("gap", gap)
    if not gap <= CLOSE * max(float(wanted.abs().max()), float(values.abs().max()), 1.0):
        raise NumericsError(
            f"what deeplift passes back adds up to a difference that is {gap:.3g} off the metric's: this model computes something that its "
            "rules do not cover"
        )
