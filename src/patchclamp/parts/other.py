"""Another model's values as the fallback: what the base model, or an earlier checkpoint, makes of the same prompt."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from patchclamp.errors import GateError
from patchclamp.models.anatomy import Layer
from patchclamp.models.model import Model
from patchclamp.parts.fallbacks import Record, Values
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch


@dataclass(frozen=True, eq=False)
class Other:
    """The same places' values in another model's run of the same prompt: the base model's, an earlier checkpoint's.

    A gate says then how much of what that model lacks a part carries: with every gate closed, what the parts write is the other
    model's, and only what has no gate (norms, the unembedding, the embedding where it is open) is the model's own.
    """

    record: Record
    model: Model
    kind: str = "model"
    off_distribution: bool = False
    kept: "WeakKeyDictionary[Batch, Values]" = field(default_factory=WeakKeyDictionary["Batch", "Values"])

    def at(self, batch: Batch | None) -> Values:
        """The other model's values on the batch. One forward pass of it per batch, kept."""
        if batch is None:
            raise GateError(
                "the fallback 'model' has no value on new tokens: the other model does not run beside this one. Use mean or zero"
            )
        if batch not in self.kept:
            self.kept[batch] = self.record(batch)
        return self.kept[batch]

    def since(self, batch: Batch) -> int:
        """0."""
        return 0


def check_alike(model: Model, other: Model) -> None:
    """Refuse another model whose parts are not those of this one, and name what differs.

    Raises:
        GateError: another family, number of layers, width, vocabulary, or sizes of a layer.
    """
    facts = {
        "family": tuple(str(one.anatomy.config.model_type) for one in (model, other)),
        "layers": (model.layers, other.layers),
        "width": (model.width, other.width),
        "vocabulary": (int(model.anatomy.config.vocab_size), int(other.anatomy.config.vocab_size)),
    }
    pairs = zip(model.anatomy.sizes, other.anatomy.sizes, strict=False)
    facts |= {f"layer {number}": (str(mine), str(theirs)) for number, (mine, theirs) in enumerate(pairs)}
    for name, (mine, theirs) in facts.items():
        if mine != theirs:
            raise GateError(
                f"{other.name} cannot stand in for parts of {model.name}: its {name} is {theirs}, and here it is {mine}. "
                "Give a model of the same anatomy: the base model, or another checkpoint"
            )


def warn_of_unseen(places: Sequence[Site], model: Model, other: Model) -> None:
    """Say which weights differ that no gate sees: a head's gate stands before the output projection, a neuron's before the down
    projection, an expert's on its routing weight, so that what differs behind it stays the model's own."""
    kinds = {(place.layer, place.kind) for place in places}
    for name, words, before, behind in UNSEEN:
        differ: list[int] = []
        for layer, (mine, theirs) in enumerate(zip(model.anatomy.layers, other.anatomy.layers, strict=True)):
            gates = any((layer, kind) in kinds for kind in before) and not any(
                (layer, kind) in kinds for kind in (*behind, "resid.mid", "resid.post")
            )
            if gates and _differ(_weights(mine, name), _weights(theirs, name)):
                differ.append(layer)
        if differ:
            shown = ", ".join(map(str, differ[:8])) + (" ..." if len(differ) > 8 else "")
            warnings.warn(
                f"the {words[0]} of layers {shown} differ between {model.name} and {other.name}, and the gates there stand "
                f"{words[1]}: what these changed no gate carries (add L*.{behind[0]})",
                stacklevel=4,
            )


UNSEEN = (
    ("output", ("output projections", "before them"), ("q", "k", "v", "scores", "pattern", "z"), ("attn.write", "attn")),
    ("down", ("down projections", "before them"), ("neuron",), ("mlp", "mlp.write")),
    ("experts", ("experts", "on their routing weights"), ("expert", "router"), ("mlp", "mlp.write")),
)
"""What stands behind gates, in words, before which kinds of site, and at which a gate would see it."""


def _weights(layer: Layer, name: str) -> list[torch.nn.Parameter]:
    """The weights behind a gate: of a projection, or of all experts without their router."""
    if name != "experts":
        module: torch.nn.Module | None = getattr(layer, name)
        return [] if module is None else list(module.parameters())
    own = set[int]() if layer.router is None else {id(weight) for weight in layer.router.parameters()}
    return [weight for weight in layer.mlp.parameters() if id(weight) not in own]


def _differ(one: Sequence[torch.nn.Parameter], two: Sequence[torch.nn.Parameter]) -> bool:
    return any(not torch.equal(mine, theirs.to(mine)) for mine, theirs in zip(one, two, strict=True))
