"""The measuring engine: many gate settings, each from where it first differs from the model itself, what they share once."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.edits import Put
from patchclamp.metrics import Metric
from patchclamp.models.checkpointing import ran_out
from patchclamp.models.editing import Edits
from patchclamp.models.replay import capped, reference, trimmed, why_plain
from patchclamp.models.standing import Start, projections, why_whole_vocabulary
from patchclamp.models.tree import Pattern, apart, grow
from patchclamp.parts.compiling import acts_on
from patchclamp.parts.fallbacks import Fallback
from patchclamp.parts.limits import limits_of
from patchclamp.parts.pieces import pieces
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

if TYPE_CHECKING:
    from patchclamp.parts.gated import Gated

SPREADING = ("k", "v", "resid.pre", "embed")
"""Sites whose change at one column changes later columns of the same block."""
SHARE = 4
"""One part in so many of the memory is the most that kept queries, keys and values may take."""


@dataclass(frozen=True)
class Route:
    """Where one setting can start.

    Args:
        pattern: what it does at each stage (`models.tree`).
        block: the first block at which it differs from the model itself.
        column: the first column that has to run.
        changed: the one column at which all of its closed gates act, where there is one and later columns run too.
        alone: whether in its first block nothing but that column changes.
    """

    pattern: Pattern
    block: int
    column: int
    changed: int | None
    alone: bool


@dataclass(frozen=True)
class Question:
    """What is measured.

    Args:
        parts: whose gates.
        batch: on which prompts, on the model's device.
        gates: the settings.
        fallback: what closed gates pass.
        metric: what is measured.
        asked: the batch, its answers numbered as in the logits that are computed.
    """

    parts: "Gated"
    batch: Batch
    gates: Tensor
    fallback: Fallback
    metric: Metric
    asked: Batch

    def itself(self, start: Start) -> Float[Tensor, " example"]:
        """The metric of the model's own run."""
        assert start.logits is not None
        return self.metric(start.logits[None], self.batch, start.logits if self.metric.reference else None)[0]

    def edits(self, gates: Tensor, start: Start) -> Edits:
        """The settings' edits, behind what is added to the embeddings in every run."""
        edits = self.parts.compiled(gates, self.fallback, self.batch, start)
        if self.parts.added is None:
            return edits
        if start.tree is None:
            return {**self.parts.base(), **edits}
        return {Site("embed"): Put(start.inputs[0][:, start.column : start.stop]), **edits}

    def run(self, some: Sequence[int], start: Start) -> dict[int, Tensor] | None:
        """The metric of some settings side by side; None where memory ran out (said, and fewer run at once from then on)."""
        try:
            logits = self.parts.model.target_logits(self.batch, self.edits(self.gates[list(some)], start), len(some), start)
        except RuntimeError as error:
            _shrink(self.parts, error, len(some))
            return None
        plain = start.logits if self.metric.reference else None
        return dict(zip(some, self.metric(logits, self.asked, plain), strict=True))


def measured(
    parts: "Gated", batch: Batch, gates: Float[Tensor, "setting #example #position part"], fallback: Fallback, metric: Metric
) -> Float[Tensor, "setting example"]:
    """What `Gated.measure` gives.

    Where memory runs out with several settings at once, half as many run from then on; where it runs out with one, or in the
    model's own run, half as many prompts; a warning each time.
    """
    limits = limits_of(parts)
    if limits.prompts is None or limits.prompts >= len(batch):
        try:
            return _together(parts, batch, gates, fallback, metric)
        except RuntimeError as error:
            if not ran_out(error) or len(batch) == 1:
                raise
        limits.prompts = len(batch) // 2  # behind the except clause, which holds what the failed pass made
        warnings.warn(f"memory ran out with {len(batch)} prompts at once: going on with {limits.prompts}", stacklevel=3)
        if parts.model.device.type == "cuda":
            torch.cuda.empty_cache()
    some = pieces(parts, batch, gates, limits.prompts)
    return torch.cat([measured(of, few, mine, fallback, metric) for of, few, mine in some], 1)


def _together(
    parts: "Gated", batch: Batch, gates: Tensor, fallback: Fallback, metric: Metric
) -> Float[Tensor, "setting example"]:
    """Every setting on all prompts of the batch at once."""
    with torch.no_grad():
        found = routes(parts, batch, gates, fallback)
        ways = {number: route for number, route in enumerate(found) if route is not None}
        start, asked = _start(parts, batch, metric, list(ways.values()), len(found))
        question = Question(parts, batch, gates, fallback, metric, asked)
        out: dict[int, Tensor] = {}
        if len(ways) < len(found):
            out = dict.fromkeys(set(range(len(found))) - set(ways), question.itself(start))
        groups: dict[tuple[int, int], dict[int, Route]] = {}
        for number, route in ways.items() if start.inputs else ():
            groups.setdefault((route.column, -1 if route.changed is None else route.changed), {})[number] = route
        for column, changed in sorted(groups):
            here = replace(start, column=column, changed=None if changed < 0 else changed)
            out |= _rising(question, here, groups[column, changed])
        rest = [] if start.inputs else list(ways)
        while rest:  # whole runs
            some = rest[: parts.fold(batch)]
            made = question.run(some, start)
            out |= made or {}
            rest = rest[len(some) :] if made else rest
    return torch.stack([out[number] for number in range(len(found))])


def _rising(question: Question, start: Start, ways: dict[int, Route]) -> dict[int, Tensor]:
    """Settings of one first column, each from its own block, in the order of the tree so that those alike stand together."""
    parts, batch = question.parts, question.batch
    fresh = _fresh(question, start, ways) if start.changed is not None else {}
    last = parts.model.layers
    joins = {number: way.block + ((way.block, way.pattern) in fresh) for number, way in ways.items()}
    out: dict[int, Tensor] = {}
    if start.changed is not None and start.changed not in set(batch.target_position.tolist()):  # nobody looks there any more
        gone = [number for number, way in ways.items() if joins[number] == last and not way.pattern[2 * last]]
        out = dict.fromkeys(gone, question.itself(start))
    rest = sorted(ways.keys() - out.keys(), key=lambda number: (joins[number], [-one for one in ways[number].pattern]))
    while rest:
        some = rest[: parts.fold(batch, column=start.column)]
        tree = grow([ways[number].pattern for number in some], [joins[number] for number in some])
        begun: dict[int, Tensor] = {}
        for block, level in enumerate(tree.levels) if fresh else ():
            starting = [ways[some[setting]] for setting in level.settings[level.going :]]
            if starting:
                own = start.inputs[block][:, start.changed]
                begun[block] = torch.stack([fresh.get((way.block, way.pattern), own) for way in starting])
        made = question.run(some, replace(start.behind(start.column, tree), fresh=begun))
        out |= made or {}
        rest = rest[len(some) :] if made else rest
    return out


def _fresh(question: Question, start: Start, ways: dict[int, Route]) -> dict[tuple[int, Pattern], Tensor]:
    """What the changed column holds behind the first block of settings that change nothing else there: that column alone runs.

    By block and pattern: [row, width]. All first blocks run in one call, each for its own settings.
    """
    parts, batch = question.parts, question.batch
    assert start.changed is not None
    numbers: dict[tuple[int, int], list[int]] = {}
    for number, way in ways.items():
        if way.alone:
            numbers.setdefault((way.block, way.pattern[2 * way.block + 1]), []).append(number)
    blocks: list[list[int]] = [[] for _ in range(parts.model.layers)]
    for (block, _), alike in numbers.items():
        blocks[block].append(alike[0])
    column, rows, out = start.changed, len(batch.tokens), dict[tuple[int, Pattern], Tensor]()
    most = parts.fold(batch, column=batch.tokens.shape[1] - 1)
    while any(blocks):
        some = [here[:most] for here in blocks]
        kept: dict[int, Tensor] = {}
        here = replace(start, column=column, stop=column + 1, changed=None, wanted=None, kept=kept, tree=apart(some))
        try:
            edits = question.edits(question.gates, here)
            parts.model.forward(batch, edits, columns=batch.target_position[:0], start=here)
        except RuntimeError as error:
            _shrink(parts, error, max(map(len, some)))
            most = max(1, most // 2)
            continue
        for block, settings in enumerate(some):
            values = kept[block][:, 0].unflatten(0, (-1, rows)) if settings else ()
            for setting, value in zip(settings, values, strict=True):
                for alike in numbers[block, ways[setting].pattern[2 * block + 1]]:
                    out[block, ways[alike].pattern] = value
        blocks = [here[most:] for here in blocks]
    return out


def _shrink(parts: "Gated", error: RuntimeError, settings: int) -> None:
    """Where memory ran out with several settings at once, go on with half as many, and say so."""
    if settings == 1 or not ran_out(error):
        raise error
    parts.most = settings // 2
    warnings.warn(f"memory ran out with {settings} settings at once: going on with {settings // 2}", stacklevel=5)
    if parts.model.device.type == "cuda":
        torch.cuda.empty_cache()


def routes(parts: "Gated", batch: Batch, gates: Tensor, fallback: Fallback) -> list[Route | None]:
    """By setting, where it can start; None where all gates are open."""
    layers, width = parts.model.layers, batch.tokens.shape[1]
    since = fallback.since(batch) if parts.added is None or fallback.kind == "own" else 0
    since = since if parts.model.anatomy.causal else 0  # else values differ before the first token that does
    last = int(batch.target_position.min())
    reach: dict[int | str | None, tuple[int, int]] = {}
    for position in {site.position for site in parts.labels}:
        columns = [0, width - 1] if position is None else batch.columns(position).any(0).nonzero().flatten().tolist()
        reach[position] = (max(since, columns[0]), columns[-1]) if columns else (width, -1)
    stages: dict[int, list[int]] = {}
    for number, site in enumerate(parts.labels):
        stages.setdefault(_stage(site, layers), []).append(number)
    reached = torch.tensor([reach[site.position][0] <= reach[site.position][1] for site in parts.labels])
    closed, names = (gates != 1).flatten(1, 2).any(1).cpu() & reached, dict[tuple[int, bytes], int]()
    patterns = [[0] * (2 * layers + 1) for _ in range(len(gates))]
    for stage, members in stages.items():
        some = closed[:, members].any(1).nonzero().flatten().tolist()
        held = gates[some][..., members].cpu().contiguous().numpy()
        for setting, values in zip(some, held, strict=True):
            patterns[setting][stage] = names.setdefault((stage, values.tobytes()), len(names) + 1)
    found: list[Route | None] = []
    for setting, pattern in enumerate(patterns):
        shut = closed[setting].nonzero().flatten().tolist()
        if not shut:
            found.append(None)
            continue
        first = next(stage for stage, name in enumerate(pattern) if name)
        begins = min(reach[parts.labels[number].position][0] for number in shut)
        ends = max(reach[parts.labels[number].position][1] for number in shut)
        column = min(begins, last)
        single = begins == ends and begins + 1 < width
        if not parts.model.anatomy.causal:
            column, single = 0, False  # what changes at one column changes those before it, too
        if not single and 4 * column < width:
            column = 0  # so that settings of several first columns run together: that is worth more than few columns
        inside = [acts_on(parts.labels[number]).kind for number in shut if _stage(parts.labels[number], layers) == first]
        alone = single and first % 2 == 1 and not set(inside) & set(SPREADING)
        found.append(Route(tuple(pattern), first // 2, column, begins if single else None, alone))
    return found


def _stage(site: Site, layers: int) -> int:
    """The stage (`models.tree`) at which a part's gate acts."""
    place = acts_on(site)
    if place.layer is None:
        return 0 if place.kind == "embed" else 2 * layers
    if place.kind in ("resid.pre", "resid.post"):
        return 2 * (place.layer + (place.kind == "resid.post"))
    return 2 * place.layer + 1


def _start(parts: "Gated", batch: Batch, metric: Metric, found: Sequence[Route], settings: int) -> tuple[Start, Batch]:
    """Where runs may start, with what the model's own run holds there; and the batch, its tokens numbered as in the logits."""
    model, asked = parts.model, batch
    some = len(found) > 1 and any(route.block or route.column for route in found) and not why_plain(model)
    frozen, start, normed = parts.routing == "frozen", Start(), parts.norm == "frozen"
    if some or frozen or normed or metric.reference or len(found) < settings:
        keys = some and any(route.column or route.changed for route in found)
        with model.editing(parts.base(), batch):
            start = reference(model, batch, some, keys, some and _roomy(parts, batch), frozen, normed)
    if not some:
        return start, asked
    if not any(site.kind in ("neuron", "router", "expert") for site in parts.labels):
        start = trimmed(model, start, batch.target_position.unique())
    streams = metric.answers_alone(batch) or (not metric.vocabulary and not capped(model))
    if streams and Site("logits") not in parts.by_place and not why_whole_vocabulary(model.anatomy):
        tokens, asked = batch.numbered()
        start = replace(start, tokens=tokens, rest=not metric.answers_alone(batch))
    return start, asked


def _roomy(parts: "Gated", batch: Batch) -> bool:
    """Whether there is room to keep queries, keys and values of the model's own run."""
    anatomy = parts.model.anatomy
    made = [module for layer in anatomy.layers for module in projections(layer.attention, layer.output)]
    width = sum(max(module.weight.shape) if module.weight.dim() == 2 else 0 for module in made)  # type: ignore[union-attr]
    return batch.tokens.numel() * width * 4 * SHARE <= parts.memory
