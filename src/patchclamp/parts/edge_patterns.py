"""What closing edges into queries and keys makes of attention weights, by the model's own softmax (AtP*'s QK fix, on edges).

For an edge s>q of a head, queries are those of a stream without what s wrote (its fallback in its place), keys the run's own; for
an edge s>k the other way round. Every edge by itself: attention of its layer is computed once more for each source and slot.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.models.session import CALL, Call, Session
from patchclamp.parts.edge_blocks import SLOTS, attention_patterns, attention_reads, detached
from patchclamp.parts.edge_gates import Readers, written_at
from patchclamp.parts.fallbacks import Values
from patchclamp.parts.slopes import frozen
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

if TYPE_CHECKING:
    from patchclamp.parts.edges import Edges

Rows = Float[Tensor, "row head query key"]
ASKED = ("q", "k")
"""What softmax stands between and the values."""


def through_softmax(
    parts: "Edges", batch: Batch, fallback: Values, slopes: Sequence[Mapping[int, Rows]]
) -> dict[int, Float[Tensor, "rule example"]]:
    """By number of an edge into queries or keys: <A - A', slope> for each of `slopes`.

    A are the run's attention weights, A' those with the edge closed; all queries change at once (they do not matter to each
    other), of keys those that the source is read at.

    Args:
        parts: the edges.
        batch: the prompts.
        fallback: what closed edges carry, by place of the sources.
        slopes: by layer, what attention weights are multiplied with.

    Cost: one forward pass; for each source and slot, its layer's norm, maps and attention weights once more.
    """
    batch = batch.to(parts.model.device)
    found: dict[int, Tensor] = {}
    readers = [one for one in parts.readers if any(site.kind in ASKED for site in one.destinations)]
    with frozen(parts.model), torch.no_grad():
        run = _run(parts, batch, [one.place.layer or 0 for one in readers])
        for one in readers:
            for group in _groups(parts, one):
                _add(parts, batch, one, group, run, fallback, slopes, found)
    return found


@dataclass(frozen=True)
class _Group:
    """Edges that can be read together: one slot, written at one position."""

    slot: str
    position: int | str | None
    edges: tuple[tuple[int, int], ...]
    """(number of the edge, number of its source among the readers')."""


def _groups(parts: "Edges", readers: Readers) -> list[_Group]:
    made: dict[tuple[str, int | str | None], list[tuple[int, int]]] = {}
    for destination, (edges, sources) in zip(readers.destinations, readers.edges, strict=True):
        if destination.kind in ASKED:
            for number, source in zip(edges, sources, strict=True):
                where = written_at(parts.labels[number]) if destination.kind == "k" else None
                made.setdefault((destination.kind, where), []).append((number, source))
    return [_Group(slot, position, tuple(edges)) for (slot, position), edges in made.items()]


@dataclass(frozen=True, eq=False)
class _Run:
    """The model's own run: what stands at places, and what blocks are called with."""

    kept: Values
    calls: Mapping[int, Call]


def _run(parts: "Edges", batch: Batch, layers: Sequence[int]) -> _Run:
    kept, calls = dict[Site, Tensor](), dict[int, Call]()

    def keep(place: Site, value: Tensor) -> Tensor:
        if place.kind == "resid.pre":
            calls[place.layer or 0] = detached(CALL.get())
        kept[place] = value.detach()
        return value

    places = {Site(kind, layer) for layer in layers for kind in (*SLOTS, "resid.pre", "pattern")} | {*parts.sources.sites}
    with Session(parts.model.anatomy, {place: partial(keep, place) for place in places}).open():
        parts.model.forward(batch, columns=torch.zeros(1, dtype=torch.long, device=parts.model.device))
    return _Run(kept, calls)


def _add(
    parts: "Edges", batch: Batch, readers: Readers, group: _Group, run: _Run, fallback: Values,
    slopes: Sequence[Mapping[int, Rows]], found: dict[int, Tensor],
) -> None:  # fmt: skip
    """The edges of a group, some sources after others."""
    layer, sources, anatomy = readers.place.layer or 0, parts.sources, parts.model.anatomy
    stream, own = run.kept[readers.place], {slot: run.kept[Site(slot, layer)] for slot in SLOTS}
    kv, pattern = anatomy.sizes[layer].kv_heads, run.kept[Site("pattern", layer)]
    wanted = {source for _, source in group.edges}
    where = None if group.position is None else batch.columns(group.position).to(stream)[..., None]
    most = max(1, sources.memory // (8 * (6 * stream.numel() + 4 * pattern.numel())))
    for place, (numbers, units) in readers.by_place(sources).items():
        mine = [(number, unit) for number, unit in zip(numbers, units, strict=True) if number in wanted]
        for start in range(0, len(mine), most):
            some = mine[start : start + most]
            apart = sources.difference(place, [unit for _, unit in some], fallback[place], sources.value(place, run.kept))
            streams = stream + (apart if where is None else apart * where).to(stream)
            made = attention_reads(anatomy, layer, run.calls[layer], 1, streams)
            given = {slot: made[slot] if slot == group.slot else own[slot].expand(len(some), *own[slot].shape) for slot in SLOTS}
            change = pattern.double() - attention_patterns(anatomy, layer, run.calls[layer], 1, given).double()
            for at, (number, _) in enumerate(some):
                by_query = torch.stack([(change[at] * slope[layer].double()).sum(-1) for slope in slopes])
                for edge in (edge for edge, source in group.edges if source == number):
                    found[edge] = _of(parts, batch, by_query, edge, kv)


def _of(
    parts: "Edges", batch: Batch, by_query: Float[Tensor, "rule row head query"], edge: int, kv: int
) -> Float[Tensor, "rule example"]:
    """One edge's share of what all heads of a layer would make of it: its head's (of keys, those that read them), its queries'."""
    target = parts.labels[edge].target
    index = target.index or 0
    mine = by_query if target.kind == "q" else by_query.unflatten(2, (kv, -1)).sum(3)
    chosen = mine[:, :, index]
    if target.position is not None:
        chosen = chosen * batch.columns(target.position).to(chosen)
    by_row = chosen.sum(-1)
    return by_row.new_zeros(len(by_row), len(batch)).index_add(1, batch.example, by_row)
