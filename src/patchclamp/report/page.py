"""The frame of every page: what is in it is not trusted, and it reaches for nothing outside itself.

Text goes through jinja2's autoescape; charts are JSON in `<script type="application/json">` with every `<` as \\u003c; a
Content-Security-Policy lets only the two scripts of the page run, by their hashes, and lets nothing be fetched. Vega's
expressions are interpreted, so that no `eval` is needed.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from patchclamp.report.look import Chart


@dataclass(frozen=True)
class Figure:
    """A chart with its caption; `name` is its id in the page and the name of the file that it is saved as."""

    name: str
    spec: Mapping[str, Any]
    caption: str = ""
    note: str = ""


def signed(value: float | int | None, digits: int = 2) -> str:
    """A number with its sign, true minus and all; a dash where there is none."""
    return "–" if value is None else f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def number(value: float | int | None, digits: int = 2) -> str:
    """A number without plus sign; thousands apart where it is whole."""
    if value is None:
        return "–"
    return (
        f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else f"{round(value, digits) + 0.0:.{digits}f}"
    ).replace("-", "−")


def percent(value: float | int | None) -> str:
    """A share in percent."""
    return "–" if value is None else f"{100 * value:.1f}".removesuffix(".0") + "\u202f%"


def figure(name: str, chart: Chart, caption: str = "", note: str = "") -> Figure:
    # checking each against Vega-Lite's schema would take longer than all else; the tests do it
    return Figure(name, chart.to_dict(validate=False), caption, note)


def fill(template: str, context: Mapping[str, Any]) -> str:
    """A page as HTML, about 1 MB (the charts' library is in it). Takes 3 s for the first page of a process."""
    import jinja2

    room = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(_asset),
    )
    room.filters |= {"signed": signed, "number": number, "percent": percent, "spec": _json}
    scripts = {"library": _library(), "boot": _asset("boot.js")}
    policy = "; ".join((
        "default-src 'none'",
        f"script-src {' '.join(_source(text) for text in scripts.values())}",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
    ))  # fmt: skip
    return room.get_template(template).render(policy=policy, style=_asset("report.css"), **scripts, **context)


def _json(value: Any) -> Any:
    """JSON that no HTML parser can mistake for markup, whatever strings are in it."""
    from markupsafe import Markup

    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script, out of vl-convert."""
    import vl_convert

    text = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


@cache
def _asset(name: str) -> str:
    return files("patchclamp.report").joinpath(name).read_text()


def _source(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
