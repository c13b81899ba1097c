"""From gates on edges to what destinations read: stream + sum over sources of (1 - gate) * (fallback - value)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.models.editing import Seen
from patchclamp.parts.edge_reading import Changed, Streams, User, reads_at
from patchclamp.parts.edge_sources import Sources, place_of
from patchclamp.parts.fallbacks import Values
from patchclamp.sites import Edge, Site


@dataclass(frozen=True)
class Readers:
    """The destinations that read the stream at one place, and all sources that any of them has a gate for.

    Args:
        place: of the stream.
        destinations: who reads it.
        sources: in forward order.
        edges: by destination, the numbers of its edges and, beside each, the number of its source.
    """

    place: Site
    destinations: tuple[Site, ...]
    sources: tuple[Site, ...]
    edges: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    def by_place(self, sources: Sources) -> dict[Site, tuple[list[int], list[int]]]:
        """By the sources' places: their numbers here, and the numbers of their heads (0 for what has none)."""
        found: dict[Site, tuple[list[int], list[int]]] = {}
        for number, source in enumerate(self.sources):
            numbers, units = found.setdefault(place_of(sources.model.anatomy, source), ([], []))
            numbers.append(number)
            units.append(source.index or 0)
        return found


def readers_of(labels: Sequence[Edge], sources: Sources) -> tuple[Readers, ...]:
    """The edges, sorted by the place of the stream that they carry something to."""
    at: dict[Site, dict[Site, list[int]]] = {}
    for number, edge in enumerate(labels):
        at.setdefault(reads_at(sources.model.anatomy, edge.target), {}).setdefault(edge.target, []).append(number)
    made: list[Readers] = []
    for place, by_target in sorted(at.items()):
        found = sorted({labels[number].source for numbers in by_target.values() for number in numbers})
        index = {source: number for number, source in enumerate(found)}
        edges = tuple(
            (tuple(numbers), tuple(index[labels[number].source] for number in numbers)) for numbers in by_target.values()
        )
        made.append(Readers(place, tuple(by_target), tuple(found), edges))
    return tuple(made)


@dataclass(frozen=True, eq=False)
class Closed:
    """Gates on the edges into one place, as `Changed`: who reads which stream, and how the streams are made.

    Args:
        readers: the destinations.
        sources: what sources write.
        fallback: by place of the sources.
        shares: [read, row, position, source], 1 - gate.
        settings: by read, the setting.
        users: who reads.
    """

    readers: Readers
    sources: Sources
    fallback: Values
    shares: Float[Tensor, "read #row #position source"]
    settings: tuple[int, ...]
    users: Sequence[User]

    @property
    def reads(self) -> tuple[Site, ...]:
        return tuple(site for place in self.readers.by_place(self.sources) for site in self.sources.seen(place))

    def streams(self, own: Float[Tensor, "setting row position width"], seen: Seen) -> Streams:
        """own + sum over sources of (1 - gate) * (fallback - value), value being what the source writes in this very run."""
        total = own[torch.tensor(self.settings, device=own.device)]
        shares = self.shares.to(own)
        for place, (numbers, units) in self.readers.by_place(self.sources).items():
            here = shares[..., numbers]
            used = (here != 0).flatten(1, 2)
            reads = used.flatten(1).any(1).nonzero()[:, 0].tolist() if not shares.requires_grad else list(range(len(here)))
            if not reads:
                continue
            needed = list(range(len(units))) if shares.requires_grad else used.flatten(0, 1).any(0).nonzero()[:, 0].tolist()
            run = {site: seen.values[site] for site in self.sources.seen(place)}
            origins = [self.settings[read] for read in reads]
            apart = self.sources.mixed(
                place, [units[at] for at in needed], here[reads][..., needed], self.fallback[place], run, origins, own.shape[1]
            )
            total = total.index_add(0, torch.tensor(reads, device=own.device), apart.to(own))
        return total


def closed(
    readers: Sequence[Readers],
    sources: Sources,
    gates: Float[Tensor, "setting #row #position part"],
    fallback: Values,
) -> Mapping[Site, Changed]:
    """What destinations read under gates, by the place of the stream; places whose gates are all 1 are left out.

    Destinations of a setting whose gates are the same read one stream together (unless the gates want gradients).
    """
    made: dict[Site, Changed] = {}
    for one in readers:
        shares, settings, users = list[Tensor](), list[int](), list[User]()
        known: dict[tuple[int, bytes], int] = {}
        for destination, (edges, numbers) in zip(one.destinations, one.edges, strict=True):
            part = 1 - gates[..., list(edges)]
            wanted = range(len(gates)) if gates.requires_grad else (part != 0).flatten(1).any(1).nonzero()[:, 0].tolist()
            for setting in wanted:
                empty = part.new_zeros(*part.shape[1:3], len(one.sources))
                share = empty.index_copy(-1, torch.tensor(numbers, device=part.device), part[setting])
                key = (setting, str(destination).encode() if gates.requires_grad else share.float().cpu().numpy().tobytes())
                if key not in known:
                    known[key] = len(shares)
                    shares.append(share)
                    settings.append(setting)
                users.append(User(destination, setting, known[key]))
        if users:
            made[one.place] = Closed(one, sources, fallback, torch.stack(shares), tuple(settings), users)
    return made
