"""Charts of what happens as parts are closed, and of attention; `patchclamp.report.figures` has them all."""

from collections.abc import Mapping
from typing import Any

import altair as alt
import polars as pl

from patchclamp.report.look import (
    BARE,
    BLUE,
    INK,
    ORANGE,
    QUIET,
    SEQUENTIAL,
    STROKES,
    Chart,
    Width,
    data,
    line,
    printable,
    styled,
)
from patchclamp.store.record import Patterns

_LINES = ["#0072B2", "#D55E00", "#6f6a63", "#009E73", "#9C5A87"]
_DASHES = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [4, 4]]


def toggle_curves(toggles: pl.DataFrame, label: str = "metric", width: Width = 560) -> Chart:
    """The toggle check: `label` as parts are closed one after another, in the order of each score; bands are 95 % intervals."""
    orders = toggles["order"].unique(maintain_order=True).to_list()
    title = "closed in the order of"
    colour = alt.Color("order:N", title=title, scale=alt.Scale(domain=orders, range=_LINES), legend=STROKES)
    dash = alt.StrokeDash("order:N", title=title, scale=alt.Scale(domain=orders, range=_DASHES), legend=STROKES)
    base = data(toggles.select("order", "k", "value", "low", "high").to_dicts())
    base = base.encode(alt.X("k:Q", title="parts closed", axis=alt.Axis(tickMinStep=1)), colour)
    y = alt.Y("low:Q", title=label, scale=alt.Scale(zero=False))
    band = base.mark_area(opacity=0.16).encode(y, alt.Y2("high:Q"))
    tips = ["order:N", "k:Q", alt.Tooltip("value:Q", format=".3f", title=label)]
    curve = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=18)).encode(alt.Y("value:Q"), dash, tooltip=tips)
    return styled(alt.layer(band, curve), f"{label} as parts are closed in the order of {', '.join(orders)}.", width, 260)


def faithfulness_curve(
    curve: pl.DataFrame, random: pl.DataFrame | None = None, size: int | None = None, width: Width = 560
) -> Chart:
    """Faithfulness as parts are opened, best first, from all closed to all open, with its interval.

    Random circuits of the same size are a band (2.5 to 97.5 %) and their median; completeness (what is lost without the
    circuit) is dashed; `size` marks the chosen circuit.
    """
    rows = curve.select("k", "faithfulness", "low", "high", "completeness").to_dicts()
    mine = [
        {"k": row["k"], "value": row["faithfulness"], "what": "the circuit", "low": row["low"], "high": row["high"]}
        for row in rows
    ]
    left = [{"k": row["k"], "value": row["completeness"], "what": "lost without it"} for row in rows]
    chance = [] if random is None else [{**row, "what": "random circuits"} for row in _band(random).to_dicts()]
    kinds = ["the circuit", "lost without it", *(["random circuits"] if chance else [])]
    colour = alt.Color(
        "what:N", title=None, scale=alt.Scale(domain=kinds, range=[BLUE, ORANGE, QUIET][: len(kinds)]), legend=STROKES
    )
    dash = alt.StrokeDash("what:N", title=None, scale=alt.Scale(domain=kinds, range=_DASHES[: len(kinds)]), legend=STROKES)
    x = alt.X("k:Q", title="parts in the circuit", axis=alt.Axis(tickMinStep=1))
    y = alt.Y("value:Q", title="faithfulness (0: all closed, 1: all open)")
    tips = ["what:N", alt.Tooltip("k:Q", title="parts"), alt.Tooltip("value:Q", format=".3f", title="faithfulness")]
    layers: list[Any] = [line("y", 0), line("y", 1), *([line("x", size, (3, 3), INK)] if size is not None else [])]
    for drawn, tone in ((chance, QUIET), (mine, BLUE)):
        layers.append(data(drawn).mark_area(color=tone, opacity=0.18).encode(x, alt.Y("low:Q"), alt.Y2("high:Q")))
    drawn = data([row for row in (*mine, *left, *chance) if row["value"] is not None])
    layers.append(drawn.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=22)).encode(x, y, colour, dash, tooltip=tips))
    return styled(alt.layer(*layers), "Faithfulness as parts are opened, against random circuits of the same size.", width, 300)


def minimality_bars(minimality: Mapping[str, float], width: Width = 380) -> Chart:
    """What closing each part costs the circuit's faithfulness, largest first."""
    order = sorted(minimality, key=lambda site: -minimality[site])
    bars = (
        data([{"site": site, "cost": minimality[site]} for site in order])
        .mark_bar(cornerRadiusEnd=2, height=13, color=BLUE)
        .encode(
            alt.X("cost:Q", title="faithfulness lost when it is closed", axis=alt.Axis(tickCount=5)),
            alt.Y("site:N", sort=order, title=None, axis=alt.Axis(**BARE)),
            tooltip=["site:N", alt.Tooltip("cost:Q", format="+.3f")],
        )
    )
    return styled(bars, "What closing each part of the circuit costs.", width, alt.Step(22))


def attention_pattern(patterns: Patterns, head: int, width: Width = 260) -> Chart:
    """One head's attention, queries downwards and keys to the right, with the tokens at the sides."""
    names = [f"{i} {printable(token)}" for i, token in enumerate(patterns.tokens)]
    rows = [
        {"query": query, "key": key, "weight": round(float(weight), 4)}
        for query, line in zip(names, patterns.weights[head], strict=True)
        for key, weight in zip(names, line, strict=True)
        if weight > 0  # a mask's zeros are left blank
    ]
    plain: dict[str, Any] = {**BARE, "labelFontSize": 9, "labelLimit": 64, "labelOverlap": True}
    squares = (
        data(rows)
        .mark_rect()
        .encode(
            alt.X("key:N", sort=names, scale=alt.Scale(domain=names), title="key", axis=alt.Axis(labelAngle=-90, **plain)),
            alt.Y("query:N", sort=names, scale=alt.Scale(domain=names), title="query", axis=alt.Axis(**plain)),
            alt.Color("weight:Q", scale=alt.Scale(domain=[0, 1], range=SEQUENTIAL, interpolate="lab"), legend=None),
            tooltip=["query:N", "key:N", alt.Tooltip("weight:Q", format=".3f", title="attention")],
        )
    )
    return styled(squares, f"Attention pattern of {patterns.sites[head]}.", width, 270)


def _band(random: pl.DataFrame) -> pl.DataFrame:
    value = pl.col("faithfulness")
    low, high = (value.quantile(share, "linear") for share in (0.025, 0.975))
    return random.group_by("k").agg(value.median().alias("value"), low.alias("low"), high.alias("high")).sort("k")
