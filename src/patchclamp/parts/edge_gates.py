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
        order, added = list[int](), list[Tensor]()
        for setting in dict.fromkeys(self.settings):
            mine = [read for read, one in enumerate(self.settings) if one == setting]
            order += mine
            added.append(self._added(setting, self.shares[mine].to(own), own[setting], seen))
        back = torch.tensor(order, device=own.device).argsort()
        return own[torch.tensor(self.settings, device=own.device)] + torch.cat(added)[back]

    def _added(self, setting: int, shares: Tensor, own: Tensor, seen: Seen) -> Streams:
        """What is added to a setting's stream, for each of its reads."""
        total = own.new_zeros(len(shares), *own.shape)
        for place, (numbers, units) in self.readers.by_place(self.sources).items():
            here = shares[..., numbers]
            needed = [at for at in range(len(units)) if shares.requires_grad or bool((here[..., at] != 0).any())]
            if not needed:
                continue
            run = {site: seen.values[site].unflatten(0, (-1, len(own)))[setting] for site in self.sources.seen(place)}
            for piece in self.sources.pieces(needed, own[..., 0].numel()):
                apart = self.sources.difference(place, [units[at] for at in piece], self.fallback[place], run)
                total = total + torch.einsum("nrps,rpsw->nrpw", here[..., list(piece)], apart.to(own))
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
