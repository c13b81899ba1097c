"""Charts of circuits: the drawing, how methods agree on it, how faithful theirs are, and the routes that one prompt takes."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import altair as alt
import polars as pl

from patchclamp.circuit import Circuit
from patchclamp.report.look import (
    BARE,
    BLUE,
    DIVERGING,
    INK,
    ORANGE,
    QUIET,
    ROLES,
    STROKES,
    Chart,
    Width,
    by_role,
    clean,
    data,
    line,
    printable,
    spoken,
    styled,
)
from patchclamp.sites import Edge, Site

READ = {"query": BLUE, "key": ORANGE, "value": "#009E73", "MLP": "#9C5A87", "logits": INK, "next layer": QUIET}
"""What an edge is read as, and its colour."""
_DASHES = {"query": [1, 0], "key": [6, 3], "value": [2, 2], "MLP": [1, 0], "logits": [1, 0], "next layer": [1, 0]}
_SLOTS = {"q": "query", "k": "key", "v": "value", "mlp": "MLP", "logits": "logits"}
_ENDS = ("embed", "logits")
_METHODS = [BLUE, ORANGE, "#009E73", "#9C5A87", "#E69F00", "#56B4E9", INK, "#CC79A7", QUIET]


def circuit_drawing(circuit: Circuit, scores: pl.DataFrame | None = None, width: Width = 560) -> Chart:
    """The circuit's heads (circles) and MLPs (squares) by layer, input below, logits above.

    Of a circuit of parts, size is |exact effect|, colour the role, and a line joins each part to those of the next layer that
    has any: it may read what the other wrote. Of a circuit of edges the lines are the edges: colour and dashes say whether the
    target reads them as query, key, value, by an MLP or as logits, width is the edge's |exact| effect. `about["group"]`, the heads
    that share a key/value head, joins keys and values to the heads that read them; else they are nodes of their own.
    """
    edges = [part for part in circuit if isinstance(part, Edge)]
    known = {} if scores is None else {row["site"]: row for row in map(clean, scores.to_dicts())}
    group = circuit.about.get("group")
    place, levels = _places(circuit, edges, group)
    if edges:
        strongest = max((abs(_effect(known, edge)) for edge in edges), default=0) or 1.0
        lines = [line for edge in edges for line in _drawn(edge, place, known, strongest, group)]
    else:
        lines = [
            {**_ends(place[a], place[b]), "read": "next layer", "width": 1.0, "edge": f"{a} to {b}", "effect": "not tested"}
            for low, high in pairwise(levels) for a in low for b in high
        ]  # fmt: skip
    largest = max((abs(known[name].get("exact") or 0) for name in place if name in known), default=0) or 1.0
    nodes = [_node(name, known.get(name, {}), largest, place[name]) for name in place]
    there = [role for role in (*ROLES, "no role") if any(node["role"] == role for node in nodes)]
    span = max(abs(x) for x, _ in place.values()) + 0.6
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[-span, span], nice=False))
    y = alt.Y("y:Q", axis=None, scale=alt.Scale(domain=[-0.5, len(levels) - 0.5], nice=False))
    base = data(nodes).encode(x, y)
    tips = [alt.Tooltip("site:N", title="part"), alt.Tooltip("role:N"), alt.Tooltip("effect:N", title="exact effect")]
    marks = base.mark_point(filled=True, opacity=1, stroke="white", strokeWidth=1.5).encode(
        color=by_role(there),
        size=alt.Size("size:Q", legend=None, scale=None),
        shape=alt.Shape("shape:N", legend=None, scale=None),
        tooltip=tips,
    )
    words = base.mark_text(dy=21, fontSize=10.5, color=INK, stroke=None).encode(text="site:N")
    described = f"The circuit by layer, input below: {', '.join(map(str, circuit)) or 'no part'}."
    chart = alt.layer(_strokes(lines, x, y), marks, words).resolve_scale(color="independent")
    return styled(chart, described, width, 66 * len(levels))


def _strokes(lines: Sequence[Mapping[str, Any]], x: alt.X, y: alt.Y) -> Any:
    read = [kind for kind in READ if any(row["read"] == kind for row in lines)]
    legend = None if read in ([], ["next layer"]) else STROKES
    colour = alt.Color(
        "read:N", title="read as", legend=legend, scale=alt.Scale(domain=read, range=[READ[kind] for kind in read])
    )
    dash = alt.StrokeDash("read:N", legend=None, scale=alt.Scale(domain=read, range=[_DASHES[kind] for kind in read]))
    tips = [alt.Tooltip("edge:N"), alt.Tooltip("read:N", title="read as"), alt.Tooltip("effect:N", title="effect")]
    return data(lines).mark_rule(opacity=0.6 if legend else 0.35).encode(
        x, y, alt.X2("x2:Q"), alt.Y2("y2:Q"), colour, dash,
        strokeWidth=alt.StrokeWidth("width:Q", legend=None, scale=None), tooltip=tips,
    )  # fmt: skip


def method_agreement(agreement: pl.DataFrame, width: Width = 380) -> Chart:
    """Rank correlation of every two methods' scores, a cell each, exact first; a method with itself is 1.

    Needs a, b, spearman, each pair once or twice.
    """
    rows = [clean(row) for row in agreement.select("a", "b", "spearman").to_dicts()]
    both = {(row["a"], row["b"]): row["spearman"] for row in rows} | {(row["b"], row["a"]): row["spearman"] for row in rows}
    names = sorted({name for pair in both for name in pair}, key=lambda name: (name != "exact", name))
    cells = [
        {"a": a, "b": b, "value": 1.0 if a == b else both.get((a, b)),
         "shown": "" if both.get((a, b)) is None and a != b else f"{1.0 if a == b else both[a, b]:.2f}".replace("-", "−")}
        for a in names for b in names
    ]  # fmt: skip
    axis = alt.Axis(labelLimit=120, labelAngle=-40, **BARE)
    base = data(cells).encode(
        alt.X("b:N", sort=names, title=None, axis=axis),
        alt.Y("a:N", sort=names, title=None, axis=alt.Axis(labelLimit=120, **BARE)),
    )
    colour = alt.Color(
        "value:Q", title="Spearman", scale=alt.Scale(domain=[-1, 1], range=DIVERGING, interpolate="lab"),
        legend=alt.Legend(gradientLength=140, gradientThickness=10, tickCount=5),
    )  # fmt: skip
    squares = base.mark_rect(cornerRadius=3).encode(
        color=colour, tooltip=["a:N", "b:N", alt.Tooltip("value:Q", format="+.3f", title="Spearman")]
    )
    ink = alt.condition("abs(datum.value) > 0.6", alt.value("white"), alt.value(INK))
    words = base.mark_text(fontSize=10).encode(text="shown:N", color=ink)
    told = f"Rank correlation of the scores of {', '.join(names)}."
    return styled(alt.layer(squares, words), told, width, alt.Step(30))


def faithfulness_curves(curves: pl.DataFrame, width: Width = 560) -> Chart:
    """Faithfulness of the circuits of several methods by size, on one plot; bands are 95 % intervals; the axis of sizes is logarithmic.

    Needs method, share (of all parts), parts, faithfulness, low, high.
    """
    methods = curves["method"].unique(maintain_order=True).to_list()
    rows = [clean(row) for row in curves.select("method", "share", "parts", "faithfulness", "low", "high").to_dicts()]
    dashes = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2], [4, 4]]
    tones = alt.Scale(domain=methods, range=[_METHODS[i % len(_METHODS)] for i in range(len(methods))])
    colour = alt.Color("method:N", title="parts in the order of", legend=STROKES, scale=tones)
    dash = alt.StrokeDash(
        "method:N", title="parts in the order of", legend=STROKES,
        scale=alt.Scale(domain=methods, range=[dashes[i % len(dashes)] for i in range(len(methods))]),
    )  # fmt: skip
    ticks = alt.Axis(format="~%", grid=False, values=[0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])
    x = alt.X("share:Q", title="share of all parts in the circuit", scale=alt.Scale(type="log"), axis=ticks)
    y = alt.Y("faithfulness:Q", title="faithfulness (0: all closed, 1: all open)")
    band = data(rows).mark_area(opacity=0.12).encode(x, alt.Y("low:Q"), alt.Y2("high:Q"), colour)
    tips = ["method:N", alt.Tooltip("parts:Q"), alt.Tooltip("share:Q", format=".1%"), alt.Tooltip("faithfulness:Q", format=".3f")]
    curve = data(rows).mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=20)).encode(x, y, colour, dash, tooltip=tips)
    told = f"Faithfulness of circuits by size, parts taken in the order of {', '.join(methods)}."
    return styled(alt.layer(line("y", 0), line("y", 1), band, curve), told, width, 300)


def flow_graph(flow: pl.DataFrame, tokens: Sequence[str], width: Width = 560) -> Chart:
    """The routes by which information reaches one prompt's last token: tokens to the right, blocks upwards.

    A line goes from what wrote (a token's state before the block) to what read it (a token's state behind it): straight up, the
    residual stream; through an MLP; from another token, the head named. Width is the share of what the state holds.
    Needs level (0: the first block), source, target (positions), part ("residual", L3.mlp, L3.h2), share.
    """
    rows: list[dict[str, Any]] = []
    for row in flow.iter_rows(named=True):
        kind = "residual" if row["part"] == "residual" else "MLP" if str(row["part"]).endswith("mlp") else "head"
        bend = 0.16 if kind == "MLP" else 0.0
        rows.append({
            "x": row["source"] + bend, "x2": row["target"] + bend, "y": row["level"], "y2": row["level"] + 1, "kind": kind,
            "part": row["part"], "share": row["share"], "width": 0.5 + 5 * row["share"],
            "told": f"{row['part']}: token {row['source']} to {row['target']}",
        })  # fmt: skip
    top = max((row["y2"] for row in rows), default=1)
    kinds = {"residual": QUIET, "MLP": "#9C5A87", "head": BLUE}
    there = [kind for kind in kinds if any(row["kind"] == kind for row in rows)]
    x = alt.X("x:Q", axis=None, scale=alt.Scale(domain=[-0.6, max(len(tokens), 1) - 0.4], nice=False))
    y = alt.Y("y:Q", title="block", axis=alt.Axis(tickMinStep=1, format="d", grid=False, **BARE),
              scale=alt.Scale(domain=[-0.75, top + 0.3], nice=False))  # fmt: skip
    lines = data(rows).mark_rule(opacity=0.7).encode(
        x, y, alt.X2("x2:Q"), alt.Y2("y2:Q"),
        alt.Color("kind:N", title="through", legend=STROKES, scale=alt.Scale(domain=there, range=[kinds[kind] for kind in there])),
        strokeWidth=alt.StrokeWidth("width:Q", scale=None, legend=None),
        tooltip=["told:N", alt.Tooltip("share:Q", format=".1%")],
    )  # fmt: skip
    met = sorted(
        {(row["x2"], row["y2"]) for row in rows if row["kind"] != "MLP"}
        | {(row["x"], row["y"]) for row in rows if row["kind"] != "MLP"}
    )
    dots = data([{"x": a, "y": b} for a, b in met]).mark_circle(size=22, color=INK, opacity=1).encode(x, y)
    names = data([{"x": i, "y": -0.2, "token": printable(token)} for i, token in enumerate(tokens)])
    words = names.mark_text(angle=320, align="right", fontSize=10, color=INK, limit=70).encode(x, y, text="token:N")
    heads = ", ".join(sorted({row["part"] for row in rows if row["kind"] == "head"})) or "no head"
    return styled(
        alt.layer(lines, dots, words), f"Information flow routes to the last token, through {heads}.", width, 46 * (top + 2)
    )


def _places(circuit: Circuit, edges: Sequence[Edge], group: int | None) -> tuple[dict[str, tuple[float, float]], list[list[str]]]:
    """Where each part stands: upwards by layer, a layer's MLP above its heads where edges are drawn; side by side otherwise."""
    whole = {part for part in circuit if not isinstance(part, Edge)} | {edge.source for edge in edges}
    sites = sorted(whole | {owner for edge in edges for owner in _readers(edge.target, whole, group)})
    rows: dict[tuple[int, bool], list[str]] = {}
    for site in sites:
        if site.layer is not None:
            rows.setdefault((site.layer, bool(edges) and site.kind == "mlp"), []).append(str(site))
    levels = [["embed"], *(rows[row] for row in sorted(rows)), ["logits"]]
    if not edges:
        return {
            name: (i - (len(level) - 1) / 2, float(y)) for y, level in enumerate(levels) for i, name in enumerate(level)
        }, levels
    columns = sorted({_column(site) for site in sites if site.layer is not None})  # a head has one column in every layer
    middle = (len(columns) - 1) / 2
    place = {"embed": (0.0, 0.0), "logits": (0.0, float(len(levels) - 1))}
    height = {row: float(y) for y, row in enumerate(sorted(rows), start=1)}
    for site in sites:
        if site.layer is not None:
            place[str(site)] = (columns.index(_column(site)) - middle, height[site.layer, site.kind == "mlp"])
    return place, levels


def _column(site: Site) -> tuple[bool, int]:
    return site.kind == "mlp", site.index or 0


def _drawn(
    edge: Edge,
    place: Mapping[str, tuple[float, float]],
    known: Mapping[str, Mapping[str, Any]],
    strongest: float,
    group: int | None,
) -> list[dict[str, Any]]:
    """A line to each part that reads what the edge brings."""
    effect = abs(_effect(known, edge))
    told = spoken(dict(known.get(str(edge), {})), "exact") if str(edge) in known else "not scored"
    read = _SLOTS.get(edge.target.kind, edge.target.kind)
    there = {Site.parse(name) for name in place}
    return [
        {**_ends(place[str(edge.source)], place[str(reader)]), "read": read, "width": 1 + 4 * effect / strongest, "edge": str(edge), "effect": told}
        for reader in _readers(edge.target, there, group)
    ]  # fmt: skip


def _readers(target: Site, there: Iterable[Site], group: int | None) -> list[Site]:
    """The parts that an edge's end belongs to: a query's head; of a key or value, the heads that share it, as far as they are
    drawn, or a node of its own where none is, or nothing is known of sharing."""
    if target.kind == "q":
        return [Site("head", target.layer, target.index)]
    if target.kind not in ("k", "v") or group is None or target.index is None:
        return [target]
    heads = [Site("head", target.layer, target.index * group + one) for one in range(group)]
    return [head for head in heads if head in set(there)] or (
        [heads[0]] if group == 1 else [Site("kv", target.layer, target.index)]
    )


def _effect(known: Mapping[str, Mapping[str, Any]], edge: Edge) -> float:
    return float(known.get(str(edge), {}).get("exact") or 0.0)


def _ends(a: tuple[float, float], b: tuple[float, float]) -> dict[str, float]:
    return {"x": a[0], "y": a[1], "x2": b[0], "y2": b[1]}


def _node(name: str, row: Mapping[str, Any], largest: float, place: tuple[float, float]) -> dict[str, Any]:
    shape = "triangle-up" if name in _ENDS else "square" if name.endswith("mlp") else "circle"
    size = 110 if name in _ENDS else 180 + 620 * abs(row.get("exact") or 0) / largest
    role = "no role" if name in _ENDS else row.get("role") or "no role"
    return {
        "site": name,
        "role": role,
        "size": size,
        "shape": shape,
        "effect": spoken(row, "exact"),
        "x": place[0],
        "y": place[1],
    }
