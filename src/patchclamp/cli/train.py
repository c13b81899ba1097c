"""The command that trains a model on text: train."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from patchclamp.cli import common
from patchclamp.cli.common import Device, Json, Revision, Tokenizer
from patchclamp.cli.progress import duration
from patchclamp.errors import TrainingError

if TYPE_CHECKING:
    from patchclamp.models.model import Model
    from patchclamp.training import Tokens, Trained, Training

Source = Annotated[
    str,
    typer.Argument(help="A hub name, a folder or zoo/NAME; or a configuration (JSON), for random weights.", show_default=False),
]
Data = Annotated[
    Path,
    typer.Option(
        "--data", help="Text (.txt), JSONL, Parquet, a folder of such files, or one that datasets saved.", show_default=False
    ),
]
Out = Annotated[Path, typer.Option("--out", help="The run's folder; one that was cut off goes on.", show_default=False)]
Steps = Annotated[int | None, typer.Option(help="Updates.")]
Epochs = Annotated[float | None, typer.Option(help="Instead of --steps: how often each row is seen.")]
Batch = Annotated[int, typer.Option(help="Rows of an update.")]
Accumulate = Annotated[int, typer.Option(help="Passes that an update is split into, where memory is short.")]
Length = Annotated[int, typer.Option("--length", help="Tokens of a row.")]
Pack = Annotated[bool, typer.Option("--pack/--no-pack", help="Join texts and cut them into rows, or a text per row, padded.")]
Column = Annotated[str, typer.Option(help="Where the texts are in JSONL, Parquet and datasets.")]
Held = Annotated[float, typer.Option("--held-out", help="Share of rows that is never trained on, for a loss on them; 0: none.")]
Rate = Annotated[float, typer.Option(help="The highest learning rate.")]
Schedule = Annotated[str, typer.Option(help="constant, linear, cosine, or wsd (constant, then --cooldown).")]
Warmup = Annotated[int, typer.Option(help="Updates over which the rate grows from 0.")]
Cooldown = Annotated[int, typer.Option(help="Of wsd: the last updates, over which the rate falls.")]
Floor = Annotated[float, typer.Option(help="Share of the rate that is left at the end.")]
Optimizer = Annotated[str, typer.Option(help="adamw or sgd.")]
Decay = Annotated[float, typer.Option(help="Weight decay.")]
Betas = Annotated[tuple[float, float], typer.Option(help="AdamW's; of sgd the first is the momentum.")]
Epsilon = Annotated[float, typer.Option(help="AdamW's.")]
Clip = Annotated[float, typer.Option(help="Largest norm of the gradient; 0: as it is.")]
Precision = Annotated[str, typer.Option(help="Of passes: float32, bfloat16 or float16. Weights are float32.")]
Attention = Annotated[str | None, typer.Option(help="The kernel: eager, sdpa, ...; by default the library's choice.")]
Lora = Annotated[int | None, typer.Option(help="Train factors of this rank beside frozen weights (LoRA).")]
Alpha = Annotated[int | None, typer.Option("--lora-alpha", help="Of LoRA; by default the rank.")]
Dropout = Annotated[float, typer.Option("--lora-dropout", help="Of LoRA.")]
Targets = Annotated[str, typer.Option("--lora-targets", help="Modules, comma-separated, or all-linear.")]
Seed = Annotated[int, typer.Option(help="Of random weights, of the order of rows, and of dropout.")]
Checkpoints = Annotated[str, typer.Option(help="How many, log-spaced; or the steps, comma-separated.")]
States = Annotated[
    str, typer.Option(help="Which checkpoints keep the optimizer's state: all, or last (a third of the disk space).")
]
Evaluate = Annotated[int, typer.Option(help="The loss on held-out rows is measured every so many updates, and at checkpoints.")]
Save = Annotated[int, typer.Option(help="A state to go on from is written every so many updates, besides checkpoints.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would take (time, memory, disk), and do nothing.")]
ROWS = 64
"""Of those set aside, how many the held-out loss is measured on, at most."""
HELD = "held-out loss"


def add(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("train")(train)


def train(
    source: Source, data: Data, out: Out, steps: Steps = None, epochs: Epochs = None, batch: Batch = 32, accumulate: Accumulate = 1,
    length: Length = 128, pack: Pack = True, column: Column = "text", held_out: Held = 0.05, rate: Rate = 1e-3,
    schedule: Schedule = "cosine", warmup: Warmup = 0, cooldown: Cooldown = 0, floor: Floor = 0.0, optimizer: Optimizer = "adamw",
    decay: Decay = 0.0, betas: Betas = (0.9, 0.999), epsilon: Epsilon = 1e-8, clip: Clip = 1.0, precision: Precision = "float32",
    attention: Attention = None, lora: Lora = None, lora_alpha: Alpha = None, lora_dropout: Dropout = 0.0,
    lora_targets: Targets = "all-linear", seed: Seed = 0, checkpoints: Checkpoints = "20", states: States = "all",
    evaluate: Evaluate = 100, save: Save = 500, tokenizer: Tokenizer = None, device: Device = None, revision: Revision = None,
    dry_run: DryRun = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Train a causal language model on text, whole or by LoRA; killed and begun again, it ends in the same weights.

    Started by torchrun or accelerate launch, several processes share each update's rows.
    """
    from patchclamp.training import begin, texts
    from patchclamp.training import lora as adapt
    from patchclamp.training.distributed import joined

    if (steps is None) == (epochs is None):
        raise TrainingError("say how long to train: give --steps or --epochs, and not both")
    without = {
        "--lora-alpha": lora_alpha is not None,
        "--lora-dropout": lora_dropout != 0,
        "--lora-targets": lora_targets != "all-linear",
    }
    if lora is None and any(without.values()):
        raise TrainingError(f"{next(name for name, given in without.items() if given)} is of LoRA: give its rank, --lora 8, too")
    numbers: dict[str, Any] = {
        "batch": batch, "accumulate": accumulate, "rate": rate, "schedule": schedule, "warmup": warmup, "cooldown": cooldown,
        "floor": floor, "optimizer": optimizer, "decay": decay, "betas": betas, "epsilon": epsilon, "clip": clip or None,
        "precision": precision, "seed": seed, "checkpoints": _checkpoints(checkpoints), "states": states, "evaluate": evaluate,
        "save": save,
    }  # fmt: skip
    _plan(steps if steps is not None else 10**12, numbers)  # what makes no sense is said before anything is loaded
    common.quiet()
    with joined(device) as own:
        with common.err.status(f"loading {source} and {data}"):
            model = begin(source, seed=seed, tokenizer=tokenizer, attention=attention, device=own, revision=revision)
            if lora is not None:
                targets = lora_targets if lora_targets == "all-linear" else [name.strip() for name in lora_targets.split(",")]
                model = adapt(model, lora, alpha=lora_alpha, dropout=lora_dropout, targets=targets, seed=seed)
            rows = texts(data, model.tokenizer, length, pack=pack, column=column, held=held_out, seed=seed)
        plan = _plan(steps if steps is not None else max(1, round((epochs or 0) * rows.trained / batch)), numbers)
        if dry_run:
            _estimated(model, rows, plan, as_json)
            return
        _carried_out(model, rows, plan, out, as_json)


def _plan(steps: int, numbers: Mapping[str, Any]) -> "Training":
    from patchclamp.training import Training

    return Training(steps, **numbers)


def _checkpoints(text: str) -> int | tuple[int, ...]:
    try:
        return tuple(int(step) for step in text.split(",")) if "," in text else int(text)
    except ValueError:
        raise TrainingError(f"--checkpoints {text!r} is neither a number nor steps such as 0,10,100,1000") from None


def _carried_out(model: "Model", rows: "Tokens", plan: "Training", out: Path, as_json: bool) -> None:
    """Train, with a bar and a line per measurement, and say what came out."""
    from patchclamp.training import checkpoint, held_out
    from patchclamp.training import train as carry_out
    from patchclamp.training.distributed import rank

    first = rank() == 0
    if first:
        begun = checkpoint.resumable(out) if (out / "training.json").is_file() else None
        note = "" if begun is None else f"; goes on from step {begun}"
        common.err.print(Text(f"{model}\n{rows.label}: {_rows(rows, plan)}{note}", style="dim"))
    measures = [held_out(rows, min(ROWS, rows.held), name=HELD, interval=True)] if rows.held else []
    try:
        with _bar(plan.steps) as (tick, progress):
            trained = carry_out(model, rows, plan, out, measures=measures, tick=tick, progress=progress)
    except KeyboardInterrupt:
        if first:
            common.err.print(Text(f"interrupted; {out} holds the last update: run the same command again to go on"))
        raise typer.Exit(130) from None
    if first:
        _told(trained, rows, as_json)


def _rows(rows: "Tokens", plan: "Training") -> str:
    epochs = plan.steps * plan.batch / rows.trained
    return (
        f"{rows.trained:,} rows of {rows.tokens.shape[1]} tokens to train on, {rows.held:,} set aside; "
        f"{plan.steps:,} updates of {plan.batch} rows ({epochs:.1f} epochs)"
    )


@contextmanager
def _bar(steps: int) -> Generator[tuple[Any, Any]]:
    """How far the training is, and what was measured."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("  updates"), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=common.err, transient=True, disable=not common.err.is_terminal) as bar:
        task = bar.add_task("", total=steps)

        def tick(done: int, of: int, numbers: Mapping[str, float]) -> None:
            bar.update(task, completed=done, description=f"loss {numbers['loss']:.3f}")

        def progress(step: int, numbers: Mapping[str, float]) -> None:
            if HELD in numbers:
                said = _said(*(numbers.get(f"{HELD}{end}") for end in ("", " low", " high")))
                bar.console.print(Text(f"  step {step:>7,}  {HELD} {said}", style="dim"))

        yield tick, progress


def _told(trained: "Trained", rows: "Tokens", as_json: bool) -> None:
    losses, kept = trained.curve("loss"), _kept(trained)
    last = float(losses["value"].tail(100).mean())  # pyright: ignore[reportArgumentType]
    held: dict[str, Any] | None = None
    if kept:
        held = {"rows": min(ROWS, rows.held), "first": kept[0][0], "last": kept[-1][0], "first_interval": kept[0][1:],
                "last_interval": kept[-1][1:]}  # fmt: skip
    if as_json:
        common.print_json({"folder": str(trained.out), "steps": len(losses), "loss": last, "held_out": held,
                           "checkpoints": list(trained.steps)})  # fmt: skip
        return
    common.out.print(Text(f"Loss of the last {min(100, len(losses))} updates: {last:.3f} nats a token"))
    if held:
        common.out.print(
            Text(
                f"On {held['rows']} rows that were set aside: {_said(*kept[0])} before, {_said(*kept[-1])} after (95 % over rows)"
            )
        )
    common.out.print(
        Text(f"{len(trained.steps)} checkpoints, each a model: {trained.out}/checkpoints/step-NNNNNNN"), soft_wrap=True
    )
    common.out.print(Text(str(trained.out), style="bold"), soft_wrap=True)


def _kept(trained: "Trained") -> list[tuple[float, float | None, float | None]]:
    """The loss on rows that were set aside, with its interval, by step; none of an interval that was not measured."""
    found = trained.curve(HELD)
    for end in ("low", "high"):
        found = found.join(trained.curve(f"{HELD} {end}").rename({"value": end}), on="step", how="left")
    return found.sort("step").select("value", "low", "high").rows()


def _said(value: float | None, low: float | None, high: float | None) -> str:
    """A number with its interval; of a single row there is none."""
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _estimated(model: "Model", rows: "Tokens", plan: "Training", as_json: bool) -> None:
    from dataclasses import asdict

    from patchclamp.models.memory import shown
    from patchclamp.training import estimate
    from patchclamp.training.distributed import rank, world

    if world() > 1:
        raise TrainingError("--dry-run was asked of several processes: ask it of one")
    with common.err.status("timing some updates"):
        found = estimate(model, rows, plan)
    if as_json and rank() == 0:
        common.print_json(asdict(found))
        return
    common.out.print(Text(str(model)))
    lines = {
        "data": f"{rows.label}: {_rows(rows, plan)}",
        "parameters": f"{found.parameters:,}, of which {found.trained:,} are trained",
        "tokens": f"{found.tokens:,.0f}",
        "time": f"about {duration(found.seconds)} ({duration(found.update)} an update here), with measures and checkpoints on top",
        "memory": f"{shown(found.memory)} for weights, gradients and moments"
        + ("; passes on top" if found.passes is None else f"; {shown(found.passes)} for passes"),
        "disk": f"{shown(found.disk)} for {len(plan.kept)} checkpoints (of {shown(found.checkpoint)} with the optimizer's state)",
    }
    common.print_rows([{"": name, "what it takes": text} for name, text in lines.items()])
