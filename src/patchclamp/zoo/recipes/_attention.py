"""Other kinds of attention, as edits at the pattern that read the scores: the same model, with no softmax or with less of it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from patchclamp.models.editing import Edits, Seen
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.training import Clamp, Rows

Kind = Literal["sigmoid", "relu", "clipped"]
STRETCH = -0.03
"""Clipped softmax's lower end, as in the paper's language models."""


@dataclass(frozen=True)
class Attention(Clamp):
    """Attention in every layer, for the whole of a training, by another function of the scores s of a query's n keys:

        sigmoid   1 / (1 + n e^-s)                     no sum over keys; at s = 0 all add up to about 1
        relu      max(0, s) / n                        no sum over keys
        clipped   clip((1 - g) softmax(s) + g, 0, 1)   g = -0.03: attention of exactly 0 costs no infinite score

    Papers: Gu et al. 2024, When Attention Sink Emerges in Language Models, https://arxiv.org/abs/2410.10781 (sigmoid, without
    the n, which is that of https://arxiv.org/abs/2409.04431); Guo et al. 2024, https://arxiv.org/abs/2410.13835 (ReLU); Bondarenko
    et al. 2023, Quantizable Transformers, https://arxiv.org/abs/2306.12929 (clipped).
    """

    kind: Kind

    def edits(self, model: Model, step: int, rows: Rows) -> Edits:
        """At every layer's pattern."""
        return {Site("pattern", layer): Other(self.kind, layer) for layer in range(model.layers)}


@dataclass(frozen=True)
class Other:
    """The edit of one layer."""

    kind: Kind
    layer: int

    @property
    def reads(self) -> tuple[Site, ...]:
        """The scores."""
        return () if self.kind == "clipped" else (Site("scores", self.layer),)

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        if self.kind == "clipped":
            return ((1 - STRETCH) * value + STRETCH).clamp(0, 1)
        scores = seen.values[Site("scores", self.layer)]
        visible = scores > torch.finfo(scores.dtype).min / 4
        keys = visible.sum(-1, keepdim=True).clamp(min=1)
        if self.kind == "relu":
            return torch.where(visible, scores, 0).relu() / keys
        return torch.where(visible, torch.sigmoid(torch.where(visible, scores, 0) - keys.log()), 0)
