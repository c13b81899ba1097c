"""From gates to edits: where each part's gate acts, and the gates of one place as one `Mix`."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.edits import Mix
from patchclamp.errors import GateError
from patchclamp.models.anatomy import Sizes
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

BY_HEAD = ("scores", "pattern")  # [row, head, query, key]; all others are [row, position, ...]
WHOLE = ("k", "v")  # under a cache, what attention reads is every column


def acts_on(site: Site) -> Site:
    """The whole-layer site that a part's gate acts on: a head's is z, an MLP's what it adds to the residual stream."""
    if site.kind == "head":
        return Site("z", site.layer)
    return Site("mlp.write", site.layer) if site.kind == "mlp" and site.index is None else replace(site.place, position=None)


def mix(
    place: Site,
    sites: Sequence[Site],
    gates: Float[Tensor, "setting row #position gate"],
    value: Tensor,
    batch: Batch | None,
    columns: slice,
    sizes: Sequence[Sizes],
) -> Mix:
    """The gates of the parts `sites`, which act on `place`, as one edit of a run of some columns; `value` is the fallback's."""
    by_head, settings = place.kind in BY_HEAD, len(gates)
    gate = _units(place, sites, _spread(sites, gates, batch), sizes)
    columns = slice(0, columns.stop) if place.kind in WHOLE else columns
    gate = gate[:, :, columns] if gate.shape[2] > 1 else gate
    axis = 2 if by_head else 1
    if value.dim() > axis and value.shape[axis] > 1:
        value = value[:, :, columns, : columns.stop] if by_head else value[:, columns]
    gate = gate.flatten(0, 1)
    if by_head:
        gate = gate.transpose(1, 2)[..., None]
    elif place.kind in ("q", "k", "v", "z"):
        gate = gate[..., None]
    return Mix(gate, value, settings)


def _spread(
    sites: Sequence[Site], gates: Float[Tensor, "setting row #position gate"], batch: Batch | None
) -> Float[Tensor, "setting row #position unit"]:
    """Gates of parts at positions as gates at every column (1 where no part stands), one per unit."""
    places: dict[int | str | None, list[int]] = {}
    for number, site in enumerate(sites):
        places.setdefault(site.position, []).append(number)
    if set(places) == {None}:
        return gates
    assert batch is not None  # edits() has checked
    units = sorted({site.index for site in sites}, key=lambda index: -1 if index is None else index)
    if any([sites[number].index for number in numbers] != units for numbers in places.values()):
        raise GateError("parts at one place must have the same positions each")
    spread: Tensor | None = None
    shut = [True] * len(sites) if gates.requires_grad else (gates != 1).flatten(0, 2).any(0).tolist()
    for position, numbers in places.items():
        if not any(shut[number] for number in numbers):
            continue
        split = gates[..., numbers]
        if position is not None:
            where = batch.columns(position).to(gates.device)[None, :, :, None]
            split = torch.where(where, split, torch.ones_like(split))
        spread = split if spread is None else spread * split
    return torch.ones_like(gates[..., : len(units)]) if spread is None else spread


def _units(
    place: Site, sites: Sequence[Site], gates: Float[Tensor, "setting row #position gate"], sizes: Sequence[Sizes]
) -> Float[Tensor, "setting row #position unit"]:
    """Gates of some units of a place as gates of all of them."""
    units = list(dict.fromkeys(site.index for site in sites))
    if units == [None] or place.layer is None:
        return gates
    total = _count(place, sizes[place.layer])
    if units == list(range(total)):
        return gates
    full = torch.ones(*gates.shape[:3], total, device=gates.device, dtype=gates.dtype)
    return full.index_copy(3, torch.tensor(units, device=gates.device), gates)


def _count(place: Site, sizes: Sizes) -> int:
    if place.kind in ("k", "v"):
        return sizes.kv_heads
    counts = {"neuron": sizes.neurons, "expert": sizes.experts, "router": sizes.experts}
    return counts.get(place.kind, sizes.heads) or 0


def windows(labels: Sequence[Site], width: int) -> Float[Tensor, "setting 1 1 part"]:
    """Gates, one setting per part: closed for it and for the same unit and position in the layers around it.

    `width` layers in all, centred, cut at the ends; of an even window the longer half is below.
    """
    gates = torch.ones(len(labels), 1, 1, len(labels))
    alike: dict[tuple[object, ...], list[int]] = {}
    for number, site in enumerate(labels):
        alike.setdefault((site.kind, site.index, site.position), []).append(number)
    for siblings in alike.values():
        for number in siblings:
            for other in siblings:
                distance = (labels[other].layer or 0) - (labels[number].layer or 0)
                if -(width // 2) <= distance <= (width - 1) // 2:
                    gates[number, ..., other] = 0
    return gates
