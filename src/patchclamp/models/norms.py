"""Norms held at a run's own scale: what a norm divides by, and the norm once that number is held.

A norm is N(x) = gain * (x - c(x)) / s(x) + bias, with c the mean over the width (LayerNorm) or 0 (RMS norm) and
s(x) = sqrt(mean((x - c)^2) + eps); where a model has no norm, an identity stands in its place, and s(x) = 1. With s held it is
linear (up to the bias): parts add up behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchclamp.errors import FamilyError
from patchclamp.models.invariants import rounding
from patchclamp.models.scope import unobserved

EPSILONS = ("eps", "variance_epsilon", "epsilon")


@dataclass(frozen=True)
class Scale:
    """How a norm's divisor s(x) is computed."""

    centred: bool
    eps: float
    identity: bool = False

    def __call__(self, value: Float[Tensor, "*row width"]) -> Float[Tensor, "*row 1"]:
        """s(x) of every row, in float32 or wider."""
        value = value if value.dtype == torch.float64 else value.float()
        if self.identity:
            return torch.ones_like(value[..., :1])
        if self.centred:
            value = value - value.mean(-1, keepdim=True)
        return (value.square().mean(-1, keepdim=True) + self.eps).sqrt()


_SCALES: "WeakKeyDictionary[nn.Module, Scale]" = WeakKeyDictionary()


def scale_of(norm: nn.Module, width: int) -> Scale:
    """How a norm's divisor is computed; proved once per norm: what is left when it is taken away must be linear.

    Raises:
        FamilyError: it is neither a LayerNorm nor an RMS norm, nor the identity.
    """
    if norm not in _SCALES:
        _SCALES[norm] = _proved(norm, width)
    return _SCALES[norm]


def held(
    own: Callable[..., Tensor], scale: Scale, value: Float[Tensor, "*row width"], kept: Float[Tensor, "*#row 1"]
) -> Float[Tensor, "*row width"]:
    """What a norm gives for `value` if it divides by `kept`; `own` is its forward function.

    (N(x) - bias) * s(x) / kept + bias, the bias being N(0): nothing about gains has to be known.
    """
    out, bias = own(value), own(torch.zeros_like(value[:1, :1]))
    return (out - bias) * (scale(value) / kept).to(out.dtype) + bias


def _proved(norm: nn.Module, width: int) -> Scale:
    if type(norm) is nn.Identity:
        return Scale(False, 0.0, identity=True)
    weight = next(iter(norm.parameters()), torch.zeros(0))
    draw = torch.randn(2, width, generator=torch.Generator().manual_seed(0)) + 2  # so that centring matters
    one, two = draw.to(device=weight.device, dtype=weight.dtype)
    rows = torch.stack([one, two, one + two, 0.01 * one])
    found = [float(getattr(norm, name)) for name in EPSILONS if isinstance(getattr(norm, name, None), float)]
    with torch.no_grad(), unobserved():
        out = norm(rows[None])[0]
        bias = norm(torch.zeros_like(rows[None]))[0]
    for scale in [Scale(centred, eps) for centred in (False, True) for eps in found]:
        linear = (out - bias).double() * scale(rows).double()
        apart = (linear[0] + linear[1] - linear[2]).abs().max() + (linear[0] - 100 * linear[3]).abs().max()
        if float(apart) <= 2 * rounding(weight.dtype) * float(linear.abs().max()):
            return scale
    raise FamilyError(f"the final norm {type(norm).__name__} is neither a LayerNorm nor an RMS norm, so its scale cannot be held")
