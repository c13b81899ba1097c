"""Double dissociation: a set of parts that impairs one task and spares another, and a second set that does the reverse.

Sets are found on select prompts and judged on confirm prompts alone. What a set takes is the share of the way from the open to the
closed model:  lost = (benefit open - benefit set closed) / (benefit open - benefit all closed), with means over prompts above and below.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float

from patchclamp.dependence.network.hubs import matched_sets
from patchclamp.errors import PatchclampError
from patchclamp.methods import groups_of
from patchclamp.metrics import metric_named
from patchclamp.parts import Fallback, Parts, benefits
from patchclamp.parts.contract import sites_of
from patchclamp.scores.statistics import grouped, names_of
from patchclamp.tasks import Examples

IMPAIR, SPARE = 0.5, 0.1
LARGEST = 8
RESAMPLES = 1000


@dataclass(frozen=True)
class Loss:
    """The share that closing a set takes of a task, with its 95 % bootstrap interval over groups of confirm prompts."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, eq=False)
class Dissociation:
    """What two sets take of two tasks.

    Args:
        tasks: names.
        sets: by the task that the set is to impair.
        lost: (set's task, measured task) -> loss on confirm prompts; without a set, absent.
        contrast: by set: lost of its own task less lost of the other, with interval.
        random: by set: mean contrast of random sets of the same size and kinds, and p of the set's among them.
        impair, spare: the bounds that were asked for.
        about: fallback, metric, n.
    """

    tasks: tuple[str, str]
    sets: Mapping[str, tuple[str, ...]]
    lost: Mapping[tuple[str, str], Loss]
    contrast: Mapping[str, Loss]
    random: Mapping[str, tuple[float, float]]
    impair: float
    spare: float
    about: Mapping[str, Any]

    def single(self, task: str) -> bool:
        """Whether this task's set impairs it and spares the other, by the intervals' worse ends."""
        other = next(name for name in self.tasks if name != task)
        if (task, task) not in self.lost:
            return False
        spared = self.lost[task, other]
        return self.lost[task, task].low >= self.impair and spared.high <= self.spare and spared.low >= -self.spare

    @property
    def double(self) -> bool:
        """Whether both hold: one set alone may only be the harder task's."""
        return all(self.single(task) for task in self.tasks)

    def to_frame(self) -> pl.DataFrame:
        """A row per set and task: `set`, `parts`, `task`, `lost`, `low`, `high`, `n`."""
        return pl.DataFrame([
            {"set": name, "parts": ", ".join(self.sets[name]), "task": task, "lost": one.mean, "low": one.low, "high": one.high, "n": one.n}
            for (name, task), one in self.lost.items()
        ], schema={"set": pl.String, "parts": pl.String, "task": pl.String, "lost": pl.Float64, "low": pl.Float64,
                   "high": pl.Float64, "n": pl.Int64})  # fmt: skip

    def __str__(self) -> str:
        verdict = "double" if self.double else next((f"single ({t})" for t in self.tasks if self.single(t)), "no")
        lines = [f"{verdict} dissociation of {self.tasks[0]} and {self.tasks[1]}"]
        for (name, task), one in self.lost.items():
            lines.append(f"  without {', '.join(self.sets[name])}: {task} loses {one.mean:.0%} [{one.low:.0%}, {one.high:.0%}]")
        lines += [f"  no set was found that impairs {task} alone" for task in self.tasks if not self.sets.get(task)]
        return "\n".join(lines)


def double_dissociation(
    parts: Parts,
    select: Mapping[str, Examples],
    confirm: Mapping[str, Examples],
    fallbacks: Mapping[str, Fallback],
    *,
    metric: str | None = None,
    impair: float = IMPAIR,
    spare: float = SPARE,
    largest: int = LARGEST,
    draws: int = 99,
    seed: int = 0,
    batch_size: int = 64,
) -> Dissociation:
    """Find a set per task on select prompts, and judge both on confirm prompts.

    A set grows by the part whose closing, on top of those closed already, makes lost(own task) - lost(other) / spare x impair largest,
    while the other task stays spared; it stops once its own task is impaired, or nothing helps.

    Args:
        parts: whose gates.
        select: two tasks' prompts, by name: sets are chosen on them.
        confirm: other prompts of the same tasks.
        fallbacks: by task's name.
        metric: by default each task's.
        impair: a set must take at least this share of its own task (lower end of the interval on confirm prompts).
        spare: and at most this share of the other (both ends within +- it).
        largest: parts in a set at most.
        draws: random sets that stand beside.
        seed: of draws and bootstrap.
        batch_size: examples at once.

    Cost: (parts + draws) passes over both tasks' prompts and, per part that joins a set, as many again as there are parts.

    Raises:
        PatchclampError: not two tasks, prompts of both kinds in common, a task that closing everything does not impair, or confirm
            prompts of which all are of one group, so that no interval can be given.
    """
    names = tuple(select)
    if len(names) != 2 or set(confirm) != set(names) or set(fallbacks) != set(names):
        raise PatchclampError(
            f"a double dissociation is of two tasks with select, confirm and fallback each, not of {', '.join(names)}"
        )
    for name in names:
        if {item.clean for item in select[name]} & {item.clean for item in confirm[name]}:
            raise PatchclampError(f"some confirm prompts of {name} are among its select prompts: split the task")
        if len(set(groups_of(confirm[name]))) < 2:
            raise PatchclampError(
                f"the confirm prompts of {name} are all of one group, so no interval can be given: give several groups"
            )
    scales = {name: _Scale(parts, select[name], fallbacks[name], metric, batch_size) for name in names}
    judges = {name: _Scale(parts, confirm[name], fallbacks[name], metric, batch_size) for name in names}
    sets: dict[str, tuple[str, ...]] = {}
    lost: dict[tuple[str, str], Loss] = {}
    contrast: dict[str, Loss] = {}
    random: dict[str, tuple[float, float]] = {}
    labels = [str(site) for site in sites_of(parts)]
    for task, other in (names, names[::-1]):
        found = _grown(scales[task], scales[other], len(labels), impair, spare, largest)
        sets[task] = tuple(labels[i] for i in sorted(found))
        if found:
            samples = {name: judges[name].samples([found])[0] for name in names}
            lost |= {(task, name): judges[name].loss(samples[name], seed) for name in (task, other)}
            contrast[task] = _difference(judges[task], judges[other], samples[task], samples[other], seed)
            random[task] = _random(judges[task], judges[other], found, contrast[task].mean, draws, seed)
    about = {"fallback": fallbacks[names[0]].kind, "metric": metric or select[names[0]].metric, "seed": seed,
             "n": {name: len(confirm[name]) for name in names}}  # fmt: skip
    return Dissociation((names[0], names[1]), sets, lost, contrast, random, impair, spare, about)


class _Scale:
    """One task's prompts with the benefit open and all closed, and what sets take of it."""

    def __init__(self, parts: Parts, examples: Examples, fallback: Fallback, metric: str | None, batch_size: int):
        self.parts, self.examples, self.fallback, self.batch_size = parts, examples, fallback, batch_size
        self.metric, self.sites = metric_named(metric or examples.metric), sites_of(parts)
        ends = self._measured(torch.cat([parts.open(), parts.without(self.sites)]))
        self.opened, self.whole = ends[0], ends[0] - ends[1]
        self.groups = names_of(groups_of(examples))
        if self.whole.mean() <= 0:
            raise PatchclampError(f"closing every part does not impair {examples.task!r}: there is no scale for what a set takes")

    def _measured(self, gates: torch.Tensor) -> Float[np.ndarray, "set example"]:
        return benefits(self.parts, self.examples, gates, self.fallback, self.metric, self.batch_size).double().numpy()

    def samples(self, sets: Sequence[Sequence[int]]) -> Float[np.ndarray, "set example"]:
        """What closing each set takes of each example's benefit."""
        gates = torch.cat([self.parts.without([self.sites[i] for i in one]) for one in sets])
        return self.opened - self._measured(gates)

    def shares(self, sets: Sequence[Sequence[int]]) -> Float[np.ndarray, " set"]:
        """Lost, of each set."""
        return self.samples(sets).mean(1) / self.whole.mean()

    def resampled(self, samples: Float[np.ndarray, " example"], seed: int) -> Float[np.ndarray, " resample"]:
        """Lost in bootstrap resamples of groups."""
        sums, _ = grouped(np.stack([samples, self.whole]), self.groups)
        count = sums.shape[1]
        drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(float)
        above, below = sums @ drawn.T
        return np.divide(above, below, out=np.full(RESAMPLES, np.nan), where=np.abs(below) > 0)

    def loss(self, samples: Float[np.ndarray, " example"], seed: int) -> Loss:
        """Mean and interval."""
        low, high = np.nanpercentile(self.resampled(samples, seed), [2.5, 97.5])
        return Loss(float(samples.mean() / self.whole.mean()), float(low), float(high), len(samples))


def _grown(own: _Scale, other: _Scale, count: int, impair: float, spare: float, largest: int) -> list[int]:
    chosen: list[int] = []
    lost = 0.0
    while len(chosen) < largest and lost < impair:
        rest = [i for i in range(count) if i not in chosen]
        sets = [[*chosen, i] for i in rest]
        mine, theirs = own.shares(sets), other.shares(sets)
        value = np.where(np.abs(theirs) <= spare, mine - np.abs(theirs) * impair / max(spare, 1e-9), -np.inf)
        best = int(value.argmax())
        if not np.isfinite(value[best]) or mine[best] <= lost + 0.01:
            break
        chosen, lost = sets[best], float(mine[best])
    return chosen


def _difference(
    own: _Scale, other: _Scale, mine: Float[np.ndarray, " example"], theirs: Float[np.ndarray, " example"], seed: int
) -> Loss:
    drawn = own.resampled(mine, seed) - other.resampled(theirs, seed + 1)
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    mean = mine.mean() / own.whole.mean() - theirs.mean() / other.whole.mean()
    return Loss(float(mean), float(low), float(high), len(mine) + len(theirs))


def _random(own: _Scale, other: _Scale, found: list[int], seen: float, draws: int, seed: int) -> tuple[float, float]:
    sets = [one.tolist() for one in matched_sets(own.sites, np.array(found), draws, "kind", seed)]
    values = own.shares(sets) - other.shares(sets)
    return float(values.mean()), float((1 + (values >= seen - 1e-9).sum()) / (1 + len(values)))
