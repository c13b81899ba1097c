"""When a part's effect forms, whether it stays: from maps at checkpoints to a row per part."""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

CLEAR = 0.05
"""Benjamini and Hochberg's q below which an effect is clear."""


def lives(maps: pl.DataFrame) -> pl.DataFrame:
    """A row per task and part: when its effect formed, and whether it stayed.

    Args:
        maps: a row per task, step and part, with `task`, `step`, `site`, `exact`, `exact_q` (`Development.maps`).

    Returns:
        task, site; `first`: the first checkpoint with a clear effect (q <= .05); `formed`: the first from which on it is clear
        with one sign at every later checkpoint, so that it lies in (`before`, `formed`], `before` the checkpoint ahead of it
        (None at the first); `half`: the first from which on it is at least half its final effect, for one that stays (a clear
        effect may be small); `lost`: the last with a clear effect, where it is not clear at the end; `turned`: whether clear
        effects of both signs occurred; `peak`, `peak_step`: the largest effect in size; `final`; `word`: "stays", "lost",
        "turns" (it stays, and had the other sign before), "never".
    """
    rows: list[dict[str, Any]] = []
    for (task, site), part in maps.sort("step").group_by("task", "site", maintain_order=True):
        rows.append({"task": task, "site": site, **_life(part.select("step", "exact", "exact_q").to_dicts())})
    schema = {"before": pl.Int64, "first": pl.Int64, "formed": pl.Int64, "half": pl.Int64, "lost": pl.Int64}
    return pl.DataFrame(rows, schema_overrides=schema, infer_schema_length=None).sort(
        ["task", pl.col("final").abs()], descending=[False, True], maintain_order=True
    )


def _life(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    steps = [int(point["step"]) for point in points]
    signs = [_sign(point) for point in points]
    clear = [i for i, sign in enumerate(signs) if sign]
    since = len(signs)
    while since and signs[since - 1] == signs[-1] != 0:
        since -= 1
    stays = since < len(signs)
    final = float(points[-1]["exact"])
    half = len(points)
    while stays and half and points[half - 1]["exact"] / final >= 0.5:
        half -= 1
    peak = max(points, key=lambda point: abs(point["exact"]))
    turned = len({signs[i] for i in clear}) > 1
    word = ("turns" if turned else "stays") if stays else "lost" if clear else "never"
    return {
        "word": word,
        "first": steps[clear[0]] if clear else None,
        "before": steps[since - 1] if stays and since else None,
        "formed": steps[since] if stays else None,
        "half": steps[half] if stays else None,
        "lost": steps[clear[-1]] if clear and not stays else None,
        "turned": turned,
        "peak": float(peak["exact"]),
        "peak_step": int(peak["step"]),
        "final": final,
    }


def _sign(point: Mapping[str, Any]) -> int:
    """1 or -1 for a clear effect, 0 for one that is not."""
    if point["exact_q"] is None or point["exact_q"] > CLEAR or point["exact"] == 0:
        return 0
    return 1 if point["exact"] > 0 else -1
