"""Routers of mixture-of-experts layers: their logits are edited inside the router's own forward, their weights behind it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode


class RouterTap(TorchFunctionMode):
    """Inside one router's forward, visits the output of its linear map: everything behind it (softmax, top-k) follows."""

    def __init__(self, visit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.visit, self.done = visit, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not F.linear or self.done:
            return out
        self.done = True
        return self.visit(out)


def spread_weights(
    logits: Float[Tensor, "token expert"], weights: Float[Tensor, "token chosen"], chosen: Int[Tensor, "token chosen"]
) -> Float[Tensor, "token expert"]:
    """Routing weight of every expert, 0 for those not chosen."""
    return torch.zeros(logits.shape, dtype=weights.dtype, device=weights.device).scatter(-1, chosen, weights)
