"""Reading tasks that users wrote down: JSONL, JSON, CSV, Parquet, text, rows and data frames."""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

from patchclamp.errors import TaskError
from patchclamp.tasks._pairs import Pair, as_answers, as_prompt, as_range
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Tokenizer

FIELDS = ("clean", "text", "corrupt", "answer", "wrong", "spans", "group", "targets", "mirrors", "read")
"""What a row may hold. `text` instead of `clean` makes it plain text, whose own tokens are predicted; other keys are
ignored, unless they look misspelt."""


class _Row(NamedTuple):
    where: str
    fields: Mapping[str, Any]


def read_task(path: Path, columns: Mapping[str, str] | None, mirrors: bool = True) -> Task:
    """A task from a file, by the ending of its name.

    Raises:
        TaskError: the file cannot be read, is empty, or a line is malformed (with its number).
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TaskError(f"the task file {str(path)!r} cannot be read: {error.strerror}") from error
    rows = list(_READERS[path.suffix](path, content))
    digest = hashlib.sha256(content).hexdigest()
    return _task(path.stem, f"rows of {path.name}", rows, columns, mirrors, digest)


def suffixes() -> tuple[str, ...]:
    """Endings of the files that can be read."""
    return tuple(_READERS)


def rows_task(source: Any, columns: Mapping[str, str] | None, mirrors: bool = True) -> Task:
    """A task from rows: a list of mappings, a Hugging Face dataset, a polars or pandas frame.

    Raises:
        TaskError: a row is malformed (with its number), or these are no rows.
    """
    if hasattr(source, "to_dicts"):  # polars
        source = source.to_dicts()
    elif hasattr(source, "to_dict") and hasattr(source, "columns"):  # pandas
        source = source.to_dict("records")
    if not isinstance(source, Iterable) or isinstance(source, str | Mapping):
        raise TaskError(f"a task is a name, a path, rows or a data frame, not {type(source).__name__}")
    rows: list[_Row] = []
    for i, row in enumerate(cast(Iterable[object], source), 1):
        if not isinstance(row, Mapping):
            raise TaskError(f"row {i} is no mapping but {type(row).__name__}: a row has {', '.join(FIELDS)}")
        rows.append(_Row(f"row {i}", cast(Mapping[str, Any], row)))
    content = json.dumps([dict(row.fields) for row in rows], sort_keys=True, default=str)
    return _task("rows", f"{len(rows)} rows", rows, columns, mirrors, hashlib.sha256(content.encode()).hexdigest())


def _task(name: str, about: str, rows: Sequence[_Row], columns: Mapping[str, str] | None, mirrors: bool, digest: str) -> Task:
    if not rows:
        raise TaskError(f"the task {name!r} is empty: it has no rows")
    pairs = [_pair(_renamed(row, columns or {}), mirrors) for row in rows]
    for field in ("answer", "corrupt", "wrong"):
        lacking = [row.where for row, pair in zip(rows, pairs, strict=True) if not getattr(pair, field)]
        if 0 < len(lacking) < len(rows):
            raise TaskError(f"{lacking[0]} of {name!r} has no {field!r}, and others have: all rows must have it, or none")
    return Task(
        name,
        about,
        partial(_given, tuple(pairs)),
        metric="logit_diff" if pairs[0].wrong else "nll",
        size=len(pairs),
        options={"columns": dict(columns or {}), "mirrors": mirrors},
        source=digest,
    )


def _given(pairs: tuple[Pair, ...], _rng: random.Random, _tokenizer: Tokenizer) -> Iterator[Pair]:
    return iter(pairs)


def _renamed(row: _Row, columns: Mapping[str, str]) -> _Row:
    strange = [name for name in columns if name not in FIELDS]
    if strange:
        raise TaskError(f"columns name {strange[0]!r}, which is no field of a task: choose from {', '.join(FIELDS)}")
    absent = [column for column in columns.values() if column not in row.fields]
    if absent:
        raise TaskError(f"{row.where} has no column {absent[0]!r}: there are {', '.join(map(str, row.fields))}")
    named = {name: row.fields[column] for name, column in columns.items()}
    rest = {name: row.fields[name] for name in FIELDS if name in row.fields and name not in columns}
    for name in row.fields:
        meant = get_close_matches(
            str(name), [field for field in FIELDS if field not in row.fields and field not in columns], 1, 0.85
        )
        if name not in FIELDS and name not in columns.values() and meant:
            raise TaskError(f"{row.where} has a field {name!r}: is {meant[0]!r} meant? Rename it, or leave it out")
    return _Row(row.where, {name: value for name, value in {**rest, **named}.items() if not _missing(value)})


def _missing(value: object) -> bool:
    """Empty cells: None, and the NaN that pandas has for them."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _pair(row: _Row, mirrors: bool) -> Pair:
    fields = row.fields
    try:
        if "text" in fields:
            both = [name for name in ("clean", "corrupt", "answer", "wrong") if name in fields]
            if both:
                raise TaskError(f"'text' is plain text and stands alone, and {both[0]!r} is given: call the prompt 'clean'")
            return Pair(as_prompt(fields["text"], "text"), targets=_ranges(fields), group=str(fields.get("group", "")))
        for needed in ("clean", "answer"):
            if needed not in fields:
                raise TaskError(f"there is no {needed!r} (plain text is called 'text')")
        if not isinstance(fields.get("spans", {}), Mapping):
            raise TaskError("'spans' must map names to [start, end]")
        return Pair(
            as_prompt(fields["clean"], "clean"),
            as_answers(fields["answer"], "answer"),
            as_prompt(fields["corrupt"], "corrupt") if "corrupt" in fields else None,
            as_answers(fields.get("wrong"), "wrong"),
            {str(name): as_range(span, f"span {name!r}") for name, span in fields.get("spans", {}).items() if span is not None},
            str(fields.get("group", "")),
            bool(fields.get("mirrors", mirrors)),
            read=_names(fields.get("read", ())),
        )
    except TaskError as error:
        raise TaskError(f"{row.where}: {error}") from error


def _names(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TaskError("'read' must be a list of names of spans")
    return tuple(str(name) for name in cast(Sequence[object], value))


def _ranges(fields: Mapping[str, Any]) -> tuple[tuple[int, int], ...] | None:
    if "targets" not in fields:
        return None
    targets = fields["targets"]
    if not isinstance(targets, Sequence) or isinstance(targets, str):
        raise TaskError("'targets' must be a list of [start, end]")
    return tuple(as_range(span, "a target") for span in cast(Sequence[object], targets))


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path.name} is not UTF-8 text (byte {error.start})") from error


def _jsonl(path: Path, content: bytes) -> Iterator[_Row]:
    # split on \n alone: JSON strings may hold the other separators that splitlines() knows
    for number, line in enumerate(_text(path, content).split("\n"), 1):
        if line.strip():
            where = f"{path.name}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise TaskError(f"{where} is no JSON object but {type(row).__name__}: a row has {', '.join(FIELDS)}")
            yield _Row(where, cast(dict[str, Any], row))


def _json(path: Path, content: bytes) -> Iterator[_Row]:
    try:
        rows = json.loads(_text(path, content))
    except json.JSONDecodeError as error:
        raise TaskError(f"{path.name}, line {error.lineno} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in cast(list[object], rows)):
        raise TaskError(f"{path.name} must be a list of JSON objects")
    yield from (_Row(f"{path.name}, row {i}", row) for i, row in enumerate(cast(list[dict[str, Any]], rows), 1))


def _table(read: Callable[[Any, Path], Any], path: Path, _content: bytes) -> Iterator[_Row]:
    import polars as pl

    try:
        frame: pl.DataFrame = read(pl, path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise TaskError(f"{path.name} cannot be read: {error}") from error
    yield from (_Row(f"{path.name}, row {i}", row) for i, row in enumerate(frame.iter_rows(named=True), 1))


def _plain(path: Path, content: bytes) -> Iterator[_Row]:
    text = _text(path, content)
    if text.strip():
        yield _Row(path.name, {"text": text})


_READERS: dict[str, Callable[[Path, bytes], Iterator[_Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": partial(_table, lambda pl, path: pl.read_csv(path, infer_schema=False)),
    ".tsv": partial(_table, lambda pl, path: pl.read_csv(path, infer_schema=False, separator="\t", quote_char=None)),
    ".parquet": partial(_table, lambda pl, path: pl.read_parquet(path)),
    ".txt": _plain,
}
