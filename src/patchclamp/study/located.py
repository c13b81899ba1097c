"""Edges and neurons: many parts, of which a screen finds those worth an exact effect; circuits searched among them, and judged.

What `attribute`, `discover` and `trust` do where parts are not heads and MLPs (`--parts`), and every search but the threshold.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

from patchclamp.circuit import Circuit
from patchclamp.discover import discover
from patchclamp.discover.acdc import Acdc, acdc
from patchclamp.discover.evaluation import group_of
from patchclamp.discover.greedy import greedy
from patchclamp.discover.screen import Screened, screened
from patchclamp.discover.threshold import ranked
from patchclamp.errors import PatchclampError
from patchclamp.methods import Direction, groups_of
from patchclamp.models.memory import budget
from patchclamp.models.model import Model
from patchclamp.parts import Fallback, Parts, edges, gated
from patchclamp.scores import Scores
from patchclamp.store.record import Claim
from patchclamp.store.sections import Localisation
from patchclamp.study.plan import Plan
from patchclamp.study.work import Work
from patchclamp.tasks import Examples
from patchclamp.trust import Trusted, trust

DOES = ("attribute", "discover", "trust")
"""What is done with edges and neurons."""
NAMES = {"edges": "edges", "neurons": "neurons"}
CANDIDATES = 60
"""Parts, those that the screen ranks first, among which a greedy search looks."""
STABLE = 0.8
"""Mean overlap of the circuits of several orders from which on one is said not to depend on the order."""


@dataclass(frozen=True)
class Located:
    """What was found of edges or neurons.

    Args:
        parts: what they are called.
        of: how many there are.
        shown: what a screen found on prompts that choose nothing; None where no scores were asked for.
        circuit: the circuit; None where none was asked for.
        search: what found it: threshold, acdc, greedy.
        orders: of ACDC, the overlap of its orders' circuits and in words what was left.
        trusted: the circuit on unseen prompts.
    """

    parts: str
    of: int
    shown: Screened | None = None
    circuit: Circuit | None = None
    search: str = "threshold"
    orders: tuple[float, str] | None = None
    trusted: Trusted | None = None


def parts_of(plan: Plan, model: Model, memory: int | str | None = None) -> Parts:
    """The parts that a plan asks about, where these are not heads and MLPs.

    Raises:
        PatchclampError: the model has none that can be had one by one (named).
    """
    room = budget(model.device, memory)
    if plan.parts == "edges":
        return edges(model, memory=room)
    return gated(model, ["L*.mlp.n*"], memory=room, routing=plan.routing)


def check(do: Collection[str]) -> None:
    """Refuse steps that are of heads and MLPs alone."""
    if others := set(do) - set(DOES):
        raise PatchclampError(
            f"{sorted(others)[0]!r} is of heads and MLPs: edges and neurons go with {', '.join(DOES)} (leave --parts out, or ask for one "
            "of these)"
        )


def locate(work: Work, do: Collection[str], parts: Parts) -> Located:
    """Screen and verify on the confirm set what is to be told; screen, search and judge where a circuit is wanted."""
    plan, split = work.plan, work.split
    fallback = parts.fallback(work.kind, fit=split.fit)
    found: dict[str, Any] = {"parts": NAMES[plan.parts], "of": len(parts.counted), "search": plan.search}
    direction: Direction = plan.direction if fallback.kind == "resample" else "noising"
    if "attribute" in do:
        found["shown"] = _screened(work, "screened", parts, split.confirm, fallback, direction)
    if {"discover", "trust"} & set(do):
        chosen = _screened(work, "screened-select", parts, split.select, fallback, "noising")
        found |= searched(work, parts, split.select, fallback, chosen.ranking)
        circuit: Circuit = found["circuit"]
        found["circuit"] = Circuit(circuit, {**circuit.about, "group": group_of(parts)})  # so that it can be drawn
        if "trust" in do:
            found["trusted"] = work.run.step(
                "trust", trust, parts, split.confirm, fallback, found["circuit"], ranked(chosen.ranking, plan.order),
                groups=groups_of(split.confirm), metric=work.metric, random_circuits=plan.random_circuits, seed=plan.seed,
                progress=work.progress("circuit against random ones"),
            )  # fmt: skip
    return Located(**found)


def _screened(work: Work, name: str, parts: Parts, examples: Examples, fallback: Fallback, direction: Direction) -> Screened:
    plan = work.plan
    return work.run.step(
        name, screened, parts, examples, fallback, plan.screen, metric=work.metric, direction=direction, seed=plan.seed,
        progress=work.progress("exact effects of what the screen ranks first"),
    )  # fmt: skip


def searched(work: Work, parts: Parts, select: Examples, fallback: Fallback, ranking: Scores) -> dict[str, Any]:
    """The circuit, by the plan's search: what there is to keep of it."""
    plan, run = work.plan, work.run
    if plan.search == "threshold":
        circuit, _ = run.step(
            "discover",
            discover,
            parts,
            select,
            fallback,
            ranking,
            faithfulness=plan.faithfulness,
            by=plan.order,
            metric=work.metric,
        )
        return {"circuit": circuit}
    if plan.search == "greedy":
        among = ranked(ranking, plan.order)[:CANDIDATES]
        grown = run.step(
            "greedy", greedy, parts, select, fallback, faithfulness=plan.faithfulness, among=among, metric=work.metric,
            progress=work.progress("greedy search"),
        )  # fmt: skip
        return {"circuit": grown.circuit}
    found: Acdc = run.step(
        "acdc", acdc, parts, select, fallback, plan.threshold, objective=plan.metric or "kl",
        progress=work.progress("parts closed one after the other"),
    )  # fmt: skip
    return {"circuit": found.circuit, "orders": None if found.stability is None else (found.stability, str(found))}


def localisation(found: Located, n: int, judged: int) -> Localisation:
    """What the report shows of it."""
    shown = found.shown
    screen = "screen" if shown is None else str(shown.scores.about["screen"])
    scores = _empty("site", "exact", screen) if shown is None else _named(shown, screen)
    rows: list[dict[str, Any]] = []
    if shown is not None:
        rows.append({"a": "exact", "b": screen, "spearman": shown.agreement, "n": shown.missed.sampled, "top": None})
    about = {"parts": found.parts, "of": found.of, "methods": [] if shown is None else [screen, "exact"], "n": n, "judged": judged,
             "verified": "" if shown is None else f"{shown}."}  # fmt: skip
    agreement = pl.DataFrame(
        rows, schema={"a": pl.String, "b": pl.String, "spearman": pl.Float64, "n": pl.Int64, "top": pl.Float64}
    )
    areas = pl.DataFrame(
        schema={"method": pl.String, "name": pl.String, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64}
    )
    return Localisation(scores, agreement, _curves(found, screen), areas, found.circuit, about=about)


def _named(shown: Screened, screen: str) -> pl.DataFrame:
    """The verified parts, columns as charts know them."""
    table = shown.scores.table.rename({"score": "exact", "screen": screen})
    return table.with_columns(pl.col("low").alias("exact_low"), pl.col("high").alias("exact_high"))


def _curves(found: Located, screen: str) -> pl.DataFrame:
    if found.trusted is None:
        return _empty("method", "share", "parts", "faithfulness", "low", "high")
    curve = found.trusted.curve.filter(pl.col("k") > 0)  # the axis of sizes is logarithmic
    return curve.select(
        pl.lit(f"{screen}, then exact").alias("method"), (pl.col("k") / found.of).alias("share"), pl.col("k").alias("parts"),
        "faithfulness", "low", "high",
    )  # fmt: skip


def _empty(*columns: str) -> pl.DataFrame:
    return pl.DataFrame(schema={name: pl.String if name in ("site", "method") else pl.Float64 for name in columns})


def sentences(found: Located | Mapping[str, Any], scope: str) -> list[Claim]:
    """What is said besides the circuit: that nothing larger was missed, and that the order of visits does not matter."""
    made: list[Claim] = []
    shown, orders = (found.shown, found.orders) if isinstance(found, Located) else (None, found.get("orders"))
    if isinstance(found, Located) and shown is not None:
        made.append(
            Claim(
                f"Every one of {found.of} {found.parts} whose effect is above {shown.goal:.3g} was measured by itself",
                scope,
                str(shown),
                f"close {found.parts} that were not measured, one by one, and find a larger effect than {shown.goal:.3g}",
                "not supported" if shown.stopped == "budget" else "supported",
            )
        )
    if orders is not None:
        overlap, told = orders
        made.append(
            Claim(
                "The circuit does not depend on the order in which parts were visited",
                scope,
                told,
                "visit the parts in another order and find another circuit",
                "supported" if overlap >= STABLE else "not supported",
            )
        )
    return made
