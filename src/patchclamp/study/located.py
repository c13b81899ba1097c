"""Edges and neurons: many parts, of which a screen finds those worth an exact effect; circuits searched among them, and judged.

What `attribute`, `discover` and `trust` do where parts are not heads and MLPs (`--parts`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from patchclamp.circuit import Circuit
from patchclamp.discover.evaluation import group_of
from patchclamp.discover.screen import Screened, screened
from patchclamp.discover.threshold import ranked
from patchclamp.errors import PatchclampError
from patchclamp.methods import Direction, groups_of
from patchclamp.models.memory import budget
from patchclamp.models.model import Model
from patchclamp.parts import Fallback, Parts, edges, gated
from patchclamp.store.record import Claim
from patchclamp.store.sections import Localisation
from patchclamp.study.plan import Plan
from patchclamp.study.searches import searched
from patchclamp.study.work import Work
from patchclamp.tasks import Examples
from patchclamp.trust import Trusted, trust

DOES = ("attribute", "discover", "trust")
"""What is done with edges and neurons."""
NAMES = {"edges": "edges", "neurons": "neurons"}


@dataclass(frozen=True)
class Located:
    """What was found of edges or neurons.

    Args:
        parts: what they are called.
        of: how many there are.
        shown: what a screen found on prompts that choose nothing; None where no scores were asked for.
        circuit: the circuit; None where none was asked for.
        findings: what is said of the search.
        trusted: the circuit on unseen prompts.
    """

    parts: str
    of: int
    shown: Screened | None = None
    circuit: Circuit | None = None
    findings: tuple[Claim, ...] = ()
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
    found: dict[str, Any] = {"parts": NAMES[plan.parts], "of": len(parts.counted)}
    direction: Direction = plan.direction if fallback.kind == "resample" else "noising"
    if "attribute" in do:
        found["shown"] = _screened(work, "screened", parts, split.confirm, fallback, direction)
    if {"discover", "trust"} & set(do):
        chosen = _screened(work, "screened-select", parts, split.select, fallback, "noising")
        found |= searched(work, parts, split.select, fallback, chosen.ranking)
        circuit: Circuit = found["circuit"]  # of edges and neurons every search finds one
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


def sentences(found: Located | Sequence[Claim], scope: str) -> list[Claim]:
    """What is said besides the circuit: that nothing larger was missed, and what the search says of itself."""
    findings = found.findings if isinstance(found, Located) else found
    made = [replace(claim, scope=scope) for claim in findings]
    shown = found.shown if isinstance(found, Located) else None
    if shown is None or not isinstance(found, Located):
        return made
    measured = Claim(
        f"Every one of {found.of} {found.parts} whose effect is above {shown.goal:.3g} was measured by itself",
        scope,
        str(shown),
        f"close {found.parts} that were not measured, one by one, and find a larger effect than {shown.goal:.3g}",
        "not supported" if shown.stopped == "budget" else "supported",
    )
    return [
        measured,
        *([counted(found.parts, shown, scope)] if shown.stopped == "budget" and shown.missed.sampled else []),
        *made,
    ]


def counted(parts: str, shown: Screened, scope: str) -> Claim:
    """What stands where sizes are not bounded: how many may have been missed."""
    missed = shown.missed
    return Claim(
        f"At most {missed.count} of the {missed.left} {parts} that were not measured have a larger effect than {missed.largest:.3g}",
        scope,
        f"none of {missed.sampled} drawn at random among those that the screen put behind has, at {missed.confidence:.1%} confidence "
        "(hypergeometric); a bound of how many, not of how large",
        f"close {parts} that were not measured, one by one, and find {missed.count + 1} above {missed.largest:.3g}",
        "supported",
    )
