"""Slopes of a metric in the gates of edges, at the model itself: edge attribution patching (Syed et al. 2310.10348)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.edits import Add
from patchclamp.metrics import Metric
from patchclamp.models.session import CALL, Call, Session
from patchclamp.parts.edge_gates import Readers
from patchclamp.parts.edge_reading import SLOTS, attention_reads, mlp_reads
from patchclamp.parts.edge_sources import Sources
from patchclamp.parts.fallbacks import Fallback, Values
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

Slopes = Float[Tensor, "destination row position width"]


@dataclass(frozen=True, eq=False)
class OwnRun:
    """The model's own run of a batch: what destinations read, and how the metric depends on what they make of it.

    Args:
        values: the metric, by example.
        kept: what stands at places.
        calls: what blocks were called with.
        slopes: by place (q, k, v, mlp, the stream behind the last block), d metric / d its value.
    """

    values: Float[Tensor, " example"]
    kept: Values
    calls: dict[int, Call]
    slopes: Values


def own_run(sources: Sources, readers: Sequence[Readers], batch: Batch, metric: Metric) -> OwnRun:
    """One forward and one backward pass: keeps what is needed for slopes in the gates of edges."""
    model, kept, calls = sources.model, dict[Site, Tensor](), dict[int, Call]()
    behind = Site("resid.post", model.layers - 1)

    def keep(place: Site, value: Tensor) -> Tensor:
        kept[place] = value
        if place.kind == "resid.pre" and place.layer is not None:
            calls[place.layer] = CALL.get()
        return value

    used = {_used(one, destination) for one in readers for destination in one.destinations}
    seen = {site for place in sources.places for site in sources.seen(place)}
    entered = {Site("resid.pre", one.place.layer) for one in readers if one.place != behind}
    places = used | seen | entered | {one.place for one in readers}
    with torch.no_grad():
        plain = model.target_logits(batch)[0] if metric.reference else None
    root = torch.zeros(model.width, device=model.device, dtype=model.dtype, requires_grad=True)  # weights require no gradient
    watching = Session(model.anatomy, {place: partial(keep, place) for place in places})
    with torch.enable_grad(), model.editing({Site("embed"): Add(root)}, batch), watching.open():
        values = metric(model.target_logits(batch), batch, plain)[0]
        order = sorted(used)
        slopes = dict(zip(order, torch.autograd.grad(values.sum(), [kept[place] for place in order]), strict=True))
    detached = {place: value.detach() for place, value in kept.items()}
    return OwnRun(values.detach(), detached, {layer: _detached(call) for layer, call in calls.items()}, slopes)


def _detached(given: Any) -> Any:
    if isinstance(given, dict):
        return {name: _detached(one) for name, one in given.items()}
    if isinstance(given, tuple | list):
        return type(given)(map(_detached, given))
    return given.detach() if isinstance(given, Tensor) else given


def _used(readers: Readers, destination: Site) -> Site:
    """Where stands what a destination makes of its stream."""
    return readers.place if destination.kind == "logits" else Site(destination.kind, destination.layer)


def open_slopes(
    sources: Sources, readers: Sequence[Readers], count: int, batch: Batch, fallback: Fallback, metric: Metric, spread: bool
) -> tuple[Float[Tensor, " example"], Float[Tensor, "example *position part"]]:
    """The metric with every gate open, and its slope in each of `count` gates (`spread`: at each position), per example.

    slope(s>d) = sum over rows and positions of <value_s - fallback_s, d metric / d what d reads>.
    """
    run, closing = own_run(sources, readers, batch, metric), fallback.at(batch)
    rows, length = batch.tokens.shape
    kind = torch.promote_types(sources.model.dtype, torch.float32)
    out = torch.zeros(count, rows, *([length] if spread else []), dtype=kind, device=batch.tokens.device)
    for one in readers:
        for numbers, slopes in _into(sources, one, run, rows, length):
            for place, (mine, units) in one.by_place(sources).items():
                for piece in sources.pieces(list(range(len(units))), rows * length):
                    seen = {site: run.kept[site] for site in sources.seen(place)}
                    with torch.no_grad():
                        apart = sources.difference(place, [units[at] for at in piece], closing[place], seen)
                        found = -torch.einsum("drpw,rpsw->dsrp" if spread else "drpw,rpsw->dsr", slopes.to(kind), apart.to(kind))
                    _fill(out, one, numbers, [mine[at] for at in piece], found)
    gathered = out.new_zeros(len(batch), *out.shape[2:], count).index_add(0, batch.example, out.movedim(0, -1))
    return run.values, gathered


def _fill(out: Tensor, readers: Readers, numbers: Sequence[int], sources: Sequence[int], found: Tensor) -> None:
    """Put slopes [destination, source, row, ...] where their edges' gates are."""
    column = {source: at for at, source in enumerate(sources)}
    for at, number in enumerate(numbers):
        pairs = [(edge, column[source]) for edge, source in zip(*readers.edges[number], strict=True) if source in column]
        if pairs:
            edges, columns = zip(*pairs, strict=True)
            out[list(edges)] = found[at, list(columns)].to(out.dtype)


def _into(sources: Sources, readers: Readers, run: OwnRun, rows: int, length: int) -> Iterator[tuple[list[int], Slopes]]:
    """For some destinations after others: their numbers, and d metric / d what each of them reads."""
    anatomy, stream = sources.model.anatomy, run.kept[readers.place]
    layer = readers.place.layer
    assert layer is not None
    by_kind: dict[str, list[int]] = {}
    for number, destination in enumerate(readers.destinations):
        by_kind.setdefault(destination.kind, []).append(number)
    if "logits" in by_kind:
        yield by_kind["logits"], run.slopes[readers.place][None]
        return
    leaf = stream[None].clone().requires_grad_()
    most = max(1, sources.memory // (16 * rows * length * stream.shape[-1]))
    if "mlp" in by_kind:
        with torch.enable_grad():
            made = mlp_reads(anatomy, layer, run.calls[layer], 1, leaf)[0]
        (slope,) = torch.autograd.grad(made, leaf, run.slopes[Site("mlp", layer)])
        yield by_kind["mlp"], slope
    slots = [slot for slot in SLOTS if slot in by_kind]
    with torch.enable_grad():
        found = attention_reads(anatomy, layer, run.calls[layer], 1, leaf) if slots else {}
    for slot in slots:
        given = run.slopes[Site(slot, layer)]
        for start in range(0, len(by_kind[slot]), most):
            some = by_kind[slot][start : start + most]
            apart = torch.stack([_alone(given, readers.destinations[number].index or 0) for number in some])
            (slope,) = torch.autograd.grad(found[slot][0], leaf, apart, retain_graph=True, is_grads_batched=True)
            yield some, slope[:, 0]


def _alone(slope: Tensor, head: int) -> Tensor:
    """Zero but for one head."""
    out = torch.zeros_like(slope)
    out[:, :, head] = slope[:, :, head]
    return out
