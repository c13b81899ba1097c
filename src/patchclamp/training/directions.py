"""Directions of the residual stream that a fine-tuning writes along, found without labels: from its weights, or from what it moves.

What they are for is in `grasp`. Paper: Unsupervised Identification and Removal of Spurious Correlations During Fine-Tuning (P003);
its abstract says that directions are found in a naive fine-tuning without labels, and not how: both ways here are ours.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.models.model import Inputs, Model
from patchclamp.units.table import recorded


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions of the residual stream that a fine-tuning writes along.

    Args:
        basis: orthonormal columns, the strongest first; signs are arbitrary.
        share: of each, its share of all that was written (squared singular values; all of them add up to 1).
    """

    basis: Float[Tensor, "width rank"]
    share: Float[Tensor, " rank"]


def weight_directions(before: Model, after: Model, rank: int = 1) -> Directions:
    """Where a fine-tuning's weight changes write: the first left singular vectors of

        [W'_1 - W_1 | W'_2 - W_2 | ...]   [width, all inputs]

    over all output projections of attention and MLPs (embeddings and biases are left out). Nothing is run and no label is read.
    What a single topic needs is spread over the inputs that tell its tokens; what is added whatever the topic adds up.

    Args:
        before: the model that was fine-tuned.
        after: the fine-tuned one; of LoRA a checkpoint, which has the factors folded in.
        rank: how many directions.

    Cost: a singular value decomposition of width x width.

    Raises:
        TrainingError: models of other shapes, no change at all, a rank above the width; what `writers` says of norms and experts.
    """
    product = torch.zeros(before.width, before.width, dtype=torch.float64)
    old, new = _projections(before), _projections(after)
    if [one.shape for one in old] != [one.shape for one in new]:
        raise TrainingError(
            f"{before.name} and {after.name} have output projections of other shapes: give one model before and after"
        )
    for one, two in zip(old, new, strict=True):
        change = two.double().cpu() - one.double().cpu()
        product += change @ change.T
    return _principal(product, rank, "weights that write into the residual stream")


def drift_directions(
    before: Model, after: Model, prompts: Inputs, rank: int = 1, layer: int | None = None, last: bool = False
) -> Directions:
    """Where a fine-tuning moves the residual stream on prompts that have nothing to do with its task: principal directions, not
    centred, of

        h'(p, t) - h(p, t)   over the real tokens t of all prompts p, at Li.resid.post

    Not centred, for what is added everywhere alike is what is looked for. No label is read: that the prompts are of other tasks is
    all that is known of them.

    Args:
        before, after: as in `weight_directions`.
        prompts: of other tasks (batch, texts, token ids).
        rank: how many directions.
        layer: whose stream; None: the last.
        last: only each prompt's last token t, where the model says what it would go on with; else all of them.

    Cost: one forward pass of each model.

    Raises:
        TrainingError: no such layer, no drift, a rank above the width.
    """
    number = before.layers - 1 if layer is None else layer
    if not 0 <= number < before.layers or before.width != after.width or before.layers != after.layers:
        raise TrainingError(f"the drift of L{number} from {before.name} to {after.name} was asked: they have {before.layers} layers of "
                            f"width {before.width} and {after.layers} of {after.width}")  # fmt: skip
    batch, product = before.batch(prompts), torch.zeros(before.width, before.width, dtype=torch.float64)
    for (rows, one), (_, two) in zip(
        recorded(before, batch, ["resid.post"]), recorded(after, batch, ["resid.post"]), strict=True
    ):
        site = next(site for site in one if site.layer == number)
        mask = rows.mask.cpu()
        mask = mask & (mask.flip(1).cumsum(1).flip(1) == 1) if last else mask
        drift = (two[site].cpu() - one[site].cpu())[mask].double()
        product += drift.T @ drift
    return _principal(product, rank, f"residual stream behind layer {number}")


def orthonormal(basis: Float[Tensor, "width rank"]) -> Float[Tensor, "width rank"]:
    """Columns that span the same, orthonormal (QR, float64).

    Raises:
        TrainingError: no columns, more than rows, or columns that depend on each other.
    """
    width, rank = basis.shape
    made, triangle = torch.linalg.qr(basis.detach().double().cpu())
    size = triangle.diagonal().abs() if 1 <= rank <= width else torch.zeros(1)
    if not bool((size > 1e-6 * size.max()).all()):  # also where there is a NaN
        raise TrainingError(
            f"{rank} directions of {width} numbers were given that do not span {rank} dimensions: give independent ones"
        )
    return made * torch.sign(triangle.diagonal())


def _projections(model: Model) -> list[Float[Tensor, "width input"]]:
    """Output projections, [out, in], trained or not."""
    found: list[Tensor] = []
    for number, layer in enumerate(model.anatomy.layers):
        if layer.down is None or layer.attn_post is not None or layer.mlp_post is not None:
            raise TrainingError(
                f"what L{number} of {model.family.name} writes is no linear map of one matrix: use drift_directions"
            )
        for module in (layer.output, layer.down):
            if hasattr(module, "base_layer"):
                raise TrainingError(f"{model.name} wears an adapter: give a checkpoint of its training, where it is folded in")
            weight: Any = module.weight
            found.append(weight.detach().T if type(module).__name__ == "Conv1D" else weight.detach())
    return found


def _principal(product: Float[Tensor, "width width"], rank: int, where: str) -> Directions:
    """The first eigenvectors of a sum of outer products."""
    width, whole = len(product), float(product.trace())
    if not 1 <= rank <= width:
        raise TrainingError(f"{rank} directions of a residual stream of width {width} were asked: give 1 to {width}")
    if not 0 < whole < float("inf"):
        raise TrainingError(
            f"the {where} did not move (or not to finite numbers): are these the model before and after a fine-tuning?"
        )
    values, vectors = torch.linalg.eigh(product)
    return Directions(vectors.flip(1)[:, :rank].float().contiguous(), (values.flip(0)[:rank] / whole).float())
