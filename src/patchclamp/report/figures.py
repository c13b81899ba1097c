"""Charts of a study. Each is an Altair chart: it shows itself in a notebook, and `chart.save("figure.svg")` (or png, pdf)
keeps it for a paper.

Colours are told apart by colour-blind readers (Okabe and Ito's; blue to orange for signs), and no role is said by colour alone.
Frames have the columns of `patchclamp.store.record.SCORE_COLUMNS`; `width` is in pixels, or "container" in a page.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

from patchclamp.report.circuits import circuit_drawing, faithfulness_curves, flow_graph, method_agreement
from patchclamp.report.curves import attention_pattern, faithfulness_curve, minimality_bars, toggle_curves
from patchclamp.report.look import (
    BARE,
    BLUE,
    DIVERGING,
    INK,
    ORANGE,
    QUIET,
    ROLES,
    SHAPES,
    Chart,
    Width,
    by_role,
    clean,
    data,
    line,
    spoken,
    styled,
)
from patchclamp.report.relations import causal_against_statistical, connectome, interaction_matrix, switching_map
from patchclamp.store.record import Null

__all__ = [
    "agreement_scatter",
    "attention_pattern",
    "causal_against_statistical",
    "circuit_drawing",
    "connectome",
    "effect_map",
    "faithfulness_curve",
    "faithfulness_curves",
    "flow_graph",
    "interaction_matrix",
    "method_agreement",
    "minimality_bars",
    "null_gates",
    "null_shares",
    "role_map",
    "switching_map",
    "toggle_curves",
]

_DETAILS = ("facilitation", "interference", "irrelevance", "any_seed", "redundant_with", "note")


def role_map(scores: pl.DataFrame, width: Width = 380, legend: bool = True) -> Chart:
    """Roles by layer (upwards) and head, MLPs in a column of their own; a letter in each cell, details on hover.

    Needs `role`; `fragile` adds a star to the letter; `exact` and what else is known of the part shows on hover.
    """
    rows = [
        {**row, "letter": ROLES[row["role"]][0] + ("*" if row.get("fragile") else ""), "effect": spoken(row, "exact")}
        for row in _cells(scores, "role", "fragile", "exact", "exact_low", "exact_high", *_DETAILS)
        if row["role"] in ROLES
    ]
    there = [role for role in ROLES if any(row["role"] == role for row in rows)]
    tips = [alt.Tooltip("site:N", title="part"), alt.Tooltip("role:N"), alt.Tooltip("effect:N", title="exact effect")]
    for name in _DETAILS:
        if any(row.get(name) not in (None, "") for row in rows):
            kind: dict[str, Any] = {"format": ".2f"} if name in _DETAILS[:3] else {}
            tips.append(alt.Tooltip(f"{name}:{'Q' if kind else 'N'}", title=name.replace("_", " "), **kind))
    x, y = _grid(rows)
    base = data(rows).encode(x, y, tooltip=tips)
    letters = base.mark_text(fontSize=11, fontWeight=600).encode(text="letter:N", color=by_role(there, part=2))
    squares = base.mark_rect(cornerRadius=3).encode(color=by_role(there, legend))
    counts = ", ".join(f"{sum(row['role'] == role for row in rows)} {role}" for role in there)
    chart = alt.layer(squares, letters).resolve_scale(color="independent")
    return styled(chart, f"Role of each head and MLP: {counts}.", width, alt.Step(28))


def effect_map(scores: pl.DataFrame, column: str = "exact", label: str = "exact effect", width: Width = 380) -> Chart:
    """A signed number by layer (upwards) and head, blue above zero, orange below.

    + and − mark parts with q <= .05, where `COLUMN_q` is there.
    """
    rows = [row for row in _cells(scores, column, *_ends(column), f"{column}_q", "role") if row[column] is not None]
    for row in rows:
        sure = row.get(f"{column}_q") is not None and row[f"{column}_q"] <= 0.05
        row |= {"value": row[column], "effect": spoken(row, column), "mark": ("+" if row[column] > 0 else "−") if sure else ""}
    size = max((abs(row["value"]) for row in rows), default=1.0) or 1.0
    tips = [alt.Tooltip("site:N", title="part"), alt.Tooltip("effect:N", title=label)]
    tips += [alt.Tooltip(f"{column}_q:Q", title="q", format=".3g")] if f"{column}_q" in scores.columns else []
    tips += [alt.Tooltip("role:N")] if "role" in scores.columns else []
    x, y = _grid(rows)
    base = data(rows).encode(x, y, tooltip=tips)
    colour = alt.Color(
        "value:Q",
        title=label,
        scale=alt.Scale(domain=[-size, size], range=DIVERGING, interpolate="lab"),
        legend=alt.Legend(gradientLength=180, gradientThickness=10, format="+.2~f", tickCount=4),
    )
    squares = base.mark_rect(cornerRadius=3).encode(color=colour)
    ink = alt.condition(f"abs(datum.value) > {0.6 * size}", alt.value("white"), alt.value(INK))
    marks = base.mark_text(fontSize=12).encode(text="mark:N", color=ink)
    best = max(rows, key=lambda row: abs(row["value"]), default=None)
    words = f"{label.capitalize()} of each head and MLP" + (
        f"; the largest is {best['site']}, {best['effect']}." if best else "."
    )
    return styled(alt.layer(squares, marks), words, width, alt.Step(28))


def agreement_scatter(
    scores: pl.DataFrame,
    column: str,
    label: str,
    against: str = "exact",
    against_label: str = "exact effect",
    diagonal: bool = True,
    width: Width = 260,
) -> Chart:
    """A point per part: `against` to the right, `column` upwards, coloured and shaped by role, the five largest named.

    Points in the upper left and lower right have opposite signs. `diagonal` draws where both are equal: for one unit.
    """
    wanted = ("site", column, against, *_ends(column), *_ends(against), "role")
    frame = scores.select(name for name in dict.fromkeys(wanted) if name in scores.columns)
    rows = [row for row in map(clean, frame.to_dicts()) if row[column] is not None and row[against] is not None]
    named = _apart(sorted(rows, key=lambda row: -abs(row[against]))[:6], against, column)
    middle = sum(_span(rows, against)) / 2
    points = [
        {
            "x": row[against],
            "y": row[column],
            "site": row["site"],
            "role": row.get("role") or "no role",
            "name": row["site"] if row["site"] in named else "",
            "left": row[against] > middle,
            "right": spoken(row, against),
            "up": spoken(row, column),
        }
        for row in rows
    ]
    there = [role for role in (*ROLES, "no role") if any(row["role"] == role for row in points)]
    tips = [alt.Tooltip("site:N", title="part"), alt.Tooltip("right:N", title=against_label), alt.Tooltip("up:N", title=label)]
    x = alt.X("x:Q", title=against_label, axis=alt.Axis(tickCount=5))
    base = data(points).encode(x, alt.Y("y:Q", title=label, axis=alt.Axis(tickCount=5)))
    shape = alt.Shape("role:N", legend=None, scale=alt.Scale(domain=there, range=[SHAPES.get(role, "circle") for role in there]))
    marks = base.mark_point(size=52, filled=True, opacity=0.9, stroke=QUIET, strokeWidth=0.6)
    marks = marks.encode(color=by_role(there), shape=shape, tooltip=[*tips, alt.Tooltip("role:N")])
    names = [
        base.transform_filter(f"datum.left == {side}")
        .mark_text(align="right" if side == "true" else "left", dx=-7 if side == "true" else 7, dy=-5, fontSize=10, color=INK)
        .encode(text="name:N")
        for side in ("true", "false")
    ]
    layers: list[Any] = [line("x", 0), line("y", 0)]
    if diagonal and points:
        both = [value for row in points for value in (row["x"], row["y"])]
        ends = [{"x": end, "y": end} for end in (min(both), max(both))]
        layers.append(data(ends).mark_line(color=QUIET, strokeDash=[3, 3], strokeWidth=1).encode(x="x:Q", y="y:Q"))
    return styled(alt.layer(*layers, marks, *names), f"{label} against {against_label}, one point per part.", width, 230)


def null_shares(found: Mapping[str, float], nulls: Iterable[Null], width: Width = 380) -> Chart:
    """Shares of parts called facilitating or interfering in this study and in each null, by gates alone and with safeguards.

    Args:
        found: `facilitating` and `interfering`: shares in this study.
        nulls: what the same procedure finds where there is nothing.
    """
    rows = [{"line": "this study", "role": role, "share": share} for role, share in found.items()]
    for null in nulls:
        alone, guarded = (null.raw_facilitating, null.raw_interfering), (null.facilitating, null.interfering)
        for how, pair in (("gates alone", alone), ("with safeguards", guarded)):
            rows += [{"line": f"{null.name}, {how}", "role": role, "share": x} for role, x in zip(found, pair, strict=True)]
    order = list(dict.fromkeys(str(row["line"]) for row in rows))
    bars = (
        data(rows)
        .mark_bar(cornerRadiusEnd=2, height=14)
        .encode(
            alt.X("share:Q", title="share of parts", axis=alt.Axis(format="%", tickCount=5)),
            alt.Y("line:N", sort=order, title=None, axis=alt.Axis(labelLimit=230, **BARE)),
            alt.Color("role:N", title=None, scale=alt.Scale(domain=["facilitating", "interfering"], range=[BLUE, ORANGE])),
            tooltip=["line:N", "role:N", alt.Tooltip("share:Q", format=".1%")],
        )
    )
    words = "Shares of parts with a role, here and where there is nothing to find."
    return styled(alt.layer(bars, line("x", 0.05, (3, 3))), words, width, alt.Step(26))


def null_gates(scores: pl.DataFrame, width: Width = 380) -> Chart:
    """Every part's gates here and under shuffled answers, a tick each.

    Needs gate_plus, gate_minus, null_gate_plus and null_gate_minus.
    """
    lines = {
        "G−, this study": "gate_minus",
        "G−, shuffled answers": "null_gate_minus",
        "G+, this study": "gate_plus",
        "G+, shuffled answers": "null_gate_plus",
    }
    rows = [
        {"line": name, "gate": value, "site": site, "null": "null" in column}
        for name, column in lines.items()
        for site, value in scores.select("site", column).drop_nulls().iter_rows()
    ]
    ticks = (
        data(rows)
        .mark_tick(thickness=1.6, height=15, opacity=0.65)
        .encode(
            alt.X(
                "gate:Q", title="learned gate: closed (0) to open (1)", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=5)
            ),
            alt.Y("line:N", sort=list(lines), title=None, axis=alt.Axis(labelLimit=200, **BARE)),
            color=alt.condition("datum.null", alt.value(QUIET), alt.value(BLUE)),
            tooltip=["site:N", alt.Tooltip("gate:Q", format=".3f")],
        )
    )
    return styled(ticks, "Learned gates of every part, in this study and with shuffled answers.", width, alt.Step(28))


def _ends(column: str) -> tuple[str, str]:
    return f"{column}_low", f"{column}_high"


def _span(rows: Sequence[Mapping[str, Any]], column: str) -> tuple[float, float]:
    values = [row[column] for row in rows] or [0.0]
    return min(values), max(values)


def _apart(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> set[str]:
    """Sites whose names do not lie on one another, the first first."""
    wide, high = ((high - low) or 1.0 for low, high in (_span(rows, x), _span(rows, y)))
    kept: list[Mapping[str, Any]] = []
    for row in rows:
        if all(abs(row[x] - other[x]) > 0.22 * wide or abs(row[y] - other[y]) > 0.07 * high for other in kept):
            kept.append(row)
    return {row["site"] for row in kept}


def _cells(scores: pl.DataFrame, *columns: str) -> list[dict[str, Any]]:
    """Rows of heads and MLPs, with the row and column of the map that each belongs in."""
    kept = [name for name in ("site", "layer", "kind", "index", *columns) if name in scores.columns]
    rows = map(clean, scores.filter(pl.col("kind").is_in(["head", "mlp"])).select(kept).to_dicts())
    return [{**row, "row": f"L{row['layer']}", "column": f"h{row['index']}" if row["kind"] == "head" else "MLP"} for row in rows]


def _grid(rows: Sequence[Mapping[str, Any]]) -> tuple[alt.X, alt.Y]:
    heads = sorted({row["index"] for row in rows if row["kind"] == "head"})
    gap = [" ", "MLP"] if any(row["kind"] == "mlp" for row in rows) else []
    columns = [*(f"h{head}" for head in heads), *gap]
    layers = [f"L{layer}" for layer in sorted({row["layer"] for row in rows}, reverse=True)]
    across, up = (alt.Scale(domain=names, paddingInner=0.06) for names in (columns, layers))
    x = alt.X(
        "column:N",
        sort=columns,
        scale=across,
        title=None,
        axis=alt.Axis(labelAngle=0, labelOverlap=True, labelSeparation=4, **BARE),
    )
    return x, alt.Y("row:N", sort=layers, scale=up, title=None, axis=alt.Axis(labelOverlap=True, labelSeparation=4, **BARE))
