"""Outliers: how far activations are from what eight bits hold, and what eight bits cost.

Paper: Bondarenko et al. 2023, Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing,
https://arxiv.org/abs/2306.12929 (P145).
"""

import copy
from typing import cast

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from patchclamp.errors import MeasureError
from patchclamp.models.editing import Edits
from patchclamp.models.model import Inputs, Model
from patchclamp.units.context import losses
from patchclamp.units.table import Numbers, recorded, tidy

KINDS = ("attn", "mlp", "resid.post")
LEVELS = 127
MAPS = ("Linear", "Conv1D", "FalconLinear")


def outliers(model: Model, inputs: Inputs, seed: int = 0, edits: Edits | None = None) -> pl.DataFrame:
    """Largest magnitude and kurtosis of what attention, MLP and block give, by layer.

    Over all coordinates x of a row's real tokens:  inf_norm = max |x|,   kurtosis = mean (x - mu)^4 / variance^2  (3 of a Gaussian).

    Args:
        model: any.
        inputs: rows.
        seed: of the intervals.
        edits: run with these (another kind of attention that it was trained with, say).

    Returns:
        part `Li.attn`, `Li.mlp`, `Li.resid.post`: `inf_norm`, `kurtosis`; part "model": the largest inf_norm, and the mean
        kurtosis, of blocks' outputs (the paper's two numbers). Means over rows, with intervals.

    Cost: one forward pass.
    """
    found: dict[tuple[str, str], list[Tensor]] = {}
    for batch, values in recorded(model, inputs, KINDS, edits):
        for site, value in values.items():
            largest, kurtosis = _moments(value, batch.mask)
            found.setdefault((str(site), "inf_norm"), []).append(largest.cpu())
            found.setdefault((str(site), "kurtosis"), []).append(kurtosis.cpu())
    numbers = {key: torch.cat(some).numpy() for key, some in found.items()}
    blocks = [f"L{layer}.resid.post" for layer in range(model.layers)]
    whole = [
        Numbers("model", "inf_norm", np.max([numbers[block, "inf_norm"] for block in blocks], axis=0)),
        Numbers("model", "kurtosis", np.mean([numbers[block, "kurtosis"] for block in blocks], axis=0)),
    ]
    return tidy([*(Numbers(part, name, values) for (part, name), values in numbers.items()), *whole], seed)


def _moments(
    value: Float[Tensor, "row position width"], mask: Bool[Tensor, "row position"]
) -> tuple[Float[Tensor, " row"], Float[Tensor, " row"]]:
    value, real = value.double(), mask[:, :, None].double()
    count = real.sum((1, 2)) * value.shape[2]
    mean = (value * real).sum((1, 2)) / count
    apart = (value - mean[:, None, None]) * real
    variance = apart.square().sum((1, 2)) / count
    return (value.abs() * real).amax((1, 2)), apart.pow(4).sum((1, 2)) / count / variance.square().clamp(min=1e-300)


# --- eight bits


class Quantised(nn.Module):
    """A linear map with weights and inputs rounded to eight bits (fake quantisation: the arithmetic stays in floats).

    w' = s_w round(w / s_w), s_w = max |w| / 127 of each output; x' = s_x clamp(round(x / s_x), -127, 127), one s_x = m / 127 for
    the whole tensor, m the largest |x| that came in before `fix`. Until then it is the map itself.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.largest, self.fixed = inner, 0.0, False

    @property
    def weight(self) -> Tensor:
        """The map's: some model files ask for it."""
        return cast(Tensor, self.inner.weight)

    @property
    def bias(self) -> Tensor | None:
        """The map's."""
        return cast("Tensor | None", self.inner.bias)

    def fix(self) -> None:
        """From now on, round: weights here and now, in place, and inputs by the range seen so far."""
        axis = 0 if type(self.inner).__name__ == "Conv1D" else 1  # [in, out] there
        with torch.no_grad():
            scale = self.weight.abs().amax(axis, keepdim=True).clamp(min=1e-30) / LEVELS
            self.weight.copy_((self.weight / scale).round() * scale)
        self.fixed = True

    def forward(self, x: Tensor) -> Tensor:
        """The map."""
        if not self.fixed:
            self.largest = max(self.largest, float(x.detach().abs().max()))
            return self.inner(x)
        scale = max(self.largest, 1e-30) / LEVELS
        return self.inner((x / scale).round().clamp(-LEVELS, LEVELS) * scale)


def int8(
    model: Model, inputs: Inputs, calibration: Inputs | None = None, seed: int = 0, edits: Edits | None = None
) -> pl.DataFrame:
    """Loss with weights and activations of every linear map at eight bits (W8A8), against the loss in floats.

    Symmetric: a scale per output of a weight, one per input tensor of a map, the latter fixed on calibration rows. Embeddings,
    norms, attention itself and the unembedding stay in floats. The model is left as it is: a copy is rounded.

    Args:
        model: any without experts.
        inputs: rows.
        calibration: rows that fix the ranges; by default the same.
        seed: of the intervals.
        edits: run with these, before and after.

    Returns:
        part "model": `loss`, `loss.int8`, `change.int8` (paired by row), in nats per token; `maps`: how many were rounded.

    Cost: three forward passes, and a second copy of the weights.

    Raises:
        MeasureError: a mixture of experts, whose fused weights are no linear maps, or a model with no linear map in its blocks.
    """
    if any(size.experts for size in model.anatomy.sizes):
        raise MeasureError(
            f"{model.name} ({model.family.name}) keeps its experts in fused kernels, whose inputs are not rounded here"
        )
    twin = Model.load(copy.deepcopy(model.hf), tokenizer=model.tokenizer)
    maps = _wrapped(twin)
    batch = model.batch(inputs)
    losses(twin, batch if calibration is None else twin.batch(calibration), edits)
    for one in maps:
        one.fix()
    before, after = (np.nanmean(losses(which, batch, edits), 1) for which in (model, twin))
    rows = [
        ("loss", before),
        ("loss.int8", after),
        ("change.int8", after - before),
        ("maps", np.full(len(before), float(len(maps)))),
    ]
    return tidy([Numbers("model", name, values) for name, values in rows], seed)


def _wrapped(model: Model) -> list[Quantised]:
    """Every linear map inside the blocks of a model, in place: those that are called, and not only read."""
    made: list[Quantised] = []
    for layer in model.anatomy.layers:
        for parent in list(layer.block.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__ in MAPS and not isinstance(parent, Quantised):
                    made.append(Quantised(child))
                    setattr(parent, name, made[-1])
    if not made:
        raise MeasureError(f"the blocks of {model.name} ({model.family.name}) hold no linear maps that can be rounded")
    return made
