"""Jobs: what is to be costed, and the lines that its cost is given in."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from patchclamp.gating.objective import GatingSettings
from patchclamp.metrics import Metric, metric_named
from patchclamp.models.model import Model
from patchclamp.study.asked import Whole
from patchclamp.study.cost.work import Amount, Engine, Shape
from patchclamp.study.plan import Plan
from patchclamp.study.steps import metric_for
from patchclamp.tasks import Examples
from patchclamp.tasks._split import Split

BATCH = 64
"""Examples at once, of whatever is measured."""


@dataclass(frozen=True)
class Line:
    """What one piece of a map takes.

    Args:
        step: the step of the run that keeps it; empty: nothing keeps it, and it is done again by a run that goes on.
        title: what progress calls it.
        settings: gate settings that are run on the batch.
        rows, tokens: the batch.
        expected, most: passes, in prompts (`work`).
        memory: bytes beside the model, at most.
        kept: whether the run has it already, so that it costs nothing.
    """

    step: str
    title: str
    settings: int
    rows: int
    tokens: int
    expected: Amount
    most: Amount
    memory: int
    kept: bool = False

    def beside(self, weights: int) -> "Line":
        """The same with a second model in memory."""
        return replace(self, memory=self.memory + weights)

    @property
    def forward(self) -> float:
        """Forward-pass equivalents, in passes over the line's batch."""
        return self.expected.forward / self.rows

    @property
    def backward(self) -> float:
        """Backward-pass equivalents likewise."""
        return self.expected.backward / self.rows


@dataclass(frozen=True)
class Job:
    """What is to be costed: a question, its prompts, its parts, how its gates are learned."""

    model: Model
    plan: Plan
    split: Split
    parts: Whole
    settings: GatingSettings

    @cached_property
    def engine(self) -> Engine:
        """What measuring costs."""
        return Engine(self.parts, self.split.confirm)

    @cached_property
    def kind(self) -> str:
        """The fallback."""
        return self.plan.fallback or ("resample" if self.split.fit[0].corrupt is not None else "mean")

    @cached_property
    def second(self) -> str:
        """The second fallback."""
        return self.plan.second or ("mean" if self.kind.partition(":")[0] != "mean" else "zero")

    @cached_property
    def metric(self) -> Metric:
        """The metric of effects."""
        return metric_named(metric_for(self.split.confirm, self.plan.metric))

    @cached_property
    def weights(self) -> int:
        """Bytes of the model's weights."""
        return sum(one.numel() * one.element_size() for one in self.model.hf.parameters())

    def shapes(self, examples: Examples, kind: str | None = None, metric: Metric | None = None) -> list[Shape]:
        """The examples' batches."""
        return [self.engine.shape(batch, kind or self.kind, metric or self.metric) for batch in examples.batches(BATCH)]


def line(
    job: Job, step: str, title: str, shapes: Sequence[Shape], settings: int, expected: Amount, most: Amount | None = None, *,
    folded: int | None = None, backward: bool = False,
) -> Line:  # fmt: skip
    """A line over batches; `folded` settings at once at most, by default all that there are."""
    memory = max(bytes_of(job, shape, settings if folded is None else folded, backward) for shape in shapes)
    rows, tokens = sum(shape.rows for shape in shapes), max(shape.tokens for shape in shapes)
    return Line(step, title, settings, rows, tokens, expected, expected if most is None else most, memory)


def bytes_of(job: Job, shape: Shape, settings: int, backward: bool) -> int:
    """What folded settings hold, and what is kept of the corrupt and the model's own run; an estimate, as `Gated.fold` is."""
    anatomy, width = job.model.anatomy, job.model.width
    sizes = max(anatomy.sizes, key=lambda one: one.heads * one.head_width)
    inner, neurons = sizes.heads * sizes.head_width, max(one.neurons or 4 * width for one in anatomy.sizes)
    layers, item = len(anatomy.sizes), job.model.dtype.itemsize
    per_token = (8 * width + 4 * inner + 3 * neurons + 3 * sizes.heads * shape.tokens) * (layers if backward else 2)
    vocabulary = shape.wanted * int(anatomy.config.vocab_size) * 3
    folded = min(settings, shape.slope_fold if backward else shape.fold)
    running = folded * shape.rows * ((shape.tokens - shape.since) * per_token + vocabulary)
    kept = shape.rows * shape.tokens * layers * (2 * (width + inner) + width)  # the fallback's values; inputs, keys and values
    return item * (running + kept)


def total(amounts: Iterable[Amount]) -> Amount:
    """Their sum."""
    return sum(amounts, Amount())
