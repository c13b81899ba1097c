"""Load balancing: the loss that keeps a router from always choosing the same experts, as a gradient at the router's logits.

A trainer's loss sees logits of tokens alone. This one is a function of each router's logits, so its gradient is added where it
arises: what the router gives stays as it is, bit for bit, and the backward pass gains one term.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.models.editing import Edits, Seen
from patchclamp.sites import Site
from patchclamp.training import Clamp, Rows

if TYPE_CHECKING:
    from patchclamp.models.model import Model


@dataclass(frozen=True)
class Balance(Clamp):
    """The loss of Switch Transformers and Mixtral, summed over layers:

        coefficient * E * sum over experts e of f(e) P(e)

    with E experts, f(e) the share of tokens that choose e (they sum to the number chosen by a token), P(e) the mean over tokens of
    softmax(router)(e). f is held constant in the gradient. It is least where both are even. Where an update is accumulated over
    several passes, each pass adds it whole.

    Paper: Fedus et al. 2021, https://arxiv.org/abs/2101.03961, equations 4 to 6.
    """

    coefficient: float = 0.01
    training_only = True
    """Nothing that the model computes is changed: it needs this no longer once it is trained."""

    def edits(self, model: "Model", step: int, rows: Rows) -> Edits:
        """One edit at every router."""
        chosen = int(model.anatomy.config.num_experts_per_tok)
        sizes = model.anatomy.sizes
        return {Site("router", at): Balanced(self.coefficient, chosen) for at, size in enumerate(sizes) if size.experts}


@dataclass(frozen=True)
class Balanced:
    """The router's logits, unchanged; in the backward pass they get the loss's gradient besides."""

    coefficient: float
    chosen: int

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        if not value.requires_grad:
            return value
        with torch.no_grad():
            extra = self.coefficient * slope(value.float()[seen.mask], self.chosen)
            whole = torch.zeros_like(value).masked_scatter(seen.mask[..., None], extra.to(value.dtype))
        return _Adds.apply(value, whole)


def slope(logits: Float[Tensor, "token expert"], chosen: int) -> Float[Tensor, "token expert"]:
    """d / d logits of E * sum over experts of f P: E / tokens * p * (f - sum over experts of p f)."""
    share = torch.zeros_like(logits).scatter(1, logits.topk(chosen, dim=1).indices, 1.0).mean(0)
    p = logits.softmax(-1)
    return logits.shape[1] / len(logits) * p * (share - (p * share).sum(1, keepdim=True))


class _Adds(torch.autograd.Function):
    """The value as it is; its gradient plus another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, extra: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(extra)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient + ctx.saved_tensors[0], None
