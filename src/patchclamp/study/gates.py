"""What gates say beyond roles, as steps of a study: gates that hang on the input, gates that keep one behaviour and lose another, sets
of a wanted size or price, and the several sets that suffice."""

from dataclasses import replace
from typing import Any

import polars as pl

from patchclamp.errors import PatchclampError
from patchclamp.gating.contrast import Behaviour, contrast
from patchclamp.gating.dynamic import Controller, DynamicRoles, DynamicSettings, dynamic_roles
from patchclamp.gating.finder import find_sets
from patchclamp.gating.solutions import solutions
from patchclamp.methods import counted
from patchclamp.store.sections import Alternatives, Contrasts, Dynamics, KeptSets
from patchclamp.study import steps
from patchclamp.study.work import Work
from patchclamp.tasks import load_task

INPUTS = 60
"""Inputs that the report shows, at most."""
BUDGET = DynamicSettings(prices=(0.03, 0.1), updates=60, batch=24)
"""Of the command: two prices, two seeds, half of the updates that `DynamicSettings` gives by itself (its four fits take minutes)."""


def dynamic(work: Work) -> Dynamics:
    """Fit gates that hang on the input, with every control; keep the controller that does best, for `generate`.

    Raises:
        PatchclampError: nothing was said of what they may hang on.
    """
    plan = work.plan
    if plan.dynamic is None:
        raise PatchclampError(
            "dynamic gates were asked for, and not what they may hang on: choose phase, example or token (--dynamic)"
        )
    settings = replace(BUDGET, scope=plan.dynamic, site=sight_of(work), seed=plan.seed)
    split = work.split
    found = work.run.step(
        "dynamic", dynamic_roles, work.parts, split.fit, split.select, split.confirm, work.fallback, settings, progress=work.told
    )
    work.run.step("controller", best, found)
    switches = found.switching.table.filter(pl.col("role") == "switches")["site"].to_list()
    labels = None if found.labels is None else bool(found.labels.rejected)
    about = {"scope": plan.dynamic, "sight": str(found.found.sight), "n": len(split.select), "labels_rejected": labels,
             "switching": switches}  # fmt: skip
    return Dynamics(
        found.switching.table, gates_of(found, switches), found.judged.advantage, found.controls, tuple(found.sentences()), about
    )


def sight_of(work: Work) -> str | None:
    """The residual stream that is read: as asked, else before the last block for a prompt, and the embedding for tokens."""
    plan = work.plan
    if plan.dynamic in ("phase", "static", None):
        return None
    return plan.sight or ("L0.resid.pre" if plan.dynamic == "token" else f"L{work.model.layers - 1}.resid.pre")


def best(found: DynamicRoles) -> Controller:
    """The first moving fit of the strength at which moving gates gain most."""
    return found.found.controller(found.found.pick(True, found.switching.strength)[0])


def gates_of(found: DynamicRoles, sites: list[str]) -> pl.DataFrame:
    """A row per switching part and input: how far it is open, inputs in groups of the feature that tells them apart."""
    told, rows = found.switching, list[dict[str, Any]]()
    labels = [str(site) for site in found.found.labels]
    for site in sites:
        row = told.table.filter(pl.col("site") == site).row(0, named=True)
        values = told.inputs.values.get(row["feature"] or "", ("",) * len(told.inputs))
        for number in range(min(INPUTS, len(told.inputs))):
            name = f"{number + 1}: {told.inputs.names[number]}"
            rows.append(
                {"site": site, "input": name, "group": values[number], "gate": float(told.gates[labels.index(site), number])}
            )
    return pl.DataFrame(rows, schema={"site": pl.String, "input": pl.String, "group": pl.String, "gate": pl.Float64})


def contrasted(work: Work) -> Contrasts:
    """Keep this task and lose the other, and the other way round, with controls.

    Means that closed gates pass are learned on both tasks.

    Raises:
        PatchclampError: no other task was named, or it is this one.
        BaselineError: the model does not show the other behaviour, so that there is nothing to lose.
    """
    other = work.plan.contrast
    if other is None:
        raise PatchclampError("a contrast was asked for, and not with what: name a task to be lost (--contrast TASK)")
    if other == work.task.name:
        raise PatchclampError(f"{other!r} was to be kept and lost at once: name another task")
    split = load_task(other).split(work.model.tokenizer, work.plan.n, seed=work.plan.seed)
    rule = work.fallback
    if work.kind.partition(":")[0] == "mean":
        rule = work.parts.fallback(work.kind, fit=replace(work.split.fit, items=work.split.fit.items + split.fit.items))
    shown = steps.baseline(work.parts, split.select, rule, steps.metric_for(split.select, None))
    steps.require(shown, split.select, work.plan.min_accuracy)
    a, b = Behaviour(work.split.fit, work.split.select), Behaviour(split.fit, split.select)
    found = work.run.step("contrast", contrast, work.parts, a, b, rule, work.plan.gating, progress=work.told)
    return Contrasts(found.parts, found.evaluation, found.about, found.warnings)


def sets(work: Work) -> KeptSets:
    """Sets of exactly so many parts, and sets by what a part costs, learned on the fit set and judged on the confirm set, beside as
    many parts in order of their exact effects on the select set, and random ones.

    Raises:
        PatchclampError: neither sizes nor prices were asked for.
    """
    plan, labels = work.plan, counted(work.parts)
    if not plan.keep and not plan.prices:
        raise PatchclampError(
            "sets of parts were asked for, and not of how many: say how many (--keep 8) or what one costs (--price 0.1)"
        )
    sizes = work.selected().double().mean(1).abs()
    orders = {"exact effect": [labels[number] for number in sizes.argsort(descending=True, stable=True).tolist()]}
    found = work.run.step(
        "sets", find_sets, work.parts, work.split.fit, work.split.confirm, work.fallback, plan.keep, plan.prices, plan.gating,
        orders=orders, metric=work.metric, progress=work.told,
    )  # fmt: skip
    return KeptSets(found.table, found.about, found.warnings)


def several(work: Work) -> Alternatives:
    """The sufficient sets in which the seeds of the learned gates ended: reduced on the select set, judged on the confirm set."""
    split, plan = work.split, work.plan
    found = work.run.step(
        "solutions", solutions, work.parts, work.found["roles"].gated, split.select, split.confirm, work.fallback,
        share=plan.faithfulness, metric=work.metric, seed=plan.seed,
    )  # fmt: skip
    about = {**found.about, "distinct": found.distinct, "families": found.families, "wanted": found.wanted}
    return Alternatives(found.table, found.substitutes, found.core, found.union, about)
