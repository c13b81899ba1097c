"""Charts of how parts go together: the matrix of interactions, the connectome, causal against statistical, and what switches."""

import math
from typing import Any

import altair as alt
import polars as pl

from patchclamp.report.look import (
    BARE,
    BLUE,
    DIVERGING,
    INK,
    ORANGE,
    QUIET,
    RULE,
    SEQUENTIAL,
    Chart,
    Width,
    data,
    line,
    spoken,
    styled,
)

LINES = 60
"""Pairs at most that are drawn as lines: the strongest."""
WORDS = {"AND": ("need each other", BLUE), "OR": ("stand in for each other", ORANGE)}


def interaction_matrix(pairs: pl.DataFrame, parts: pl.DataFrame, width: Width = 560) -> Chart:
    """Interactions of all pairs, parts in the order of `parts.order` (communities together): blue where two parts need each other,
    orange where they stand in for each other; a dot where the sign holds under two fallbacks.

    Needs pairs a, b, interaction; parts site, order, community.
    """
    order = parts.sort("order")["site"].to_list()
    group = dict(parts.select("site", "community").iter_rows())
    rows: list[dict[str, Any]] = []
    for row in pairs.iter_rows(named=True):
        told = spoken({"x": row["interaction"], "x_low": row.get("low"), "x_high": row.get("high")}, "x")
        sure = row.get("word") in WORDS
        shown = {"value": row["interaction"], "told": told, "word": row.get("word") or "", "relation": row.get("relation") or "",
                 "sure": sure}  # fmt: skip
        rows += [
            {**shown, "a": a, "b": b, "community": f"{group.get(a)} and {group.get(b)}"}
            for a, b in ((row["a"], row["b"]), (row["b"], row["a"]))
        ]
    size = max((abs(row["value"]) for row in rows), default=1.0) or 1.0
    tips = [alt.Tooltip("a:N", title="part"), alt.Tooltip("b:N", title="and"), alt.Tooltip("told:N", title="interaction"),
            alt.Tooltip("word:N"), alt.Tooltip("relation:N"), alt.Tooltip("community:N", title="communities")]  # fmt: skip
    names = alt.Axis(labelFontSize=9, labelOverlap=True, labelLimit=70, **BARE)
    x = alt.X("b:N", sort=order, title=None, axis=names, scale=alt.Scale(domain=order))
    y = alt.Y("a:N", sort=order, title=None, axis=names, scale=alt.Scale(domain=order))
    scale = alt.Scale(domain=[-size, size], range=DIVERGING, interpolate="lab")
    legend = alt.Legend(gradientLength=160, orient="top", titleLimit=320)
    base = data(rows).encode(x, y, tooltip=tips)
    cells = base.mark_rect().encode(alt.Color("value:Q", title="interaction", scale=scale, legend=legend))
    dots = base.transform_filter("datum.sure").mark_circle(size=9, color=INK)
    words = f"Interactions of {len(order)} parts, ordered by community."
    return styled(alt.layer(cells, dots), words, width, min(620, max(180, 13 * len(order))))


def connectome(pairs: pl.DataFrame, parts: pl.DataFrame, width: Width = 560) -> Chart:
    """Parts by layer (input below), coloured by community, as large as their effect; a line for each of the strongest pairs whose
    sign holds under two fallbacks, blue where they need each other, orange where they stand in for each other.

    Needs pairs a, b, interaction, word; parts site, layer, community, effect.
    """
    place: dict[str, tuple[float, float]] = {}
    for (layer,), level in parts.sort("site").group_by(["layer"], maintain_order=True):
        sites = sorted(level["site"].to_list(), key=_number)
        for number, site in enumerate(sites):
            # a gentle arc, so that lines between neighbours of a layer can be told from those that pass behind them
            place[site] = ((number - (len(sites) - 1) / 2) / max(len(sites), 1), float(layer) + 0.22 * math.cos(math.pi * number))  # type: ignore[arg-type]
    drawn = pairs.filter(pl.col("word").is_in(list(WORDS))).sort(pl.col("interaction").abs(), descending=True).head(LINES)
    lines = [
        {"x": place[row["a"]][0], "y": place[row["a"]][1], "x2": place[row["b"]][0], "y2": place[row["b"]][1],
         "what": WORDS[row["word"]][0], "size": abs(row["interaction"]), "told": f"{row['a']} and {row['b']}: {row['interaction']:+.3f}",
         "relation": row.get("relation") or row["word"]}
        for row in drawn.iter_rows(named=True)
    ]  # fmt: skip
    linked = {name for row in drawn.iter_rows(named=True) for name in (row["a"], row["b"])}
    dots = [
        {"x": place[row["site"]][0], "y": place[row["site"]][1], "site": row["site"], "community": str(row["community"]),
         "effect": row.get("effect"), "size": abs(row.get("effect") or 0.0), "name": row["site"] if row["site"] in linked else "",
         "kind": "MLP" if row["site"].endswith("mlp") else "head"}
        for row in parts.iter_rows(named=True)
    ]  # fmt: skip
    bare = alt.Axis(labels=False, grid=False, title=None, **BARE)
    layers = sorted(set(parts["layer"].to_list()))
    up = alt.Axis(values=layers, title="layer", grid=False, format="d", **BARE)
    x, y = alt.X("x:Q", axis=bare), alt.Y("y:Q", axis=up)
    kinds = [words for words, _ in WORDS.values()]
    colour = alt.Color("what:N", title=None, scale=alt.Scale(domain=kinds, range=[c for _, c in WORDS.values()]),
                       legend=alt.Legend(symbolType="stroke", symbolSize=320, symbolStrokeWidth=2.5))  # fmt: skip
    strokes = data(lines).mark_rule(opacity=0.65).encode(
        x, y, alt.X2("x2:Q"), alt.Y2("y2:Q"), colour, strokeWidth=alt.StrokeWidth("size:Q", scale=alt.Scale(range=[0.6, 4]), legend=None),
        tooltip=[alt.Tooltip("told:N", title="pair"), alt.Tooltip("relation:N")],
    )  # fmt: skip
    tips = [
        alt.Tooltip("site:N", title="part"),
        alt.Tooltip("community:N"),
        alt.Tooltip("effect:Q", title="exact effect", format="+.3f"),
    ]
    marks = data(dots).mark_point(filled=True, stroke="white", strokeWidth=1, opacity=1).encode(
        x, y, alt.Fill("community:N", scale=alt.Scale(scheme="tableau10"), legend=alt.Legend(title="community", symbolType="circle")),
        size=alt.Size("size:Q", scale=alt.Scale(range=[40, 420]), legend=None),
        shape=alt.Shape("kind:N", scale=alt.Scale(domain=["head", "MLP"], range=["circle", "square"]), legend=None), tooltip=tips,
    )  # fmt: skip
    names = data(dots).mark_text(dy=-13, fontSize=9, color=INK).encode(x, y, text="name:N")
    words = f"The {len(lines)} strongest interactions whose sign holds under two fallbacks, by layer."
    return styled(alt.layer(strokes, marks, names).resolve_scale(color="independent"), words, width, max(220, 62 * len(layers)))


def _number(site: str) -> tuple[int, int]:
    tail = site.rpartition(".")[2]
    return (1, 0) if tail == "mlp" else (0, int("".join(c for c in tail if c.isdigit()) or 0))


def causal_against_statistical(pairs: pl.DataFrame, width: Width = 380) -> Chart:
    """A point per pair: how its parts' outputs go together (correlation) against what closing both shows (interaction).

    Needs association, interaction; association_q and word tell which are clear. Upper middle: they act together without
    going together; far right at 0: they go together and nothing follows from it.
    """
    rows = [
        {"pair": f"{row['a']} and {row['b']}", "association": row["association"], "interaction": row["interaction"],
         "word": row.get("word") or "", "what": _both(row)}
        for row in pairs.drop_nulls(["association", "interaction"]).iter_rows(named=True)
    ]  # fmt: skip
    kinds = {"both": BLUE, "interaction only": "#009E73", "association only": ORANGE, "neither": RULE}
    there = [kind for kind in kinds if any(row["what"] == kind for row in rows)]
    points = data(rows).mark_circle(size=34, opacity=0.75).encode(
        alt.X("association:Q", title="statistical association of outputs"),
        alt.Y("interaction:Q", title="interaction by closing both"),
        alt.Color("what:N", title="clear in", scale=alt.Scale(domain=there, range=[kinds[kind] for kind in there])),
        tooltip=["pair:N", alt.Tooltip("association:Q", format="+.3f"), alt.Tooltip("interaction:Q", format="+.3f"), "word:N", "what:N"],
    )  # fmt: skip
    return styled(
        alt.layer(line("x", 0), line("y", 0), points),
        "Interaction of each pair against the association of its outputs.",
        width,
        260,
    )


def _both(row: dict[str, Any]) -> str:
    causal = row.get("word") in WORDS
    statistical = row.get("association_q") is not None and row["association_q"] <= 0.05
    return {(True, True): "both", (True, False): "interaction only", (False, True): "association only"}.get(
        (causal, statistical), "neither"
    )


def switching_map(switching: pl.DataFrame, width: Width = 560) -> Chart:
    """How far each switching part is open on each input, inputs in groups. Needs site, input, group, gate."""
    inputs = switching.select("group", "input").unique().sort("group", "input").with_row_index("place")
    frame = switching.join(inputs, on=["group", "input"]).sort("place")
    sites = frame["site"].unique(maintain_order=True).to_list()
    tips = ["site:N", alt.Tooltip("input:N"), "group:N", alt.Tooltip("gate:Q", format=".2f")]
    # by number: what inputs say is not trusted, and an axis of names would put it into an expression
    across = alt.X("place:O", title="inputs, group by group", axis=alt.Axis(labels=False, **BARE))
    cells = data(frame.to_dicts()).mark_rect().encode(
        across, alt.Y("site:N", sort=sites, title=None, axis=alt.Axis(**BARE)),
        alt.Color("gate:Q", title="gate", scale=alt.Scale(domain=[0, 1], range=SEQUENTIAL), legend=alt.Legend(gradientLength=120)),
        tooltip=tips,
    )  # fmt: skip
    starts = inputs.group_by("group", maintain_order=True).first()
    strip = (
        data(starts.to_dicts()).mark_tick(thickness=3, color=QUIET, height=6).encode(across, y=alt.value(0), tooltip=["group:N"])
    )
    return styled(alt.layer(cells, strip), "Gates of parts that switch, by input.", width, alt.Step(22))
