"""Single steps of modified backward passes: each gives back the value that it is given, bit for bit, with another way back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchclamp.models.editing import Seen
from patchclamp.models.norms import held, scale_of
from patchclamp.sites import Site

TINY = 1e-6
"""Below it, f(z) / z is taken at this distance from 0."""
Told = Callable[[], None]


class _Instead(torch.autograd.Function):
    """The first value, bit for bit; what flows back goes to the second."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, back: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor]:
        return None, slopes[0]


def instead(value: Tensor, back: Tensor) -> Tensor:
    """`value`, with the way back of `back`."""
    return _Instead.apply(value.detach(), back.to(value.dtype))  # type: ignore[no-any-return,no-untyped-call]


def recorded(value: Tensor) -> bool:
    """Whether a backward pass will come through the value."""
    return torch.is_grad_enabled() and value.requires_grad


# --- for modules: what stands in for a forward function


def through_norm(norm: nn.Module, own: Callable[..., Tensor], value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A norm that divides by a constant: what it divides by here."""
    out = own(value, *args, **kwargs)
    if not recorded(value):
        return out
    scale, flat = scale_of(norm, value.shape[-1]), value.reshape(1, -1, value.shape[-1])
    return instead(out, held(own, scale, flat, scale(flat).detach()).view_as(out))


def through_ratio(own: Callable[..., Tensor], value: Tensor) -> Tensor:
    """An activation as multiplication by f(z) / z."""
    out = own(value)
    if not recorded(value):
        return out
    with torch.no_grad():
        away = torch.where(value.abs() < TINY, torch.where(value < 0, -TINY, TINY).to(value.dtype), value)
        ratio = own(away) / away
    return instead(out, value * ratio)


def held_output(own: Callable[..., Tensor], value: Tensor) -> Tensor:
    """A function whose value is a constant."""
    return own(value).detach()


def scaled_input(factor: float, own: Callable[..., Any], value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A function into whose input `factor` of what would flows back."""
    return own(instead(value, value * factor) if recorded(value) else value, *args, **kwargs)


# --- for places: edits


@dataclass(frozen=True, eq=False)
class Hold:
    """A value that is a constant."""

    told: Told

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        self.told()
        return value.detach()


@dataclass(frozen=True, eq=False)
class Weigh:
    """A value into which `factor` of what would flows back."""

    told: Told
    factor: float

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        self.told()
        return instead(value, value * self.factor) if recorded(value) else value


@dataclass(frozen=True, eq=False)
class Drop:
    """What a block gives, as if it had added a constant to its input, which is at `before`."""

    told: Told
    before: Site

    @property
    def reads(self) -> tuple[Site, ...]:
        """What the edit wants to see."""
        return (self.before,)

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        self.told()
        return instead(value, seen.values[self.before])


@dataclass(eq=False)
class Linked:
    """What softmax's input leaves for its output, in one layer.

    Args:
        told: called when the output has been linked.
        temperature: of the way back.
        sinks: whether rows have a column more, which is not seen, so that they sum to less than 1.
    """

    told: Told
    temperature: float
    sinks: bool
    scores: Tensor | None = field(default=None)


@dataclass(frozen=True, eq=False)
class Cut:
    """Softmax's input, cut off from its output: the way back leads past softmax."""

    linked: Linked

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        self.linked.scores = value
        return value.detach()


@dataclass(frozen=True, eq=False)
class Temper:
    """Softmax's output, from which s * (g - <g, s>) flows back to its input, s = softmax(scores / temperature)."""

    linked: Linked

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        scores, self.linked.scores = self.linked.scores, None
        assert scores is not None
        self.linked.told()
        if not recorded(scores):
            return value
        return _Tempered.apply(value.detach(), scores, self.linked)  # type: ignore[no-any-return,no-untyped-call]


class _Tempered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pattern: Tensor, scores: Tensor, linked: Linked) -> Tensor:
        ctx.save_for_backward(pattern, scores)
        ctx.linked = linked
        return pattern.view_as(pattern)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor, None]:
        pattern, scores = ctx.saved_tensors
        flat = softer(scores, pattern, ctx.linked.temperature, ctx.linked.sinks)
        slope = slopes[0].to(flat)
        return None, (flat * (slope - (slope * flat).sum(-1, keepdim=True))).to(scores.dtype), None


def softer(
    scores: Float[Tensor, "row head query key"], pattern: Float[Tensor, "row head query key"], temperature: float, sinks: bool
) -> Float[Tensor, "row head query key"]:
    """softmax(scores / temperature) over the keys, with the sink's share taken off where there is one; float32 or wider."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if not sinks:
        return (scores / temperature).softmax(-1)
    mine, kept = scores.logsumexp(-1, keepdim=True), pattern.to(scores).sum(-1, keepdim=True)
    sink = mine - kept.log() + (1 - kept).clamp(min=torch.finfo(scores.dtype).tiny).log()
    total = torch.logaddexp((scores / temperature).logsumexp(-1, keepdim=True), sink / temperature)
    return (scores / temperature - total).exp()
