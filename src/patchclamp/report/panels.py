"""What the report's template shows: numbers and charts of a record, section by section."""

import json
from collections.abc import Mapping
from typing import Any

import polars as pl

from patchclamp.circuit import Circuit
from patchclamp.report import figures
from patchclamp.report.look import ROLES, clean
from patchclamp.report.outline import outline
from patchclamp.report.page import Figure, figure, signed
from patchclamp.sites import Edge
from patchclamp.store.codec import plain
from patchclamp.store.record import Prompt, Record

_COMPARED = {
    "gradient": ("gradient", "attribution patching", True),
    "integrated": ("integrated", "integrated gradients", True),
    "gate": ("gate", "facilitation − interference", False),
    "random": ("random", "random score", False),
    "second": ("second fallback", "second fallback", True),
    "shifted": ("random prefixes", "after random prefixes", True),
}
_TABLE_ROWS = 24


def context(record: Record) -> dict[str, Any]:
    """Everything that the template names."""
    shown = _shown(record)
    sections = outline(record, shown)
    there = [section for section in sections if section.there]
    absent = [section for section in sections if not section.there]
    nav = [(section.id, section.title) for section in there]
    nav[-1:-1] = [("absent", "Not tested")] if absent else []
    return {**shown, "there": {section.id for section in there}, "absent_sections": absent, "sections": nav}


def _shown(record: Record) -> dict[str, Any]:
    scores = record.scores
    return {
        "record": record,
        "maps": _maps(record),
        "scatters": _scatters(record, ("gradient", "integrated", "gate", "random")),
        "robust": _scatters(record, ("second", "shifted")),
        "parts": _parts(scores, record.circuit),
        "told": {name for name in ("role", "exact", "facilitation") if _has(scores, name)},
        "shown": _TABLE_ROWS,
        "roles": {role: (letter, _count(scores, role)) for role, (letter, _, _) in ROLES.items()},
        "null_figures": _nulls(record),
        "circuit_figures": _circuit(record),
        "of_edges": record.circuit is not None and _of_edges(record.circuit),
        "curve": _curve(record),
        "toggles": _toggles(record),
        "relation_figures": _relations(record),
        "named": _named(record),
        "switching": _switching(record),
        "sets": _sets(record),
        "substitutes": [] if record.alternatives is None else record.alternatives.substitutes.filter("substitutes").to_dicts(),
        "shapley": _shapley(record),
        "localised": _localised(record),
        "areas": _areas(record),
        "patterns": _patterns(record),
        "prompts": [_prompt(prompt) for prompt in record.examples],
        "plan": json.dumps(plain(record.plan), indent=2, ensure_ascii=False),
    }


def _count(scores: pl.DataFrame, role: str) -> int:
    return int((scores["role"] == role).sum()) if "role" in scores.columns else 0


def _has(scores: pl.DataFrame, *columns: str) -> bool:
    return all(name in scores.columns and scores[name].drop_nulls().len() for name in columns)


def _maps(record: Record) -> list[Figure]:
    maps: list[Figure] = []
    if _has(record.scores, "role"):
        maps.append(figure("roles", figures.role_map(record.scores, "container", legend=False), "Roles"))
    if _has(record.scores, "exact"):
        how = ", ".join((record.baseline.metric, *(f"{name} fallback" for name in record.fallbacks[:1])))
        caption = f"Exact effect of closing each part alone ({how})"
        maps.append(figure("effects", figures.effect_map(record.scores, width="container"), caption))
    return maps


def _scatters(record: Record, columns: tuple[str, ...]) -> list[Figure]:
    scores = record.scores
    if _has(scores, "facilitation", "interference"):
        scores = scores.with_columns((pl.col("facilitation") - pl.col("interference")).alias("gate role"))
    found: list[Figure] = []
    for name in columns:
        column = "gate role" if name == "gate" else name
        if _has(scores, column, "exact"):
            key, label, same_unit = _COMPARED[name]
            if name == "second" and len(record.fallbacks) > 1:
                label = f"{record.fallbacks[1]} fallback"
            drawn = figures.agreement_scatter(scores, column, label, diagonal=same_unit, width="container")
            agreement = record.agreement.get(key) or record.agreement.get(name)
            note = "" if agreement is None else f"{agreement}".replace("-", "−")
            found.append(figure(f"exact-{name}", drawn, label[0].upper() + label[1:], note))
    return found


def _nulls(record: Record) -> list[Figure]:
    found: list[Figure] = []
    if record.nulls and _has(record.scores, "role"):
        parts = sum(_count(record.scores, role) for role in ROLES) or 1
        shares = {role: _count(record.scores, role) / parts for role in ("facilitating", "interfering")}
        drawn = figures.null_shares(shares, record.nulls, "container")
        found.append(figure("null-shares", drawn, "Share of parts with a role; the dashed line is 5\u202f%"))
    if _has(record.scores, "gate_plus", "gate_minus", "null_gate_plus", "null_gate_minus"):
        drawn = figures.null_gates(record.scores, "container")
        found.append(figure("null-gates", drawn, "Gates of all parts, a tick each"))
    return found


def _circuit(record: Record) -> list[Figure]:
    if record.circuit is None:
        return []
    known = record.scores if record.localisation is None else record.localisation.scores  # of edges, theirs
    drawn = figures.circuit_drawing(record.circuit, known if _of_edges(record.circuit) else record.scores, "container")
    found = [figure("circuit", drawn, f"{len(record.circuit)} parts, input below")]
    if record.trust and record.trust.minimality:
        drawn = figures.minimality_bars(record.trust.minimality, "container")
        found.append(figure("minimality", drawn, "What each part is worth to the circuit"))
    return found


def _of_edges(circuit: Circuit) -> bool:
    return any(isinstance(part, Edge) for part in circuit)


def _curve(record: Record) -> Figure | None:
    if record.curve is None:
        return None
    size = None if record.circuit is None else len(record.circuit)
    drawn = figures.faithfulness_curve(record.curve, record.random, size, "container")
    return figure("faithfulness", drawn, "Faithfulness against random circuits of the same size")


def _toggles(record: Record) -> Figure | None:
    if record.toggles is None:
        return None
    drawn = figures.toggle_curves(record.toggles, record.toggled, "container")
    return figure("toggle-check", drawn, f"{record.toggled[:1].upper()}{record.toggled[1:]} as parts are closed")


def _relations(record: Record) -> list[Figure]:
    found = record.relations
    if found is None:
        return []
    drawn = [
        figure("interactions", figures.interaction_matrix(found.pairs, found.parts, "container"),
                "Interaction of every pair, communities together; a dot: the sign holds under two fallbacks"),
        figure("connectome", figures.connectome(found.pairs, found.parts, "container"),
                "The strongest of them by layer, input below; colour of a part is its community, size its exact effect"),
    ]  # fmt: skip
    if "association" in found.pairs.columns:
        caption = "What closing both shows, against how outputs go together"
        drawn.append(figure("causal-statistical", figures.causal_against_statistical(found.pairs, "container"), caption))
    return drawn


def _switching(record: Record) -> Figure | None:
    if record.dynamics is None or not record.dynamics.gates.height:
        return None
    return figure(
        "switching", figures.switching_map(record.dynamics.gates, "container"), "Gates of parts that switch, by unseen input"
    )


def _localised(record: Record) -> list[Figure]:
    found = record.localisation
    if found is None:
        return []
    drawn = [
        figure(
            "method-agreement", figures.method_agreement(found.agreement, "container"), "Rank correlation of every two methods"
        )
    ]
    if found.curves.height:
        drawn.append(figure("method-faithfulness", figures.faithfulness_curves(found.curves, "container"),
                             "Circuits of every size, parts in the order of each method"))  # fmt: skip
    if found.circuit is not None and len(found.circuit):
        chart = figures.circuit_drawing(found.circuit, found.scores, "container")
        drawn.append(figure("localised-circuit", chart, f"{len(found.circuit)} {found.about.get('parts', 'parts')}, input below"))
    if found.flow is not None and found.flow.height:
        drawn.append(
            figure("flow", figures.flow_graph(found.flow, found.tokens, "container"), "Routes to the last token of one prompt")
        )
    return drawn


def _areas(record: Record) -> list[dict[str, Any]]:
    """A row per method: CPR, CMD and the area over log k, each with its interval."""
    if record.localisation is None:
        return []
    rows: dict[str, dict[str, Any]] = {}
    for row in map(clean, record.localisation.areas.to_dicts()):
        rows.setdefault(row["method"], {"method": row["method"]})[row["name"]] = _interval(row, "value", "low", "high")
    return list(rows.values())


def _sets(record: Record) -> list[dict[str, Any]]:
    """Sets of each method and size; of random ones, the mean."""
    if record.sets is None:
        return []
    table = record.sets.table.group_by("method", "knob", "size", maintain_order=True)
    rows = map(clean, table.agg(pl.col("share").mean(), pl.col("low", "high", "kept").first()).to_dicts())
    return [{**row, "low": None, "high": None, "kept": "–"} if row["method"] == "random" else row for row in rows]


def _shapley(record: Record) -> list[dict[str, Any]]:
    if record.relations is None or record.relations.shapley is None:
        return []
    return [clean(row) for row in record.relations.shapley.sort(pl.col("score").abs(), descending=True).head(12).to_dicts()]


def _named(record: Record) -> list[dict[str, Any]]:
    """Pairs that stand in for each other, suppress or need each other: those with a relation of a name first, then by size."""
    if record.relations is None:
        return []
    rows = [clean(row) for row in record.relations.pairs.filter(pl.col("word").is_in(["AND", "OR"])).to_dicts()]
    rows.sort(key=lambda row: (not row.get("relation"), -abs(row["interaction"])))
    ends = (("interaction", "low", "high"), ("other", "other_low", "other_high"))
    for row in rows:
        row["shown"], row["shown_other"] = (_interval(row, *names) for names in ends)
    return rows


def _interval(row: Mapping[str, Any], name: str, low: str, high: str) -> str:
    if row.get(name) is None:
        return "–"
    return signed(row[name]) + (
        "" if row.get(low) is None or row.get(high) is None else f" [{signed(row[low])}, {signed(row[high])}]"
    )


def _patterns(record: Record) -> list[Figure]:
    if record.patterns is None:
        return []
    sites = enumerate(record.patterns.sites)
    return [figure(f"pattern-{site}", figures.attention_pattern(record.patterns, i, "container"), site) for i, site in sites]


def _parts(scores: pl.DataFrame, circuit: Circuit | None) -> list[dict[str, Any]]:
    """Rows of the table of parts: those with a role first, each by size of effect, those of the circuit before others."""
    chosen = {str(part) for part in circuit or ()}
    rows: list[dict[str, Any]] = [
        {**clean(row), "chosen": row["site"] in chosen} for row in scores.filter(pl.col("kind") != "embed").to_dicts()
    ]
    rows.sort(key=lambda row: (row.get("role") == "irrelevant", -abs(row.get("exact") or 0), not row["chosen"]))
    return [{**row, "letter": ROLES.get(row.get("role") or "", ("",))[0], "effect": _effect(row)} for row in rows]


def _effect(row: Mapping[str, Any]) -> str:
    if row.get("exact") is None:
        return "–"
    if row.get("below_noise"):
        return "below noise"
    low, high = row.get("exact_low"), row.get("exact_high")
    return signed(row["exact"]) + ("" if low is None or high is None else f" [{signed(low)}, {signed(high)}]")


def _prompt(prompt: Prompt) -> dict[str, Any]:
    """Tokens with the shade of their probability, and where the corrupt prompt differs."""
    tokens: list[dict[str, Any]] = []
    for token, chance, other in zip(prompt.tokens, prompt.probabilities, prompt.corrupt or prompt.tokens, strict=True):
        shade = None if chance is None else round(100 * chance)
        tokens.append({"text": token, "chance": chance, "shade": shade, "instead": other if other != token else None})
    bars = [(prompt.answer, prompt.p_answer, "right"), *([(prompt.wrong, prompt.p_wrong, "wrong")] if prompt.wrong else [])]
    return {"tokens": tokens, "bars": bars, "metric": prompt.metric}
