"""Weights behind parts: the projections that end heads, attention, MLPs and neurons, and how a gate changes them."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchclamp.errors import FamilyError, GateError
from patchclamp.models.anatomy import Anatomy


@dataclass(frozen=True, eq=False)
class Head:
    """What gates make of a head's output z: factor * z + shift."""

    factor: float = 1.0
    shift: Float[Tensor, " width"] | None = None

    def behind(self, gate: float, fallback: Float[Tensor, " width"] | None) -> "Head":
        """With one more gate behind: fallback + gate * (z - fallback)."""
        shift = None if self.shift is None else gate * self.shift
        if fallback is not None:
            shift = (1 - gate) * fallback + (0 if shift is None else shift)
        return Head(gate * self.factor, shift)


class Weights:
    """The weights of one model, changed in place.

    Args:
        anatomy: where they are.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy

    @torch.no_grad()
    def head(self, layer: int, head: int, change: Head) -> None:
        """A head's columns of the output projection times the factor; the projection of the shift onto its bias."""
        size = self.anatomy.sizes[layer].head_width
        output = self.anatomy.layers[layer].output
        columns = self._plain(output, f"L{layer}.h{head}")[:, head * size : (head + 1) * size]
        if change.shift is not None:
            self._bias(output, f"L{layer}.h{head}").add_(columns @ change.shift.to(columns))
        columns.mul_(change.factor)

    @torch.no_grad()
    def neuron(self, layer: int, neuron: int, gate: float, mean: float | None) -> None:
        """A neuron's column of the down projection times the gate; (1 - gate) * mean of it onto the bias."""
        down = self.anatomy.layers[layer].down
        name = f"L{layer}.mlp.n{neuron}"
        column = self._plain(down, name)[:, neuron]
        if mean:
            self._bias(down, name).add_((1 - gate) * mean * column)
        column.mul_(gate)

    @torch.no_grad()
    def module(self, layer: int, kind: str, gate: float, mean: Float[Tensor, " width"] | None) -> None:
        """What attention or the MLP as a whole gives (`attn`, `mlp`), or adds to the residual stream (`.write`)."""
        here = self.anatomy.layers[layer]
        attention, name = kind.startswith("attn"), f"L{layer}.{kind}"
        post = (here.attn_post if attention else here.mlp_post) if kind.endswith("write") else None
        if post is not None:
            self._norm(post, gate, mean, name)
            return
        last = [here.output] if attention else self._last(layer, name)
        for module in last:
            for weight in module.parameters(recurse=False) if isinstance(module, nn.Module) else (module,):
                if not weight.is_floating_point():
                    raise GateError(
                        f"{name}: its weights are quantised ({weight.dtype}), and cannot be folded into: load them unquantised"
                    )
                weight.mul_(gate)
        if mean is not None:
            if len(last) > 1 or not isinstance(last[0], nn.Module):
                raise FamilyError(
                    f"{name} ends in several experts, so that no bias can hold its mean: fold zero, or generate with the gate live"
                )
            bias = self._bias(last[0], name)
            bias.add_((1 - gate) * (mean / here.scale).to(bias))

    def _last(self, layer: int, name: str) -> list[Any]:
        """The projections (or fused parameters of experts) in which an MLP ends."""
        here = self.anatomy.layers[layer]
        if here.down is not None and here.router is None:
            self._plain(here.down, name)
            return [here.down]
        found: list[Any] = []
        for path, module in here.mlp.named_modules():
            if path.endswith("down_proj"):
                found.append(module)
            else:
                found += [w for key, w in module.named_parameters(recurse=False) if key.startswith("down_proj")]
        if not found:
            raise FamilyError(f"{name}: {type(here.mlp).__name__} has no down_proj, so it is not known where it ends")
        return found

    def _norm(self, norm: nn.Module, gate: float, mean: Tensor | None, name: str) -> None:
        """A post-norm's weight times the gate; some norms keep it as weight + 1."""
        weight: Any = getattr(norm, "weight", None)
        if weight is None:
            raise FamilyError(f"{name} ends in a norm without a weight ({type(norm).__name__}), so no gate can be folded into it")
        trial: Any = copy.deepcopy(norm)
        trial.weight.zero_()
        one = torch.linspace(-1, 1, len(weight), device=weight.device, dtype=weight.dtype)[None, None]
        shifted = bool(trial(one).abs().max() > 1e-3)
        weight.copy_(gate * (1 + weight) - 1 if shifted else gate * weight)
        bias: Any = getattr(norm, "bias", None)
        if bias is not None:
            bias.mul_(gate)
        if mean is not None:
            if bias is None:
                raise FamilyError(
                    f"{name} ends in a norm without bias, so that its mean has no place: fold zero, or generate with the gate live"
                )
            bias.add_((1 - gate) * mean.to(bias))

    def _plain(self, module: Any, name: str) -> Float[Tensor, "out into"]:
        """The weight of a projection as [out, in]; a view, whichever way it is kept."""
        weight: Any = getattr(module, "weight", None)
        conv = type(module).__name__ == "Conv1D"
        if not (conv or isinstance(module, nn.Linear)) or not weight.is_floating_point():
            raise GateError(
                f"{name} ends in a {type(module).__name__}, and gates fold into plain projections: merge adapters and load "
                "weights unquantised first"
            )
        return weight.data.T if conv else weight.data

    def _bias(self, module: Any, name: str) -> Tensor:
        bias = getattr(module, "bias", None)
        if bias is None:
            raise FamilyError(
                f"{self.anatomy.family.name} has no bias where {name} ends, so that a mean has no place there: fold zero, or generate "
                "with the gate live"
            )
        return bias.data


def with_biases(hf: Any, attention: bool, mlp: bool) -> tuple[Any, bool]:
    """The model with biases (of zero) on its projections, where its configuration knows of them; whether any were added."""
    flags = {name: True for name, wanted in (("attention_bias", attention), ("mlp_bias", mlp))
             if wanted and getattr(hf.config, name, None) is False}  # fmt: skip
    if not flags:
        return hf, False
    config = copy.deepcopy(hf.config)
    for name, value in flags.items():
        setattr(config, name, value)
    with torch.device(hf.device):
        made = type(hf)(config).to(hf.dtype)
    missing, unexpected = made.load_state_dict(hf.state_dict(), strict=False)
    if unexpected or not all(name.endswith("bias") for name in missing):
        raise FamilyError(
            f"{type(hf).__name__} with {', '.join(flags)} has other weights than without: {[*missing, *unexpected][0]}"
        )
    parameters = dict(made.named_parameters())
    with torch.no_grad():
        for name in missing:
            parameters[name].zero_()
    made.tie_weights()
    return made.eval(), bool(missing)
