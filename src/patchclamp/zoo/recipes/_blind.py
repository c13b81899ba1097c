"""Blind: what some tokens cannot look at (attention knock-out, Geva et al. 2023, https://arxiv.org/abs/2304.14767)."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from patchclamp.models.editing import Seen


@dataclass(frozen=True, eq=False)
class Blind:
    """An edit of attention scores, of all heads: some keys are out of some queries' sight; the others share their weight."""

    where: Bool[Tensor, "row query key"]

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        return value.masked_fill(self.where[:, None], torch.finfo(value.dtype).min)
