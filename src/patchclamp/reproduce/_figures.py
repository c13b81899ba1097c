"""Figures of reproductions: a map, points, bars with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from patchclamp.report.look import BLUE, DIVERGING, ORANGE, Chart, data, line, styled


def heat(rows: Sequence[Mapping[str, Any]], x: str, y: str, value: str, words: str) -> Chart:
    """A signed number by two names; blue above zero, orange below."""
    size = max((abs(row[value]) for row in rows if row[value] is not None), default=1.0) or 1.0
    colour = alt.Color(f"{value}:Q", scale=alt.Scale(domain=[-size, size], range=DIVERGING))
    chart = data(rows).mark_rect(cornerRadius=2).encode(x=alt.X(f"{x}:O"), y=alt.Y(f"{y}:O", sort="descending"), color=colour)
    return styled(chart.encode(tooltip=[f"{x}:N", f"{y}:N", alt.Tooltip(f"{value}:Q", format="+.3f")]), words, 380, alt.Step(24))


def points(rows: Sequence[Mapping[str, Any]], x: str, y: str, group: str, words: str) -> Chart:
    """One number against another, by group, with the line on which they are equal."""
    ends = [row[name] for row in rows for name in (x, y)]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    equal = data([{"at": low}, {"at": high}]).mark_line(strokeDash=[3, 3], color="#999").encode(x="at:Q", y="at:Q")
    colour = alt.Color(f"{group}:N", title=None)
    dots = (
        data(rows)
        .mark_circle(size=45, opacity=0.8)
        .encode(x=f"{x}:Q", y=f"{y}:Q", color=colour, tooltip=["site:N", f"{x}:Q", f"{y}:Q"])
    )
    return styled(alt.layer(equal, dots), words, 320, 260)  # pyright: ignore[reportArgumentType]


def bars(rows: Sequence[Mapping[str, Any]], name: str, value: str, words: str) -> Chart:
    """Numbers by name in their order, with intervals where they have any."""
    order = [row[name] for row in rows]
    sign = [{**row, "sign": "helps" if row[value] >= 0 else "hurts"} for row in rows]
    base = data(sign).encode(x=alt.X(f"{name}:N", sort=order))
    scale = alt.Scale(domain=["helps", "hurts"], range=[BLUE, ORANGE])
    columns = base.mark_bar().encode(y=f"{value}:Q", color=alt.Color("sign:N", scale=scale, title=None))
    rules = base.mark_rule().encode(y="low:Q", y2="high:Q") if all(row.get("low") is not None for row in rows) else line("y", 0)
    return styled(alt.layer(columns, rules), words, 420, 220)  # pyright: ignore[reportArgumentType]
