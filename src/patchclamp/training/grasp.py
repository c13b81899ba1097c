"""GRASP: find what a fine-tuning picked up beside its task, without labels, and fine-tune again with that projected out of the gradients.

    found = weight_directions(before, naive, rank=1)            # or drift_directions(before, naive, unrelated prompts)
    train(again, data, training, out, clamps=[Grasp(found.basis)])

Paper: Unsupervised Identification and Removal of Spurious Correlations During Fine-Tuning (P003). A summary of its abstract
alone was at hand: a latent direction is found without labels in a naive fine-tuning, and projected out of the gradients of a second
one. What is ours: how the direction is found (two ways, below), which weights are projected (those that write into the residual stream), that AdamW's
update is projected and not its gradient alone, and the variant `stream`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchclamp.errors import TrainingError
from patchclamp.models.editing import Edits, Seen
from patchclamp.models.model import Model
from patchclamp.training.clamp import Clamp
from patchclamp.training.clamps.schedule import ALWAYS, Schedule
from patchclamp.training.data import Rows, tensors_digest
from patchclamp.training.directions import orthonormal

STREAM = ("embed", "L*.attn.write", "L*.mlp.write")
"""What adds to the residual stream."""


@dataclass(frozen=True, eq=False)
class Writer:
    """A trained parameter whose outputs are added to the residual stream.

    Args:
        name: in the model.
        parameter: a matrix, or a bias.
        axis: the axis that counts the residual stream's coordinates (Linear: 0; GPT-2's Conv1D and embeddings: 1; LoRA's B: 0).
    """

    name: str
    parameter: nn.Parameter
    axis: int

    def along(self, value: Float[Tensor, "..."], basis: Float[Tensor, "width rank"]) -> Float[Tensor, "..."]:
        """U U^T x of a tensor shaped like the parameter, in its orientation."""
        u = basis.to(value)
        return u @ (u.T @ value) if self.axis == 0 else (value @ u) @ u.T


def writers(model: Model) -> tuple[Writer, ...]:
    """The trained parameters that write into the residual stream: output projections of attention and MLPs with their biases (of
    an adapted one LoRA's B, for W' - W = s B A lies in the columns of B), embeddings of tokens and positions. A matrix that embeds
    and unembeds is one of them.

    Raises:
        TrainingError: where a write is no linear map of a parameter (a norm behind the module or the embedding, fused experts),
            and where nothing that writes is trained.
    """
    found: dict[int, Writer] = {}
    for number, layer in enumerate(model.anatomy.layers):
        if layer.attn_post is not None or layer.mlp_post is not None:
            raise TrainingError(
                f"{model.family.name} has a norm behind L{number}'s modules, so no update of a matrix can be kept out of a direction "
                "of the residual stream: use Grasp(..., stream=True, weights=False), which stops the gradient instead"
            )
        if layer.down is None or layer.router is not None:
            raise TrainingError(
                f"L{number} is a mixture of experts with fused matrices: use Grasp(..., stream=True, weights=False), which stops the "
                "gradient at what the layer adds"
            )
        for module in (layer.output, layer.down):
            found |= {id(one.parameter): one for one in _of(model, module)}
    found |= {id(one.parameter): one for one in _embeddings(model)}
    if not found:
        raise TrainingError(
            f"no weight of {model.name} that writes into the residual stream is trained: there is nothing to project"
        )
    return tuple(found.values())


def _of(model: Model, module: nn.Module) -> Iterator[Writer]:
    """A projection's own weights, or those of the adapter that it wears."""
    base: Any = getattr(module, "base_layer", module)
    axis = 1 if type(base).__name__ == "Conv1D" else 0
    given: list[tuple[Any, int]] = [(base.weight, axis), (getattr(base, "bias", None), 0)]
    given += [(factor.weight, 0) for factor in getattr(module, "lora_B", nn.ModuleDict()).values()]
    yield from (Writer(_name(model, p), p, a) for p, a in given if p is not None and p.requires_grad)


def _embeddings(model: Model) -> Iterator[Writer]:
    """What is added up before the first block."""
    anatomy = model.anatomy
    inside = {id(m) for layer in anatomy.layers for m in layer.block.modules()}
    ends = {id(m) for end in (anatomy.norm, anatomy.unembed) for m in end.modules()}
    for name, module in anatomy.hf.named_modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if not own or id(module) in inside or id(module) in ends:
            continue
        if not isinstance(module, nn.Embedding) or module.embedding_dim != model.width:
            raise TrainingError(
                f"{name} stands before the first block and is no table of vectors of the residual stream: freeze it "
                "(requires_grad_(False)), or use Grasp(..., stream=True, weights=False)"
            )
        yield Writer(_name(model, own[0]), own[0], 1)


def _name(model: Model, parameter: nn.Parameter) -> str:
    return next(name for name, p in model.hf.named_parameters() if p is parameter)


@dataclass(frozen=True, eq=False, repr=False)
class Grasp(Clamp):
    """Training that adds nothing along some directions U [width, rank] (orthonormal) of the residual stream:

        gradient(W) <- gradient(W) - s U U^T gradient(W)              of every W that writes into the stream (`writers`)
        W(t + 1)    <- W(t + 1) - s U U^T (W(t + 1) - W(t))           behind the optimizer's update (`updates`)

    The second line is needed wherever the optimizer is no plain gradient descent: AdamW divides each entry by the root of its own
    second moment, which turns a projected gradient back towards U; decoupled weight decay shrinks what lies along U, too. With it,
    at s = 1, U^T W stays as it was to rounding, whatever the optimizer does; without it, it does not (a test measures both). Of LoRA
    U^T (W' - W) = s U^T B A, which is 0 as long as U^T B is, which begins at 0.

    Writers that write along U already may still be driven harder by weights that read (queries, keys, values, up and gate
    projections, norms), which this leaves free. `stream` stops that route as a reason to learn: the gradient that arrives at
    whatever is added to the stream loses its component along U, so that no weight before it changes for the sake of U:

        backward of h + f:   d/df <- d/df - s U U^T d/df

    The last norm, and an unembedding of its own, are behind the stream; they are not held by either.

    Args:
        basis: U, or any full set of directions: it is made orthonormal.
        updates: project updates, and not gradients alone.
        stream: stop the gradient along U at what is added to the stream.
        weights: hold the writers; False: `stream` alone, which any architecture takes.
        schedule: when, and how strongly (s).

    Cost: two products (writer x rank) and a copy of the writers per update; with `stream` hooks at every module and two products
        (tokens x rank).

    Raises:
        TrainingError: directions that depend on each other or are none, of another width than the model's; nothing asked for;
            what `writers` raises; a LoRA whose B has a component along U to begin with.
    """

    basis: Float[Tensor, "width rank"]
    updates: bool = True
    stream: bool = False
    weights: bool = True
    schedule: Schedule = ALWAYS
    _held: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]], init=False)

    def __post_init__(self) -> None:
        if not (self.stream or self.weights):
            raise TrainingError("Grasp with neither weights nor stream was asked, which holds nothing: choose one")
        object.__setattr__(self, "basis", orthonormal(self.basis))

    def __repr__(self) -> str:
        said = tensors_digest({"basis": self.basis})[:16]
        held = ", ".join(f"{name}={getattr(self, name)}" for name in ("updates", "stream", "weights"))
        return f"Grasp({tuple(self.basis.shape)}:{said}, {held}, {self.schedule!r})"

    def edits(self, model: Model, step: int, rows: Rows) -> Edits:
        """With `stream`: the same values, with less of a gradient."""
        self._require_width(model)
        strength = self.schedule(step)
        if not (self.stream and strength):
            return {}
        return {site: Blind(self.basis, strength) for site in model.find(STREAM)}

    @torch.no_grad()
    def gradients(self, model: Model, step: int) -> None:
        """Project gradients, and keep what the weights are."""
        strength = self.schedule(step)
        if not (self.weights and strength):
            return
        found = writers(model)
        for one in found:
            if one.parameter.grad is not None:
                one.parameter.grad.sub_(one.along(one.parameter.grad, self.basis), alpha=strength)
        if self.updates:
            self._held["weights"] = [one.parameter.detach().clone() for one in found]

    @torch.no_grad()
    def updated(self, model: Model, steps: int) -> None:
        """Project the update."""
        if steps == 0:
            self._require_width(model)
            self._require_clean(model)
            return
        held = self._held.pop("weights", None)
        for one, before in zip(writers(model) if held else (), held or (), strict=True):
            one.parameter.sub_(one.along(one.parameter - before, self.basis), alpha=self.schedule(steps - 1))

    def _require_width(self, model: Model) -> None:
        if self.basis.shape[0] != model.width:
            raise TrainingError(f"directions of {self.basis.shape[0]} numbers were given, and {model.name} is {model.width} wide")

    def _require_clean(self, model: Model) -> None:
        for one in writers(model) if self.weights else ():
            if "lora_B" in one.name and float(one.along(one.parameter.detach(), self.basis).abs().max()) > 1e-5:
                raise TrainingError(
                    f"{one.name} writes along the directions to begin with, and its A would go on to change how much: begin with a new "
                    "adapter, or fold this one in first (merge_and_unload)"
                )


@dataclass(frozen=True, eq=False)
class Blind:
    """The value as it is; backward, its gradient without `strength` times its component along the basis."""

    basis: Float[Tensor, "width rank"]
    strength: float

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        if not value.requires_grad:
            return value
        u = self.basis.to(value)
        along = self.strength * ((value @ u) @ u.T)
        return value - (along - along.detach())  # the bracket is exactly 0: not a bit of the value changes
