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


def check_distinct(place: Site, sites: Sequence[Site]) -> None:
    """Refuse two names of one thing (`L9.h6` and `L9.h6.z`): their gates would be one gate twice."""
    seen: dict[tuple[int | None, int | str | None], Site] = {}
    for site in sites:
        twin = seen.setdefault((site.index, site.position), site)
        if twin is not site:
            raise GateError(f"{twin} and {site} are gates on the same values, those of {place}: leave one of them out")


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
    units = _units(place, sites, sizes)
    gate = _every(place, units, _spread(units, sites, gates, batch), sizes)
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
    units: Sequence[int | None],
    sites: Sequence[Site],
    gates: Float[Tensor, "setting row #position gate"],
    batch: Batch | None,
) -> Float[Tensor, "setting row #position unit"]:
    """Gates of parts at positions as gates at every column, one per unit (1 where no part stands).

    Gates of nested parts multiply: of `L9.z` and `L9.h6`, of `L9.h6` and `L9.h6@-1`.
    """
    if [(site.index, site.position) for site in sites] == [(unit, None) for unit in units]:
        return gates
    layers: dict[tuple[bool, int | str | None], list[int]] = {}
    for number, site in enumerate(sites):
        layers.setdefault((site.index is None, site.position), []).append(number)
    shut = [True] * len(sites) if gates.requires_grad else (gates != 1).flatten(0, 2).any(0).tolist()
    spread: Tensor | None = None
    for (whole, position), numbers in layers.items():
        if not any(shut[number] for number in numbers):
            continue
        split = gates[..., numbers]
        if position is not None:
            assert batch is not None  # edits() has checked
            where = batch.columns(position).to(gates.device)[None, :, :, None]
            split = torch.where(where, split, torch.ones_like(split))
        if not whole and [sites[number].index for number in numbers] != units:
            split = _put(split, [units.index(sites[number].index) for number in numbers], len(units))
        spread = split if spread is None else spread * split
    return torch.ones_like(gates[..., :1]).expand(-1, -1, -1, len(units)) if spread is None else spread


def _units(place: Site, sites: Sequence[Site], sizes: Sequence[Sizes]) -> list[int | None]:
    """The units of a place that any of the sites gates: all of them where one gates the place as a whole, beside single ones."""
    found = list(dict.fromkeys(site.index for site in sites))
    if None not in found or found == [None] or place.layer is None:
        return found
    return list(range(_count(place, sizes[place.layer])))


def _every(
    place: Site, units: Sequence[int | None], gates: Float[Tensor, "setting row #position unit"], sizes: Sequence[Sizes]
) -> Float[Tensor, "setting row #position every"]:
    """Gates of some units of a place as gates of all of them."""
    if list(units) == [None] or place.layer is None:
        return gates
    total = _count(place, sizes[place.layer])
    return gates if list(units) == list(range(total)) else _put(gates, [unit or 0 for unit in units], total)


def _put(gates: Float[Tensor, "*many unit"], where: Sequence[int], total: int) -> Float[Tensor, "*many every"]:
    """Gates at some of `total` places, 1 at the others."""
    full = torch.ones(*gates.shape[:-1], total, device=gates.device, dtype=gates.dtype)
    return full.index_copy(-1, torch.tensor(where, device=gates.device), gates)


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
