"""The report: one HTML file with everything in it, made from a stored study; it needs no model and no network.

What is written into it comes from models and tasks and is not trusted. Text goes through jinja2's autoescape; charts are JSON in
`<script type="application/json">` with every `<` as \\u003c; a Content-Security-Policy lets only the two scripts of the page run,
by their hashes, and lets nothing be fetched. Vega's expressions are interpreted, so that no `eval` is needed.
"""

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from patchclamp.files import write_atomically
from patchclamp.report.panels import context, number, percent, signed
from patchclamp.store import Record, load_record

__all__ = ["render", "write_report"]


def write_report(run_folder: Path | str) -> Path:
    """Make report.html from the finished study in a run's folder; returns its path.

    Raises:
        StoreError: the run is not finished, damaged, or cannot be written.
    """
    path = Path(run_folder) / "report.html"
    write_atomically(path, render(load_record(run_folder)).encode())
    return path


def render(record: Record) -> str:
    """The report as HTML, about 1 MB (the charts' library is in it). Takes 3 s for the first report of a process."""
    import jinja2

    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"signed": signed, "number": number, "percent": percent, "spec": _json}
    scripts = {"library": _library(), "boot": _asset("boot.js")}
    policy = "; ".join((
        "default-src 'none'",
        f"script-src {' '.join(_source(text) for text in scripts.values())}",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
        "base-uri 'none'",
        "form-action 'none'",
    ))  # fmt: skip
    template = page.from_string(_asset("report.html.jinja"))
    return template.render(policy=policy, style=_asset("report.css"), **scripts, **context(record))


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
