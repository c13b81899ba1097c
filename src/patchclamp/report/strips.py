"""Charts of a training: curves over steps, film strips of every part, a map with a slider."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import polars as pl

from patchclamp.report.look import BARE, DIVERGING, INK, ROLES, STROKES, Chart, Width, data, spoken, styled

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#9C5A87", "#6f6a63", "#b8860b"]
LARGEST = 40
"""Parts of a film strip at most: those of the largest effect at any checkpoint."""


def learning_curve(
    curves: Mapping[str, pl.DataFrame], marks: pl.DataFrame | None = None, width: Width = 560, label: str = ""
) -> Chart:
    """Curves over steps (log(1 + step) to the right), with a band where there are intervals; phase changes are dashed lines.

    Args:
        curves: name -> step, value, and low, high where known.
        marks: rows with `curve`, `step`: where a curve turns.
        label: of the vertical axis.
    """
    names = list(curves)
    rows = [{**row, "curve": name, "x": row["step"] + 1} for name, frame in curves.items() for row in frame.to_dicts()]
    colour = alt.Color(
        "curve:N",
        title=None,
        scale=alt.Scale(domain=names, range=COLOURS[: len(names)]),
        legend=STROKES if len(names) > 1 else None,
    )
    base = data(rows).encode(over_steps(), colour)
    tips = ["curve:N", alt.Tooltip("step:Q"), alt.Tooltip("value:Q", format=".4g")]
    layers: list[Any] = []
    if any(row.get("low") is not None for row in rows):
        layers.append(base.mark_area(opacity=0.16).encode(alt.Y("low:Q"), alt.Y2("high:Q")))
    layers.append(
        base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=18)).encode(
            alt.Y("value:Q", title=label or (names[0] if len(names) == 1 else "value"), scale=alt.Scale(zero=False)), tooltip=tips
        )
    )
    if marks is not None and marks.height:
        there = [{"x": row["step"] + 1, "curve": row["curve"]} for row in marks.to_dicts() if row["curve"] in names]
        layers.append(
            data(there)
            .mark_rule(color=INK, strokeDash=[4, 3], strokeWidth=1)
            .encode(alt.X("x:Q", scale=alt.Scale(type="log")), tooltip=["curve:N"])
        )
    return styled(alt.layer(*layers), f"{', '.join(names)} over training.", width, 220)


def task_curve(base: pl.DataFrame, width: Width = 560) -> Chart:
    """The metric with every part open (with its interval) and closed, over training."""
    opened = base.select(
        "step", pl.col("open").alias("value"), pl.col("open_low").alias("low"), pl.col("open_high").alias("high")
    )
    closed = base.select("step", pl.col("closed").alias("value"))
    return learning_curve({"all open": opened, "all closed": closed}, width=width, label="metric")


def film_strip(maps: pl.DataFrame, width: Width = 560) -> Chart:
    """A row per part (in forward order, upwards), a column per checkpoint: blue where closing the part hurts, orange where it helps."""
    kept = _largest(maps, "exact")
    rows = [
        {**row, "effect": spoken(row, "exact"), "sure": "•" if row["exact_q"] is not None and row["exact_q"] <= 0.05 else ""}
        for row in kept.to_dicts()
    ]
    return _strip(rows, "exact", "exact effect", _order(kept), width, signs=True, marks="sure")


def number_strip(frame: pl.DataFrame, width: Width = 560) -> Chart:
    """A measure's number of every part over training."""
    kept = _largest(frame.rename({"part": "site"}), "value")
    rows = [
        {**row, "effect": spoken(row | {"value_low": row.get("low"), "value_high": row.get("high")}, "value")}
        for row in kept.to_dicts()
    ]
    return _strip(
        rows, "value", "value", kept["site"].unique(maintain_order=True).to_list(), width, signs=bool((kept["value"] < 0).any())
    )


def role_strip(maps: pl.DataFrame, width: Width = 560) -> Chart:
    """The role of each part at each checkpoint."""
    rows = [{**row, "letter": ROLES[row["role"]][0]} for row in maps.drop_nulls("role").to_dicts() if row["role"] in ROLES]
    there = [role for role in ROLES if any(row["role"] == role for row in rows)]
    scale = alt.Scale(domain=there, range=[ROLES[role][1] for role in there])
    x = alt.X("step:O", title="step", axis=alt.Axis(labelAngle=-60, **BARE))
    y = alt.Y("site:N", title=None, sort=_order(maps)[::-1], axis=alt.Axis(**BARE))
    base = data(rows).encode(x, y, tooltip=["site:N", "step:Q", "role:N"])
    letters = base.mark_text(fontSize=9).encode(
        text="letter:N", color=alt.Color("role:N", legend=None, scale=alt.Scale(domain=there, range=[ROLES[r][2] for r in there]))
    )
    cells = base.mark_rect().encode(alt.Color("role:N", title=None, scale=scale, legend=alt.Legend(columns=5)))
    return styled(
        alt.layer(cells, letters).resolve_scale(color="independent"), "Role of each part over training.", width, alt.Step(15)
    )


def pair_strip(pairs: pl.DataFrame, width: Width = 560) -> Chart:
    """The interaction of the strongest pairs over training."""
    frame = pairs.with_columns((pl.col("a") + " & " + pl.col("b")).alias("site"))
    kept = _largest(frame, "interaction", 20)
    rows = [
        {**row, "effect": spoken(row | {"interaction_low": row.get("low"), "interaction_high": row.get("high")}, "interaction")}
        for row in kept.to_dicts()
    ]
    return _strip(rows, "interaction", "interaction", kept["site"].unique(maintain_order=True).to_list(), width, signs=True)


def slider(maps: pl.DataFrame, width: Width = 420) -> Chart:
    """The map by layer and head at one checkpoint; a slider chooses which."""
    steps = maps["step"].unique().sort().to_list()
    number = {step: i for i, step in enumerate(steps)}
    rows: list[dict[str, Any]] = [
        {
            "site": row["site"],
            "row": f"L{row['layer']}",
            "column": f"h{row['index']}" if row["kind"] == "head" else "MLP",
            "at": number[row["step"]],
            "step": row["step"],
            "value": row["exact"],
            "effect": spoken(row, "exact"),
        }
        for row in maps.filter(pl.col("kind").is_in(["head", "mlp"])).to_dicts()
    ]
    size = max((abs(row["value"]) for row in rows), default=1.0) or 1.0
    chosen = alt.param(
        name="at", value=len(steps) - 1, bind=alt.binding_range(min=0, max=len(steps) - 1, step=1, name="checkpoint ")
    )
    heads = sorted({row["column"] for row in rows if row["column"] != "MLP"}, key=lambda name: int(name[1:]))
    layers = sorted({row["row"] for row in rows}, key=lambda name: -int(name[1:]))
    x = alt.X(
        "column:N",
        sort=[*heads, "MLP"],
        scale=alt.Scale(domain=[*heads, "MLP"]),
        title=None,
        axis=alt.Axis(labelAngle=0, orient="bottom", **BARE),
    )
    y = alt.Y("row:N", sort=layers, scale=alt.Scale(domain=layers), title=None, axis=alt.Axis(**BARE))
    base = data(rows).transform_filter("datum.at == at")
    cells = base.mark_rect(cornerRadius=3).encode(
        x, y, _signed_colour("value", "exact effect", size), tooltip=["site:N", "step:Q", "effect:N"]
    )
    said = data([{"at": i, "text": f"step {step}"} for i, step in enumerate(steps)]).transform_filter("datum.at == at")
    words = said.mark_text(align="right", baseline="bottom", fontSize=13, color=INK, x="width", y=-6).encode(text="text:N")
    return styled(
        alt.layer(cells, words).add_params(chosen),
        "Exact effects at the checkpoint that the slider chooses.",
        width,
        alt.Step(28),
    )


def _strip(
    rows: Sequence[Mapping[str, Any]],
    column: str,
    title: str,
    order: Sequence[str],
    width: Width,
    *,
    signs: bool,
    marks: str | None = None,
) -> Chart:
    size = max((abs(row[column]) for row in rows if row[column] is not None), default=1.0) or 1.0
    x = alt.X("step:O", title="step", axis=alt.Axis(labelAngle=-60, **BARE))
    y = alt.Y("site:N", title=None, sort=list(order)[::-1], axis=alt.Axis(labelLimit=200, **BARE))
    base = data(rows).encode(x, y, tooltip=["site:N", "step:Q", alt.Tooltip("effect:N", title=title)])
    colour = (
        _signed_colour(column, title, size)
        if signs
        else alt.Color(
            f"{column}:Q",
            title=title,
            scale=alt.Scale(domain=[0, size], range=DIVERGING[3:], interpolate="lab"),
            legend=alt.Legend(gradientLength=180, gradientThickness=10, tickCount=4),
        )
    )
    layers: list[Any] = [base.mark_rect().encode(colour)]
    if marks is not None:
        ink = alt.condition(f"abs(datum.{column}) > {0.6 * size}", alt.value("white"), alt.value(INK))
        layers.append(base.mark_text(fontSize=9).encode(text=f"{marks}:N", color=ink))
    return styled(alt.layer(*layers), f"{title} of each part over training.", width, alt.Step(15))


def _signed_colour(column: str, title: str, size: float) -> alt.Color:
    return alt.Color(
        f"{column}:Q",
        title=title,
        scale=alt.Scale(domain=[-size, size], range=DIVERGING, interpolate="lab"),
        legend=alt.Legend(gradientLength=180, gradientThickness=10, format="+.2~f", tickCount=4),
    )


def over_steps() -> alt.X:
    """Steps to the right, in the logarithm of step + 1 (`x`)."""
    return alt.X(
        "x:Q", title="step + 1 (logarithmic)", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(tickCount=6, format="~s")
    )


def _largest(frame: pl.DataFrame, column: str, count: int = LARGEST) -> pl.DataFrame:
    """The rows of the parts whose number is largest at any checkpoint; all of them where they are few."""
    top = frame.group_by("site").agg(pl.col(column).abs().max().alias("top")).sort("top", descending=True).head(count)["site"]
    return frame.filter(pl.col("site").is_in(top.to_list()))


def _order(maps: pl.DataFrame) -> list[str]:
    return maps["site"].unique(maintain_order=True).to_list()
