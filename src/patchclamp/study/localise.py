"""Localise: several methods on the same parts, side by side: how they agree, how faithful their circuits are, and what one prompt's routes are."""

from itertools import combinations
from typing import Any

import numpy as np
import polars as pl

from patchclamp.circuit import Circuit
from patchclamp.discover import Evaluation, discover, evaluate
from patchclamp.discover.evaluation import group_of
from patchclamp.discover.flow import flow
from patchclamp.discover.screen import Screened, screened
from patchclamp.errors import GateError, MetricError, PatchclampError
from patchclamp.methods import attribute, groups_of, passes_of
from patchclamp.parts import Fallback, Parts
from patchclamp.scores import Scores
from patchclamp.store.sections import Localisation
from patchclamp.study.located import parts_of
from patchclamp.study.work import Work

METHODS = ("gradient", "integrated", "inputs", "conductance", "relevance", "gim", "random")
"""What is compared where nothing is named; exact effects stand beside in any case."""
TENTH = 10
ROUTES = 0.04
"""Share of a state from which on a contribution is drawn."""


def localise(work: Work) -> Localisation:
    """Score parts by each method on the select prompts, and judge what it chooses on the confirm prompts.

    Of heads and MLPs every exact effect is measured. Of edges and neurons a screen finds those worth one (`discover.screened`):
    `exact` is empty elsewhere, and the order "exact" goes on with the screen's.

    Cost: that of each method; 40 forward passes over the confirm prompts for each method's circuits of ten sizes, in two orders; one for
    the routes.

    Raises:
        PatchclampError: no method that was named is defined for these parts.
    """
    plan, split = work.plan, work.split
    parts: Parts = work.parts if plan.parts == "nodes" else parts_of(plan, work.model, work.parts.memory)
    fallback = work.fallback if plan.parts == "nodes" else parts.fallback(work.kind, fit=split.fit)
    scores, verified = _scores(work, parts, fallback)
    judged = {name: _judged(work, parts, fallback, name, one) for name, one in scores.items()}
    best = min((name for name in judged if name != "random"), key=lambda name: judged[name]["magnitude"].area("CMD"))
    circuit, _ = work.run.step(
        "localised",
        discover,
        parts,
        split.select,
        fallback,
        scores[best],
        faithfulness=plan.faithfulness,
        by=plan.order,
        metric=work.metric,
    )
    routes, tokens = work.run.step("routes", _routes, work)
    about = {
        "parts": {"nodes": "heads and MLPs"}.get(plan.parts, plan.parts), "of": len(parts.counted), "methods": list(scores),
        "n": len(split.select), "judged": len(split.confirm), "metric": work.metric, "fallback": work.kind, "seed": plan.seed, "best": best,
        "verified": "" if verified is None else f"{verified}.",
        "passes": {name: sum(passes_of(name, work.model.layers, len(parts.counted))) for name in scores if name != "exact"},
    }  # fmt: skip
    return Localisation(
        scores=_beside(scores, verified),
        agreement=_agreement(scores, verified),
        curves=_curves(judged),
        areas=_areas(judged),
        circuit=Circuit(circuit, {**circuit.about, "group": group_of(parts)}),
        flow=routes,
        tokens=tokens,
        about=about,
    )


def _scores(work: Work, parts: Parts, fallback: Fallback) -> tuple[dict[str, Scores], Screened | None]:
    """By method, exact first; and of parts too many to measure all, what was verified."""
    plan, select, found = work.plan, work.split.select, dict[str, Scores]()
    verified: Screened | None = None
    if plan.parts == "nodes":
        sites = [parts.labels[number] for number in parts.counted]
        about = {"method": "exact", "metric": work.metric, "fallback": work.kind, "seed": plan.seed}
        found["exact"] = Scores.from_samples(sites, work.selected().double().numpy(), about, groups_of(select), seed=plan.seed)
    else:
        verified = work.run.step(
            "screened-select", screened, parts, select, fallback, plan.screen, metric=work.metric, direction="noising", seed=plan.seed,
            progress=work.progress("exact effects of what the screen ranks first"),
        )  # fmt: skip
        found["exact"] = verified.ranking
    for name in plan.compared or METHODS:
        if name == "exact":
            continue
        try:
            found[name] = work.run.step(
                f"scores-{name}",
                attribute,
                parts,
                select,
                fallback,
                name,
                metric=work.metric,
                seed=plan.seed,
                progress=work.progress(name),
            )
        except (GateError, MetricError) as error:
            work.warnings.append(f"The method {name} was left out: {error}")
    if set(found) <= {"exact", "random"}:
        raise PatchclampError(
            f"none of the methods {', '.join(plan.compared or METHODS)} is defined here: {'; '.join(work.warnings)}"
        )
    return found, verified


def _judged(work: Work, parts: Parts, fallback: Fallback, name: str, scores: Scores) -> dict[str, Evaluation]:
    """Circuits of ten sizes on the confirm prompts: what matters first, and what helps first."""
    return {
        order: work.run.step(
            f"curve-{name}-{order}",
            evaluate,
            parts,
            work.split.confirm,
            fallback,
            scores,
            by=order,
            metric=work.metric,
            seed=work.plan.seed,
        )
        for order in ("magnitude", "signed")
    }


def _beside(scores: dict[str, Scores], verified: Screened | None) -> pl.DataFrame:
    """A row per part and a column per method; `exact` where it was measured."""
    first = scores["exact"].table if verified is None else verified.scores.table
    bounds = [name for name in ("low", "high", "q") if name in first.columns]
    exact = first.select("site", pl.col("score").alias("exact"), *(pl.col(name).alias(f"exact_{name}") for name in bounds))
    table = scores["exact"].table.select("site").join(exact, on="site", how="left", maintain_order="left")
    for name, one in scores.items():
        if name != "exact":
            table = table.join(
                one.table.select("site", pl.col("score").alias(name)), on="site", how="left", maintain_order="left"
            )
    return table.sort(pl.col("exact").abs(), descending=True, nulls_last=True)


def _agreement(scores: dict[str, Scores], verified: Screened | None) -> pl.DataFrame:
    """Rank correlation of every two methods over the parts that both score, and what their largest tenths share."""
    exact = scores["exact"] if verified is None else verified.scores
    rows: list[dict[str, Any]] = []
    for a, b in combinations(scores, 2):
        first = exact if a == "exact" else scores[a]
        found = scores[b].agreement(first)
        rows.append({"a": a, "b": b, "spearman": found.spearman, "n": found.n, "top": _shared(first, scores[b])})
    kinds = {"a": pl.String, "b": pl.String, "spearman": pl.Float64, "n": pl.Int64, "top": pl.Float64}
    return pl.DataFrame(rows, schema=kinds)


def _shared(a: Scores, b: Scores) -> float:
    """Of the tenth of the parts that `a` puts first, the share that `b` puts first among the same parts."""
    values, others = a.values(), b.values(a.sites)
    count = max(1, len(values) // TENTH)
    first, second = (set(np.argsort(-np.abs(one))[:count].tolist()) for one in (values, others))
    return len(first & second) / count


def _curves(judged: dict[str, dict[str, Evaluation]]) -> pl.DataFrame:
    columns = ("share", "parts", "faithfulness", "low", "high")
    return pl.concat([found["magnitude"].table.select(pl.lit(name).alias("method"), *columns) for name, found in judged.items()])


def _areas(judged: dict[str, dict[str, Evaluation]]) -> pl.DataFrame:
    """CPR by signed scores, CMD and the area over log k by sizes."""
    wanted = {"signed": ("CPR",), "magnitude": ("CMD", "log_area")}
    return pl.concat(
        [
            found[order].areas.filter((pl.col("over") == "nominal") & pl.col("name").is_in(names)).select(
                pl.lit(name).alias("method"), "name", "value", "low", "high"
            )
            for name, found in judged.items() for order, names in wanted.items()
        ]
    )  # fmt: skip


def _routes(work: Work) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Information flow routes of the first confirm prompt."""
    found = flow(work.model, work.split.confirm.take([0]).batch())
    return found.routes(threshold=ROUTES), found.tokens[0]
