"""What all charts share: colours, size, words for who cannot see them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import altair as alt

Width: TypeAlias = int | Literal["container"]
Chart: TypeAlias = alt.Chart | alt.LayerChart

ROLES: dict[str, tuple[str, str, str]] = {
    "facilitating": ("F", "#0072B2", "white"),
    "interfering": ("I", "#D55E00", "white"),
    "redundant": ("R", "#9C5A87", "white"),
    "undecided": ("?", "#E8C547", "#333"),
    "irrelevant": ("·", "#E9E6E1", "#777"),
}
"""Role -> letter in the cell, colour of the cell, colour of the letter."""

SHAPES = {"facilitating": "circle", "interfering": "diamond", "redundant": "square", "undecided": "triangle-up"}
DIVERGING = ["#8a3b00", "#d26a1b", "#f3b983", "#f5f2ee", "#a4c8e4", "#3c84bd", "#084a80"]
SEQUENTIAL = DIVERGING[3:]
INK, QUIET, RULE = "#22201d", "#6f6a63", "#dcd7cf"
BLUE, ORANGE = ROLES["facilitating"][1], ROLES["interfering"][1]
BARE: dict[str, Any] = {"domain": False, "ticks": False}  # an axis of names
STROKES = alt.Legend(symbolType="stroke", symbolSize=320, symbolStrokeWidth=2.5, symbolOpacity=1, columns=2)
_FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif"


def styled(chart: Any, description: str, width: Width, height: int | alt.Step) -> Chart:
    """Size, words for who cannot see it, and the calm look that all charts share."""
    axis: dict[str, Any] = {"labelColor": QUIET, "titleColor": INK, "tickColor": RULE, "domainColor": RULE, "gridColor": RULE}
    fonts: dict[str, Any] = {"labelFont": _FONT, "titleFont": _FONT, "labelFontSize": 11, "titleFontSize": 12}
    return (
        chart.properties(width=width, height=height, description=description)
        .configure(background="transparent", font=_FONT, padding=4)
        .configure_view(stroke=None, continuousWidth=380)
        .configure_axis(**axis, **fonts, titleFontWeight=500, gridOpacity=0.6)
        .configure_legend(**fonts, labelColor=QUIET, titleColor=INK, titleFontWeight=500, orient="top", symbolStrokeWidth=2)
    )


def clean(row: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that JSON cannot say become empty."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def spoken(row: Mapping[str, Any], column: str) -> str:
    """A number with its interval, in words for a tooltip."""
    if row.get(column) is None:
        return "not tested"
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    return f"{row[column]:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if low is not None and high is not None else "")


def data(rows: Sequence[Mapping[str, Any]]) -> alt.Chart:
    """A chart of rows that are written into it."""
    return alt.Chart(alt.Data(values=[clean(row) for row in rows]))


def line(axis: Literal["x", "y"], at: float | int, dash: Sequence[int] = (), colour: str = QUIET) -> alt.Chart:
    """A thin line at a value of one axis."""
    mark = data([{"at": at}]).mark_rule(color=colour, strokeWidth=0.8, strokeDash=list(dash))
    return mark.encode(x="at:Q") if axis == "x" else mark.encode(y="at:Q")


def by_role(there: Sequence[str], legend: bool = False, part: int = 1) -> alt.Color:
    """Colour by role; `part` 1 is the cell's colour, 2 that of the letter in it."""
    colours = [ROLES[role][part] if role in ROLES else QUIET for role in there]
    scale = alt.Scale(domain=list(there), range=colours)
    return (
        alt.Color("role:N", title=None, scale=scale, legend=alt.Legend(columns=3))
        if legend
        else alt.Color("role:N", legend=None, scale=scale)
    )


def printable(token: str) -> str:
    """Tokens become parts of Vega expressions (its order of categories), which a line separator would break."""
    return "".join(letter if letter.isprintable() else f"\\u{ord(letter):04x}" for letter in token.strip(" ") or "␣")
