"""The first run: the streams that receivers read once a sender has its fallback."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from patchclamp.edits import Put
from patchclamp.models.editing import Edit, Seen
from patchclamp.models.model import Model
from patchclamp.models.recording import Recorder
from patchclamp.parts import Edges, Fallback, Gated, gated
from patchclamp.parts.edge_blocks import Streams, reads_at
from patchclamp.parts.edge_sources import Sources, place_of
from patchclamp.sites import Edge, Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch


@dataclass(frozen=True)
class Route:
    """One setting: a sender, and the receivers that read what follows from it."""

    sender: Site
    receivers: tuple[Site, ...]


@runtime_checkable
class First(Protocol):
    """A first run, by what may follow from the sender."""

    def streams(self, batch: Batch, senders: Sequence[Site]) -> Mapping[Site, Streams]:
        """By place, what receivers there read: a stream for each sender."""
        ...


def first_run(model: Model, routes: Sequence[Route], between: str, fallback: str, fit: Examples | None, memory: int) -> First:
    """What makes the streams that receivers read, by what may follow from the sender."""
    if between == "frozen":
        return _Frozen.of(model, routes, fallback, fit, memory)
    return _Running.of(model, routes, fallback, fit, memory, frozen_heads=between == "mlps")


@dataclass(frozen=True, eq=False)
class _Frozen:
    """The first run where nothing follows from the sender but its own write: no run at all."""

    sources: Sources
    fallback: Fallback
    places: tuple[Site, ...]

    @classmethod
    def of(cls, model: Model, routes: Sequence[Route], fallback: str, fit: Examples | None, memory: int) -> "_Frozen":
        edges = Edges(model, [Edge(route.sender, site) for route in routes for site in route.receivers], memory)
        places = tuple(sorted({place_of(model.anatomy, route.sender) for route in routes}))
        return cls(Sources(model, places, memory // 4), edges.fallback(fallback, fit), _places(model, routes))

    def streams(self, batch: Batch, senders: Sequence[Site]) -> Mapping[Site, Streams]:
        """By place, the own stream with each sender's fallback in place of its value."""
        sources, values = self.sources, self.fallback.at(batch)
        model, own = sources.model, sources.own(batch)
        recorder = Recorder(model.anatomy, self.places)
        with recorder.session().open():
            model.forward(batch, columns=torch.zeros(1, dtype=torch.long, device=model.device))
        added, written = list[Tensor](), {place: sources.value(place, own) for place in sources.places}
        for sender in senders:
            place = place_of(model.anatomy, sender)
            added.append(sources.difference(place, [sender.index or 0], values[place], written[place])[0])
        apart = torch.stack(added)
        return {place: recorder.kept[place] + apart.to(recorder.kept[place]) for place in self.places}


class _Kept(Exception):
    """The last stream is kept: the rest of the model need not run."""


@dataclass(frozen=True, eq=False)
class _Running:
    """The first run where MLPs, or everything, follows from the sender."""

    parts: Gated
    fallback: Fallback
    places: tuple[Site, ...]
    frozen_heads: bool

    @classmethod
    def of(
        cls, model: Model, routes: Sequence[Route], fallback: str, fit: Examples | None, memory: int, frozen_heads: bool
    ) -> "_Running":
        parts = Gated(model, sorted({route.sender for route in routes}), memory)
        return cls(parts, parts.fallback(fallback, fit), _places(model, routes), frozen_heads)

    def streams(self, batch: Batch, senders: Sequence[Site]) -> Mapping[Site, Streams]:
        """By place, the streams of runs in which each sender has its fallback."""
        model, kept, last = self.parts.model, dict[Site, Tensor](), self.places[-1]
        gates = self.parts.open(len(senders))
        for number, sender in enumerate(senders):
            gates[number, ..., self.parts.index[sender]] = 0
        edits: dict[Site, list[Edit]] = {}
        if self.frozen_heads:
            frozen = gated(model, ["L*.z"]).record(batch)
            edits = {place: [Put(z)] for place, z in frozen.items()}
        for site, edit in self.parts.edits(gates, self.fallback, batch).items():
            edits.setdefault(site, []).extend([edit] if isinstance(edit, Edit) else edit)

        for place in self.places:
            edits.setdefault(place, []).append(_Keep(place, kept, place == last))
        with suppress(_Kept):
            model.forward(batch, edits, settings=len(senders))
        return {place: kept[place].unflatten(0, (len(senders), -1)) for place in self.places}


@dataclass(frozen=True, eq=False)
class _Keep:
    """Keeps a stream; the last one ends the run."""

    place: Site
    kept: dict[Site, Tensor]
    last: bool

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        self.kept[self.place] = value
        if self.last:
            raise _Kept
        return value


def _places(model: Model, routes: Sequence[Route]) -> tuple[Site, ...]:
    """Where the streams are that receivers read, in forward order."""
    return tuple(sorted({reads_at(model.anatomy, site) for route in routes for site in route.receivers}))
