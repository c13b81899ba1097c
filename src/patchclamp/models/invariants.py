"""What must hold between the values that one short pass shows, if a family's row is right about a model.

Each invariant gives its worst deviation and where that is. Elementwise ones are relative to the sum of the absolute values
that were added, so that a few huge coordinates do not hide the rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.models.anatomy import Anatomy
from patchclamp.models.attention import rests
from patchclamp.models.recording import head_writes, output_bias
from patchclamp.models.scope import unobserved
from patchclamp.sites import Site

Values = Mapping[Site, Tensor]


@dataclass(frozen=True)
class Worst:
    """The largest deviation, and the site where it is."""

    measured: float = 0.0
    where: str = ""

    def __or__(self, other: "Worst") -> "Worst":
        return other if not other.measured <= self.measured else self  # NaN counts as largest


def rounding(dtype: torch.dtype) -> float:
    """Relative rounding of a few operations in this precision; many modules compute in float32 whatever the model's."""
    return max(8 * torch.finfo(dtype).eps, 64 * torch.finfo(torch.float32).eps)


def relative(one: Tensor, two: Tensor, size: Tensor) -> float:
    """Largest |one - two| / size, elementwise."""
    return float(((one - two).abs() / size.clamp(min=torch.finfo(torch.float32).tiny)).max())


def stream(anatomy: Anatomy, values: Values) -> Worst:
    """Residual stream before a block + what its modules write = residual stream after it = before the next."""
    worst = Worst()
    for layer in range(len(anatomy.layers)):
        before, attn, mlp, after = (
            values[Site(kind, layer)].double() for kind in ("resid.pre", "attn.write", "mlp.write", "resid.post")
        )
        size = before.abs() + attn.abs() + mlp.abs()
        worst |= Worst(relative(before + attn + mlp, after, size), f"L{layer}")
        if not anatomy.parallel:
            worst |= Worst(relative(values[Site("resid.mid", layer)].double() + mlp, after, size), f"L{layer}.resid.mid")
        if layer + 1 < len(anatomy.layers):
            worst |= Worst(relative(values[Site("resid.pre", layer + 1)].double(), after, size), f"L{layer + 1}.resid.pre")
    return worst


def mixing(anatomy: Anatomy, values: Values) -> Worst:
    """Pattern @ v = z, query head h reading key/value head h // group."""
    worst = Worst()
    for layer in range(len(anatomy.layers)):
        pattern, v, z = (values[Site(kind, layer)].double() for kind in ("pattern", "v", "z"))
        v = v.repeat_interleave(pattern.shape[1] // v.shape[2], 2)
        mixed, size = (torch.einsum("bhqk,bkhd->bqhd", pattern, x) for x in (v, v.abs()))
        worst |= Worst(relative(mixed, z, size), f"L{layer}")
    return worst


def sums(anatomy: Anatomy, values: Values) -> Worst:
    """Rows of patterns are not negative and sum to one (to less, where a sink or a gate takes a share).

    None of it is ahead of the query, unless the model looks both ways.
    """
    worst = Worst()
    for layer in range(len(anatomy.layers)):
        pattern = values[Site("pattern", layer)].double()
        total = pattern.sum(-1)
        off = (total - 1).clamp(min=0) if rests(anatomy.layers[layer].attention) else (total - 1).abs()
        ahead = pattern.triu(1).abs().max() if anatomy.causal else pattern.new_zeros(())
        worst |= Worst(float(torch.stack([off.max(), ahead, -pattern.min()]).max()), f"L{layer}")
    return worst


def heads(anatomy: Anatomy, values: Values) -> Worst:
    """The writes of a layer's heads + the output bias = what attention writes."""
    worst = Worst()
    for number, layer in enumerate(anatomy.layers):
        z, attn, write = (values[Site(kind, number)] for kind in ("z", "attn", "attn.write"))
        with unobserved():
            parts = head_writes(layer, z, attn)
            total = parts.sum(2) + output_bias(layer, z, attn)
        worst |= Worst(_of_largest(total, write, parts.abs().sum(2)), f"L{number}")
    return worst


def neurons(anatomy: Anatomy, values: Values) -> Worst:
    """The down projection of the neurons = the MLP's output."""
    worst = Worst()
    for number, layer in enumerate(anatomy.layers):
        if layer.down is not None:
            with unobserved():
                out = layer.down(values[Site("neuron", number)])
            worst |= Worst(_of_largest(out, values[Site("mlp", number)], out), f"L{number}")
    return worst


def _of_largest(one: Tensor, two: Tensor, size: Tensor) -> float:
    """Largest difference as a share of the largest entry: products with weights round at the scale of what they cancel."""
    one, two = one.double(), two.double()
    scale: Float[Tensor, ""] = size.abs().double().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((one - two).abs().max() / scale)


@dataclass(frozen=True)
class Rule:
    """An invariant of one observed pass."""

    name: str
    about: str
    check: Callable[[Anatomy, Values], Worst]
    through_weights: bool = False
    """Whether it puts values through the model's own weights once more: quantised ones round."""

    @property
    def at_load(self) -> bool:
        """Whether a model that breaks it is not loaded at all (the others take longer, and allow for quantised weights)."""
        return not self.through_weights


RULES: tuple[Rule, ...] = (
    Rule("residual stream is the sum", "before a block + what attention and MLP write = after it = before the next", stream),
    Rule("pattern @ v = z", "what the pattern mixes is what the output projection reads", mixing),
    Rule("patterns sum to one", "rows sum to one (less with a sink), nothing ahead of a causal query", sums),
    Rule("heads and bias are attention", "the heads' writes and the output bias sum to what attention writes", heads, True),
    Rule("neurons make the MLP", "the down projection of the neurons is the MLP's output", neurons),
)
