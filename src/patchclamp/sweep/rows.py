"""What a sweep leaves beside its runs: a row per plan, as a table that reports and comparisons can read."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polars as pl

from patchclamp.errors import StoreError
from patchclamp.files import write_atomically
from patchclamp.store.record import Record
from patchclamp.sweep.case import Case

NAME = "sweep.parquet"
State = Literal["done", "kept", "failed", "waiting"]
FOUND = ("n", "accuracy", "open", "closed", "parts", "circuit", "faithfulness", "random")


@dataclass(frozen=True)
class Row:
    """What came of one plan.

    Args:
        case: what was asked.
        state: done now, kept from before, failed, or waiting (the sweep was stopped before it).
        digest: of its run, where known.
        folder: of its run, where it is finished.
        seconds: that its steps took when they were computed.
        headline: what was found, in a sentence.
        error: what went wrong.
        found: the numbers `FOUND`: confirm prompts, accuracy, metric with every part open and closed, parts, size of the circuit,
            its faithfulness and that of random circuits of its size. None where the plan did not ask.
    """

    case: Case
    state: State
    digest: str = ""
    folder: Path | None = None
    seconds: float = 0.0
    headline: str = ""
    error: str = ""
    found: Mapping[str, float | None] = field(default_factory=dict[str, float | None])


@dataclass(frozen=True)
class Swept:
    """What came of a sweep: a row per plan, in the order in which they were asked."""

    rows: tuple[Row, ...]
    folder: Path

    @property
    def failed(self) -> tuple[Row, ...]:
        """Plans that came to nothing, each with its error."""
        return tuple(row for row in self.rows if row.state == "failed")

    @property
    def table(self) -> pl.DataFrame:
        """A row per plan: model, revision, task, seed, method, steps, state, digest, folder, seconds, headline, error, and `FOUND`."""
        return frame(self.rows)

    def __str__(self) -> str:
        counts = {state: sum(row.state == state for row in self.rows) for state in ("done", "kept", "failed", "waiting")}
        return f"{len(self.rows)} plans: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def row_of(case: Case, state: State, digest: str, folder: Path, record: Record) -> Row:
    """The row of a finished run."""
    base, trust = record.baseline, record.trust
    found: dict[str, float | None] = {
        "n": float(base.n),
        "accuracy": base.accuracy,
        "open": base.open.mean,
        "closed": base.closed.mean,
        "parts": float(record.scores.height),
        "circuit": None if record.circuit is None else float(len(record.circuit)),
        "faithfulness": None if trust is None else trust.faithfulness.mean,
        "random": None if trust is None else trust.random.mean,
    }
    return Row(case, state, digest, folder, sum(record.provenance.seconds.values()), record.headline, found=found)


def frame(rows: tuple[Row, ...]) -> pl.DataFrame:
    """Rows as a table, with the same columns and types whatever is in them."""
    columns: dict[str, list[object]] = {
        "model": [row.case.model for row in rows],
        "revision": [row.case.loading.get("revision") for row in rows],
        "task": [row.case.task for row in rows],
        "seed": [row.case.plan.seed for row in rows],
        "method": [row.case.plan.method for row in rows],
        "steps": [" ".join(row.case.steps) for row in rows],
        "state": [row.state for row in rows],
        "digest": [row.digest for row in rows],
        "folder": [None if row.folder is None else row.folder.name for row in rows],
        "seconds": [row.seconds for row in rows],
        "headline": [row.headline for row in rows],
        "error": [row.error for row in rows],
        **{name: [row.found.get(name) for row in rows] for name in FOUND},
    }
    numbers: dict[str, Any] = {"seed": pl.Int64, "seconds": pl.Float64, **dict.fromkeys(FOUND, pl.Float64)}
    return pl.DataFrame(columns, schema={name: numbers.get(name, pl.String) for name in columns})


def write_table(folder: Path, rows: tuple[Row, ...]) -> Path:
    """Write the table beside the runs, whole or not at all."""
    body = io.BytesIO()
    frame(rows).write_parquet(body)
    write_atomically(folder / NAME, body.getvalue())
    return folder / NAME


def read_table(folder: str | Path) -> pl.DataFrame:
    """The table of the last sweep into `folder`; raises `StoreError` where there is none, or it is damaged."""
    path = Path(folder) / NAME
    if not path.is_file():
        raise StoreError(
            f"{folder} holds no sweep: there is no {NAME} in it; `patchclamp sweep plans.toml --out {folder}` writes one"
        )
    try:
        return pl.read_parquet(path)
    except (pl.exceptions.ComputeError, OSError) as error:
        raise StoreError(f"{path} is damaged: run the same sweep again, finished plans are kept") from error
