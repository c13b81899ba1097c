"""Closed forms of the backward pass from linear maps of a norm of the residual stream: what edges' slopes are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from patchclamp.models.invariants import rounding
from patchclamp.models.norms import scale_of
from patchclamp.models.scope import unobserved

Slopes = Float[Tensor, "destination row position width"]


@dataclass(frozen=True, eq=False)
class Slot:
    """The columns of a linear map's output that make queries, keys or values: by head, as many for each."""

    module: nn.Module
    columns: Int[Tensor, "head inner"]


@dataclass(frozen=True, eq=False)
class NormSlope:
    """A norm N(x) = gain * (x - c) / s + bias at some x, backwards.

    J^T g = (u - unit * mean(u * unit)) / s with unit = (x - c) / s and u = gain * g, less its mean in a LayerNorm (c the mean of x).
    """

    gain: Float[Tensor, " width"]
    unit: Float[Tensor, "row position width"]
    divisor: Float[Tensor, "row position 1"]
    centred: bool

    @classmethod
    def at(cls, norm: nn.Module, stream: Float[Tensor, "row position width"]) -> "NormSlope":
        """Of a norm that reads `stream`; raises `FamilyError` where it is neither a LayerNorm nor an RMS norm."""
        width, kind = stream.shape[-1], torch.promote_types(stream.dtype, torch.float32)
        scale = scale_of(norm, width)
        stream = stream.to(kind)
        probe = torch.ones(width, device=stream.device, dtype=stream.dtype)
        probe[::2] = -1.5  # no coordinate is the mean
        with torch.no_grad(), unobserved():
            weight = next(iter(norm.parameters()), stream)
            given = torch.stack([probe, torch.zeros_like(probe)])[None].to(weight.dtype)
            out, bias = norm(given)[0].to(kind)
            centred = probe - probe.mean() if scale.centred else probe
            gain = _exact(norm, (out - bias) * scale(probe).to(kind) / centred)
            divisor = scale(stream).to(kind)
            unit = (stream - stream.mean(-1, keepdim=True) if scale.centred else stream) / divisor
        return cls(gain, unit, divisor, scale.centred)

    @classmethod
    def between(
        cls, norm: nn.Module, stream: Float[Tensor, "row position width"], other: Float[Tensor, "row position width"]
    ) -> "NormSlope":
        """The multiplier of the norm's difference between two streams, in place of its slope at one (`models.differences`).

        With a and b what the two are multiplied with (1 / s each) and x, x' the two (less their means in a LayerNorm): the
        product gives (a + b) / 2, the reciprocal root of the mean square -(a b)^2 / (a + b) * (x + x'). That is the form
        above with unit = (x + x') a b / (a + b) and s = 2 / (a + b), and the slope itself where x = x'.
        """
        one, two = cls.at(norm, stream), cls.at(norm, other)
        total = one.divisor + two.divisor  # a b / (a + b) = 1 / (s + s')
        unit = (one.unit * one.divisor + two.unit * two.divisor) / total
        return cls(one.gain, unit, 2 * one.divisor * two.divisor / total, one.centred)

    def matrix(self, weight: Float[Tensor, "head inner width"]) -> Float[Tensor, "head inner width"]:
        """A linear map behind the norm, so that its slopes are u."""
        weight = weight.to(self.gain.dtype) * self.gain
        return weight - weight.mean(-1, keepdim=True) if self.centred else weight

    def __call__(self, slope: Float[Tensor, "row position width"]) -> Float[Tensor, "row position width"]:
        """J^T slope."""
        slope = slope.to(self.gain.dtype) * self.gain
        slope = slope - slope.mean(-1, keepdim=True) if self.centred else slope
        return (slope - self.unit * (slope * self.unit).mean(-1, keepdim=True)) / self.divisor


def _exact(norm: nn.Module, gain: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
    """The gain itself, where it is a weight (or 1 + that) up to rounding in the norm's own precision."""
    weight = getattr(norm, "weight", None)
    if isinstance(weight, Tensor):
        for own in (weight.to(gain), 1 + weight.to(gain)):
            if close(gain, own.to(weight.dtype)):
                return own
    return gain


def slot_slopes(
    slot: Slot,
    heads: Sequence[int],
    norm: NormSlope | None,
    slope: Float[Tensor, "row position outer"],
) -> Slopes:
    """d metric / d stream as each head's queries (keys, values) read it, from the slope at the linear map's outputs.

    W_h^T slope_h, through the norm backwards: (u - unit * mean(u * unit)) / s, where mean(u * unit) is taken before W^T, in the
    head's own width.
    """
    columns, weight = slot.columns[list(heads)], weight_of(slot.module)
    assert weight is not None
    given, chosen = _taken(slope, columns, 2), _taken(weight, columns, 0)  # [row, position, head, inner], [head, inner, width]
    kind = torch.promote_types(slope.dtype, torch.float32)
    given, shape = given.to(kind), given.shape[:2]
    if norm is None:
        return torch.bmm(given.permute(2, 0, 1, 3).flatten(1, 2), chosen.to(kind)).unflatten(1, shape)
    given, matrix = given / norm.divisor[..., None], norm.matrix(chosen)
    out = torch.bmm(given.permute(2, 0, 1, 3).flatten(1, 2), matrix).unflatten(1, shape)
    unit = torch.einsum("rpw,hew->rphe", norm.unit, matrix)
    along = (given * unit).sum(-1) / norm.unit.shape[-1]
    return out.addcmul_(norm.unit[None], along.permute(2, 0, 1)[..., None], value=-1)


def _taken(value: Tensor, columns: Int[Tensor, "head inner"], axis: int) -> Tensor:
    """The columns on an axis, as two axes; a view where they stand side by side."""
    first, count = int(columns[0, 0]), columns.numel()
    if int(columns[-1, -1]) == first + count - 1 and bool((columns.flatten().diff() == 1).all()):
        return value.narrow(axis, first, count).unflatten(axis, columns.shape)
    return value.index_select(axis, columns.flatten()).unflatten(axis, columns.shape)


def weight_of(module: nn.Module) -> Float[Tensor, "outer width"] | None:
    """A linear map's weights, or None where it is not just that (adapters, quantised weights, weights that accelerate moves)."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point or "_hf_hook" in vars(module):
        return None
    if isinstance(module, nn.Linear) and not list(module.children()):
        return weight
    return weight.T if type(module).__name__ == "Conv1D" else None


def close(one: Tensor, two: Tensor) -> bool:
    """Whether two computations of one thing agree, the second's precision allowed for."""
    allowed = 8 * rounding(two.dtype) * float(two.abs().max())
    return float((one - two.to(one.dtype)).abs().max()) <= allowed
