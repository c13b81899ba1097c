"""Work: how many passes the engine makes for gate settings on a batch, with what replay spares.

The unit is one prompt of the confirm set run once through the whole model: a forward-pass equivalent. A backward pass counts as
one, too: weights want no gradient, so it multiplies by each of them once, as a forward pass does. (Training, which also wants
the weights' gradients, would count two.) What is counted are matrix products, as they are shared out in a plain run.
"""

import random
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from math import ceil

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from patchclamp.metrics import Metric
from patchclamp.models.anatomy import Anatomy
from patchclamp.models.model import Model
from patchclamp.models.replay import why_plain
from patchclamp.models.standing import projections, why_every_column, why_whole_vocabulary
from patchclamp.study.asked import Whole
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch


@dataclass(frozen=True)
class Amount:
    """Calls of the model, and prompts that run through it in them, by kind; amounts add up.

    plain: runs by themselves (recordings, the model's own run). folded: gate settings without gradient. sloped: gate settings
    with gradient, of which each call is a forward and a backward pass, and each prompt runs both ways.
    """

    plain_calls: float = 0.0
    plain: float = 0.0
    folded_calls: float = 0.0
    folded: float = 0.0
    sloped_calls: float = 0.0
    sloped: float = 0.0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def __mul__(self, times: int | float) -> "Amount":
        return Amount(*(getattr(self, one.name) * times for one in fields(self)))

    @property
    def forward(self) -> float:
        """Forward-pass equivalents, in prompts."""
        return self.plain + self.folded + self.sloped

    @property
    def backward(self) -> float:
        """Backward-pass equivalents, in prompts."""
        return self.sloped


@dataclass(frozen=True)
class Shares:
    """What share of a plain run's matrix products is where; logits at the targets.

    Args:
        blocks: by block.
        projections: of each block, what makes queries, keys and values: runs of one input share them, and have the model's own.
        tail: of the last block, what runs at the targets' columns only.
        unembed: of the unembedding.
    """

    blocks: tuple[float, ...]
    projections: tuple[float, ...]
    tail: float
    unembed: float


def shares_of(model: Model, batch: Batch) -> Shares:
    """Counted while the model runs two of the batch's prompts; even, where nothing is counted. Cost: one forward pass over two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.target_logits(batch)
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    names = {id(module): name for name, module in model.anatomy.hf.named_modules()}
    root = type(model.anatomy.hf).__name__

    def of(module: nn.Module) -> float:
        return float(counts.get(f"{root}.{names[id(module)]}", 0))

    layers, unembed = model.anatomy.layers, of(model.anatomy.unembed)
    blocks = [of(layer.block) for layer in layers]
    if not all(blocks):
        even = 1 / len(layers)
        return Shares((even,) * len(layers), (0.0,) * len(layers), 0.0, 0.0)
    made = [sum(of(one) for one in projections(layer.attention, layer.output)) for layer in layers]
    last = layers[-1]
    tail = 0.0 if why_every_column(model.anatomy) else sum(of(one) for one in {last.output, last.mlp})
    whole = sum(blocks) + unembed
    return Shares(tuple(b / whole for b in blocks), tuple(m / whole for m in made), tail / whole, unembed / whole)


Pattern = tuple[Hashable, ...]
"""What a setting does, block by block: None where every gate is open, and equal where two settings do the same."""


def runs_of(patterns: Sequence[Pattern]) -> tuple[list[int], list[int]]:
    """By block, the runs of settings that share what they have in common, and the inputs of these runs that are not the model's.

    Runs at block b: different beginnings of patterns, up to b, that are not all None. Inputs: different beginnings below b.
    """
    runs, inputs = list[int](), list[int]()
    for block in range(len(patterns[0]) if patterns else 0):
        here = {pattern[: block + 1] for pattern in patterns if any(what is not None for what in pattern[: block + 1])}
        runs.append(len(here))
        inputs.append(len({begun[:-1] for begun in here if any(what is not None for what in begun[:-1])}))
    return runs, inputs


@dataclass(frozen=True)
class Shape:
    """A batch as far as its cost goes.

    Args:
        rows, tokens: its size.
        since: the first column that settings run (0: all run).
        wanted: columns with targets.
        answers: share of the vocabulary's logits that a metric of answers alone takes.
        fold, slope_fold: settings side by side, without and with gradient.
        prompts: rows, in prompts of the confirm set's length.
        resamples: whether the fallback takes a run of its own.
        reference: whether the metric compares with the model's own run.
    """

    rows: int
    tokens: int
    since: int
    wanted: int
    answers: float
    fold: int
    slope_fold: int
    prompts: float
    resamples: bool
    reference: bool


@dataclass(frozen=True, eq=False)
class Engine:
    """What measuring costs for the parts of one model.

    Args:
        parts: heads and MLPs, or a mixture.
        examples: the confirm set, whose prompts are the unit.
    """

    parts: Whole
    examples: Examples

    @property
    def anatomy(self) -> Anatomy:
        """The model's."""
        return self.parts.model.anatomy

    @cached_property
    def shares(self) -> Shares:
        """Of the model on the first two prompts."""
        return shares_of(self.parts.model, self.examples.batch(range(min(2, len(self.examples)))))

    @cached_property
    def tokens(self) -> int:
        """Of the confirm set's first batch."""
        return self.examples.batch(range(min(64, len(self.examples)))).tokens.shape[1]

    @cached_property
    def whole(self) -> bool:
        """Whether every run is a whole one."""
        return bool(why_plain(self.parts.model))

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """By counted part, its block."""
        return tuple(self.parts.labels[number].layer or 0 for number in self.parts.counted)

    def shape(self, batch: Batch, kind: str, metric: Metric) -> Shape:
        """What a batch costs under a fallback of this kind."""
        rows, tokens = batch.tokens.shape
        resamples = kind in ("resample", "model")  # of another model, which is of this one's size
        since = self.parts.fallback(kind).since(batch) if kind == "resample" else 0
        since = min(since, int(batch.target_position.min()))
        since = 0 if 4 * since < tokens or self.whole else since
        alone = metric.answers_alone(batch) and not why_whole_vocabulary(self.anatomy)
        answers = len(batch.numbered()[0]) / int(self.anatomy.config.vocab_size) if alone else 1.0
        return Shape(
            rows, tokens, since, len(batch.target_position.unique()), answers, self.parts.fold(batch, column=since),
            self.parts.fold(batch, backward=True), rows * tokens / self.tokens, resamples, metric.reference,
        )  # fmt: skip

    def plain(self, shape: Shape, times: int = 1) -> Amount:
        """Runs of the model itself, one call each; logits at the targets."""
        return Amount(plain_calls=float(times), plain=times * shape.prompts)

    def recording(self, shape: Shape) -> Amount:
        """A run for what its sites hold: logits at one column."""
        return Amount(plain_calls=1.0, plain=(1 - self.shares.unembed * (1 - 1 / shape.wanted)) * shape.prompts)

    def everywhere(self, shape: Shape) -> Amount:
        """A run with logits at every column."""
        return Amount(plain_calls=1.0, plain=(1 + self.shares.unembed * (shape.tokens / shape.wanted - 1)) * shape.prompts)

    def measure(self, shape: Shape, patterns: Sequence[Pattern], opened: bool = False, kept: bool = False) -> Amount:
        """One `measure`.

            settings: sum over blocks of ((block - projections) R + projections Q) C, of the last with its tail at W for C;
            and unembed A for each setting, per prompt
            R, Q = runs and inputs at the block (`runs_of`), C = (tokens - since) / tokens, W = targets' columns / tokens,
            A = the share of logits that are asked for

        Beside it a run of the model itself, where settings start from it, one of them is open, or the metric compares with it;
        and one of the corrupt prompts, where the fallback takes their values. A single setting runs whole, and so do several
        that all start at the beginning. (Where memory is short of what projections take, they are made anew: not counted.)

        Args:
            shape: the batch.
            patterns: of the settings that have a closed gate.
            opened: whether one of the settings has every gate open.
            kept: whether the fallback has this batch's values from before.
        """
        share, late = self.shares, [pattern for pattern in patterns if pattern[0] is None]
        some = len(patterns) > 1 and not self.whole and (shape.since > 0 or bool(late))
        each, calls = float(len(patterns)), ceil(len(patterns) / shape.fold)
        if some:
            columns, wanted = (shape.tokens - shape.since) / shape.tokens, shape.wanted / shape.tokens
            each, ordered = 0.0, sorted(patterns, key=_place)
            for start in range(0, len(ordered), shape.fold):
                runs, inputs = runs_of(ordered[start : start + shape.fold])
                blocks = zip(share.blocks, share.projections, runs, inputs, strict=True)
                each += columns * sum((block - made) * run + made * own for block, made, run, own in blocks)
                each += runs[-1] * (share.tail * (wanted - columns) + share.unembed * shape.answers)
        record = self.recording(shape) if shape.resamples and not kept and len(patterns) else Amount()
        beside = self.plain(shape, int(some or opened or shape.reference)) + record
        return beside + Amount(folded_calls=float(calls), folded=each * shape.prompts)

    def gradient(self, shape: Shape, settings: int) -> Amount:
        """One `gradient`: (1 - unembed - tail) C + tail W + unembed A forward per setting, and as much backward.

        And a run of the model itself, where starting behind the first columns spares more than that, or the metric compares with
        it; and one for the fallback. (Blocks that are computed again, where memory is short, are not counted.)
        """
        spares = 2 * settings * shape.since / shape.tokens > 1.1  # the engine's own rule
        columns = (shape.tokens - shape.since * spares) / shape.tokens
        trimmed = (1 - self.shares.unembed - self.shares.tail) * columns + self.shares.tail * shape.wanted / shape.tokens
        each = 1.0 if self.whole else trimmed + self.shares.unembed * shape.answers
        record = self.recording(shape) if shape.resamples else Amount()
        calls = float(ceil(settings / shape.slope_fold))
        beside = self.plain(shape, int(spares or shape.reference)) + record
        return beside + Amount(sloped_calls=calls, sloped=settings * each * shape.prompts)

    def closing(self, closed: Collection[int], of: Hashable = None) -> Pattern:
        """The setting that closes some of the counted parts, by number; with `of`, one that differs in these from a setting whose
        gates are all between open and closed, known by that name."""
        by_block: list[set[int]] = [set() for _ in self.anatomy.layers]
        for part in closed:
            by_block[self.layers[part]].add(part)
        return tuple(None if of is None and not here else (of, frozenset(here)) for here in by_block)

    def singles(self) -> list[Pattern]:
        """Each part closed alone."""
        return [self.closing([part]) for part in range(len(self.layers))]

    def drawn(self, closed: int, seed: int) -> Pattern:
        """So many parts closed, whichever they are: drawn at random."""
        return self.closing(self.order(seed)[:closed])

    def order(self, seed: int = 0, late: bool = True) -> list[int]:
        """The parts in an order drawn at random, for orders that are not known yet; the last of them `late` in the model, or early.

        Closing the last alone is a setting that starts late or at the beginning, and where none starts late, all run whole.
        """
        found = random.Random(seed).sample(range(len(self.layers)), len(self.layers))
        last = max(found, key=self.layers.__getitem__) if late else min(found, key=self.layers.__getitem__)
        return [*(part for part in found if part != last), last]


def _place(pattern: Pattern) -> tuple[int, str]:
    """Where a setting stands among others: by its first block, those alike together."""
    first = next((block for block, what in enumerate(pattern) if what is not None), len(pattern))
    return first, str([sorted(what[1]) if isinstance(what, tuple) else what for what in pattern])
