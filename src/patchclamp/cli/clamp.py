"""The command for clamping while a model learns: clamp."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.text import Text

from patchclamp.cli import common
from patchclamp.cli.common import Json, Tokenizer
from patchclamp.errors import ModelError, TrainingError

if TYPE_CHECKING:
    from patchclamp.models.model import Model
    from patchclamp.training import Clamp, Data, Training
    from patchclamp.training.counterfactual import Counterfactual

Source = Annotated[
    str,
    typer.Argument(help="A recipe of the zoo (induction), a configuration (JSON), or a model to begin with.", show_default=False),
]
DataFile = Annotated[Path | None, typer.Option("--data", help="Texts to train on, where it is no recipe.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of all runs (ARM/seed-N) and of the tables.", show_default=False)]
Many = list[str] | None
ForceAt = Annotated[
    Many,
    typer.Option("--force", help="Attention forced: previous, induction, match, first, self, uniform. L0.h0.pattern=previous"),
]
ForbidAt = Annotated[
    Many, typer.Option("--forbid", help="Attention kept from previous, induction, first, self. L0.h*.pattern=previous")
]
AblateAt = Annotated[Many, typer.Option("--ablate", help="A part set to zero, or to its mean. L1.h2, L1.h2=mean")]
CopyAt = Annotated[Many, typer.Option("--copy", help="Heads whose attention is said outright: ideal copying. L1.h0.pattern")]
FreezeAt = Annotated[Many, typer.Option("--freeze", help="Weights that do not learn. L0.h0, L1.mlp, embed")]
PreserveAt = Annotated[
    Many,
    typer.Option("--preserve", help="A value as at a checkpoint, or (=itself) as without clamps. L0.h0.pattern=CHECKPOINT"),
]
MatchAt = Annotated[Many, typer.Option("--match", help="A value as in another run at the same step. L0.h0.pattern=RUN")]
GraftAt = Annotated[Many, typer.Option("--graft", help="Weights taken from a checkpoint at --from. L0.h0=CHECKPOINT")]
From = Annotated[int, typer.Option("--from", help="The first update that is clamped.", min=0)]
To = Annotated[int | None, typer.Option("--to", help="The first that is no longer; by default to the end.")]
Strength = Annotated[float, typer.Option(help="0 (nothing) to 1 (held).")]
Ramp = Annotated[str, typer.Option(help="constant, up (to --strength at --to) or down.")]
Seeds = Annotated[str, typer.Option(help="How many seeds, or which: 5, or 0,3,7.")]
Each = Annotated[bool, typer.Option("--each", help="Each clamp is an arm of its own; by default all together are one.")]
Steps = Annotated[int | None, typer.Option(help="Updates; by default the recipe's.")]
BatchSize = Annotated[int | None, typer.Option("--batch", help="Rows of an update; by default the recipe's, or 32.")]
Rate = Annotated[float | None, typer.Option(help="Highest learning rate; by default the recipe's, or 0.001.")]
Every = Annotated[int | None, typer.Option(help="Updates between points of the curve; by default a hundredth of --steps.")]
Length = Annotated[int, typer.Option(help="Tokens of a row of texts.")]
Count = Annotated[
    str,
    typer.Option(help="What the curve counts: all (as in training), or repeated (tokens that repeat what followed last time)."),
]
KINDS = ("force", "forbid", "ablate", "copy", "freeze", "preserve", "match", "graft")


def add(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("clamp")(clamp)


def clamp(
    source: Source, out: Out, data: DataFile = None, force: ForceAt = None, forbid: ForbidAt = None, ablate: AblateAt = None,
    copy: CopyAt = None, freeze: FreezeAt = None, preserve: PreserveAt = None, match: MatchAt = None, graft: GraftAt = None,
    start: From = 0, to: To = None, strength: Strength = 1.0, ramp: Ramp = "constant", seeds: Seeds = "5", each: Each = False, steps: Steps = None,
    batch: BatchSize = None, rate: Rate = None, every: Every = None, length: Length = 128, count: Count = "all",
    tokenizer: Tokenizer = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Train the same seeds with and without clamps: does the phase change come earlier, later or never? Runs are kept and gone on with."""
    from patchclamp.training.clamps import Schedule
    from patchclamp.training.clamps.read import FORMS, read
    from patchclamp.training.counterfactual import counterfactual, repeated

    common.quiet()
    schedule = Schedule(start, to, strength, ramp)
    given = dict(zip(KINDS, (force, forbid, ablate, copy, freeze, preserve, match, graft), strict=True))
    clamps = {f"{kind} {text}": read(kind, text, schedule) for kind, texts in given.items() for text in texts or ()}
    if not clamps:
        raise TrainingError("nothing was clamped: give " + "; ".join(f"--{kind} {form}" for kind, form in FORMS.items()))
    if count not in ("all", "repeated"):
        raise TrainingError(f"--count {count} was given: choose all or repeated")
    arms: dict[str, list[Clamp]] = (
        {_folder(name): [one] for name, one in clamps.items()} if each else {"clamped": list(clamps.values())}
    )
    made, rows, training, always = _sources(source, data, length, tokenizer)
    asked: dict[str, Any] = {"steps": steps, "batch": batch, "rate": rate}
    if steps is not None:
        asked["warmup"] = round(training.warmup * steps / training.steps)  # the same share
    training = replace(training, **{name: value for name, value in asked.items() if value is not None})
    training = replace(training, evaluate=every or max(1, training.steps // 100), checkpoints=(0, training.steps))
    with common.bars() as bars:

        def told(arm: str, seed: int, done: int, of: int) -> None:
            bars.progress("runs", done, of)
            bars.bars.console.print(Text(f"  {arm}, seed {seed}", style="dim"))

        try:
            found = counterfactual(
                made, rows, training, arms, out, seeds=_seeds(seeds), always=always, weights=repeated if count == "repeated" else None,
                told=told,
            )  # fmt: skip
        except KeyboardInterrupt:
            common.err.print(Text("interrupted; what was trained is kept: run the same command again to go on"))
            raise typer.Exit(130) from None
    from patchclamp.report.counterfactual import write_counterfactual

    _show(found, out, write_counterfactual(out), as_json)


def _sources(
    source: str, data: Path | None, length: int, tokenizer: str | None
) -> "tuple[Callable[[int], Model], Callable[[int], Data], Training, tuple[Clamp, ...]]":
    """Models and rows by seed, the training's numbers, and what is clamped in every arm."""
    from patchclamp.models.model import Model
    from patchclamp.training import Training
    from patchclamp.training.start import begin
    from patchclamp.training.texts import texts
    from patchclamp.zoo.recipes import recipes

    own = source.removeprefix("zoo/")
    if data is None and own in recipes():
        recipe = recipes()[own]
        return lambda seed: Model.load(recipe.build(seed)), recipe.data, recipe.training, recipe.clamps
    if own in recipes() and not Path(source).exists():
        raise ModelError(f"{source!r} is a recipe, which has data of its own, and --data was given: leave out one of them")
    if data is None:
        raise ModelError(
            f"{source!r} is no recipe of the zoo ({', '.join(recipes())}): give one, or a configuration or model with --data TEXTS"
        )
    words = begin(source, tokenizer=tokenizer).tokenizer
    found = texts(data, words, length, held=0.1)  # read once, here, so that what cannot be read is said before anything runs
    return (
        lambda seed: begin(source, seed=seed, tokenizer=words),
        lambda seed: cast("Data", replace(found, seed=seed)),
        Training(1000),
        (),
    )


def _seeds(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(piece) for piece in text.split(","))
    except ValueError:
        raise TrainingError(f"--seeds {text} was given: give how many, or which (0,3,7)") from None
    chosen = tuple(range(numbers[0])) if len(numbers) == 1 else numbers
    if not chosen or min(chosen) < 0:
        raise TrainingError(f"--seeds {text} was given: give how many (1 or more), or which (0,3,7)")
    return chosen


def _folder(name: str) -> str:
    """A clamp as the name of a folder."""
    kept = "".join(letter if letter.isalnum() or letter in "._-" else "all" if letter == "*" else "-" for letter in name)
    return kept.strip("-.")


def _show(found: "Counterfactual", out: Path, report: Path, as_json: bool) -> None:
    if as_json:
        common.print_json(
            {
                "folder": out,
                "report": report,
                "runs": found.table.to_dicts(),
                "arms": found.arms.to_dicts(),
                "about": dict(found.about),
            }
        )
        return
    confidence = found.about.get("confidence", 0.95)
    common.print_rows([
        {
            "arm": row["arm"], "seed": row["seed"], "phase change": _span(row["step"], row["low"], row["high"]),
            "half-way at": None if row["crossing"] is None else round(row["crossing"]), "loss": row["last"], "loss unclamped": row["free"],
        }
        for row in found.table.to_dicts()
    ])  # fmt: skip
    common.out.print(
        Text(
            f"\nHalf-way: where a run passes the middle of the unclamped run's change. Intervals at {confidence:.0%}.\n",
            style="dim",
        )
    )
    common.print_rows([
        {
            "arm": row["arm"], "verdict": row["verdict"], "times as many steps": _factor(row), "pairs": row["pairs"],
            "never": row["never"],
        }
        for row in found.arms.to_dicts()
    ])  # fmt: skip
    common.out.print(Text.assemble(("Report ", "bold"), str(report)), soft_wrap=True)


def _span(middle: float | None, low: float | None, high: float | None) -> str:
    return "none" if middle is None or low is None or high is None else f"{middle:.0f} [{low:.0f}, {high:.0f}]"


def _factor(row: dict[str, Any]) -> str | None:
    if row["factor"] is None:
        return None
    at_least = "at least " if row["never"] else ""
    return f"{at_least}{row['factor']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
