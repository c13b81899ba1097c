"""Edits: functions of a value put at a site."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.models.editing import Seen
from patchclamp.sites import Site


@dataclass(frozen=True)
class Zero:
    """Zero: the value a part would have if it wrote nothing. Off-distribution for most parts."""

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        return torch.zeros_like(value)


@dataclass(frozen=True, eq=False)
class Put:
    """Put a value there (patching), broadcast over rows: another prompt's, a mean, anything.

    Rows are settings x batch rows, so a [row, ...] value of the batch is repeated over settings.
    """

    replacement: Tensor

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        return _fit(self.replacement, value, seen).expand_as(value)


@dataclass(frozen=True, eq=False)
class Add:
    """Add `strength * direction` (steering)."""

    direction: Tensor
    strength: float = 1.0

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        return value + self.strength * _fit(self.direction, value, seen)


@dataclass(frozen=True)
class Scale:
    """Multiply by a number."""

    factor: float

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        return value * self.factor


@dataclass(frozen=True)
class Clamp:
    """Hold every coordinate between two bounds."""

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise GateError(f"clamp between {self.low} and {self.high}: the first must not be above the second")

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        return value.clamp(self.low, self.high)


@dataclass(frozen=True, eq=False)
class Project:
    """Project onto the span of orthonormal `basis` [rank, width] (keep=True), or remove that span (keep=False)."""

    basis: Float[Tensor, "rank width"]
    keep: bool = False

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        basis = self.basis.to(value)
        inside = value @ basis.T @ basis
        return inside if self.keep else value - inside


@dataclass(frozen=True, eq=False)
class Reconstruct:
    """Replace the value by what a function makes of it: an autoencoder, a low-rank map."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        return self.function(value)


@dataclass(frozen=True, eq=False)
class Mix:
    """The gate: `value' = fallback + gate * (value - fallback)`, as `torch.lerp(fallback, value, gate)`.

    Exact at gate 0 and gate 1 in every dtype, and differentiable in the gate. `gate` is [setting x row, ...] or broadcastable
    to the value; `fallback` broadcastable to it as in `Put`.
    """

    gate: Tensor
    fallback: Tensor
    settings: int | None = None
    """How many settings run here, where that is not as many as in the whole pass."""

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        gate, rows = self.gate.to(value.dtype), self.fallback.shape[0]
        settings = seen.settings if self.settings is None else self.settings
        if self.fallback.dim() == value.dim() and 1 < rows < len(value) == rows * settings:
            # settings side by side: the fallback is broadcast over them, not copied for each
            gate = gate.unflatten(0, (-1, rows)) if len(gate) == len(value) else gate
            fallback = self.fallback.to(device=value.device, dtype=value.dtype)
            return _between(fallback, value.unflatten(0, (-1, rows)), gate, seen.site).flatten(0, 1)
        return _between(_fit(self.fallback, value, seen).expand_as(value), value, gate, seen.site)


def _between(fallback: Tensor, value: Tensor, gate: Tensor, site: Site) -> Tensor:
    """lerp; of scores, what the model has masked (minus infinity, or the lowest number there is) stays masked."""
    if site.kind != "scores":
        return torch.lerp(fallback, value, gate)
    masked = value < torch.finfo(value.dtype).min / 4
    return torch.where(masked, value, torch.lerp(fallback.masked_fill(masked, 0), value.masked_fill(masked, 0), gate))


def _fit(replacement: Tensor, value: Tensor, seen: Seen) -> Tensor:
    replacement = replacement.to(device=value.device, dtype=value.dtype)
    if replacement.dim() == value.dim() and 1 < replacement.shape[0] < value.shape[0]:
        if value.shape[0] != replacement.shape[0] * seen.settings:
            raise GateError(f"a value for {replacement.shape[0]} rows was put at {seen.site}, where {value.shape[0]} rows run")
        return replacement.repeat(seen.settings, *[1] * (value.dim() - 1))
    padded = (1,) * (value.dim() - replacement.dim()) + tuple(replacement.shape)
    if len(padded) != value.dim() or any(have not in (1, want) for have, want in zip(padded, value.shape, strict=True)):
        shapes = f"{tuple(replacement.shape)} at {seen.site}, whose value is {tuple(value.shape)}"
        hint = " (new tokens run one by one: put it there on='prompt' only)" if seen.phase == "generation" else ""
        raise GateError(f"shapes do not fit: {shapes}{hint}")
    return replacement
