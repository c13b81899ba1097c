"""Relate: how parts depend on each other, causally and statistically, as a step of a study."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from math import ceil, comb

import numpy as np
import polars as pl
from jaxtyping import Float

from patchclamp.dependence import (
    Closings,
    Dependence,
    Screened,
    SelfRepair,
    Shapley,
    changed_roles,
    close_pairs,
    conditional_roles,
    interaction_table,
    relations,
    screen,
    self_repair,
    shapley,
)
from patchclamp.dependence.association import Association, Recorded, associate, recorded
from patchclamp.dependence.network.communities import Communities, communities
from patchclamp.dependence.network.graph import connectome
from patchclamp.dependence.network.hubs import Lesion, hub_table, lesion
from patchclamp.errors import GateError, MetricError, PatchclampError
from patchclamp.gating.dynamic import inputs_of
from patchclamp.gating.mechanisms import mechanisms, told_by
from patchclamp.methods import counted, groups_of
from patchclamp.parts import Fallback, gated
from patchclamp.scores import Part, Scores
from patchclamp.store.sections import Relations
from patchclamp.study.work import Work, second_of

KEPT = 400
"""Rows of conditional roles and of self-repair that a record keeps: the largest."""
NULLS, HUBS = 100, 3
"""Graphs with the same degrees that modularity is compared with; hubs that are closed together."""
SHUT, FEWEST_PAIRS = 0.05, 100
"""Of all parts, how many a mask of the screen closes; pairs below which all of them are closed instead."""
SMALL = 0.02
"""Of the largest effect: a role that changes by less is not told."""


def relate(work: Work) -> Relations:
    """Close pairs of parts, under two fallbacks and with the final norm's scale held; compare with how outputs go together.

    The parts are those of largest exact effect on select prompts; everything but families and hubs is measured on confirm prompts.

    Cost: one forward pass over the select set per part; three times one over the confirm set per pair of `plan.pairs_of` parts (each
    from its later part on), two per part and fallback for self-repair, one for what parts put out, and 1 + 200 over the select
    set for hubs against random sets.
    """
    exact: Scores = work.found["exact"]
    selected, seed = work.selected().double().numpy(), work.plan.seed
    names = _chosen(counted(work.parts), selected, work.plan.pairs_of)
    kind, rule = second_of(work)
    first = _closed(work, "pairs", work.fallback, names)
    second = _closed(work, "pairs-second", rule, names)
    try:
        held = _closed(work, "pairs-held", work.fallback, names, frozen_norm=True)
    except GateError as error:
        held = None
        work.warnings.append(f"Interactions were not measured with the final norm's scale held: {error}")
    repairs = _repairs(work, names, rule)
    interaction = interaction_table(first, seed=seed)
    outputs = work.run.step("outputs", recorded, work.parts, work.split.confirm)
    together = _together(work, outputs.only(names), interaction)
    graph = connectome(_only(interaction, names))
    # a graph of one edge cannot be wired in another way, and one without any has no hubs
    parted = work.run.step("communities", communities, graph, nulls=NULLS if graph.count > 1 else 0, seed=seed)
    hubs = hub_table(graph, parted.label)
    busy = hubs.filter(pl.col("degree") > 0)["part"].head(min(HUBS, len(names) - 1)).to_list()
    closed = work.run.step("hubs", _lesion, work, busy, names) if busy else None
    values = _shapley(work, names) if work.plan.shapley else None
    screened = _screened(work) if work.plan.screen_pairs else None
    kinds, reason = work.run.step("families", _families, work, first, names, selected)
    about = {
        **first.about, "second": kind, "of": len(work.parts.counted), "communities": len([one for one in parted.sets if len(one) > 1]),
        "modularity": None if parted.p is None else parted.modularity, "modularity_null": parted.null_mean, "modularity_p": parted.p,
        "stability": parted.stability, "hubs": None if closed is None else closed.to_record(), "families": reason,
        "missed": None if screened is None else str(screened.missed),
        "sampling": None if values is None else f"{values.about['permutations']} permutations of {len(names)} parts",
    }  # fmt: skip
    named = relations(first, second, repair=[one.table for one in repairs], seed=seed)
    return Relations(
        pairs=_pairs(named, held, together, values),
        parts=_parts(exact, parted, hubs),
        changed=_changed(first, seed),
        repair=None if not repairs else _largest(repairs[0].table),
        families=kinds,
        shapley=None if values is None else values.values.table.select("site", "score", "low", "high", "sampling"),
        screened=None if screened is None else screened.found.table.drop("p", strict=False),
        about=about,
    )


def _families(
    work: Work, first: Closings, names: list[str], selected: Float[np.ndarray, "part example"]
) -> tuple[pl.DataFrame, str]:
    """Select prompts clustered by their effects; what tells families apart, judged on confirm prompts; why there are so many."""
    split, rows = work.split, [[str(part) for part in first.parts].index(name) for name in names]
    sites = [first.parts[row] for row in rows]
    found = mechanisms(sites, selected[rows], first.about, groups_of(split.select), seed=work.plan.seed)
    if found.count == 1:
        return pl.DataFrame({"family": [0], "n": [len(split.confirm)]}), found.reason
    inputs = [inputs_of(one, False) for one in (split.select, split.confirm)]
    told = told_by(found.family, inputs[0], found.assign(first.effects[rows]), inputs[1], work.plan.seed)
    top = [", ".join(f"{row['site']} {row['score']:+.2f}" for row in one.top(4).iter_rows(named=True)) for one in found.effects]
    return told.with_columns(pl.Series("top", top)), found.reason


def _lesion(work: Work, hubs: list[str], names: list[str]) -> Lesion:
    """Hubs closed together, on prompts that did not choose them as hubs, against random sets of the same parts: with as many heads
    and MLPs, where there is another such set."""
    kind = {str(site): site.kind for site in work.parts.labels}
    there, closed = (Counter(kind[name] for name in some) for some in (names, hubs))
    match = "kind" if any(there[one] > closed[one] for one in closed) else "any"
    return lesion(
        work.parts, work.split.select, work.fallback, hubs, draws=200, match=match, among=names, metric=work.metric, seed=work.plan.seed
    )  # fmt: skip


def _shapley(work: Work, names: list[str]) -> Shapley:
    """Values and interactions of the parts in a game that they alone play: every other part stays open."""
    players = gated(work.model, names, memory=work.parts.memory, routing=work.plan.routing)
    rule = players.fallback(work.kind, fit=work.split.fit)
    return work.run.step(
        "shapley", shapley, players, work.split.confirm, rule, metric=work.metric, seed=work.plan.seed,
        progress=work.progress("permutations"),
    )  # fmt: skip


def _screened(work: Work) -> Screened:
    """Pairs among all parts: masks on the select set point to some, which are measured on the confirm set as random others are."""
    pairs = comb(len(work.parts.counted), 2)
    if pairs < FEWEST_PAIRS:
        raise PatchclampError(f"a screen was asked for of {pairs} pairs: close all of them (relate without --screen-pairs)")
    top, sample, passes = screen_sizes(pairs, len(work.split.select))
    return work.run.step(
        "screen-pairs", screen, work.parts, work.split.confirm, work.fallback, metric=work.metric, top=top, sample=sample, passes=passes,
        share=SHUT, by=work.split.select, seed=work.plan.seed, progress=work.told,
    )  # fmt: skip


def screen_sizes(pairs: int, prompts: int) -> tuple[int, int, int]:
    """How many pairs a screen verifies, how many it draws beside, and how many masks a prompt gets: 30 that close any given pair."""
    return min(200, pairs // 4), min(300, pairs // 4), max(64, ceil(30 / (prompts * SHUT**2)))


def _together(work: Work, outputs: Recorded, interaction: Dependence) -> Association | None:
    """How outputs go together; none where too few independent prompts could change places, said in a warning."""
    try:
        return work.run.step("association", associate, outputs, causal=interaction, seed=work.plan.seed)
    except PatchclampError as error:
        work.warnings.append(f"How outputs go together was not measured: {error}")
        return None


def _pairs(named: Dependence, held: Closings | None, together: Association | None, values: Shapley | None) -> pl.DataFrame:
    """A row per pair, causal and statistical."""
    rows = named.table.rename({"score": "interaction"})
    if held is not None:
        norm = interaction_table(held).table.select("a", "b", pl.col("score").alias("frozen"))
        rows = rows.join(norm, on=["a", "b"], how="left", maintain_order="left")
    if values is not None:
        game = values.pairs.table.select("a", "b", pl.col("score").alias("shapley"))
        rows = rows.join(game, on=["a", "b"], how="left", maintain_order="left")
    if together is None:
        return rows
    outputs = together.table.select("a", "b", pl.col("score").alias("association"), pl.col("q").alias("association_q"))
    return rows.join(outputs, on=["a", "b"], how="left", maintain_order="left")


def _parts(exact: Scores, parted: Communities, hubs: pl.DataFrame) -> pl.DataFrame:
    """A row per part, in the order of the matrix: communities together, strongest first within each."""
    labels = pl.DataFrame({"site": parted.parts, "community": parted.label})
    measured = hubs.select(pl.col("part").alias("site"), "strength", "participation", "betweenness")
    rows = exact.table.select("site", "layer", pl.col("score").alias("effect")).join(labels, on="site", maintain_order="left")
    rows = rows.join(measured, on="site", how="left", maintain_order="left")
    return rows.sort(["community", "strength"], descending=[False, True], maintain_order=True).with_row_index("order")


def _changed(first: Closings, seed: int) -> pl.DataFrame:
    """Conditional roles that differ by more than a little, largest first."""
    used = sorted({*first.first, *first.second})
    size = float(np.abs(first.effects[used].mean(1)).max())
    return changed_roles(conditional_roles(first, seed=seed), SMALL * size).drop("p", "low", "high").head(KEPT)


def _largest(repair: Dependence) -> pl.DataFrame:
    """Clear compensation, largest first."""
    clear = repair.table.filter((pl.col("q") <= 0.05) & (pl.col("score") > 0))
    return clear.sort("score", descending=True).head(KEPT)


def _only(table: Dependence, names: list[str]) -> Dependence:
    """The same pairs, of a table that knows of these parts alone."""
    return Dependence(table.table, tuple(names), table.about)


def _chosen(labels: Sequence[Part], selected: Float[np.ndarray, "part example"], most: int) -> list[str]:
    """The parts of largest mean |effect|, in forward order."""
    order = np.argsort(-np.abs(selected.mean(1)), kind="stable")[:most]
    return [str(labels[number]) for number in sorted(order.tolist())]


def _closed(work: Work, step: str, rule: Fallback, names: list[str], frozen_norm: bool = False) -> Closings:
    return work.run.step(
        step, close_pairs, work.parts, work.split.confirm, rule, metric=work.metric, pairs=list(combinations(names, 2)),
        frozen_norm=frozen_norm, progress=work.progress("pairs of parts"),
    )  # fmt: skip


def _repairs(work: Work, names: list[str], rule: Fallback) -> list[SelfRepair]:
    """Self-repair under both fallbacks; none where answers do not allow direct effects, said in a warning."""
    try:
        return [
            work.run.step(step, self_repair, work.parts, work.split.confirm, one, closed=names, seed=work.plan.seed)
            for step, one in (("self-repair", work.fallback), ("self-repair-second", rule))
        ]
    except (MetricError, GateError) as error:
        work.warnings.append(f"Self-repair was not measured: {error}")
        return []
