"""Slopes of a metric in the gates of edges, at the model itself: edge attribution patching (Syed et al. 2310.10348).

slope(s>d) = sum over rows and positions of <value_s - fallback_s, d metric / d what d reads>. One forward and one backward pass of
the model give the slopes at the outputs of the linear maps that read the stream (`edge_maps`); from there, each destination's
slope at the stream is a closed form, and all slopes of a layer's edges are one matrix product, over a few rows and positions at a
time. Where the closed form does not hold, the layer is read once more under autograd.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.edits import Add
from patchclamp.metrics import Metric
from patchclamp.models.checkpointing import Room, checkpointed
from patchclamp.models.differences import differences
from patchclamp.models.model import Model
from patchclamp.models.scope import still
from patchclamp.models.standing import Start
from patchclamp.parts.edge_blocks import SLOTS, attention_reads, attention_writes, detached, mlp_reads
from patchclamp.parts.edge_gates import KEYS, Readers
from patchclamp.parts.edge_maps import Maps, maps_of
from patchclamp.parts.edge_norms import Slopes
from patchclamp.parts.edge_products import OwnRun, add_known, is_known
from patchclamp.parts.edge_sources import Sources
from patchclamp.parts.edge_watch import Asked, Watch
from patchclamp.parts.fallbacks import Values
from patchclamp.parts.pieces import only
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

PASS = 256 << 20
"""Bytes that activations kept for a backward pass may take on a CPU: more prompts at once are no faster."""


def open_slopes(
    asked: Asked, batch: Batch, first: Values | None, second: Values, metric: Metric, spread: bool
) -> tuple[Float[Tensor, " example"], Float[Tensor, "example *position part"]]:
    """The metric with every gate open, and the sum of <first_s - second_s, d metric / d what d reads>, per example and edge.

    Some prompts after others, so that what the backward pass needs stays within memory.
    """
    model, values, slopes = asked.sources.model, list[Tensor](), list[Tensor]()
    maps = maps_of(model)
    for examples in torch.arange(len(batch)).split(at_once(model, batch, asked.memory)):
        rows = torch.isin(batch.example.cpu(), examples).nonzero().flatten().to(batch.tokens.device)
        some = batch if len(examples) == len(batch) else only(batch, examples.tolist(), rows)
        ours = rows if some is not batch else slice(None)
        given = [None if one is None else {site: _rows(value, ours) for site, value in one.items()} for one in (first, second)]
        added = None if asked.added is None else asked.added[ours]
        run = own_run(asked, maps, some, metric, added)
        assert given[1] is not None
        values.append(run.values)
        slopes.append(slopes_of(asked, maps, run, given[0], given[1], some, spread))
    return torch.cat(values), torch.cat(slopes)


def _rows(value: Tensor, rows: Tensor | slice) -> Tensor:
    """Some rows of a value that may broadcast."""
    return value[rows] if value.dim() > 1 and len(value) > 1 else value


def at_once(model: Model, batch: Batch, memory: int) -> int:
    """How many prompts a pass takes, by what its activations need; one alone may have to be computed again in part."""
    anatomy, width, (rows, length) = model.anatomy, model.width, batch.tokens.shape
    per_token = sum(
        10 * width + 4 * size.heads * size.head_width + 5 * (size.neurons or 4 * width) + 3 * size.heads * length
        for size in anatomy.sizes
    )
    most = min(memory, PASS) if model.device.type == "cpu" else memory
    once = max(1, most * len(batch) // (4 * per_token * length * rows))
    return -(-len(batch) // -(-len(batch) // once))  # as many in every pass


def own_run(
    asked: Asked, maps: Maps, batch: Batch, metric: Metric, added: Float[Tensor, "row position width"] | None = None
) -> OwnRun:
    """One forward and one backward pass: keeps what is needed for slopes in the gates of edges."""
    model, watch = asked.sources.model, Watch(asked, maps)
    with torch.no_grad():
        plain = model.target_logits(batch)[0] if metric.reference else None
    root = torch.zeros(model.width, device=model.device, dtype=model.dtype) if added is None else added.to(model.dtype)
    root = root.detach().clone().requires_grad_()  # weights require no gradient
    start = checkpointed(Start(), Room(asked.memory))
    with ExitStack() as stack:
        for one in (torch.enable_grad(), still(model.hf), model.editing({Site("embed"): Add(root)}, batch)):
            stack.enter_context(one)
        stack.enter_context(start.standing(model.anatomy))
        stack.enter_context(watch.open())
        values = metric(model.target_logits(batch), batch, plain)[0]
        order, named = watch.order, list(watch.nodes)
        slopes = torch.autograd.grad(values.sum(), watch.asked)
    return OwnRun(
        values.detach(), {place: value.detach() for place, value in watch.kept.items()},
        {n: detached(c) for n, c in watch.calls.items()},
        dict(zip(order, slopes[: len(order)], strict=True)), dict(zip(named, slopes[len(order) :], strict=True)),
    )  # fmt: skip


def slopes_of(
    asked: Asked, maps: Maps, run: OwnRun, first: Values | None, second: Values, batch: Batch, spread: bool
) -> Float[Tensor, "example *position part"]:
    """sum over rows and positions of <first_s - second_s, d metric / d what d reads>, for each edge s>d, per example.

    Args:
        asked: the edges.
        maps: how the stream is read.
        run: where slopes are taken.
        first: what sources write, by place; None: what they write in the run.
        second: the same, broadcastable: a fallback's.
        batch: its prompts.
        spread: each position by itself, instead of their sum.
    """
    sources, count = asked.sources, asked.count
    placed = _placed(asked.readers)
    whole, spread = spread, spread or bool(placed)
    rows, length = batch.tokens.shape
    kind = torch.promote_types(sources.model.dtype, torch.float32)
    out = torch.zeros(count, rows, *([length] if spread else []), dtype=kind, device=batch.tokens.device)
    with torch.no_grad():
        add_known(sources, asked.readers, maps, run, first, second, out)
    for one in asked.readers:
        for numbers, slopes in _by_autograd(sources, maps, one, run, batch):
            for place, (mine, units) in one.by_place(sources).items():
                value = run.value(sources, place, first)
                for piece in sources.pieces(list(range(len(units))), rows * length):
                    with torch.no_grad():
                        apart = sources.difference(place, [units[at] for at in piece], value, second[place])
                        equation = "drpw,srpw->sdrp" if spread else "drpw,srpw->sdr"
                        found = torch.einsum(equation, slopes.to(kind), apart.to(kind))
                    _fill(out, one, numbers, [mine[at] for at in piece], found)
    for position, numbers in placed.items():
        out[numbers] *= batch.columns(position)
    out = out.sum(-1) if spread and not whole else out
    return out.new_zeros(len(batch), *out.shape[2:], count).index_add(0, batch.example, out.movedim(0, -1))


def _placed(readers: Sequence[Readers]) -> dict[int | str, list[int]]:
    """By position, the edges that are meant there alone."""
    found: dict[int | str, list[int]] = {}
    for one in readers:
        for (edges, _), positions in zip(one.edges, one.positions, strict=True):
            for number, position in zip(edges, positions, strict=True):
                if position is not None:
                    found.setdefault(position, []).append(number)
    return found


def _fill(out: Tensor, readers: Readers, numbers: Sequence[int], sources: Sequence[int], found: Tensor) -> None:
    """Add slopes [source, destination, row, ...] where their edges' gates are."""
    column = {source: at for at, source in enumerate(sources)}
    for at, number in enumerate(numbers):
        pairs = [(edge, column[source]) for edge, source in zip(*readers.edges[number], strict=True) if source in column]
        if pairs:
            edges, columns = zip(*pairs, strict=True)
            out[list(edges)] += found[list(columns), at].to(out.dtype)


def _by_autograd(sources: Sources, maps: Maps, readers: Readers, run: OwnRun, batch: Batch) -> Iterator[tuple[list[int], Slopes]]:
    """Where the closed form does not hold, for some destinations after others: their numbers, and d metric / d what each reads."""
    anatomy, rows = sources.model.anatomy, len(run.kept[readers.place])
    layer = readers.place.layer or 0
    by_kind: dict[tuple[str, int | str | None], list[int]] = {}
    for number, destination in enumerate(readers.destinations):
        if not is_known(maps, destination):
            by_kind.setdefault((destination.kind, destination.position), []).append(number)
    leaf = run.both(readers.place)[None].clone().requires_grad_()
    most = max(1, sources.memory // (16 * leaf.numel()))
    if mlps := by_kind.pop(("mlp", None), None):
        with torch.enable_grad(), _alike(sources.model, run):
            made = mlp_reads(anatomy, layer, run.calls[layer], 1, leaf)[0]
        (slope,) = torch.autograd.grad(made, leaf, run.beside(run.slopes[Site("mlp", layer)]))
        yield mlps, slope[:, :rows]
    if not by_kind:
        return
    asked = _asked(sources.model, layer, run, {position for _, position in by_kind if position is not None}, batch)
    with torch.enable_grad(), _alike(sources.model, run):
        found = attention_reads(anatomy, layer, run.calls[layer], 1, leaf)
    for (slot, position), numbers in by_kind.items():
        given = run.slopes[Site(slot, layer)] if position is None else asked[position][slot]
        for start in range(0, len(numbers), most):
            some = numbers[start : start + most]
            apart = [run.beside(_alone(given, readers.destinations[number].index or 0)) for number in some]
            yield some, _backwards(found[slot][0], leaf, apart, together=run.other is None)[:, :rows]


def _backwards(made: Tensor, leaf: Tensor, given: Sequence[Tensor], together: bool) -> Slopes:
    """The slope at `leaf[0]` for each slope at what was made of it."""
    if together:
        return torch.autograd.grad(made, leaf, torch.stack(list(given)), retain_graph=True, is_grads_batched=True)[0][:, 0]
    # multipliers of differences are steps of their own, which know one slope at a time
    return torch.stack([torch.autograd.grad(made, leaf, one, retain_graph=True)[0][0] for one in given])


def _alike(model: Model, run: OwnRun) -> AbstractContextManager[None]:
    """What is computed again passes back what the run itself passes back."""
    return nullcontext() if run.other is None else differences(model.anatomy)


def _asked(
    model: Model, layer: int, run: OwnRun, positions: Iterable[int | str], batch: Batch
) -> dict[int | str, dict[str, Tensor]]:
    """By position, d metric / d keys and values as the queries there read them."""
    order = list(positions)
    if not order:
        return {}
    given = {slot: run.both(Site(slot, layer))[None].detach().clone().requires_grad_() for slot in SLOTS}
    rows = len(run.kept[Site("q", layer)])
    with torch.enable_grad(), _alike(model, run):
        z = attention_writes(model.anatomy, layer, run.calls[layer], 1, given)[0]
    found: dict[int | str, dict[str, Tensor]] = {}
    for position in order:
        part = run.slopes[Site("z", layer)] * batch.columns(position)[..., None, None]
        slopes = torch.autograd.grad(z, [given[slot] for slot in KEYS], run.beside(part), retain_graph=True)
        found[position] = {slot: slope[0, :rows] for slot, slope in zip(KEYS, slopes, strict=True)}
    return found


def _alone(slope: Tensor, head: int) -> Tensor:
    """Zero but for one head."""
    out = torch.zeros_like(slope)
    out[:, :, head] = slope[:, :, head]
    return out
