"""The main job: map one behaviour of one model, causally, and say how far the map is to be trusted.

`map` reads as its own summary. What it finds is a `Study`: tables, a circuit, claims with verdicts, and the record that the
report is made from.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from patchclamp.models.model import Model
from patchclamp.store import Run, Watch
from patchclamp.study.carry import FINISHED, Study, carry_out
from patchclamp.study.plan import EXTRA, STEPS, Plan
from patchclamp.study.provenance import identity
from patchclamp.study.work import Progress, Work, begin, score
from patchclamp.tasks import Task, load_task

__all__ = ["EXTRA", "FINISHED", "STEPS", "Plan", "Study", "Work", "begin", "carry_out", "load", "map", "open_run", "score"]


def map(
    model: Model,
    task: Task | str,
    plan: Plan | None = None,
    run: Run | None = None,
    *,
    do: Collection[str] = STEPS,
    progress: Progress | None = None,
    memory: int | str | None = None,
    other: Model | None = None,
) -> Study:
    """Map one task on one model: baseline, gate, attribute, verify, circuit, trust.

    Args:
        model: the model.
        task: the behaviour, or its name or file.
        plan: the question; the defaults are those of `patchclamp map`.
        run: where finished steps are kept (`open_run`); by default nothing is kept.
        do: which steps; each brings what it needs.
        progress: told what is running, how much is done and how much there is.
        memory: bytes that a folded pass may take, or "2GB", "50%" of what is free; by default a share of it
            (`models.memory.budget`). It decides how many settings run at once, and is no part of the question.
        other: the model whose values a closed gate passes, where the plan's fallback is "model": the base model of a fine-tuned one.

    Cost: see `study.cost.cost`.

    Raises:
        BaselineError: the model does not show the behaviour.
        TaskError: too few prompts fit the tokenizer.
        BudgetError: memory that is no amount, or that the device does not have.
        PatchclampError: anything else that was asked and cannot be, with what to do.
    """
    task = load_task(task) if isinstance(task, str) else task
    return carry_out(begin(model, task, plan or Plan(), run or Run.unsaved(), progress, memory, other), do)


def open_run(
    folder: str | Path | None,
    model: Model,
    task: Task,
    plan: Plan,
    watch: Watch | None = None,
    source: Mapping[str, Any] | None = None,
    other: Model | None = None,
) -> Run:
    """Open (or go on with) the run of this question; by default in runs/ under its digest. Use it as a context manager.

    Args:
        folder: the run's folder.
        model, task, plan: the question.
        watch: told of every step.
        source: how model and task were named, kept in plan.json so that the question can be asked again from the folder.
        other: the model whose values a closed gate passes, where the plan asks for them.
    """
    body = {"plan": plan, "source": dict(source) if source is not None else None}
    return Run.open(folder, body, digest=identity(model, task, plan, other), task=task.name, model=model.name, watch=watch)


def load(folder: str | Path) -> Study:
    """A finished study from its folder; no model is loaded."""
    from patchclamp.store import load_record

    return Study(load_record(folder), Path(folder))
