"""From gates on edges to what destinations read: stream + sum over sources of (1 - gate) * (fallback - value)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.models.editing import Columns, Seen
from patchclamp.models.standing import Start
from patchclamp.models.tree import Pattern
from patchclamp.parts.edge_blocks import Streams, reads_at
from patchclamp.parts.edge_reading import Changed, User
from patchclamp.parts.edge_sources import Difference, Sources, place_of
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
        positions: by destination, beside each edge, the position or span at which the source's write is meant; None: all.
    """

    place: Site
    destinations: tuple[Site, ...]
    sources: tuple[Site, ...]
    edges: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    positions: tuple[tuple[int | str | None, ...], ...]

    def by_place(self, sources: Sources) -> dict[Site, tuple[list[int], list[int]]]:
        """By the sources' places: their numbers here, and the numbers of their heads (0 for what has none)."""
        found: dict[Site, tuple[list[int], list[int]]] = {}
        for number, source in enumerate(self.sources):
            numbers, units = found.setdefault(place_of(sources.model.anatomy, source), ([], []))
            numbers.append(number)
            units.append(source.index or 0)
        return found


def readers_of(labels: Sequence[Edge], sources: Sources) -> tuple[Readers, ...]:
    """The edges, sorted by the place of the stream that they carry something to.

    Keys and values as queries at some position read them are destinations of their own; all others are one at every position.
    """
    at: dict[Site, dict[Site, list[int]]] = {}
    for number, edge in enumerate(labels):
        target = edge.target if edge.target.kind in KEYS else edge.target.at(None)
        at.setdefault(reads_at(sources.model.anatomy, edge.target), {}).setdefault(target, []).append(number)
    made: list[Readers] = []
    for place, by_target in sorted(at.items()):
        found = sorted({labels[number].source.at(None) for numbers in by_target.values() for number in numbers})
        index = {source: number for number, source in enumerate(found)}
        edges = tuple(
            (tuple(numbers), tuple(index[labels[number].source.at(None)] for number in numbers)) for numbers in by_target.values()
        )
        positions = tuple(tuple(written_at(labels[number]) for number in numbers) for numbers in by_target.values())
        made.append(Readers(place, tuple(by_target), tuple(found), edges, positions))
    return tuple(made)


KEYS = ("k", "v")
"""What attention reads at other positions than it is written at."""


def written_at(edge: Edge) -> int | str | None:
    """The position at which the source's write is meant: where it stands is where it is read, but by keys' and values' readers."""
    here = None if edge.target.kind in KEYS else edge.target.position
    return here if edge.source.position is None else edge.source.position


def spread_over(
    gates: Float[Tensor, "#row #position part"], positions: Sequence[int | str | None], columns: Columns
) -> Float[Tensor, "#row #position part"]:
    """Gates of edges at positions as gates at every column: 1 where they are not meant."""
    if not any(position is not None for position in positions):
        return gates
    meant = {one: columns(one).to(gates.device) for one in dict.fromkeys(positions) if one is not None}
    some = next(iter(meant.values()))
    masks = [torch.ones_like(some) if one is None else meant[one] for one in positions]
    return torch.where(torch.stack(masks, -1), gates, torch.ones_like(gates))


def by_source(
    gates: Float[Tensor, "#row #position part"], numbers: Sequence[int], count: int
) -> Float[Tensor, "#row #position source"]:
    """1 - gate by source; gates of one source at several positions multiply."""
    if len(set(numbers)) == len(numbers):
        shares = gates.new_zeros(*gates.shape[:2], count)
        return shares.index_copy(-1, torch.tensor(numbers, device=gates.device), 1 - gates)
    found = [torch.ones_like(gates[..., 0])] * count
    for at, number in enumerate(numbers):
        found[number] = found[number] * gates[..., at]
    return 1 - torch.stack(found, -1)


@dataclass(frozen=True, eq=False)
class Known:
    """What sources write in the model's own run, and how far that is from their fallbacks.

    Args:
        sources: which.
        kept: what is seen of them there; empty where no run starts behind the first block.
        fallback: by place of the sources.
        differences: fallback - value by place, all heads of a layer, where memory holds those of every place.
    """

    sources: Sources
    kept: Values
    fallback: Values
    differences: dict[Site, Tensor] = field(default_factory=dict[Site, Tensor])

    def difference(self, place: Site, units: Sequence[int]) -> Difference:
        """fallback - value of some units of a place."""
        if place not in self.differences:
            value = self.sources.value(place, self.kept)
            heads = value.shape[2] if place.kind in ("z", "write") else 1
            width, every = self.sources.model.width, sum(one.heads + 2 for one in self.sources.model.anatomy.sizes)
            if 4 * every * value.shape[0] * value.shape[1] * width > self.sources.memory:
                return self.sources.difference(place, units, self.fallback[place], value)
            self.differences[place] = self.sources.difference(place, list(range(heads)), self.fallback[place], value)
        found = self.differences[place]
        return found if list(units) == list(range(len(found))) else found[list(units)]


@dataclass(frozen=True, eq=False)
class Closed:
    """Gates on the edges into one place, as `Changed`: who reads which stream, and how the streams are made.

    Args:
        readers: the destinations.
        known: the model's own run and the fallback.
        shares: [read, row, position, source], 1 - gate.
        runs: by read, which of the runs at the place.
        users: who reads.
        start: where runs start.
    """

    readers: Readers
    known: Known
    shares: Float[Tensor, "read #row #position source"]
    runs: tuple[int, ...]
    users: Sequence[User]
    start: Start

    @property
    def reads(self) -> tuple[Site, ...]:
        sources = self.known.sources
        return tuple(site for place in self.readers.by_place(sources) for site in sources.seen(place))

    def streams(self, own: Float[Tensor, "run row position width"], seen: Seen) -> Streams:
        """own + sum over sources of (1 - gate) * (fallback - value), value being what the source writes in this very run."""
        total = own[torch.tensor(self.runs, device=own.device)]
        shares, sources, learns = self.shares.to(own), self.known.sources, self.shares.requires_grad
        for place, (numbers, units) in self.readers.by_place(sources).items():
            here = shares[..., numbers]
            used = torch.ones_like(here, dtype=torch.bool).flatten(1, 2).any(1) if learns else (here != 0).flatten(1, 2).any(1)
            reads = used.any(1).nonzero()[:, 0].tolist()
            if not reads:
                continue
            origins = {read: self._origin(self.runs[read], place) for read in reads}
            for some in ([read for read in reads if origins[read] < 0], [read for read in reads if origins[read] >= 0]):
                if not some:
                    continue
                needed = used[some].any(0).nonzero()[:, 0].tolist()
                wanted, given = [units[at] for at in needed], here[some][..., needed]
                if origins[some[0]] < 0:
                    apart = torch.einsum("nrpu,urpw->nrpw", given, self.known.difference(place, wanted).to(given))
                else:
                    run = {site: seen.values[site] for site in sources.seen(place)}
                    come = [origins[read] for read in some]
                    apart = sources.mixed(place, wanted, given, self.known.fallback[place], run, come, own.shape[1])
                total = total.index_add(0, torch.tensor(some, device=own.device), apart.to(own).expand(-1, *own.shape[1:]))
        return total

    def _origin(self, run: int, place: Site) -> int:
        """Which of the runs at a source's place a run here goes on from; -1: the model's own."""
        if self.start.tree is None:
            return run
        for level in range(level_of(self.readers.place), level_of(place), -1):
            if run >= 0:
                run = self.start.tree.levels[level].parents[run]
        return run


def level_of(place: Site) -> int:
    """The level of a tree of runs (`models.tree`) whose runs are at a place."""
    if place.layer is None:
        return 0
    return place.layer + (place.kind == "resid.post")


def closed(
    readers: Sequence[Readers], known: Known, gates: Float[Tensor, "setting #row #position part"], start: Start, columns: Columns
) -> Mapping[Site, Changed]:
    """What destinations read under gates, by the place of the stream; places whose gates are all 1 are left out.

    Destinations of a setting whose gates are the same read one stream together (unless the gates want gradients).
    """
    made: dict[Site, Changed] = {}
    shut = torch.ones_like(gates[:, 0, 0], dtype=torch.bool) if gates.requires_grad else (gates != 1).flatten(1, 2).any(1)
    for one in readers:
        here = list(range(len(gates))) if start.tree is None else list(start.tree.levels[level_of(one.place)].settings)
        shares, runs, users = list[Tensor](), list[int](), list[User]()
        closing = shut[here].cpu()
        if not bool(closing[:, [number for edges, _ in one.edges for number in edges]].any()):
            continue
        known_reads: dict[tuple[int, bytes], int] = {}
        for destination, (edges, numbers), positions in zip(one.destinations, one.edges, one.positions, strict=True):
            wanted = closing[:, list(edges)].any(1).nonzero()[:, 0].tolist()
            for run in wanted:
                part = spread_over(gates[here[run]][..., list(edges)], positions, columns)
                share = by_source(part, numbers, len(one.sources))
                key = (run, str(destination).encode() if gates.requires_grad else share.float().cpu().numpy().tobytes())
                if key not in known_reads:
                    known_reads[key] = len(shares)
                    shares.append(share)
                    runs.append(run)
                users.append(User(destination, run, known_reads[key]))
        shape = torch.broadcast_shapes(*(share.shape for share in shares))
        together = torch.stack([share.expand(shape) for share in shares])
        made[one.place] = Closed(one, known, together, tuple(runs), users, start)
    return made


def patterns_of(
    readers: Sequence[Readers], gates: Float[Tensor, "setting #example #position part"], layers: int
) -> list[Pattern]:
    """By setting, what it does at each stage (`models.tree`): the gates on the edges into a block's readers, as a number."""
    stages: dict[int, list[int]] = {}
    for one in readers:
        for destination, (edges, _) in zip(one.destinations, one.edges, strict=True):
            stage = 2 * layers if destination.kind == "logits" else 2 * (destination.layer or 0) + 1
            stages.setdefault(stage, []).extend(edges)
    shut, names = (gates != 1).flatten(1, 2).any(1).cpu(), dict[tuple[int, bytes], int]()
    patterns = [[0] * (2 * layers + 1) for _ in range(len(gates))]
    for stage, members in stages.items():
        some = shut[:, members].any(1).nonzero()[:, 0].tolist()
        held = gates[some][..., members].cpu().contiguous().numpy()
        for setting, values in zip(some, held, strict=True):
            patterns[setting][stage] = names.setdefault((stage, values.tobytes()), len(names) + 1)
    return [tuple(pattern) for pattern in patterns]
