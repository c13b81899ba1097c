"""What commands share: options, loading, progress, printing."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from patchclamp.cli.progress import Bars
from patchclamp.cli.progress import bars as shown_bars
from patchclamp.errors import PatchclampError, TaskError

if TYPE_CHECKING:
    from patchclamp.models.model import Model
    from patchclamp.tasks import Task

out = Console()
err = Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(help="A hub name, a folder, or zoo/NAME.", show_default=False)]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, ...; by default the checkpoint's own.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default CUDA where there is one.")]
DeviceMap = Annotated[str | None, typer.Option(help="auto, or another device map of accelerate.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Tokenizer = Annotated[str | None, typer.Option(help="Where the tokenizer is, if not beside the model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the model's repository. Only if you trust it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]
Options = Annotated[list[str] | None, typer.Option("--option", "-o", help="A task's option, key=value. May be repeated.")]
Columns = Annotated[str | None, typer.Option(help="Columns of a table as our fields: clean=good,corrupt=bad,answer=label.")]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap prompts in the tokenizer's chat template.")]
Bos = Annotated[
    bool | None, typer.Option("--bos/--no-bos", help="With or without a first BOS token; by default as the tokenizer does.")
]


def quiet() -> None:
    """Nothing from libraries on the screen but errors."""
    import logging

    for library in ("transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


def load_model(
    model: str, dtype: str | None = None, device: str | None = None, device_map: str | None = None, revision: str | None = None,
    tokenizer: str | None = None, trust: bool = False,
) -> "Model":  # fmt: skip
    """The model, with a word on the screen while it loads."""
    from patchclamp.models.model import Model

    quiet()
    with err.status(f"loading {model}"):
        return Model.load(
            model,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            tokenizer=tokenizer,
            trust_remote_code=trust,
        )


def find_task(task: str, options: Sequence[str] | None, columns: str | None, chat: bool, bos: bool | None) -> "Task":
    """The task by name or file, with its options."""
    from patchclamp.tasks import load_task

    given: dict[str, Any] = {}
    for option in options or ():
        key, equals, value = option.partition("=")
        if not equals:
            raise TaskError(f"--option {option!r} is not key=value")
        given[key.strip()] = _value(value.strip())
    if columns is not None:
        given["columns"] = column_names(columns)
    if chat:
        given["chat"] = True
    if bos is not None:
        given["bos"] = bos
    return load_task(task, **given)


def column_names(columns: str) -> dict[str, str]:
    """Columns of a table by field: clean=good,corrupt=bad."""
    pairs = [item.partition("=") for item in columns.split(",")]
    if not all(equals for _, equals, _ in pairs):
        raise TaskError(f"--columns {columns!r} is not field=column,field=column (fields: clean, corrupt, answer, wrong)")
    return {field.strip(): column.strip() for field, _, column in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def bars(pieces: Sequence[tuple[str, str, float]] = ()) -> AbstractContextManager[Bars]:
    """Progress on standard error; see `progress.bars`."""
    return shown_bars(err, pieces)


def print_json(body: object) -> None:
    """One JSON document on standard output."""
    from patchclamp.store.codec import plain

    typer.echo(json.dumps(plain(body), ensure_ascii=False, allow_nan=False))


UNBROKEN = 24  # characters of a cell that are never broken over lines: names, numbers, intervals


def print_rows(rows: Sequence[Mapping[str, object]]) -> None:
    """A table; what is untrusted is printed as it is, never as markup."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    names = list(rows[0]) if rows else []
    cells = [[_cell(row[name]) for name in names] for row in rows]
    for number, name in enumerate(names):
        numeric = all(isinstance(row[name], int | float) or row[name] is None for row in rows)
        short = max(len(row[number]) for row in cells) <= UNBROKEN
        table.add_column(name, justify="right" if numeric else "left", overflow="fold", no_wrap=short)
    for row in cells:
        table.add_row(*map(Text, row))
    out.print(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if value and abs(value) < 0.001 else f"{value:.3f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))  # pyright: ignore[reportUnknownArgumentType]
    return str(value)


def run_folder(text: str) -> Path | None:
    """The path, if it is the folder of a run."""
    path = Path(text).expanduser()
    return path if (path / "manifest.json").is_file() or (path / "plan.json").is_file() else None


def refuse_both(given: object, name: str) -> None:
    """Raise where an option makes no sense beside a run folder."""
    if given is not None:
        raise PatchclampError(f"{name} was given beside a run folder, which has its own: leave it out, or give MODEL TASK")


def check_table(out: Path | None, top: int = 1) -> None:
    """Refuse a table that could not be written, before anything runs."""
    if out is not None and out.suffix not in (".parquet", ".csv"):
        raise PatchclampError(f"--out {out} was given: tables are written as .parquet or .csv")
    if out is not None and not out.parent.is_dir():
        raise PatchclampError(f"--out {out} was given, and there is no folder {out.parent}: make it first")
    if top < 1:
        raise PatchclampError(f"--top {top} was given: choose 1 or more")


def write_table(write: Callable[[Path], object], out: Path) -> None:
    """The whole table or nothing."""
    hidden = out.with_name(f".{out.stem}.new{out.suffix}")
    try:
        write(hidden)
        hidden.replace(out)
    finally:
        hidden.unlink(missing_ok=True)
