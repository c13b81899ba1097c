"""Linear readers: through which norm and which linear maps queries, keys, values and MLPs read the residual stream.

What stands between the stream and the outputs y = W N(x) of the maps is known in closed form, so that slopes at y give slopes at
the stream without another backward pass. Which columns of y are a head's is found, and the closed form proved against autograd,
on a probe, once per model; a layer of which it does not hold is read by autograd (`edge_slopes`), with the same numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchclamp.edits import Add
from patchclamp.errors import FamilyError
from patchclamp.models.inputs import token_batch
from patchclamp.models.invariants import rounding
from patchclamp.models.model import Model
from patchclamp.models.probe import probe_tokens
from patchclamp.models.scope import unobserved
from patchclamp.models.session import CALL, Call, Session
from patchclamp.models.stand_ins import RULED
from patchclamp.parts.edge_blocks import SLOTS, attention_reads, detached, mlp_reads, reads_at
from patchclamp.parts.edge_norms import NormSlope, Slot, close, slot_slopes, weight_of
from patchclamp.parts.slopes import frozen
from patchclamp.sites import Site


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """How a layer's attention reads the stream: `norm` (None: as it is), then linear maps, by slot."""

    norm: nn.Module | None
    slots: Mapping[str, Slot]


@dataclass(frozen=True, eq=False)
class MlpMap:
    """How a layer's MLP reads the stream: it enters by the input of `entry`; behind `norm`, where attention reads that norm, too."""

    norm: nn.Module | None
    entry: nn.Module


@dataclass(frozen=True, eq=False)
class Maps:
    """By layer; None where the closed form does not hold, or was not found."""

    attention: tuple[AttentionMap | None, ...]
    mlp: tuple[MlpMap | None, ...]


_MAPS: "WeakKeyDictionary[Model, Maps]" = WeakKeyDictionary()


def maps_of(model: Model) -> Maps:
    """The linear readers of a model, but those on whose backward pass rules are now (`models.backward`).

    One short forward pass and a few backward ones through single layers, once per model.
    """
    ruled = set(RULED.get())
    if model not in _MAPS:
        with frozen(model), unobserved():
            token = RULED.set(MappingProxyType({}))
            try:
                _MAPS[model] = _found(model)
            finally:
                RULED.reset(token)
    found = _MAPS[model]
    if not ruled:
        return found
    attention = [None if one is None or ruled & {id(one.norm), *(id(slot.module) for slot in one.slots.values())} else one
                 for one in found.attention]  # fmt: skip
    return Maps(tuple(attention), tuple(None if one is None or id(one.norm) in ruled else one for one in found.mlp))


@dataclass(frozen=True, eq=False)
class _Probe:
    """What a short run shows."""

    values: Mapping[Site, Tensor]
    inputs: Mapping[int, Tensor]
    """By id of a module: its (first) input."""
    outputs: Mapping[int, Tensor]
    calls: Mapping[int, Call]


def _found(model: Model) -> Maps:
    anatomy = model.anatomy
    readers = {layer: _readers(model, layer) for layer in range(model.layers)}
    seen = _probed(model, [module for found in readers.values() for module in found])
    attention, mlp = list[AttentionMap | None](), list[MlpMap | None]()
    for number, layer in enumerate(anatomy.layers):
        children = [child for child in layer.block.children() if id(child) in seen.inputs]
        try:
            found = _attention_map(model, number, children, seen)
            attention.append(found if found is not None and _attention_holds(model, number, found, seen) else None)
            entered = _mlp_map(model, number, children, seen)
            mlp.append(entered if entered is not None and _mlp_holds(model, number, entered, seen) else None)
        except FamilyError:  # a norm of another kind
            attention, mlp = [*attention, None][: number + 1], [*mlp, None][: number + 1]
    return Maps(tuple(attention), tuple(mlp))


def _readers(model: Model, number: int) -> list[nn.Module]:
    """The modules of a block that may read its residual stream: its own children, and attention's linear maps."""
    layer = model.anatomy.layers[number]
    behind = set(layer.output.modules())
    maps = [one for one in layer.attention.modules() if one not in behind and weight_of(one) is not None]
    return [*(child for child in layer.block.children() if child not in (layer.attention, layer.attn)), *maps]


def _probed(model: Model, modules: Sequence[nn.Module]) -> _Probe:
    """A short run with what modules take and give, what blocks are called with, and the streams, queries, keys and values."""
    anatomy, batch = model.anatomy, token_batch(probe_tokens(model.anatomy)).to(model.device)
    values, calls = dict[Site, Tensor](), dict[int, Call]()
    inputs, outputs = dict[int, Tensor](), dict[int, Tensor]()

    def keep(place: Site, value: Tensor) -> Tensor:
        values[place] = value
        if place.kind == "resid.pre":
            calls[place.layer or 0] = detached(CALL.get())
        return value

    places = {Site(kind, layer) for layer in range(model.layers) for kind in (*SLOTS, "resid.pre", "mlp")}
    places |= {reads_at(anatomy, Site("mlp", layer)) for layer in range(model.layers)}
    session = Session(anatomy, {place: partial(keep, place) for place in places})
    root = torch.zeros(model.width, device=model.device, dtype=model.dtype, requires_grad=True)
    with torch.enable_grad(), model.editing({Site("embed"): Add(root)}, batch), session.open():
        for module in dict.fromkeys(modules):
            session.before(module, partial(_alias, inputs, id(module)))
            session.after(module, partial(_keep, outputs, id(module)))
        model.forward(batch, columns=torch.zeros(1, dtype=torch.long, device=model.device))
    return _Probe(values, inputs, outputs, calls)


def _keep(kept: dict[int, Any], name: int, value: Any) -> Any:
    kept[name] = value
    return value


def _alias(kept: dict[int, Any], name: int, value: Any) -> Any:
    """Keep what a module is given, and give it a name of its own: slopes at it are then of this module's reading alone."""
    kept[name] = value.view_as(value) if isinstance(value, Tensor) else value
    return kept[name]


def _alike(one: Any, two: Tensor) -> bool:
    """Whether a module was given (or gave) these values, rows and positions perhaps as one."""
    if not isinstance(one, Tensor) or one.numel() != two.numel():
        return False
    scale = float(two.detach().abs().max())
    return float((one.detach().reshape(two.shape) - two.detach()).abs().max()) <= rounding(two.dtype) * scale


def _attention_map(model: Model, number: int, children: Sequence[nn.Module], seen: _Probe) -> AttentionMap | None:
    """The norm and the linear maps through which attention reads the stream; None where there are no such."""
    layer, stream = model.anatomy.layers[number], seen.values[Site("resid.pre", number)]
    behind = set(layer.output.modules())
    maps = [
        one for one in layer.attention.modules() if one not in behind and id(one) in seen.outputs and weight_of(one) is not None
    ]
    maps = [one for one in maps if seen.inputs[id(one)].shape[-1] == model.width]
    if not maps:
        return None
    given = seen.inputs[id(maps[0])]
    if not all(_alike(seen.inputs[id(one)], given) for one in maps):
        return None
    norm = None
    if not _alike(given, stream):
        norms = [one for one in children if _alike(seen.inputs[id(one)], stream) and _alike(seen.outputs[id(one)], given)]
        if not norms:
            return None
        norm = norms[0]
    slots = {slot: _slot(seen.values[Site(slot, number)], maps, seen.outputs) for slot in SLOTS}
    found = {slot: one for slot, one in slots.items() if one is not None}
    return AttentionMap(norm, found) if len(found) == len(SLOTS) and _apart(list(found.values())) else None


def _slot(
    value: Float[Tensor, "row position head inner"], maps: Sequence[nn.Module], outputs: Mapping[int, Tensor]
) -> Slot | None:
    """The columns of one map's output that each head's queries (keys, values) are made of; None where heads share any."""
    draw = torch.rand(value.shape, generator=torch.Generator().manual_seed(0)).to(value) + 0.5
    into = [outputs[id(module)] for module in maps]
    by_head: list[tuple[int, list[int]]] = []
    for head in range(value.shape[2]):
        slopes: Any = torch.autograd.grad((value * draw)[:, :, head].sum(), into, retain_graph=True, allow_unused=True)
        given = {at: one for at, one in enumerate(slopes) if one is not None}  # None: of a map that this head does not use
        used = [(at, (one != 0).flatten(0, -2).any(0).nonzero()[:, 0].tolist()) for at, one in given.items()]
        used = [(at, columns) for at, columns in used if columns]
        if len(used) != 1:
            return None
        by_head += used
    apart = len({column for _, columns in by_head for column in columns}) == sum(len(columns) for _, columns in by_head)
    if len({(at, len(columns)) for at, columns in by_head}) > 1 or not apart:
        return None
    return Slot(maps[by_head[0][0]], torch.tensor([columns for _, columns in by_head], device=value.device))


def _apart(slots: Sequence[Slot]) -> bool:
    """Whether no column makes two of queries, keys and values."""
    used = [(id(slot.module), column) for slot in slots for column in slot.columns.flatten().tolist()]
    return len(set(used)) == len(used)


def _mlp_map(model: Model, number: int, children: Sequence[nn.Module], seen: _Probe) -> MlpMap | None:
    """The module by whose input the MLP reads the stream, and a norm before it that attention reads, too."""
    layer, stream = model.anatomy.layers[number], seen.values[reads_at(model.anatomy, Site("mlp", number))]
    others = [child for child in children if child not in (layer.attn_post, layer.mlp_post)]
    first = [child for child in others if _alike(seen.inputs[id(child)], stream)]
    if not model.anatomy.parallel:
        return MlpMap(None, first[0]) if first else None
    maps = [one for one in layer.attention.modules() if id(one) in seen.inputs and weight_of(one) is not None]
    given = seen.inputs[id(maps[0])] if maps else stream
    for norm in first:
        if not maps or not _alike(seen.outputs[id(norm)], given):
            return MlpMap(None, norm)  # its own
    for norm in first:
        for child in others:
            if child is not norm and _alike(seen.inputs[id(child)], seen.outputs[id(norm)].detach()):
                return MlpMap(norm, child)
    return None


def _attention_holds(model: Model, number: int, found: AttentionMap, seen: _Probe) -> bool:
    """Whether the closed form gives what autograd gives: all heads of a slot together, and one of them."""
    stream = seen.values[Site("resid.pre", number)].detach()
    leaf = stream[None].clone().requires_grad_()
    with torch.enable_grad():
        reads = attention_reads(model.anatomy, number, seen.calls[number], 1, leaf)
    norm = None if found.norm is None else NormSlope.at(found.norm, stream)
    for slot, one in found.slots.items():
        value = seen.values[Site(slot, number)]
        draw = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value)
        for some in (list(range(value.shape[2])), [value.shape[2] - 1]):
            given = torch.zeros_like(draw)
            given[:, :, some] = draw[:, :, some]
            (own,) = torch.autograd.grad(reads[slot][0], leaf, given, retain_graph=True)
            (made,) = torch.autograd.grad(value, seen.outputs[id(one.module)], given, retain_graph=True)
            if not close(slot_slopes(one, some, norm, made).sum(0), own[0]):
                return False
    return True


def _mlp_holds(model: Model, number: int, found: MlpMap, seen: _Probe) -> bool:
    """The same of the MLP."""
    place = reads_at(model.anatomy, Site("mlp", number))
    stream, value = seen.values[place].detach(), seen.values[Site("mlp", number)]
    leaf = stream[None].clone().requires_grad_()
    draw = torch.randn(value.shape, generator=torch.Generator().manual_seed(2)).to(value)
    with torch.enable_grad():
        made = mlp_reads(model.anatomy, number, seen.calls[number], 1, leaf)[0]
    (own,) = torch.autograd.grad(made, leaf, draw)
    (slope,) = torch.autograd.grad(value, seen.inputs[id(found.entry)], draw, retain_graph=True)
    slope = slope.reshape(stream.shape)
    return close(slope if found.norm is None else NormSlope.at(found.norm, stream)(slope), own[0])
