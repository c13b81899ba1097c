"""One screen of what a study found."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table
from rich.text import Text

from patchclamp.cli.common import out, print_rows
from patchclamp.store.sections import Alternatives, Contrasts, Dynamics, KeptSets, Localisation, Relations
from patchclamp.study import Study
from patchclamp.study.claims import shown

STYLES = {"supported": "green", "not supported": "yellow", "not tested": "dim"}


def show(study: Study, report: Path, steps: Collection[str]) -> None:
    """Headline, warnings, the largest effects, circuit and trust, claims, the report's path."""
    record, base = study.record, study.record.baseline
    out.print()
    out.print(Text(record.headline, style="bold"))
    for warning in record.warnings:
        out.print(Text(f"! {warning}", style="yellow"))
    right = "" if base.accuracy is None else f", right in {base.accuracy:.0%} of pairs"
    top1 = "" if base.top1 is None else f", top-1 {base.top1:.0%}"
    out.print(Text(f"Baseline on {base.n} prompts: {base.metric} {shown(base.open)} open, {shown(base.closed)} closed{right}{top1}; "
                   f"most frequent answer {base.majority:.0%}"))  # fmt: skip
    if "exact" in record.scores.columns:
        _parts(record.scores, record.fallbacks, base.metric)
    if record.localisation is not None and record.localisation.areas.height:
        _methods(record.localisation)
    elif record.localisation is not None and record.localisation.scores.height:
        _located(record.localisation)
    if record.circuit is not None:
        names = " ".join(str(site) for site in record.circuit)
        out.print(
            Text.assemble(
                ("Circuit ", "bold"),
                f"({len(record.circuit)} of {record.circuit.about.get('of', record.scores.height)}): {names}",
            )
        )
        if record.trust is None:
            out.print(Text("Not judged: `patchclamp trust` says how much it keeps, beside random circuits", style="dim"))
    if record.trust is not None:
        trust = record.trust
        text = f"faithfulness {shown(trust.faithfulness)}; {trust.draws} random circuits {shown(trust.random)}"
        text += "" if trust.completeness is None else f"; completeness {shown(trust.completeness)}"
        text += "" if trust.stability is None else f"; stability {trust.stability:.2f}"
        out.print(Text.assemble(("Trust ", "bold"), text))
    for null in record.nulls:
        out.print(Text(f"Null, {null.name}: {null.facilitating + null.interfering:.0%} of {null.parts} parts called "
                       f"facilitating or interfering ({null.raw_facilitating + null.raw_interfering:.0%} without safeguards)"))  # fmt: skip
    if record.relations is not None:
        _relations(record.relations)
    if record.dynamics is not None:
        _dynamics(record.dynamics)
    if record.contrast is not None:
        _contrast(record.contrast)
    if record.sets is not None:
        _sets(record.sets)
    if record.alternatives is not None:
        _alternatives(record.alternatives)
    claims = Table.grid(padding=(0, 2))
    claims.add_column(justify="right", no_wrap=True)
    for claim in record.claims:
        sentence = Text(claim.statement)
        if claim.verdict != "supported":
            sentence.append(f" ({claim.evidence})", style="dim")
        claims.add_row(Text(claim.verdict, style=STYLES[claim.verdict]), sentence)
    out.print(claims)
    out.print(Text.assemble(("Report ", "bold"), str(report)), soft_wrap=True)  # a path in one piece can be clicked


def _methods(found: Localisation) -> None:
    """A row per method: how its circuits do on unseen prompts, and how far it agrees with exact effects."""
    fits = {row["b"]: row for row in found.agreement.filter(pl.col("a") == "exact").iter_rows(named=True)}
    rows: list[dict[str, object]] = []
    for method in found.about["methods"]:
        row: dict[str, object] = {"method": method}
        for name in ("CPR", "CMD", "log_area"):
            area = found.areas.filter((pl.col("method") == method) & (pl.col("name") == name)).row(0, named=True)
            row[name.replace("_", " ")] = f"{area['value']:.3f} ±{(area['high'] - area['low']) / 2:.3f}"
        fit = fits.get(method, {})
        row |= {"exact": _number(fit.get("spearman")), "tenth": "" if fit.get("top") is None else f"{fit['top']:.0%}"}
        rows.append(row)
    out.print()
    out.print(
        Text(
            f"{found.about['of']} {found.about['parts']} in the order of each method, on {found.about['judged']} prompts that chose "
            "nothing: area under faithfulness (CPR, more is better), between it and 1 (CMD, less is better), over log size; with 95 % "
            "intervals. Rank correlation with exact effects, and what both put into their first tenth",
            style="italic",
        )
    )
    print_rows(rows)
    if found.about.get("verified"):
        out.print(Text(str(found.about["verified"]), style="dim"))
    if found.circuit is not None:
        out.print(Text.assemble(("Circuit ", "bold"), f"by {found.about['best']} ({len(found.circuit)} of {found.about['of']}): ",
                                " ".join(map(str, list(found.circuit)[:40])), " ..." if len(found.circuit) > 40 else ""))  # fmt: skip
    out.print()


def _located(found: Localisation) -> None:
    """The largest of the exact effects that were measured, beside what the screen had said of them."""
    rows: list[dict[str, object]] = []
    screen = str(found.about["methods"][0])
    for row in found.scores.head(10).iter_rows(named=True):
        span = "" if row["low"] is None else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
        effect = "below noise" if row["below_noise"] else f"{row['exact']:+.2f}{span}"
        rows.append({"site": row["site"], "exact effect": effect, screen: f"{row[screen]:+.2f}"})
    out.print()
    out.print(
        Text(
            f"Largest exact effects of {found.about['of']} {found.about['parts']} (open minus closed, 95 % intervals)",
            style="italic",
        )
    )
    print_rows(rows)
    out.print(Text(str(found.about["verified"]), style="dim"))
    out.print()


def _relations(found: Relations) -> None:
    """Pairs with a relation of a name, then the largest; roles that change; communities and hubs."""
    about, pairs = found.about, found.pairs
    words = pairs.filter(pl.col("word").is_in(["AND", "OR"]))
    counts = ", ".join(f"{words.filter(pl.col('word') == word).height} {word}" for word in ("AND", "OR"))
    out.print()
    out.print(Text(f"{pairs.height} pairs of {found.parts.height} parts: {counts} (the sign holds under {about['fallback']} and {about['second']})",
                   style="italic"))  # fmt: skip
    ranked = words.sort([pl.col("relation") == "", -pl.col("interaction").abs()]).head(10)
    rows: list[dict[str, object]] = []
    for row in ranked.iter_rows(named=True):
        shown_row: dict[str, object] = {"part": row["a"], "and": row["b"], "word": row["word"], "relation": row["relation"]}
        span = "" if row["low"] is None else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
        shown_row |= {"interaction": _number(row["interaction"]) + span, about["second"]: _number(row["other"])}
        rows.append(shown_row | {"outputs": _number(row.get("association"))})
    print_rows(rows)
    if found.changed.height:
        best = found.changed.row(0, named=True)
        out.print(Text(f"{found.changed.height} roles change when another part closes: {best['b']} goes from {best['open_role']} "
                       f"({best['open']:+.2f}) to {best['role']} ({best['score']:+.2f}) when {best['a']} is closed"))  # fmt: skip
    if about["modularity"] is not None:
        null = f"graphs of the same degrees {about['modularity_null']:.2f}, p {about['modularity_p']:.3f}"
        out.print(Text(f"{about['communities']} communities, modularity {about['modularity']:.2f} ({null})"))
    if (hubs := about["hubs"]) is not None:
        out.print(Text(f"Closing the hubs {' '.join(hubs['parts'])} takes {hubs['effect']:+.2f}, random sets {hubs['random_mean']:+.2f} "
                       f"(p {hubs['p']:.3f})"))  # fmt: skip
    else:
        out.print(Text("No pair clearly interacts, so there are neither communities nor hubs."))
    if found.shapley is not None:
        best = found.shapley.sort(pl.col("score").abs(), descending=True).head(5).iter_rows(named=True)
        told = ", ".join(f"{row['site']} {_number(row['score'])}" for row in best)
        out.print(Text(f"Shapley values ({about['sampling']}): {told}"))
    if found.screened is not None:
        best = found.screened.head(5).iter_rows(named=True)
        told = ", ".join(f"{row['a']} & {row['b']} {_number(row['score'])}" for row in best)
        out.print(Text(f"Screened among all {about['of']} parts: {told}; {about['missed']}"))
    out.print()


def _dynamics(found: Dynamics) -> None:
    """What switches on what, beside static gates and controls."""
    out.print()
    out.print(Text(f"Gates that look at {found.about['sight']}, on {found.about['n']} unseen prompts", style="italic"))
    for sentence in found.sentences:
        out.print(Text(f"  {sentence}"))
    out.print()


def _contrast(found: Contrasts) -> None:
    """What gates keep and lose of two behaviours, over seeds."""
    about = found.about
    out.print()
    out.print(Text(f"Keep A ({about['a']}) without B ({about['b']}), held-out shares, mean over seeds", style="italic"))
    means = found.evaluation.group_by("direction", "side", maintain_order=True).agg(
        pl.col("size", "share_a", "share_b", "separates").cast(pl.Float64).mean()
    )
    print_rows([
        {"direction": row["direction"], "pressure": "to open" if row["side"] == "open" else "to close", "parts": f"{row['size']:.0f}",
         "of A": row["share_a"], "of B": row["share_b"], "seeds that separate": f"{row['separates']:.0%}"}
        for row in means.iter_rows(named=True)
    ])  # fmt: skip
    every = found.parts.filter(pl.col("isolated") == 1)["site"].to_list()
    out.print(Text(f"Closed in every seed for B and not for A ({len(every)}): {' '.join(every) or 'none'}"))
    out.print()


def _sets(found: KeptSets) -> None:
    """What sets of each method and size keep; of random ones, the mean."""
    about = found.about
    out.print()
    out.print(
        Text(f"Sets that alone keep so much of the behaviour ({about['metric']}, {about['n']} confirm prompts)", style="italic")
    )
    table = found.table.group_by("method", "knob", "size", maintain_order=True).agg(
        pl.col("share").mean(), pl.col("low", "high").first(), pl.col("kept").first(), pl.len()
    )
    rows: list[dict[str, object]] = []
    for row in table.iter_rows(named=True):
        random = row["method"] == "random"
        span = f"mean of {row['len']}" if random or row["low"] is None else f"[{row['low']:.2f}, {row['high']:.2f}]"
        knob = f" at {row['knob']:g}" if row["method"] == "hard concrete" else ""
        rows.append({"method": row["method"] + knob, "parts": row["size"], "keeps": f"{row['share']:.2f} {span}",
                     "set": "" if random else row["kept"]})  # fmt: skip
    print_rows(rows)
    out.print()


def _alternatives(found: Alternatives) -> None:
    """The distinct sets that suffice, what they share, and what stands in for what."""
    about = found.about
    out.print()
    out.print(Text(f"{about['distinct']} distinct sets keep {about['wanted']:.0%} of the behaviour by themselves ({about['seeds']} seeds, "
                   f"{about['n']} confirm prompts)", style="italic"))  # fmt: skip
    print_rows([
        {"set": row["solution"], "parts": row["size"], "seeds": row["seeds"], "keeps": f"{row['share']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
         "suffices": row["sufficient"], "kept": row["kept"]}
        for row in found.table.iter_rows(named=True)
    ])  # fmt: skip
    if about["distinct"]:
        out.print(Text(f"In every one that suffices ({len(found.core)}): {' '.join(found.core) or 'none'}"))
    for row in found.substitutes.filter("substitutes").iter_rows(named=True):
        out.print(Text(f"{row['a']} and {row['b']} stand in for each other: closing both costs {row['joint']:.2f} nats, alone "
                       f"{row['alone_a']:.2f} and {row['alone_b']:.2f}"))  # fmt: skip
    out.print()


def _parts(scores: pl.DataFrame, fallbacks: tuple[str, ...], metric: str) -> None:
    frame = scores.sort(pl.col("exact").abs(), descending=True).head(10)
    names = {"second": fallbacks[-1], "shifted": "shifted", "gradient": "gradient"}
    rows: list[dict[str, object]] = []
    for row in frame.iter_rows(named=True):
        shown_row: dict[str, object] = {
            "site": row["site"],
            "exact effect": "below noise" if row.get("below_noise") else _interval(row, "exact"),
        }
        shown_row |= {name: _number(row[column]) for column, name in names.items() if column in row}
        if "role" in row:
            shown_row["role"] = row["role"]
        rows.append(shown_row)
    out.print()
    out.print(Text(f"Largest exact effects (open minus closed under {fallbacks[0]}, 95 % intervals)", style="italic"))
    print_rows(rows)
    if "role" in scores.columns:
        if metric != "log_probability":
            out.print(
                Text(f"Roles are judged on the answer's log-probability, effects on {metric}: they may differ.", style="dim")
            )
        for role in ("facilitating", "interfering", "redundant", "irrelevant", "undecided"):
            sites = scores.filter(pl.col("role") == role)["site"].to_list()
            if sites:
                note = " (while the others are open)" if role == "irrelevant" else ""
                out.print(Text.assemble((f"{role.capitalize()}{note} ", "bold"), f"({len(sites)}): {' '.join(sites)}"))
    out.print()


def _interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return _number(row[name]) + ("" if low is None else f" [{low:+.2f}, {high:+.2f}]")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
