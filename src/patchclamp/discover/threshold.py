"""Threshold: parts in order of their scores, as many as a wanted faithfulness takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.circuit import Circuit
from patchclamp.errors import MetricError, PatchclampError
from patchclamp.metrics import metric_named
from patchclamp.parts import Fallback, Parts, benefits
from patchclamp.scores import Part, Scores
from patchclamp.tasks import Examples

Order = Literal["magnitude", "signed"]
ALL_SIZES = 200
"""Up to this many parts every size is measured; beyond, sizes on a logarithmic grid."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Benefit with the first k parts of an order open, for each k.

    Attributes:
        order: parts, best first.
        sizes: the numbers k that were measured, both ends included.
        values: [size, example], the benefit with the first k parts open and the rest closed.
    """

    order: tuple[Part, ...]
    sizes: tuple[int, ...]
    values: Float[Tensor, "size example"]

    def faithfulness(self) -> Float[Tensor, " size"]:
        """(m(k) - m(none)) / (m(all) - m(none)), a ratio of means: 0 and 1 at the ends, bounded by neither between them.

        Raises:
            MetricError: closing everything changes nothing, so that there is nothing to keep.
        """
        means = self.values.double().mean(1)
        span = means[-1] - means[0]
        if float(span.abs()) < 1e-9:
            raise MetricError(
                "faithfulness has no scale: the metric is the same with every part open and with every part closed. "
                "Choose prompts, a metric or a fallback under which the behaviour goes away"
            )
        return (means - means[0]) / span


def sizes_of(parts: int) -> tuple[int, ...]:
    """Every size from 0 to `parts`, or some 100 sizes on a logarithmic grid where there are many."""
    if parts <= ALL_SIZES:
        return tuple(range(parts + 1))
    grid = torch.logspace(0, float(torch.tensor(float(parts)).log10()), 100).round().long().tolist()
    return tuple(sorted({0, parts, *map(int, grid)}))


def ranked(scores: Scores, by: Order = "magnitude") -> tuple[Part, ...]:
    """Parts, best first: by |score| (interfering parts belong to the mechanism), or by score (only what helps first)."""
    values = scores.values()
    key = {"magnitude": lambda i: -abs(values[i]), "signed": lambda i: -values[i]}[by]
    order = sorted(range(len(scores)), key=key)
    parts = scores.sites
    return tuple(parts[i] for i in order)


def faithfulness_curve(
    parts: Parts, examples: Examples, fallback: Fallback, order: Sequence[Part], *, metric: str | None = None,
    sizes: Sequence[int] | None = None,
) -> Curve:  # fmt: skip
    """Benefit with the first k parts of `order` open, for every size k. Cost: one forward pass over the examples per size."""
    sizes = tuple(sizes or sizes_of(len(order)))
    gates = torch.cat([parts.only(order[:size]) for size in sizes])
    values = benefits(parts, examples, gates, fallback, metric_named(metric or examples.metric))
    return Curve(tuple(order), sizes, values)


def discover(
    parts: Parts, examples: Examples, fallback: Fallback, scores: Scores, *, faithfulness: float = 0.85, by: Order = "magnitude",
    metric: str | None = None,
) -> tuple[Circuit, Curve]:  # fmt: skip
    """The fewest parts, in order of their scores, whose circuit reaches the wanted faithfulness and keeps it at every larger size
    that was measured, up to the whole model.

    Args:
        parts: what circuits are made of.
        examples: the select set (the circuit is to be judged on others).
        fallback: what parts outside the circuit pass.
        scores: their order.
        faithfulness: the wanted share of what closing everything takes away.
        by: order by magnitude or signed score.
        metric: by default the task's.

    Cost: one forward pass over the examples per size. Faithfulness is not monotone in size: "keeps it" avoids a lucky small one.
    """
    if not 0 < faithfulness <= 1:
        raise PatchclampError(f"a faithfulness of {faithfulness} was wanted: choose a share above 0 and up to 1, such as 0.85")
    order = ranked(scores, by)
    curve = faithfulness_curve(parts, examples, fallback, order, metric=metric)
    reached = curve.faithfulness() >= faithfulness - 1e-9
    kept = torch.flip(torch.cumprod(torch.flip(reached.long(), (0,)), 0), (0,)).bool()
    size = curve.sizes[int(kept.long().argmax())]
    about = {**scores.about, "discovered": "threshold", "by": by, "wanted": faithfulness, "size": size, "of": len(order),
             "selected_on": len(examples), "fallback": fallback.kind}  # fmt: skip
    return Circuit(order[:size], about), curve
