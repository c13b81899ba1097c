"""The report: one HTML file with everything in it, made from a stored study; it needs no model and no network."""

from pathlib import Path

from patchclamp.files import write_atomically
from patchclamp.report.page import fill
from patchclamp.report.panels import context
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
    """The report as HTML."""
    return fill("report.html.jinja", context(record))
