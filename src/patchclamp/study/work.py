"""Work: one map while it runs. How it begins, and what gives each part a number."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import PatchclampError
from patchclamp.methods import attribute, effects
from patchclamp.models.model import Model
from patchclamp.parts import Fallback
from patchclamp.scores import Scores
from patchclamp.store import Run
from patchclamp.store.record import Baseline
from patchclamp.study import steps
from patchclamp.study.asked import Whole, check_other, parts_of, rule_of
from patchclamp.study.plan import Plan
from patchclamp.tasks import Examples, Task
from patchclamp.tasks._split import Split

Progress = Callable[[str, int, int], None]
"""Told (what is running, how much is done, how much there is)."""


@dataclass
class Work:
    """One map while it runs: what every step needs, and what the steps have found."""

    model: Model
    task: Task
    plan: Plan
    run: Run
    split: Split
    parts: Whole
    kind: str
    fallback: Fallback
    metric: str
    baseline: Baseline
    told: Progress
    other: Model | None = None
    warnings: list[str] = field(default_factory=list[str])
    found: dict[str, Any] = field(default_factory=dict[str, Any])

    def progress(self, what: str) -> Callable[[int, int], None]:
        return lambda done, of: self.told(what, done, of)

    def exact(self, name: str, examples: Examples, fallback: Fallback) -> Scores:
        """Exact effects as a step."""
        plan = self.plan
        direction = plan.direction if fallback.kind == "resample" else "noising"
        return self.run.step(
            name, attribute, self.parts, examples, fallback, "exact", metric=self.metric, direction=direction, seed=plan.seed,
            progress=self.progress("exact effects"),
        )  # fmt: skip

    def selected(self) -> Float[Tensor, "part example"]:
        """Exact effects of every part on each select prompt, as a step: what chooses parts."""
        return self.run.step(
            "select-effects", effects, self.parts, self.split.select, self.fallback, "exact", metric=self.metric, seed=self.plan.seed,
            progress=self.progress("effects that choose parts"),
        )  # fmt: skip


def begin(
    model: Model, task: Task, plan: Plan, run: Run, progress: Progress | None = None, memory: int | str | None = None,
    other: Model | None = None,
) -> Work:  # fmt: skip
    """Prompts, parts, fallback and baseline; raises `BaselineError` where the model does not show the behaviour."""
    check_other(plan, other)
    told = progress or (lambda what, done, of: None)
    split = task.split(model.tokenizer, plan.n, seed=plan.seed)
    parts = parts_of(plan, model, memory)
    kind = plan.fallback or ("resample" if split.fit[0].corrupt is not None else "mean")
    fallback, said = rule_of(parts, kind, split.fit, other)
    metric = steps.metric_for(split.confirm, plan.metric)
    baseline = run.step("baseline", steps.baseline, parts, split.confirm, fallback, metric)
    steps.require(baseline, split.confirm, plan.min_accuracy)
    work = Work(model, task, plan, run, split, parts, kind, fallback, metric, baseline, told, other, [*said])
    if fallback.off_distribution:
        work.warnings.append(
            f"The fallback {kind} puts in values that the model never computes itself: effects may be of the shock, not of the part."
        )
    if split.confirm.majority > 0.9 and not split.confirm[0].targets:
        work.warnings.append(
            f"{split.confirm.majority:.0%} of the prompts have the same answer: parts that always say it look like parts that know it."
        )
    return work


def score(work: Work, do: Collection[str]) -> None:
    """Whatever gives each part a number on each prompt by itself: exact effects, attributions, effects for the circuit."""
    if {"attribute", "verify", "gate", "solutions", "relate"} & set(do):
        work.found["exact"] = work.exact("exact", work.split.confirm, work.fallback)
    if "verify" in do:
        _second(work)
    if "attribute" in do or "verify" in do:
        names = ("gradient", "integrated", "random") if "verify" in do else (work.plan.method,)
        work.found["attributions"] = work.run.step(
            "-".join(("attribution", *names)), steps.attributions, work.parts, work.split.confirm, work.fallback, work.metric, names,
            work.plan.seed, work.progress("attribution"),
        )  # fmt: skip
    if {"discover", "trust"} & set(do):
        work.found["samples"] = work.selected()


def _second(work: Work) -> None:
    """Exact effects under a second fallback."""
    work.found["second_fallback"], rule = second_of(work)
    work.found["second"] = work.exact("second", work.split.confirm, rule)


def second_of(work: Work) -> tuple[str, Fallback]:
    """The fallback that effects are repeated under, by name and as a rule; raises `PatchclampError` where it is the first."""
    if work.plan.second == work.kind:
        raise PatchclampError(f"the second fallback is to be another than the first, and both are {work.kind!r}")
    second = work.plan.second or ("mean" if work.kind.partition(":")[0] != "mean" else "zero")
    rule, said = rule_of(work.parts, second, work.split.fit, work.other)
    work.warnings += [one for one in said if one not in work.warnings]
    return second, rule
