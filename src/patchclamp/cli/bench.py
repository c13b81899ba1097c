"""The command that runs the circuit-localisation protocol, and writes and reads its submissions."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from patchclamp.cli import common
from patchclamp.cli.common import (
    Bos,
    Device,
    DeviceMap,
    Dtype,
    Json,
    ModelArgument,
    Options,
    Revision,
    Tokenizer,
    Trust,
)
from patchclamp.cli.patching import Memory, Metric, Out, Seed
from patchclamp.errors import PatchclampError

if TYPE_CHECKING:
    from patchclamp.bench import Bench
    from patchclamp.models.model import Model
    from patchclamp.tasks import Task

Tasks = Annotated[
    list[str], typer.Argument(help="Built-in tasks, files, or folders of files; each is a cell.", show_default=False)
]
Method = Annotated[
    list[str] | None,
    typer.Option("--method", help="Attributions; may be repeated. [default: exact, integrated, gradient, random]"),
]
Granularity = Annotated[str, typer.Option("--parts", help="edges or nodes.")]
Fallback = Annotated[str, typer.Option(help="What parts outside a circuit pass: resample, zero, mean, mean:position, optimal.")]
N = Annotated[int | None, typer.Option("--n", help="Prompts of each task (half for scores, a quarter to judge circuits on).")]
Minimum = Annotated[float, typer.Option("--min-accuracy", help="A task that the model does less often is left out.")]
Submit = Annotated[
    Path | None, typer.Option("--submit", help="Write a submission here: a folder TASK_MODEL for each task, of the first method.")
]
Nine = Annotated[bool, typer.Option("--circuits", help="Submit nine circuits for each task instead of scores.")]
Read = Annotated[Path | None, typer.Option("--read", help="Judge a submission from here instead of running methods.")]


def add(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("bench")(bench)


def bench(
    model: ModelArgument, tasks: Tasks, method: Method = None, granularity: Granularity = "edges", fallback: Fallback = "resample",
    n: N = None, seed: Seed = 0, metric: Metric = None, min_accuracy: Minimum = 0.75, submit: Submit = None, circuits: Nine = False,
    read: Read = None, out: Out = None, option: Options = None, bos: Bos = None, dtype: Dtype = None, device: Device = None,
    device_map: DeviceMap = None, revision: Revision = None, tokenizer: Tokenizer = None, trust_remote_code: Trust = False,
    memory: Memory = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Run MIB's circuit-localisation protocol: CPR and CMD of methods on tasks; write its submission format, or judge one."""
    from patchclamp.bench import bench as run
    from patchclamp.bench import cells
    from patchclamp.models.memory import budget

    common.check_table(out)
    if granularity not in ("edges", "nodes"):
        raise PatchclampError(f"--parts {granularity} was asked for: choose edges or nodes")
    if circuits and submit is None:
        raise PatchclampError("--circuits says what is submitted: say where, --submit FOLDER")
    if read is not None and (method or submit):
        raise PatchclampError("--read judges what was submitted: leave out --method and --submit")
    found = [common.find_task(name, option, None, False, bos) for given in tasks for name in _spread(given)]
    loaded = common.load_model(model, dtype, device, device_map, revision, tokenizer, trust_remote_code)
    held = None if memory is None else budget(loaded.device, memory)
    if read is not None:
        _judge(loaded, found, read, granularity, fallback, n, seed, metric, held, out, as_json)
        return
    settings: dict[str, Any] = {"methods": tuple(method)} if method else {}
    with common.bars() as bars:
        done = run(
            loaded, found, **settings, granularity=granularity, fallback=fallback, n=n, seed=seed, metric=metric,
            min_accuracy=min_accuracy, memory=held, progress=bars.progress,
        )  # fmt: skip
    first = str(done.table["method"][0])
    files = cells(submit, loaded, done, method[0] if method else first, circuits) if submit is not None else ()
    if out is not None:
        common.write_table(done.table.write_parquet if out.suffix == ".parquet" else done.table.write_csv, out)
    if as_json:
        body = {"table": done.table.to_dicts(), "curves": done.curves.to_dicts(), "skipped": dict(done.skipped)}
        common.print_json({**body, "files": [str(file) for file in files]})
        return
    _show(loaded, done)
    for file in files:
        common.out.print(Text(str(file)))


def _spread(given: str) -> list[str]:
    """The task files of a folder, or what was given."""
    from patchclamp.tasks._read import suffixes

    folder = Path(given).expanduser()
    if not folder.is_dir():
        return [given]
    files = sorted(str(path) for path in folder.iterdir() if path.suffix in (*suffixes(), ".py"))
    if not files:
        raise PatchclampError(f"the folder {given} has no task files ({', '.join(suffixes())})")
    return files


def _judge(
    model: "Model", tasks: "list[Task]", read: Path, granularity: str, fallback: str, n: int | None, seed: int, metric: str | None,
    memory: int | None, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Judge each task's cell of a submission."""
    import polars as pl

    from patchclamp.bench import sizes_of, submitted
    from patchclamp.exchange import read_submission
    from patchclamp.parts import edges, nodes

    short, rows = model.name.rstrip("/").rpartition("/")[2], list[dict[str, Any]]()
    parts = edges(model, memory=memory) if granularity == "edges" else nodes(model, memory=memory)
    for task in tasks:
        cell = read / f"{task.name}_{short}"
        submission = read_submission(cell, sizes_of(model).kv_heads)
        split = task.split(model.tokenizer, n, seed=seed)
        rule = parts.fallback(fallback, fit=split.fit)
        row, _ = submitted(parts, split.confirm, rule, submission, metric=metric, seed=seed)
        rows.append({"task": task.name, "submission": "scores" if submission.circuits is None else "circuits", **row})
    table = pl.DataFrame(rows)
    if out is not None:
        common.write_table(table.write_parquet if out.suffix == ".parquet" else table.write_csv, out)
    if as_json:
        common.print_json({"table": rows})
        return
    common.out.print(Text(f"{model.name}: the submission in {read}", style="bold"))
    common.print_rows([_line(row, "submission") for row in rows])


def _show(model: "Model", done: "Bench") -> None:
    row = done.table.row(0, named=True)
    text = f"{model.name}: circuit localisation, {row['parts']} parts, fallback {row['fallback']}, {row['n']} prompts a task"
    common.out.print(Text(text, style="bold"))
    common.print_rows([_line(row, "method") for row in done.table.iter_rows(named=True)])
    for name, why in done.skipped.items():
        common.out.print(Text(f"{name}: left out, {why}", style="yellow"))


def _line(row: dict[str, Any], which: str) -> dict[str, Any]:
    def shown(name: str) -> str:
        return f"{row[name]:.2f} [{row[f'{name}_low']:.2f}, {row[f'{name}_high']:.2f}]"

    return {"task": row["task"], which: row[which], "CPR (higher)": shown("CPR"), "CMD (lower)": shown("CMD"),
            "log area": row["log_area"], "85 % from": row["enough"]}  # fmt: skip
