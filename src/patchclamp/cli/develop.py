"""The command that follows a training over its checkpoints: develop."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from patchclamp.cli import common
from patchclamp.cli.common import Bos, Chat, Columns, Device, Dtype, Json, Tokenizer, Trust
from patchclamp.errors import TrainingError

if TYPE_CHECKING:
    import polars as pl

    from patchclamp.develop import Development

Source = Annotated[
    str,
    typer.Argument(
        help="A run of `patchclamp train`, a folder of checkpoints, or a hub name with a revision per checkpoint.",
        show_default=False,
    ),
]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", help="A task to map at each checkpoint, by name or file. May be repeated.")
]
Measures = Annotated[
    list[str] | None,
    typer.Option("--measure", help="What to measure at each checkpoint; `--measure list` names what there is. May be repeated."),
]
Revisions = Annotated[
    list[str] | None,
    typer.Option("--revision", help="Of a hub model: step1000. May be repeated; by default all that name a step."),
]
At = Annotated[str | None, typer.Option("--at", help="Only these steps: 0,100,1000.")]
Count = Annotated[int | None, typer.Option(help="At most so many checkpoints, evenly spaced in the logarithm of the step.")]
Steps = Annotated[
    list[str] | None,
    typer.Option("--step", help="Of the maps: verify (by default), gate, discover, trust, relate. May be repeated."),
]
Prompts = Annotated[int | None, typer.Option("--n", help="Prompts of each map in all.")]
Seed = Annotated[int, typer.Option(help="Of the maps.")]
Out = Annotated[Path | None, typer.Option("--out", help="The folder; by default runs/ and the digest of the question.")]
On = Annotated[str, typer.Option(help="Where the maps run: here, or ray.")]
Address = Annotated[str | None, typer.Option(help="Of a Ray cluster: auto, or host:port.")]
Workers = Annotated[int | None, typer.Option(help="On Ray; by default as many as there is room for.")]
LISTED = 12


def add(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("develop")(develop)


def develop(
    source: Source,
    task: Tasks = None,
    measure: Measures = None,
    revision: Revisions = None,
    at: At = None,
    count: Count = None,
    step: Steps = None,
    n: Prompts = None,
    seed: Seed = 0,
    out: Out = None,
    on: On = "here",
    address: Address = None,
    workers: Workers = None,
    dtype: Dtype = None,
    device: Device = None,
    tokenizer: Tokenizer = None,
    trust: Trust = False,
    columns: Columns = None,
    chat: Chat = False,
    bos: Bos = None,
    as_json: Json = False,
) -> None:
    """When parts take up their roles, and whether they keep them: measures and maps at the checkpoints of a training."""
    from patchclamp.develop import checkpoints, follow
    from patchclamp.report.development import write_development
    from patchclamp.study.plan import Plan
    from patchclamp.training.metrics import read
    from patchclamp.units import MEASURES

    common.quiet()
    if measure == ["list"]:
        common.print_rows(
            [
                {"measure": name, "what": (function.__doc__ or "").strip().partition("\n")[0]}
                for name, function in MEASURES.items()
            ]
        )
        return
    if unknown := [name for name in measure or () if name not in MEASURES]:
        raise TrainingError(f"there is no measure {unknown[0]!r}: choose from {', '.join(MEASURES)}")
    chosen = {name: MEASURES[name] for name in measure or ()}
    found = checkpoints(source, revisions=revision, steps=_steps(at), count=count)
    loading = {"dtype": dtype, "device": device, "tokenizer": tokenizer, "trust": trust or None}
    asked = {"columns": None if columns is None else common.column_names(columns), "chat": chat or None, "bos": bos}
    metrics = read(Path(source)) if (Path(source) / "training.json").is_file() else None
    with common.bars() as bars:
        result, folder = follow(
            found,
            out,
            tasks=task or (),
            measures={name: lambda model, take=take: take(model, None) for name, take in chosen.items()},
            plan=Plan(n=n, seed=seed, force=True, min_accuracy=0.0),
            steps=tuple(step or ("verify",)),
            metrics=metrics,
            loading={name: value for name, value in loading.items() if value is not None},
            asked={name: value for name, value in asked.items() if value is not None},
            on=on,
            address=address,
            workers=workers,
            progress=bars.progress,
        )
        report = write_development(folder)
    if as_json:
        common.print_json(
            {
                "folder": folder,
                "report": report,
                "steps": result.steps,
                "baselines": result.baselines.to_dicts(),
                "lives": result.lives.to_dicts(),
                "phases": result.phases.to_dicts(),
            }
        )
        return
    _show(result, report)


def _steps(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise TrainingError(f"--at {text!r} is not a list of steps: write --at 0,100,1000") from None


def _show(found: "Development", report: Path) -> None:
    import polars as pl

    common.out.print()
    common.out.print(Text(f"{len(found.steps)} checkpoints, step {found.steps[0]} to {found.steps[-1]}", style="bold"))
    for (task,), base in found.baselines.group_by("task", maintain_order=True):
        _show_task(found, str(task), base)
    turns = found.phases.filter(pl.col("verdict") == "turns").sort(pl.col("curve").str.contains(" of L"), maintain_order=True)
    if found.phases.height:
        common.out.print(Text(f"\n{turns.height} of {found.phases.height} curves turn", style="italic"))
        common.print_rows([_turn(row) for row in turns.head(LISTED).iter_rows(named=True)])
    common.out.print(Text.assemble(("Report ", "bold"), str(report)), soft_wrap=True)


def _show_task(found: "Development", task: str, base: "pl.DataFrame") -> None:
    import polars as pl

    done = base.filter(pl.col("error") == "")
    for row in base.filter(pl.col("error") != "").iter_rows(named=True):
        common.out.print(Text(f"! {task} at step {row['step']}: {row['error']}", style="yellow"))
    if done.is_empty():
        return
    first, last = done.row(0, named=True), done.row(-1, named=True)
    common.out.print(
        Text(
            f"\n{task}: metric {first['open']:+.2f} at step {first['step']}, {last['open']:+.2f} at step {last['step']}"
            f" ({last['n']} prompts)",
            style="italic",
        )
    )
    lived = found.lives.filter((pl.col("task") == task) & (pl.col("word") != "never"))
    common.print_rows(
        [
            {
                "part": row["site"],
                "effect": row["word"],
                "clear from": row["formed"],
                "half of it from": row["half"],
                "last clear": row["lost"],
                "at the end": f"{row['final']:+.2f}",
                "largest": f"{row['peak']:+.2f} at {row['peak_step']}",
            }
            for row in lived.head(LISTED).iter_rows(named=True)
        ]
    )
    left = found.lives.filter(pl.col("task") == task).height - min(lived.height, LISTED)
    if left:
        common.out.print(Text(f"{left} more parts are in the report", style="dim"))


def _turn(row: dict[str, float]) -> dict[str, object]:
    when = f"{row['step']:.0f} [{row['low']:.0f}, {row['high']:.0f}]"
    return {"curve": row["curve"], "at step": when, "before": row["before"], "after": row["after"]}
