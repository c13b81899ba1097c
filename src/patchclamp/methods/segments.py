"""Segments: integrated gradients of one place at a time (all heads of a layer, an MLP, all edges into a destination), the rest open.

score(part) = integral over g from 0 to 1 of d benefit / d gate, the gates of the part's own segment all at g and every other open.

So what the parts of a segment score adds up to what closing the segment takes, whatever its size; and a part that is a segment
alone scores its exact effect (fundamental theorem of calculus). This is what "integrated gradients over activations" is meant to
be: other segments stay open while one closes, and each is divided by its own number of points.

The integral is a midpoint rule on intervals, m = 5 to begin with. What the benefit really does on an interval is known from its
ends, so an interval whose midpoint misses it is cut in three (its midpoint stays one), until what is missed, summed over the
intervals of a segment, is at most a hundredth of the largest effect of any segment, or 243 points were taken. The gap that is left
is noted with the scores (`gap`: the largest |sum - exact| of any segment, in the metric's units) and warned of where it is larger.

Cost: per segment at least m forward and m backward passes, and m forward passes for the intervals' ends.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.methods._notes import note
from patchclamp.methods._slopes import first_order
from patchclamp.metrics import Metric
from patchclamp.parts import Fallback, Parts
from patchclamp.parts.compiling import acts_on
from patchclamp.sites import Edge
from patchclamp.tasks._batch import Batch

STEPS = 5
TOLERANCE = 0.01
MOST = 243
"""Points that one segment may take."""
TOGETHER = 1 << 22
"""Gates held at once."""


def passes(layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch, at least: two segments a layer."""
    return 2 * 2 * layers * STEPS + 1, 2 * layers * STEPS


def samples(parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int) -> Float[Tensor, "part example"]:
    """[part, example]; warns where the gap that is left is larger than asked for."""
    return told(segmented(parts, batch, fallback, metric, by_segment(parts)))


def by_segment(parts: Parts) -> list[list[int]]:
    """The counted parts' numbers, those of one place together; edges by their destination."""
    found: dict[object, list[int]] = {}
    for number in parts.counted:
        label = parts.labels[number]
        found.setdefault(label.target if isinstance(label, Edge) else acts_on(label), []).append(number)
    return list(found.values())


@dataclass(frozen=True, eq=False)
class Segmented:
    """Scores by segment, and how far they are from complete.

    Args:
        samples: [part, example], of the benefit.
        effects: [segment, example], what closing the segment takes.
        gaps: [segment, example], the scores' sum less the effect.
        points: by segment, how many gradients were taken.
        tolerance: the share of the largest effect that may be missed.
    """

    samples: Float[Tensor, "part example"]
    effects: Float[Tensor, "segment example"]
    gaps: Float[Tensor, "segment example"]
    points: tuple[int, ...]
    tolerance: float

    @property
    def gap(self) -> float:
        """The largest |gap| of any segment, of its mean over examples."""
        return float(self.gaps.mean(1).abs().max())

    @property
    def allowed(self) -> float:
        """What it was to be at most."""
        return self.tolerance * float(self.effects.abs().mean(1).max())


def told(found: Segmented) -> Float[Tensor, "part example"]:
    """The samples; the gap is noted, and warned of where it is larger than was asked for."""
    note("gap", found.gap)
    note("points", max(found.points))
    if found.gap > found.allowed:
        warnings.warn(
            f"integrated gradients miss {found.gap:.3g} of some segment's effect after {max(found.points)} points, where "
            f"{found.allowed:.3g} was asked for: take its parts by exact",
            stacklevel=3,
        )
    return found.samples


@dataclass(eq=False)
class _Line:
    """One segment's way from closed to open: intervals, and what is known of each."""

    numbers: list[int]
    bounds: list[tuple[float, float]]
    slopes: list[Tensor]
    """By interval, at its midpoint: [example, part]."""
    rises: list[Tensor]
    """By interval, what the metric does over it: [example]."""

    def misses(self) -> list[float]:
        """By interval, the mean over examples of what the midpoint rule misses."""
        return [
            float((rise - (stop - start) * slope.sum(1)).abs().mean())
            for (start, stop), slope, rise in zip(self.bounds, self.slopes, self.rises, strict=True)
        ]

    def integral(self) -> Float[Tensor, "example part"]:
        """The midpoint rule."""
        return torch.stack([(b - a) * slope for (a, b), slope in zip(self.bounds, self.slopes, strict=True)]).sum(0)


def segmented(
    parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, segments: Sequence[Sequence[int]], steps: int = STEPS,
    tolerance: float = TOLERANCE, most: int = MOST,
) -> Segmented:  # fmt: skip
    """Integrated gradients of each segment (numbers of parts) by itself, all other parts open; each part in one segment.

    Args:
        parts: the parts.
        batch: on which prompts.
        fallback: what a closed gate passes.
        metric: any with a gradient.
        segments: numbers of parts that close together.
        steps: equal intervals to begin with.
        tolerance: what may be missed of a segment, as a share of the largest effect of any; infinity: no interval is cut.
        most: points that a segment may take.

    Raises:
        MetricError: the metric counts.
    """
    if metric.name == "top1":
        first_order(metric, "segments")
    walker = _Walker(parts, batch, fallback, metric)
    even = [(step / steps, (step + 1) / steps) for step in range(steps)]
    lines = [_Line(list(numbers), [], [], []) for numbers in segments]
    walker.walk([(line, piece, None) for line in lines for piece in even])
    scale = max((float(sum(line.rises).abs().mean()) for line in lines), default=0.0)  # type: ignore[union-attr]
    while pieces := [cut for line in lines for cut in _cuts(line, tolerance * scale, most)]:
        walker.walk(pieces)
    place = {number: row for row, number in enumerate(parts.counted)}
    out = torch.zeros(len(parts.counted), len(batch), device=parts.model.device, dtype=lines[0].slopes[0].dtype)
    effects: list[Tensor] = []
    for line in lines:
        out[[place[number] for number in line.numbers]] = metric.sign * line.integral().T
        effects.append(metric.sign * torch.stack(line.rises).sum(0))
    gaps = [metric.sign * line.integral().sum(1) - effect for line, effect in zip(lines, effects, strict=True)]
    return Segmented(out, torch.stack(effects), torch.stack(gaps), tuple(len(line.bounds) for line in lines), tolerance)


_Piece = tuple[_Line, tuple[float, float], Tensor | None]
"""An interval to be looked at; its slope, where it is known."""


def _cuts(line: _Line, allowed: float, most: int) -> list[_Piece]:
    """The intervals of a line that are to be looked at next: thirds of those that miss more than their share."""
    misses = line.misses()
    if sum(misses) <= allowed or len(misses) + 2 > most:
        return []
    floor = max(allowed / (2 * len(misses)), max(misses) / 16)
    found: list[_Piece] = []
    for number in sorted((n for n, miss in enumerate(misses) if miss > floor), key=lambda n: -misses[n])[
        : (most - len(misses)) // 2
    ]:
        start, stop = line.bounds[number]
        third = (stop - start) / 3
        found += [
            (line, (start, start + third), None),
            (line, (start + third, stop - third), line.slopes[number]),
            (line, (stop - third, stop), None),
        ]
    gone = {(piece[1][0]) for piece in found[::3]}
    keep = [number for number, (start, _) in enumerate(line.bounds) if start not in gone]
    line.bounds, line.slopes, line.rises = (
        [line.bounds[n] for n in keep], [line.slopes[n] for n in keep], [line.rises[n] for n in keep],
    )  # fmt: skip
    return found


@dataclass(eq=False)
class _Walker:
    """Takes slopes at midpoints and values at ends, many segments at once."""

    parts: Parts
    batch: Batch
    fallback: Fallback
    metric: Metric

    @cached_property
    def opened(self) -> Float[Tensor, " example"]:
        """The metric with every gate open."""
        return self.parts.measure(self.batch, self.parts.open(), self.fallback, self.metric)[0]

    def walk(self, pieces: Sequence[_Piece]) -> None:
        """Look at intervals, and put what is found into their lines."""
        unknown = [(line, sum(bounds) / 2) for line, bounds, slope in pieces if slope is None]
        taken = self._at(unknown, slopes=True)
        slopes = iter(slope[:, line.numbers] for (line, _), slope in zip(unknown, taken, strict=True))
        ends = list(dict.fromkeys((id(line), share) for line, bounds, _ in pieces for share in bounds if share < 1 - 1e-9))
        by_id = {id(line): line for line, _, _ in pieces}
        values = dict(zip(ends, self._at([(by_id[name], share) for name, share in ends], slopes=False), strict=True))
        for line, (start, stop), slope in pieces:
            line.bounds.append((start, stop))
            line.slopes.append(next(slopes) if slope is None else slope)
            line.rises.append(values.get((id(line), stop), self.opened) - values[id(line), start])

    def _at(self, points: Sequence[tuple[_Line, float]], slopes: bool) -> list[Tensor]:
        """Slopes or values at points (a line, how far its gates are open)."""
        parts, found, most = self.parts, list[Tensor](), max(1, TOGETHER // len(self.parts.labels))
        for at in range(0, len(points), most):
            some = points[at : at + most]
            gates = parts.open(len(some))
            for row, (line, share) in enumerate(some):
                gates[row, ..., line.numbers] = share
            if slopes:
                found += list(parts.gradient(self.batch, gates, self.fallback, self.metric)[1])
            else:
                found += list(parts.measure(self.batch, gates, self.fallback, self.metric))
        return found
