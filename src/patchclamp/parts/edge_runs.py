"""Many settings of what destinations read, folded into the rows of few passes, each from where it first differs from the model.

A closed edge into a reader of block l changes nothing below it. So the model's own run is kept (the stream into each block, and what
sources write), a setting starts at the block of its first reader (`models.replay`), and what settings have in common runs once
(`models.tree`). What sources below the start write is known; their differences to the fallback are computed once.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.metrics import Metric
from patchclamp.models.editing import Edits
from patchclamp.models.model import Model
from patchclamp.models.recording import Recorder
from patchclamp.models.replay import capped, reference, trimmed, why_plain
from patchclamp.models.standing import Start, projections, why_whole_vocabulary
from patchclamp.models.tree import Pattern, grow
from patchclamp.parts.limits import CACHE
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch


@dataclass
class Count:
    """What passes have cost so far: blocks run, each for one setting on the whole batch; the model's own run, too."""

    blocks: int = 0


@dataclass(frozen=True, eq=False)
class Ground:
    """What the settings of one batch stand on: the model's own run of it.

    Args:
        model: the model.
        batch: the prompts, on its device.
        metric: what is measured.
        asked: the batch, its answers numbered as in the logits that are computed.
        start: where runs may start; without inputs, every run is a whole one.
        kept: what stood at the sites that were asked for; empty where every run is a whole one.
        itself: the metric of the model's own run, where it was made.
        count: of blocks that ran.
    """

    model: Model
    batch: Batch
    metric: Metric
    asked: Batch
    start: Start
    kept: Mapping[Site, Tensor]
    itself: Float[Tensor, " example"] | None
    count: Count = field(default_factory=Count)


def ground_of(
    model: Model, batch: Batch, metric: Metric, sites: Sequence[Site], memory: int, replays: bool, own: bool = True
) -> Ground:
    """The model's own run of a batch, kept for settings to start from.

    Args:
        model: the model.
        batch: on its device.
        metric: what is measured.
        sites: what has to be kept of it, beside the stream.
        memory: bytes that activations may take.
        replays: whether settings may start behind its first block, if this model's runs can.
        own: whether its metric is asked for in any case.

    Cost: one forward pass; none, where runs are whole and nothing is asked of it.
    """
    with torch.no_grad():
        if not replays or why_plain(model):
            if not own and not metric.reference:
                return Ground(model, batch, metric, batch, Start(), {}, None)
            logits = model.target_logits(batch)
            plain = logits[0] if metric.reference else None
            found = Ground(model, batch, metric, batch, Start(logits=logits[0]), {}, metric(logits, batch, plain)[0])
            found.count.blocks += model.layers
            return found
        recorder = Recorder(model.anatomy, sites)
        with recorder.session().open():
            start = reference(model, batch, True, False, _roomy(model, batch, memory))
        assert start.logits is not None
        itself = metric(start.logits[None], batch, start.logits if metric.reference else None)[0]
        start, asked = trimmed(model, start, batch.target_position.unique()), batch
        streams = metric.answers_alone(batch) or (not metric.vocabulary and not capped(model))
        if streams and not why_whole_vocabulary(model.anatomy):
            tokens, asked = batch.numbered()
            start = replace(start, tokens=tokens, rest=not metric.answers_alone(batch))
        found = Ground(model, batch, metric, asked, start, dict(recorder.kept), itself)
        found.count.blocks += model.layers
        return found


def _roomy(model: Model, batch: Batch, memory: int) -> bool:
    """Whether there is room to keep queries, keys and values of the model's own run."""
    made = [module for layer in model.anatomy.layers for module in projections(layer.attention, layer.output)]
    width = sum(max(module.weight.shape) if module.weight.dim() == 2 else 0 for module in made)  # type: ignore[union-attr]
    return batch.tokens.numel() * width * 16 <= memory


def first_block(pattern: Pattern) -> int | None:
    """The block at which a setting first differs from the model itself; behind the last one, the number of blocks."""
    return next((stage // 2 for stage, name in enumerate(pattern) if name), None)


def replays_pay(patterns: Sequence[Pattern]) -> bool:
    """Whether settings spare more blocks by starting late than the model's own run takes."""
    joins = [first_block(pattern) for pattern in patterns]
    return sum(join for join in joins if join is not None) > len(patterns[0]) // 2 or None in joins


def measured(
    ground: Ground, patterns: Sequence[Pattern], edits_of: Callable[[Sequence[int], Start], Edits], most: int
) -> Float[Tensor, "setting example"]:
    """The metric for each setting and example, without gradient.

    Args:
        ground: what they stand on.
        patterns: by setting, what it does at each stage (`models.tree`); nothing at any: the model itself.
        edits_of: the edits of a pass of some of the settings, from a start.
        most: how many settings run at once.

    Cost: per setting, the blocks from its first reader on, but for those that it shares with others.
    """
    model, joins = ground.model, [first_block(pattern) for pattern in patterns]
    out: dict[int, Tensor] = {}
    for number, join in enumerate(joins):
        if join is None:
            assert ground.itself is not None
            out[number] = ground.itself
    ways = {number: join if ground.start.inputs else 0 for number, join in enumerate(joins) if join is not None}
    waiting = sorted(ways, key=lambda number: (ways[number], [-one for one in patterns[number]]))
    plain = ground.start.logits if ground.metric.reference else None
    with torch.no_grad():
        while waiting:
            some, start = waiting[:most], ground.start
            if start.inputs:
                start = start.behind(0, grow([patterns[number] for number in some], [ways[number] for number in some]))
            try:
                logits = model.target_logits(ground.batch, edits_of(some, start), len(some), start)
            except RuntimeError as error:
                most = _fewer(error, len(some))
                continue
            out |= zip(some, ground.metric(logits, ground.asked, plain), strict=True)
            levels = [len(some)] * model.layers if start.tree is None else map(len, start.tree.levels[:-1])
            ground.count.blocks += sum(levels)
            waiting = waiting[len(some) :]
    return torch.stack([out[number] for number in range(len(patterns))])


def _fewer(error: RuntimeError, settings: int) -> int:
    """Where memory ran out with several settings at once, half as many, said aloud."""
    if settings == 1 or not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
        raise error
    warnings.warn(f"memory ran out with {settings} settings at once: going on with {settings // 2}", stacklevel=3)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return settings // 2


def at_once(model: Model, batch: Batch, memory: int) -> int:
    """How many settings run side by side where activations may take `memory` bytes; what sources write is kept while they run."""
    anatomy, width = model.anatomy, model.width
    size = max(size.heads * size.head_width for size in anatomy.sizes)
    neurons = max((size.neurons or 4 * width) for size in anatomy.sizes)
    heads = max(size.heads for size in anatomy.sizes)
    rows, length = batch.tokens.shape
    kept = len(anatomy.sizes) * (size + 2 * width)
    per_token = kept + 16 * width + 8 * size + 6 * neurons + 6 * heads * length
    vocabulary = int(anatomy.config.vocab_size) * len(batch.target_row) * 3
    most = memory // (4 * (rows * length * per_token + vocabulary))
    if model.device.type == "cpu":
        most = min(most, CACHE // (4 * rows * length * neurons))
    return max(1, most)
