"""Slopes in the gates of edges as matrix products: differences of what sources write, by slopes at the stream, a few tokens at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.models.session import Call
from patchclamp.parts.edge_gates import Readers
from patchclamp.parts.edge_maps import Maps
from patchclamp.parts.edge_norms import NormSlope, Slopes, slot_slopes
from patchclamp.parts.edge_sources import Sources, place_of
from patchclamp.parts.fallbacks import Values
from patchclamp.sites import Site

SLAB = 64 << 20
"""Bytes of differences and slopes that one matrix product works on, on a CPU: larger ones are no faster."""
TOGETHER = 16
"""Destinations that at least go into one matrix product: differences are read from memory once for each."""
Cut = tuple[slice, slice]
"""Some rows and positions."""


@dataclass(frozen=True, eq=False)
class OwnRun:
    """The model's own run of a batch: what destinations read, and how the metric depends on what they make of it.

    Args:
        values: the metric, by example.
        kept: what stands at places.
        calls: what blocks were called with, where they are read once more.
        slopes: by place (q, k, v, mlp, the stream behind the last block), d metric / d its value.
        entered: by id of a module, d metric / d its output (linear maps) or its input (where an MLP begins).
        other: what stands at places in the run that this one is compared with, where multipliers of differences stand in the
            place of slopes (`edge_differences`).
    """

    values: Float[Tensor, " example"]
    kept: Values
    calls: dict[int, Call]
    slopes: Values
    entered: dict[int, Tensor]
    other: Values | None = None

    def both(self, place: Site) -> Tensor:
        """What stands at a place, and behind it what stands there in the other run, where there is one."""
        return self.kept[place] if self.other is None else torch.cat([self.kept[place], self.other[place]])

    def beside(self, slope: Tensor) -> Tensor:
        """A slope at what is computed of `both`: nothing flows back into the other run."""
        return slope if self.other is None else torch.cat([slope, torch.zeros_like(slope)])

    def value(self, sources: Sources, place: Site, first: Values | None = None, cut: Cut | None = None) -> Tensor:
        """What sources of a place write in the run, or instead of that in `first`; at some rows and positions."""
        if first is not None:
            return first[place] if cut is None else shortened(first[place], cut)
        seen = {site: self.kept[site] if cut is None else self.kept[site][cut] for site in sources.seen(place)}
        return sources.value(place, seen)


def shortened(value: Tensor, cut: Cut) -> Tensor:
    """Some rows and positions of a value that may broadcast."""
    if value.dim() < 2:
        return value
    return value[tuple(slice(None) if size == 1 else one for size, one in zip(value.shape, cut, strict=False))]


def is_known(maps: Maps, destination: Site) -> bool:
    """Whether the closed form gives what a destination makes of what it reads."""
    if destination.kind == "logits":
        return True
    known = maps.mlp if destination.kind == "mlp" else maps.attention
    return destination.position is None and known[destination.layer or 0] is not None


def add_known(
    sources: Sources, readers: Sequence[Readers], maps: Maps, run: OwnRun, first: Values | None, second: Values, out: Tensor,
) -> None:  # fmt: skip
    """Add to `out` the slopes of all edges into destinations whose slope at the stream is known in closed form."""
    found = [(one, [n for n, site in enumerate(one.destinations) if is_known(maps, site)]) for one in readers]
    found = [(one, numbers) for one, numbers in found if numbers]
    if not found:
        return
    every = sorted({source for one, _ in found for source in one.sources})
    widest = max(len(numbers) for _, numbers in found)
    most = SLAB if out.device.type == "cpu" else max(SLAB, sources.memory)
    tokens = max(1, most // (4 * sources.model.width * (len(every) + widest + TOGETHER)))
    rows, length = run.kept[found[0][0].place].shape[:2]
    for cut in _slabs(rows, length, tokens):
        apart = _differences(sources, every, run, first, second, cut)
        waiting: list[tuple[Readers, list[int], Tensor]] = []
        for one, numbers in found:
            waiting.append((one, numbers, _slopes(maps, one, numbers, run, cut)))
            if sum(len(mine) for _, mine, _ in waiting) >= TOGETHER or one is found[-1][0]:
                _product(every, apart, waiting, out, cut)
                waiting = []


def _slabs(rows: int, length: int, tokens: int) -> Iterator[Cut]:
    """Cut [rows, length] into pieces of about so many tokens: whole rows, or stretches of one."""
    if tokens >= length:
        for start in range(0, rows, tokens // length):
            yield slice(start, min(rows, start + tokens // length)), slice(0, length)
        return
    for row in range(rows):
        for start in range(0, length, tokens):
            yield slice(row, row + 1), slice(start, min(length, start + tokens))


def _differences(
    sources: Sources, every: Sequence[Site], run: OwnRun, first: Values | None, second: Values, cut: Cut
) -> Float[Tensor, "source row position width"]:
    """first - second of what every source writes, at some rows and positions."""
    by_place: dict[Site, list[Site]] = {}
    for source in every:
        by_place.setdefault(place_of(sources.model.anatomy, source), []).append(source)
    rows, length = (one.stop - one.start for one in cut)
    kind = torch.promote_types(sources.model.dtype, torch.float32)
    out = torch.empty(len(every), rows, length, sources.model.width, dtype=kind, device=sources.model.device)
    done = 0
    for place, here in by_place.items():
        value, other = run.value(sources, place, first, cut), shortened(second[place], cut)
        out[done : done + len(here)] = sources.difference(place, [source.index or 0 for source in here], value, other)
        done += len(here)
    return out


def _slopes(maps: Maps, readers: Readers, numbers: Sequence[int], run: OwnRun, cut: Cut) -> Slopes:
    """d metric / d stream as some destinations read it, at some rows and positions."""
    layer, stream, made = readers.place.layer or 0, run.kept[readers.place], list[Tensor]()
    norms: dict[int, NormSlope] = {}

    def behind(norm: torch.nn.Module | None) -> NormSlope | None:
        if norm is not None and id(norm) not in norms:
            other = None if run.other is None else run.other[readers.place][cut]
            norms[id(norm)] = NormSlope.at(norm, stream[cut]) if other is None else NormSlope.between(norm, stream[cut], other)
        return None if norm is None else norms[id(norm)]

    by_kind: dict[str, list[int]] = {}
    for number in numbers:
        by_kind.setdefault(readers.destinations[number].kind, []).append(number)
    for kind, mine in by_kind.items():
        attention, mlp = maps.attention[layer], maps.mlp[layer]
        if kind == "logits":
            made.append(run.slopes[readers.place][cut][None])
        elif kind == "mlp" and mlp is not None:
            slope, norm = run.entered[id(mlp.entry)].reshape(stream.shape)[cut], behind(mlp.norm)
            made.append((slope if norm is None else norm(slope))[None])
        elif attention is not None:
            slot, heads = attention.slots[kind], [readers.destinations[number].index or 0 for number in mine]
            slope = run.entered[id(slot.module)]
            made.append(slot_slopes(slot, heads, behind(attention.norm), slope.reshape(*stream.shape[:2], -1)[cut]))
    together = torch.cat([one.to(torch.promote_types(one.dtype, torch.float32)) for one in made])
    order = torch.tensor([number for mine in by_kind.values() for number in mine]).argsort().tolist()
    return together if order == list(range(len(order))) else together[order]


def _product(
    every: Sequence[Site], apart: Tensor, waiting: Sequence[tuple[Readers, list[int], Tensor]], out: Tensor, cut: Cut
) -> None:
    """One matrix product of differences and slopes, row by row (and, where `out` has positions, position by position)."""
    slopes = torch.cat([one for _, _, one in waiting]) if len(waiting) > 1 else waiting[0][2]
    last = max(every.index(one.sources[-1]) for one, _, _ in waiting) + 1
    apart, slopes = apart[:last], slopes.to(out.dtype)
    if out.dim() == 2:
        found = torch.bmm(apart.flatten(2).transpose(0, 1), slopes.flatten(2).permute(1, 2, 0)).permute(1, 2, 0)
    else:
        found = torch.einsum("srpw,drpw->sdrp", apart, slopes)
    done = 0
    column = {source: number for number, source in enumerate(every)}
    for one, numbers, mine in waiting:
        for at, number in enumerate(numbers):
            edges, places = one.edges[number]
            chosen = [column[one.sources[place]] for place in places]
            out[(list(edges), *cut[: out.dim() - 1])] += found[chosen, done + at]
        done += len(mine)
