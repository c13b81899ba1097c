"""Fold: gates made part of the weights, so that a plain checkpoint computes what the gated model does."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.change.weights import Head, Weights, with_biases
from patchclamp.errors import FamilyError, GateError
from patchclamp.models.model import Model
from patchclamp.parts import Fallback, Gated
from patchclamp.parts.fallbacks import Mean
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

HEADS, MODULES = ("head", "z", "v"), ("attn", "attn.write", "mlp", "mlp.write", "neuron")
ORDER = {"v": 0, "z": 1, "head": 1, "neuron": 2, "attn": 3, "mlp": 3, "attn.write": 4, "mlp.write": 4}
"""What is folded first: an MLP's own gate comes behind those of its neurons, a head's behind those of its values."""
BOUND = 1e-4
"""Of the largest logit: by how much logits may differ at most; in half precision, 8 unit roundings where that is more."""


@dataclass(frozen=True, eq=False)
class Folded:
    """A model whose weights compute what gates did.

    Args:
        model: the new model; the one that was gated is left as it was.
        gates: part -> gate, of what was folded.
        fallback: what closed gates passed.
        biases: whether biases were added to hold the means.
        difference: largest difference of its logits from the gated model's on the prompts of the proof.
        scale: the largest logit there.
    """

    model: Model
    gates: dict[str, float]
    fallback: str
    biases: bool
    difference: float
    scale: float


def fold(parts: Gated, gates: Float[Tensor, "setting #example #position part"], fallback: Fallback, prove: Batch) -> Folded:
    """A copy of the model whose weights compute what these gates do, on every prompt.

        a head (z) or a key/value head's values:  columns of the output projection times g, bias + (1 - g) W fallback
        attention or MLP as a whole:              weights and bias of its last projection (or post-norm) times g, bias + (1 - g) fallback
        a neuron:                                 its column of the down projection times g, bias + (1 - g) W fallback

    Gates above 1 (amplify) and below 0 (reverse) fold as those between. Where means are folded and projections have no bias,
    the copy's configuration is asked for them (`attention_bias`, `mlp_bias`).

    Args:
        parts: whose gates; no part at a position.
        gates: one setting, the same for every example and position.
        fallback: zero, or means over every token ("mean:all").
        prove: prompts on which the copy is compared with the gated model.

    Cost: the memory of a second model; two forward passes over `prove`.

    Raises:
        GateError: what cannot be a constant change of weights: a position, a query or pattern, a fallback that depends on the
            prompt, an adapter or quantised weights.
        FamilyError: means where the architecture has no place for a bias; or the copy's logits are not the gated model's.
    """
    wanted = _wanted(parts, gates)
    values = _constants(fallback, [site for site, _ in wanted])
    twin, biases = copy.deepcopy(parts.model.hf), False
    if fallback.kind != "zero" and wanted:
        twin, biases = with_biases(twin, any(s.kind in (*HEADS, "attn", "attn.write") for s, _ in wanted),
                                   any(s.kind in ("mlp", "mlp.write", "neuron") for s, _ in wanted))  # fmt: skip
    model = Model.load(twin, tokenizer=parts.model.tokenizer)
    weights, heads = Weights(model.anatomy), dict[tuple[int, int], Head]()
    for site, gate in sorted(wanted, key=lambda one: (ORDER[one[0].kind], one[0])):
        assert site.layer is not None
        if site.kind in HEADS:
            for number in _heads_of(site, model):
                place = _of_head(values, site, number, model)
                heads[site.layer, number] = heads.get((site.layer, number), Head()).behind(gate, place)
        else:
            if site.kind in ("attn", "attn.write"):
                _flush(weights, heads, site.layer)
            _module(weights, site, gate, values)
    _flush(weights, heads)
    return _proved(parts, gates, fallback, prove, model, wanted, biases)


def _flush(weights: Weights, heads: dict[tuple[int, int], Head], layer: int | None = None) -> None:
    """Write what is known of heads, of one layer or of all, into their output projections."""
    for at, number in [key for key in heads if layer in (None, key[0])]:
        weights.head(at, number, heads.pop((at, number)))


def _wanted(parts: Gated, gates: Tensor) -> list[tuple[Site, float]]:
    if tuple(gates.shape) != (1, 1, 1, len(parts.labels)):
        raise GateError(
            f"gates of one setting, the same for every example and position, fold into weights: [1, 1, 1, {len(parts.labels)}], "
            f"not {list(gates.shape)}"
        )
    found = [(site, float(gate)) for site, gate in zip(parts.labels, gates.flatten().tolist(), strict=True) if gate != 1]
    for site, _ in found:
        if site.position is not None:
            raise GateError(f"{site} is gated at one position, and weights are the same at all: fold the whole part, or generate")
        if site.kind not in (*HEADS, *MODULES):
            raise GateError(
                f"{site} is no linear end of a computation, so its gate cannot be folded into weights: heads, values "
                "(L2.kv1.v), attention, MLPs and neurons can. `generate` runs any gate live"
            )
    return found


def _constants(fallback: Fallback, sites: Sequence[Site]) -> dict[Site, Tensor] | None:
    """What closed parts pass, by place; None where that is zero."""
    if fallback.kind == "zero":
        return None
    if not isinstance(fallback, Mean):
        raise GateError(
            f"the fallback {fallback.kind!r} depends on the prompt and cannot be folded into weights: use zero or mean:all"
        )
    if fallback.apart and sites:
        raise GateError(f"means by {fallback.by} depend on the prompt and cannot be folded into weights: use mean:all")
    return dict(fallback.total)


def _heads_of(site: Site, model: Model) -> list[int]:
    """The heads that a part's gate acts on."""
    assert site.layer is not None
    sizes = model.anatomy.sizes[site.layer]
    if site.index is None:
        return list(range(sizes.heads))
    group = sizes.heads // sizes.kv_heads
    return list(range(site.index * group, (site.index + 1) * group)) if site.kind == "v" else [site.index]


def _of_head(values: dict[Site, Tensor] | None, site: Site, head: int, model: Model) -> Tensor | None:
    """The fallback of one head: of z, or of the values that it mixes (patterns sum to 1)."""
    if values is None:
        return None
    assert site.layer is not None
    place = Site("v" if site.kind == "v" else "z", site.layer)
    sizes = model.anatomy.sizes[site.layer]
    row = head // (sizes.heads // sizes.kv_heads) if site.kind == "v" else head
    return values[place].reshape(-1, values[place].shape[-1])[row]


def _module(weights: Weights, site: Site, gate: float, values: dict[Site, Tensor] | None) -> None:
    assert site.layer is not None
    if site.kind == "neuron":
        place = Site("neuron", site.layer)
        if site.index is None:
            raise GateError(f"{site} is a whole layer of neurons: gate {Site('mlp', site.layer)} instead, or single neurons")
        weights.neuron(site.layer, site.index, gate, None if values is None else float(values[place].flatten()[site.index]))
        return
    # as a part an MLP's gate sits on what it adds to the residual stream
    place = Site("mlp.write", site.layer) if site.kind == "mlp" else site
    mean = None if values is None else values[place].flatten()
    weights.module(site.layer, place.kind, gate, mean)


def _proved(
    parts: Gated, gates: Tensor, fallback: Fallback, prove: Batch, model: Model, wanted: list[tuple[Site, float]], biases: bool
) -> Folded:
    """The copy beside the gated model; raises where they differ."""
    batch = prove.to(parts.model.device)
    gated, folded = parts.model.run(batch, parts.edits(gates, fallback, batch)).float(), model.run(batch).float()
    difference = float((gated - folded).abs()[batch.mask].max())
    scale = float(gated.abs()[batch.mask].max())
    if not difference <= max(BOUND, 8 * torch.finfo(parts.model.dtype).eps) * scale:
        raise FamilyError(
            f"{parts.model.name}: with gates folded into weights, logits differ from the gated model's by {difference:.3g} (the "
            f"largest is {scale:.3g}), so nothing is given back. Its parts are not where {model.family.name} keeps them"
        )
    return Folded(model, {str(site): gate for site, gate in wanted}, fallback.kind, biases, difference, scale)
