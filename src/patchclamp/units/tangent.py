"""Rich or lazy learning: how far a training turned the tangent kernel, the representations and the weights.

Paper: Liu et al. 2023, How connectivity structure shapes rich and lazy learning in neural circuits,
https://arxiv.org/abs/2310.08513 (P224): where the kernel stays as it was the network learned as its linearisation would (lazy),
where it turned it learned features (rich); initial weights of low rank lead to richer learning.
"""

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.errors import MeasureError
from patchclamp.models.model import Model
from patchclamp.units.condition import changes
from patchclamp.units.table import exactly

HELD = 2**30
"""Numbers that a kernel's gradients may be, together: 4 GiB in float32."""


def tangent_kernel(model: Model, tokens: Int[Tensor, "row position"], wanted: Int[Tensor, " row"]) -> Float[Tensor, "row other"]:
    """The (empirical) neural tangent kernel of what a model says of the token that follows each row.

    K[i, j] = sum over weights of  d f_i / d w  *  d f_j / d w,      f_i = logit of wanted[i] less the mean logit, behind row i

    Args:
        model: any; weights that take no gradient (`requires_grad` false) are left out.
        tokens: rows without padding.
        wanted: a token for each row.

    Cost: a forward and a backward pass for each row; rows x weights numbers.

    Raises:
        MeasureError: more numbers than `HELD`.
    """
    weights = [weight for weight in model.hf.parameters() if weight.requires_grad]
    size = len(tokens) * sum(weight.numel() for weight in weights)
    if size > HELD:
        raise MeasureError(f"the gradients of {len(tokens)} rows are {size:,} numbers, and {HELD:,} may be held: give fewer rows")
    found = list[Tensor]()
    for row, token in zip(tokens, wanted.tolist(), strict=True):
        with torch.enable_grad():
            logits = model.hf(input_ids=row[None].to(model.device)).logits[0, -1]
            said = logits[token] - logits.mean()
            slopes = torch.autograd.grad(said, weights, materialize_grads=True)
        found.append(torch.cat([slope.flatten() for slope in slopes]))
    gradients = torch.stack(found)
    return (gradients @ gradients.T).double().cpu()


def alignment(one: Float[Tensor, "row other"], two: Float[Tensor, "row other"]) -> float:
    """Of two kernels: sum of products over entries / (norm * norm). 1: the same up to scale; NaN where one is 0 everywhere."""
    return float((one * two).sum() / (one.norm() * two.norm()))


def richness(
    before: Model, after: Model, tokens: Int[Tensor, "row position"], wanted: Int[Tensor, " row"]
) -> pl.DataFrame:  # fmt: skip
    """How far learning went from where it began: all near 1, and little change of weights, is lazy; else it is rich.

    Args:
        before: the model before training.
        after: the same one behind it.
        tokens: rows without padding.
        wanted: what follows each.

    Returns:
        model: `kernel_alignment` (of tangent kernels) and `relative` (change of weights, `units.condition.changes`);
        Li.resid.post: `representation_alignment`, of the products of the stream's values at the rows' last tokens. No intervals.

    Cost: two tangent kernels and two forward passes.

    Raises:
        MeasureError: they are not two checkpoints of one model; see `tangent_kernel`.
    """
    moved = changes(before, after).filter((pl.col("part") == "model") & (pl.col("name") == "relative"))["value"].item()
    kernels = [tangent_kernel(model, tokens, wanted) for model in (before, after)]
    found: list[tuple[str, str, float]] = [("model", "kernel_alignment", alignment(*kernels)), ("model", "relative", moved)]
    streams = [model.record(tokens, "L*.resid.post") for model in (before, after)]
    for site in streams[0]:
        ends = [values[site][:, -1].double().cpu() for values in streams]
        found.append((str(site), "representation_alignment", alignment(*(end @ end.T for end in ends))))
    return exactly(found, n=len(tokens))
