"""The page of a counterfactual: learning curves with and without clamps, a line per seed, and what the clamps did to the turn."""

from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import polars as pl

from patchclamp.files import write_atomically
from patchclamp.report.look import BARE, INK, QUIET, Chart, Width, data, line, styled
from patchclamp.report.page import figure, fill
from patchclamp.report.strips import COLOURS, over_steps
from patchclamp.training.counterfactual import UNCLAMPED, Counterfactual


def write_counterfactual(folder: str | Path) -> Path:
    """Make report.html from the tables of a counterfactual in its folder; returns its path.

    Raises:
        TrainingError: the folder holds none that can be read.
        StoreError: the page cannot be written.
    """
    path = Path(folder) / "report.html"
    write_atomically(path, fill("counterfactual.html.jinja", context(Counterfactual.load(folder))).encode())
    return path


def context(found: Counterfactual) -> dict[str, Any]:
    """Everything that the template names."""
    seeds = found.table["seed"].n_unique()
    return {
        "title": f"With and without clamps, over {seeds} {'seed' if seeds == 1 else 'seeds'}",
        "sections": [("verdicts", "Verdicts"), ("curves", "Curves"), ("runs", "Every run"), ("provenance", "Provenance")],
        "arms": found.arms.to_dicts(),
        "confidence": float(found.about.get("confidence", 0.95)),
        "shifts": figure("shifts", shifts(found, "container"), "Steps to the unclamped run's half-way, times those of the unclamped run"),
        "curves": [
            figure("held-out", clamped_curves(found, "value", "container"), "Held-out loss, clamps on as in training",
                   "A thin line per seed, a thick one for their mean; dashes: where the unclamped runs' mean turns."),
            figure("free", clamped_curves(found, "free", "container"), "Held-out loss of the same weights without the clamps"),
        ],
        "runs": found.table.to_dicts(),
        "about": found.about,
    }  # fmt: skip


def clamped_curves(found: Counterfactual, column: str = "value", width: Width = 560) -> Chart:
    """Learning curves of every arm: a thin line per seed, a thick one for their mean.

    Args:
        found: the runs.
        column: "value" (clamps on), or "free" (the same weights without them).
        width: in pixels, or "container".
    """
    arms = found.curves["arm"].unique(maintain_order=True).to_list()
    colours = [QUIET, *COLOURS][: len(arms)] if arms[0] == UNCLAMPED else COLOURS[: len(arms)]
    scale = alt.Scale(domain=arms, range=colours)
    colour = alt.Color("arm:N", title=None, scale=scale, legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=2.5, columns=3))
    rows = [{**row, "x": row["step"] + 1, "value": row[column]} for row in found.curves.to_dicts()]
    mean = found.curves.group_by("arm", "step", maintain_order=True).agg(pl.col(column).mean().alias("value"))
    thick = [{**row, "x": row["step"] + 1} for row in mean.to_dicts()]
    y = alt.Y("value:Q", title="loss (nats)", scale=alt.Scale(zero=False))
    seeds = data(rows).mark_line(strokeWidth=0.8, opacity=0.35).encode(over_steps(), y, colour, detail="seed:N")
    tips = ["arm:N", alt.Tooltip("step:Q"), alt.Tooltip("value:Q", format=".3f", title="loss, mean over seeds")]
    means = data(thick).mark_line(strokeWidth=2.4).encode(over_steps(), y, colour, tooltip=tips)
    layers: list[Any] = [seeds, means]
    base = found.table.filter(pl.col("arm") == UNCLAMPED)["crossing"].drop_nulls()
    if len(base):
        at = [{"x": float(np.exp(np.log1p(base.to_numpy()).mean()))}]
        layers.append(data(at).mark_rule(color=INK, strokeDash=[4, 3], strokeWidth=1).encode(over_steps()))
    return styled(alt.layer(*layers), f"Learning curves of {', '.join(arms)}.", width, 300)


def shifts(found: Counterfactual, width: Width = 560) -> Chart:
    """Per arm: the factor in steps by which the change comes later (right of 1) or earlier, with its interval; a dot per seed."""
    base = found.table.filter(pl.col("arm") == UNCLAMPED).select("seed", base="crossing")
    pairs = found.table.filter(pl.col("arm") != UNCLAMPED).join(base, on="seed").drop_nulls(["base", "crossing"])
    dots = [
        {"arm": row["arm"], "factor": (row["crossing"] + 1) / (row["base"] + 1), "seed": row["seed"]} for row in pairs.to_dicts()
    ]
    rows = [row for row in found.arms.to_dicts() if row["factor"] is not None]
    order = found.arms["arm"].to_list()
    y = alt.Y("arm:N", sort=order, scale=alt.Scale(domain=order), title=None, axis=alt.Axis(labelLimit=260, **BARE))
    x = alt.X("factor:Q", title="times as many steps (logarithmic)", scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=6))
    tips = ["arm:N", "verdict:N", *(alt.Tooltip(f"{name}:Q", format=".2f") for name in ("factor", "low", "high"))]
    bars = (
        data(rows)
        .mark_rule(strokeWidth=2.5, color=COLOURS[0])
        .encode(alt.X("low:Q", scale=alt.Scale(type="log")), y, x2="high:Q")
    )
    middles = data(rows).mark_point(size=70, filled=True, opacity=1, color=COLOURS[0]).encode(x, y, tooltip=tips)
    seeds = (
        data(dots)
        .mark_tick(thickness=1.4, height=12, color=QUIET)
        .encode(x, y, tooltip=["arm:N", "seed:N", alt.Tooltip("factor:Q", format=".2f")])
    )
    words = (
        "By what factor each arm's change comes later or earlier: "
        + ", ".join(f"{row['arm']} {row['verdict']}" for row in found.arms.to_dicts())
        + "."
    )
    return styled(alt.layer(line("x", 1, (3, 3)), seeds, bars, middles), words, width, alt.Step(30))
