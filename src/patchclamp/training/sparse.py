"""Fine-tuning of a task's own neurons: which they are by how often they are active, how tasks share them, and a clamp that lets them alone learn.

    found = task_neurons(frequencies(model, texts))          # sites: L0.mlp.n5, ...
    train(model, data, training, out, clamps=[Only(found)])

Paper: Tan et al. 2024, Neuron Specialization: Leveraging intrinsic task modularity for multilingual machine translation,
https://arxiv.org/abs/2404.11201 (P139). There masks act in the forward pass of feed-forward layers, too, and all else goes on learning;
here the model computes as it is, and nothing but the neurons learns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.models.backward import gated_mlps
from patchclamp.models.model import Inputs, Model
from patchclamp.sites import Site
from patchclamp.training.clamp import Clamp
from patchclamp.training.clamps.places import Sites, plain
from patchclamp.training.clamps.slices import Slice, slices
from patchclamp.units.table import layers_with, recorded

Frequencies = Mapping[int, Float[Tensor, " neuron"]]
"""By layer, how often each neuron is active."""


def frequencies(model: Model, inputs: Inputs) -> Frequencies:
    """Share of real tokens at which each neuron is active, by layer.

    Active is a value above 0 where the MLP has an activation alone (ReLU, GELU: where its input is above 0). Where the activation is
    multiplied with something (SwiGLU and its like) every sign is as likely, and active is a value whose size is above the root mean
    square of the layer's values.

    Args:
        model: any whose neurons are no fused experts'.
        inputs: texts of one task (batch, texts, token ids).

    Cost: one forward pass (two where an MLP is gated).

    Raises:
        MeasureError: the model has no neurons to watch, with the reason.
    """
    gated, levels = gated_mlps(model.anatomy), dict[int, float]()
    layers = [site.layer or 0 for site in layers_with(model, "neuron")]
    if any(gated[layer] for layer in layers):
        square, count = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0)
        for batch, values in recorded(model, inputs, ["neuron"]):
            for site, value in values.items():
                real = value[batch.mask].double()
                square[site.layer or 0] += float(real.square().sum())
                count[site.layer or 0] += real.numel()
        levels = {layer: (square[layer] / count[layer]) ** 0.5 for layer in layers if gated[layer]}
    active: dict[int, Tensor] = {}
    tokens = 0
    for batch, values in recorded(model, inputs, ["neuron"]):
        tokens += int(batch.mask.sum())
        for site, value in values.items():
            layer, real = site.layer or 0, value[batch.mask]
            on = (real.abs() > levels[layer] if layer in levels else real > 0).sum(0).cpu()
            active[layer] = active.get(layer, torch.zeros_like(on)) + on
    return {layer: count.double() / tokens for layer, count in active.items()}


def task_neurons(frequency: Frequencies, threshold: float = 0.95) -> tuple[str, ...]:
    """A task's neurons: in each layer the fewest, the most frequent first, with

        sum of their frequencies >= threshold * sum of all neurons' frequencies

    Args:
        frequency: of `frequencies`.
        threshold: the paper's is .95; lower ones choose fewer.

    Returns:
        Sites, L0.mlp.n5 and so on. Of a layer that is never active: none.

    Raises:
        TrainingError: a threshold outside 0 to 1.
    """
    if not 0 < threshold <= 1:
        raise TrainingError(f"neurons that hold {threshold:g} of all activity were asked: give a share above 0, at most 1")
    found: list[str] = []
    for layer, shares in sorted(frequency.items()):
        ordered = shares.double().sort(descending=True, stable=True)
        before = ordered.values.cumsum(0) - ordered.values
        wanted = (before < threshold * ordered.values.sum() * (1 - 1e-12)) & (ordered.values > 0)
        found += [f"L{layer}.mlp.n{i}" for i in sorted(ordered.indices[wanted].tolist())]
    return tuple(found)


def random_neurons(model: Model, like: Sequence[str], seed: int = 0) -> tuple[str, ...]:
    """As many neurons of each layer as a set has, drawn from all of that layer: what a set is compared with."""
    draw, found = torch.Generator().manual_seed(seed), list[str]()
    for layer, count in sorted(_counts(like).items()):
        drawn = torch.randperm(_size(model, layer), generator=draw)[:count]
        found += [f"L{layer}.mlp.n{i}" for i in sorted(drawn.tolist())]
    return tuple(found)


def overlap(model: Model, sets: Mapping[str, Sequence[str]]) -> pl.DataFrame:
    """How much tasks share their neurons, in pairs (a task with itself, too).

        jaccard = |A and B| / |A or B|,   chance = the same from expected sizes: with E = sum over layers of |A_l| |B_l| / n_l neurons
        in both, were each layer's drawn at random, chance = E / (|A| + |B| - E)

    Args:
        model: whose neurons they are.
        sets: by task, sites of neurons (`task_neurons`).

    Returns:
        one, two, both (neurons in both), jaccard, chance.

    Raises:
        TrainingError: a set without neurons, or a site that is none.
    """
    rows: list[tuple[str, str, int, float, float]] = []
    for one, two in combinations_with_replacement(sets, 2):
        a, b = set(sets[one]), set(sets[two])
        if not a or not b:
            raise TrainingError(
                f"the overlap of {one} ({len(a)} neurons) and {two} ({len(b)}) was asked: give sets that have some"
            )
        of_a, of_b = _counts(sets[one]), _counts(sets[two])
        expected = sum(of_a[layer] * of_b[layer] / _size(model, layer) for layer in of_a.keys() & of_b.keys())
        rows.append((one, two, len(a & b), len(a & b) / len(a | b), expected / (len(a) + len(b) - expected)))
    names = {"one": pl.String, "two": pl.String, "both": pl.Int64, "jaccard": pl.Float64, "chance": pl.Float64}
    return pl.DataFrame(rows, schema=names, orient="row")


@dataclass(frozen=True, repr=False)
class Only(Clamp):
    """Training in which nothing learns but the weights of some parts: all others stay bit for bit as they are, whatever weight decay,
    momentum and the optimizer's moments would do, and their gradients count as 0 (also in the norm that is clipped).

    Args:
        parts: as in `clamps.Freeze`: neurons (L0.mlp.n5: its row into the hidden layer with its bias, its column out of it), heads,
            modules; patterns, or several.

    Cost: a copy of all trained weights at each update. The optimizer keeps moments of all of them (`tensors.learning` spares those
        of whole tensors).

    Raises:
        SiteError: when it runs: no such part, with the reason.
        TrainingError: no parts; when it runs: a part has no weights of its own, or none that is trained.

    Paper: https://arxiv.org/abs/2404.11201.
    """

    parts: Sites
    _held: dict[str, dict[int, Tensor]] = field(default_factory=dict[str, dict[int, Tensor]], init=False, compare=False)

    def __post_init__(self) -> None:
        if not plain(self.parts):
            raise TrainingError("no parts were given that alone should learn: name some, such as L0.mlp.n5")

    def __repr__(self) -> str:
        return f"Only({', '.join(plain(self.parts))})"

    @torch.no_grad()
    def gradients(self, model: Model, step: int) -> None:
        """Keep what the weights are, and the gradients of the parts alone."""
        trained, pieces = self._trained(model)
        self._held["weights"] = {id(one): one.detach().clone() for one in trained}
        kept = [(piece, piece.of(piece.parameter.grad)) for piece in pieces if piece.parameter.grad is not None]
        for one in trained:
            if one.grad is not None:
                one.grad.zero_()
        for piece, gradient in kept:
            assert piece.parameter.grad is not None
            piece.put(piece.parameter.grad, gradient)

    @torch.no_grad()
    def updated(self, model: Model, steps: int) -> None:
        """Put all weights back, but those of the parts."""
        held = self._held.pop("weights", None)
        if held is None:
            return
        trained, pieces = self._trained(model)
        new = [(piece, piece.of(piece.parameter)) for piece in pieces]
        for one in trained:
            one.copy_(held[id(one)])
        for piece, value in new:
            piece.put(piece.parameter.data, value)

    def _trained(self, model: Model) -> tuple[list[Tensor], list[Slice]]:
        """Parameters that are trained, and the parts' slices of them."""
        pieces = [piece for piece in slices(model, plain(self.parts)) if piece.parameter.requires_grad]
        if not pieces:
            raise TrainingError(
                f"no weight of {', '.join(plain(self.parts))} requires a gradient: there is nothing that may learn"
            )
        return [one for one in model.hf.parameters() if one.requires_grad], pieces


def _counts(sites: Sequence[str]) -> dict[int, int]:
    """Neurons by layer."""
    found: dict[int, int] = {}
    for text in sorted(set(sites)):
        site = Site.parse(text)
        if site.kind != "neuron" or site.layer is None or site.index is None:
            raise TrainingError(f"{text} is no neuron: give sites such as L0.mlp.n5")
        found[site.layer] = found.get(site.layer, 0) + 1
    return found


def _size(model: Model, layer: int) -> int:
    """Neurons of a layer."""
    model.anatomy.require(Site("neuron", layer))
    return int(model.anatomy.sizes[layer].neurons or 0)
