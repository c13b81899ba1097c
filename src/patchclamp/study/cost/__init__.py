"""Cost: what a map will take, before it starts: gate settings, passes, memory, seconds.

Counts follow from the plan and from the code that carries it out (`pieces`, `gates`), in units of `work`; a calibration of about a
second (`pace`) makes them seconds. What depends on what will be found is expected so much, and at most so much.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from patchclamp.errors import PatchclampError
from patchclamp.models.model import Model
from patchclamp.store.manifest import finished, place_of
from patchclamp.study import FINISHED, located
from patchclamp.study.asked import check_other, parts_of
from patchclamp.study.cost import gates, pieces
from patchclamp.study.cost.job import Job, Line
from patchclamp.study.cost.many import many, search
from patchclamp.study.cost.pace import Pace, calibrated
from patchclamp.study.cost.work import Amount
from patchclamp.study.plan import EXTRA, STEPS, Plan
from patchclamp.study.provenance import identity
from patchclamp.tasks import Task, load_task

__all__ = ["Cost", "Line", "cost", "lines"]

REPORT = 4.0
"""Seconds for the report's figures, whatever the model: 3.4 and 4.0 on two cores."""


NOT_COUNTED = {
    "dynamic": "fitting dynamic gates", "contrast": "fitting contrast gates", "localise": "localise", "sets": "learning sets",
    "solutions": "reducing solutions",
}  # fmt: skip
"""Steps that are not counted: how long they take hangs on what they find."""


@dataclass(frozen=True)
class Seconds:
    """About how long; from `low`, if nothing disturbs it, to `high`, as disturbed as the slowest repeats and if all takes its most."""

    about: float
    low: float
    high: float


@dataclass(frozen=True)
class Cost:
    """What a map will take.

    Args:
        lines: every piece, in order; what a run has kept costs nothing.
        pace: how fast this machine is, now.
        folder: the run's folder.
        state: "new", "unfinished" (it goes on) or "finished" (nothing is computed again but means and the report).
        prompt: tokens of a prompt, the unit of passes.
        budget: bytes that a folded pass may take.
    """

    lines: tuple[Line, ...]
    pace: Pace
    folder: Path
    state: str
    prompt: int
    budget: int

    def seconds(self, line: Line) -> Seconds:
        """Of one piece."""
        return Seconds(self.pace.seconds(line.expected)[0], self.pace.seconds(line.expected)[1], self.pace.seconds(line.most)[2])

    @property
    def total(self) -> Seconds:
        """Of all of them, and of the report."""
        each = [self.seconds(line) for line in self.lines]
        about, low, high = (sum(getattr(one, name) for one in each) + REPORT for name in ("about", "low", "high"))
        return Seconds(about, low, high)

    @property
    def forward(self) -> float:
        """Forward-pass equivalents of all that is left, in prompts."""
        return sum(line.expected.forward for line in self.lines)

    @property
    def backward(self) -> float:
        """Backward-pass equivalents likewise."""
        return sum(line.expected.backward for line in self.lines)

    @property
    def memory(self) -> int:
        """Bytes beside the model, of the piece that takes most."""
        return max((line.memory for line in self.lines if not line.kept), default=0)


def cost(
    model: Model, task: Task | str, plan: Plan | None = None, do: Collection[str] = STEPS, folder: Path | str | None = None,
    memory: int | str | None = None, other: Model | None = None,
) -> Cost:  # fmt: skip
    """What `map` will take with these arguments, less what the run in `folder` has finished. Nothing is written.

    Args:
        model, task, plan, do, memory, other: as for `map`.
        folder: the run's folder; by default in runs/, under its digest.

    Cost: a calibration of about a second.

    Raises:
        PatchclampError: what `map` would refuse before it computes anything.
        StoreError: the folder holds another run, or is damaged.
    """
    if uncounted := [said for step, said in NOT_COUNTED.items() if step in do]:
        raise PatchclampError(f"the cost of {uncounted[0]} is not counted before it runs: try few prompts (--n 32) first")
    plan, task = plan or Plan(), load_task(task) if isinstance(task, str) else task
    check_other(plan, other)
    digest = identity(model, task, plan, other)
    place = place_of(folder, digest)
    kept, state = finished(place, digest)
    job = job_of(model, task, plan, memory)
    found = lines(job, {*do, *(step for name, step in FINISHED.items() if name in kept)}, kept)
    left = sum((line.expected for line in found), Amount())
    kinds = [kind for kind in ("folded", "sloped") if getattr(left, kind)]
    return Cost(tuple(found), calibrated(job, kinds), place, state, job.engine.tokens, job.parts.memory)


def pieces_of(
    model: Model, task: Task, plan: Plan, do: Collection[str] = STEPS, memory: int | str | None = None
) -> list[tuple[str, str, float]]:
    """For progress: by piece of a map, its step, what progress calls it, and its passes, forward and backward together.

    Cost: two prompts' forward pass.
    """
    found = lines(job_of(model, task, plan, memory), do)
    return [(line.step, line.title, line.expected.forward + line.expected.backward) for line in found if line.step]


def job_of(model: Model, task: Task, plan: Plan, memory: int | str | None = None) -> Job:
    """The question with its prompts drawn and its parts made."""
    split = task.split(model.tokenizer, plan.n, seed=plan.seed)
    return Job(model, plan, split, parts_of(plan, model, memory), plan.gating)


def lines(job: Job, do: Collection[str], kept: Collection[str] = ()) -> list[Line]:
    """Every piece of a map that does the steps `do`, in order. Those in `kept` are finished: they cost nothing."""
    if unknown := set(do) - {*STEPS, *EXTRA}:
        raise PatchclampError(f"there is no step {sorted(unknown)[0]!r}: choose from {', '.join((*STEPS, *EXTRA))}")
    found = [*pieces.learned(job, job.kind, "the fallback"), pieces.baseline(job)]
    do = set(do) - {"localise"}  # what it takes depends on methods that say so themselves: it is not counted
    if job.plan.parts != "nodes":
        located.check(do)
        found += [*many(job, do), pieces.prompts(job)]
        return [replace(line, kept=True, expected=Amount(), most=Amount()) if line.step in kept else line for line in found]
    if {"attribute", "verify", "gate", "solutions", "relate"} & set(do):
        found.append(pieces.exact(job, "exact", job.split.confirm, job.kind))
    if "verify" in do:
        found += pieces.learned(job, job.second, "the second fallback")
        found.append(pieces.exact(job, "second", job.split.confirm, job.second))
    if "attribute" in do or "verify" in do:
        found.append(pieces.attributions(job, ("gradient", "integrated", "random") if "verify" in do else (job.plan.method,)))
    if {"discover", "trust", "relate", "sets"} & set(do):
        found.append(pieces.exact(job, "select-effects", job.split.select, job.kind, noise=False))
    if "verify" in do and job.plan.direction == "noising":
        found += pieces.behind_prefixes(job)
    found += gates.roles(job) if {"gate", "solutions"} & set(do) else []
    if {"discover", "trust"} & set(do):
        found.append(pieces.discover(job) if job.plan.search == "threshold" else search(job, job.parts))
    found += [pieces.trust(job)] if "trust" in do else []
    found += [*pieces.learned(job, job.second, "the second fallback"), *pieces.relate(job)] if "relate" in do else []
    found += [pieces.prompts(job), *([pieces.patterns(job)] if any(line.step == "exact" for line in found) else [])]
    if "model" in (job.plan.fallback, job.plan.second):
        found = [line.beside(job.weights) for line in found]
    return [replace(line, kept=True, expected=Amount(), most=Amount()) if line.step in kept else line for line in found]
