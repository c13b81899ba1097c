"""ACDC: from the output to the input, close each part, and leave it closed where the loss grows by less than a threshold.

    C = all parts;  for each part p from the output to the input:   if D(C without p) - D(C) < tau:  C = C without p

D is a mean over examples: the KL divergence from the whole model's output (nats), the squared distance of the logits (l2), or a
task's metric with its sign turned, so that less is better (Conmy et al. 2023, https://arxiv.org/abs/2304.14997). What is left
depends on the order in which parts are visited, so several orders are run and their overlap stands beside the result.

One setting after the other would be one pass each. Here as many as are expected to be needed run together: the next parts, each
under the circuit that is expected when its turn comes. Decisions are taken in turn, and what was measured under a circuit that
did not come about is thrown away, so that the result is that of one after the other. A setting runs from the block on where its
first closed gate acts, and an edge from which nothing leads on to the logits any more is closed without a run.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import polars as pl
import torch

from patchclamp.circuit import Circuit
from patchclamp.discover.loss import Loss
from patchclamp.discover.order import Reach, reach_of, traversal
from patchclamp.errors import MetricError, PatchclampError
from patchclamp.metrics import Metric, metric_named
from patchclamp.parts import Fallback, Parts
from patchclamp.scores import Part
from patchclamp.tasks import Examples

FEWEST, MOST = 2, 32
"""Settings that run together: two more after each group in which all was guessed right, the fewest after a wrong guess. (Of doubled groups
a third of all runs was thrown away.)"""
UNITS = {"kl": "nats", "nll": "nats", "log_probability": "nats", "logit_diff": "logits", "l2": "squared logits"}
ALL = (("backward", 0), ("ascending", 0), ("random", 0))


@dataclass(frozen=True, eq=False)
class Acdc:
    """What ACDC leaves, for several orders of visiting.

    Args:
        circuit: of the first order.
        orders: the circuit of each order.
        trace: a row per order and part: order, turn, site, growth (of the loss; null where nothing was run), removed, how
            ("measured" or "cut off").
        threshold: tau.
        unit: of the threshold.
        ends: the loss with every part open, and with every part closed.
        loss: of each order's circuit.
        settings: how many settings were run, in all orders, those thrown away among them.
        thrown: how many were thrown away.
        blocks: of edges, blocks that ran, each for one setting on all examples; None of other parts.
        naive: blocks that one whole run for every part of every order takes.
        closest: the smallest |growth - threshold| of a decision: below rounding, it could have gone the other way.
    """

    circuit: Circuit
    orders: tuple[Circuit, ...]
    trace: pl.DataFrame
    threshold: float
    unit: str
    ends: tuple[float, float]
    loss: tuple[float, ...]
    settings: int
    thrown: int
    blocks: float | None
    naive: int
    closest: float

    @property
    def stability(self) -> float | None:
        """Mean Jaccard overlap of the orders' circuits, pair by pair; None of one order."""
        overlaps = [one.jaccard(other) for one, other in combinations(self.orders, 2)]
        return float(np.mean(overlaps)) if overlaps else None

    @property
    def common(self) -> Circuit:
        """The parts that every order leaves."""
        found = self.orders[0]
        for one in self.orders[1:]:
            found = found & one
        return found

    @property
    def ever(self) -> Circuit:
        """The parts that any order leaves."""
        found = self.orders[0]
        for one in self.orders[1:]:
            found = found | one
        return found

    def __str__(self) -> str:
        each = ", ".join(str(len(one)) for one in self.orders)
        overlap = "one order" if self.stability is None else f"Jaccard {self.stability:.2f} between {len(self.orders)} orders"
        return (
            f"ACDC at {self.threshold:.3g} {self.unit} a part: {each} parts ({overlap}; {len(self.common)} in all, "
            f"{len(self.ever)} in any); {self.settings} settings run, {self.thrown} of them thrown away"
            + ("" if self.blocks is None else f", {self.blocks:.0f} blocks where one run per part takes {self.naive}")
        )


def acdc(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    threshold: float | None = None,
    *,
    share: float = 0.01,
    objective: str | Metric = "kl",
    orders: Sequence[tuple[str, int]] = ALL,
    expected: Iterable[Part] = (),
    most: int = MOST,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Acdc:
    """Close parts from the output to the input, and leave those closed whose closing costs less than a threshold.

    Args:
        parts: nodes, neurons, edges.
        examples: prompts; the circuit is to be judged on others.
        fallback: what a closed gate passes.
        threshold: tau, in the objective's unit (nats for kl, logits for logit_diff) per part.
        share: where no threshold is given, tau is this share of what closing everything costs.
        objective: a metric, by name; less of a benefit is more of a loss. kl and l2 compare with the whole model.
        orders: (order, seed) each: backward, ascending, random (`discover.order.traversal`). At least one.
        expected: parts that are likely to stay (of a screen): a better guess throws away fewer runs, and changes nothing else.
        most: settings that run together at most; 1 is one after the other.
        batch_size: examples at once.
        progress: told (parts decided, parts to decide) over all orders.

    Cost: per order one forward pass over the examples for each part visited that is not cut off (from its block on), those
    that were guessed wrong again, and one or two whole passes for each group that runs together.

    Raises:
        MetricError: closing everything costs nothing, so that there is nothing to keep.
        PatchclampError: a threshold or share that is not above 0, no order, or no parts.
        NumericsError: a loss that is not finite.
    """
    if not orders or not parts.counted:
        raise PatchclampError(f"{len(orders)} orders over {len(parts.counted)} parts were asked for: give at least one of each")
    if (threshold is not None and not threshold > 0) or not share > 0:
        raise PatchclampError(f"a threshold of {threshold} and a share of {share} were asked for: choose numbers above 0")
    metric = objective if isinstance(objective, Metric) else metric_named(objective)
    loss = Loss.of(parts, examples, fallback, metric, batch_size)
    opened, closed = loss(torch.cat([parts.open(), parts.closed()]))
    if threshold is None:
        if not closed - opened > 1e-9:
            raise MetricError(
                f"closing every part moves {metric.name} from {opened:.3g} to {closed:.3g} (as a loss): there is nothing to keep. "
                "Choose prompts, a metric or a fallback under which the behaviour goes away, or give a threshold"
            )
        threshold = share * (closed - opened)
    elif abs(closed - opened) < 1e-9:
        raise MetricError(f"closing every part leaves {metric.name} at {opened:.3g}: there is no behaviour to keep")
    index = {part: number for number, part in enumerate(parts.labels)}
    stay, reach = frozenset(index[part] for part in expected), reach_of(parts)
    unit = UNITS.get(metric.name, metric.name)
    about: dict[str, object] = {"method": "acdc", "metric": metric.name, "fallback": fallback.kind, "n": len(examples), "threshold": threshold,
             "unit": unit, "model": parts.model.name, "task": examples.task}  # fmt: skip
    circuits, traces, losses, settings, thrown = list[Circuit](), list[pl.DataFrame](), list[float](), 0, 0
    of = len(orders) * len(parts.counted)
    for number, (name, seed) in enumerate(orders):
        turns = traversal(parts, name, seed)
        told = None if progress is None else _shifted(progress, number * len(turns), of)
        walk = descend(loss, turns, opened, threshold, reach, stay, most, told)
        kept = [parts.labels[turn] for turn in turns if turn not in walk.closed]
        called = name if name != "random" else f"random {seed}"
        circuits.append(Circuit(kept, {**about, "order": called, "size": len(kept), "of": len(turns)}))
        traces.append(_table(parts, called, turns, walk))
        losses.append(walk.loss)
        settings, thrown = settings + walk.settings, thrown + walk.thrown
        stay = frozenset(set(turns) - walk.closed)  # what one order leaves is what the next is expected to leave
    trace = pl.concat(traces)
    margins = (trace["growth"].drop_nulls() - threshold).abs()
    naive = len(trace) * parts.model.layers
    return Acdc(
        circuits[0], tuple(circuits), trace, threshold, unit, (opened, closed), tuple(losses), settings, thrown, loss.blocks, naive,
        float(margins.min()) if len(margins) else float("inf"),  # type: ignore[arg-type]
    )  # fmt: skip


@dataclass(frozen=True)
class Walk:
    """One order: which parts were closed for good, the growth of the loss at each turn (None: cut off), and what that took."""

    closed: frozenset[int]
    growth: tuple[float | None, ...]
    loss: float
    settings: int
    thrown: int


def descend(
    loss: Loss,
    turns: Sequence[int],
    opened: float,
    threshold: float,
    reach: Reach | None,
    stay: Collection[int],
    most: int = MOST,
    progress: Callable[[int, int], None] | None = None,
) -> Walk:
    """Visit parts in turn; see the module. `stay` are the parts that are expected to be left open."""
    closed, growth, now = set[int](), list[float | None](), opened
    settings, thrown, many = 0, 0, min(FEWEST, most)
    while len(growth) < len(turns):
        runs = _ahead(turns[len(growth) :], closed, reach, stay, many)
        values = iter(loss.without([run for _, run in runs if run is not None]))
        used, made, right = 0, sum(run is not None for _, run in runs), True
        for part, run in runs:
            if run is None:
                closed.add(part)
                growth.append(None)
                continue
            value = next(values)
            used += 1
            growth.append(value - now)
            removed = value - now < threshold
            if removed:
                closed.add(part)
                now = value
            if removed == (part in stay):  # what runs behind it was run under a circuit that is not this one
                right = False
                break
        settings, thrown = settings + made, thrown + made - used
        many = min(most, many + FEWEST if right else FEWEST)
        if progress is not None:
            progress(len(growth), len(turns))
    return Walk(frozenset(closed), tuple(growth), now, settings, thrown)


def _ahead(
    turns: Sequence[int], closed: Collection[int], reach: Reach | None, stay: Collection[int], many: int
) -> list[tuple[int, frozenset[int] | None]]:
    """The next parts, each with what is closed when its turn comes as expected and it is closed; None for what is cut off."""
    found, shut, runs = list[tuple[int, frozenset[int] | None]](), set(closed), 0
    for part in turns:
        if reach is not None and reach.cut_off(part, shut):
            found.append((part, None))
            shut.add(part)
            continue
        if runs == many:
            break
        found.append((part, frozenset(shut | {part})))
        runs += 1
        if part not in stay:
            shut.add(part)
    return found


def _shifted(progress: Callable[[int, int], None], before: int, of: int) -> Callable[[int, int], None]:
    return lambda done, _: progress(before + done, of)


def _table(parts: Parts, name: str, turns: Sequence[int], walk: Walk) -> pl.DataFrame:
    return pl.DataFrame(
        {"order": [name] * len(turns), "turn": list(range(len(turns))), "site": [str(parts.labels[turn]) for turn in turns],
         "growth": list(walk.growth), "removed": [turn in walk.closed for turn in turns],
         "how": ["cut off" if one is None else "measured" for one in walk.growth]},
        schema={"order": pl.String, "turn": pl.Int64, "site": pl.String, "growth": pl.Float64, "removed": pl.Boolean, "how": pl.String},
    )  # fmt: skip
