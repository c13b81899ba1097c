"""Commands that change a model for good: apply."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from patchclamp.cli import common
from patchclamp.cli.common import Json
from patchclamp.errors import GateError, PatchclampError

if TYPE_CHECKING:
    from patchclamp.circuit import Circuit

Scale = Annotated[
    list[str] | None,
    typer.Option("--scale", "-s", help="SITE=g: a part's gate; above 1 amplifies. Patterns too. May be repeated."),
]
Keep = Annotated[str | None, typer.Option(help="circuit: close every head and MLP outside the run's circuit; or a file of one.")]
FallbackOf = Annotated[
    str | None, typer.Option("--fallback", help="What a closed gate passes: zero, mean. [default: mean with --keep, else zero]")
]


def add(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command("apply")(apply)


def apply(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    out: Annotated[Path, typer.Option("--out", help="The new checkpoint's folder.")],
    keep: Keep = None, scale: Scale = None, fallback: FallbackOf = None,
    also: Annotated[
        list[str] | None, typer.Option(help="Other tasks for side effects; none: no other. [default: all built-in ones it can do]")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Plain text for side effects, a text per line.")] = None,
    n: Annotated[int, typer.Option(help="Prompts of each other task.")] = 64,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Fold gates into the weights: a Hugging Face checkpoint that computes what the gated model does, with its side effects."""
    from patchclamp.study import apply as study

    texts = None if text is None else lines_of(text)
    scales, circuit = scales_of(scale), circuit_of(keep, run)
    model, own, fit, source = opened(run)
    want = study.asked(model, fit, circuit, scales, fallback)
    with common.err.status("folding") as status:
        done = study.apply(
            model, own, want, out, also=[] if also == ["none"] else also, texts=texts, n=n,
            about={"run": str(run), **source, "keep": keep, "scale": scales}, progress=status.update,
        )  # fmt: skip
    if as_json:
        common.print_json(
            {"folder": str(done.folder), "gates": done.folded.gates, "fallback": done.folded.fallback, "biases_added": done.folded.biases,
             "difference": done.folded.difference, "largest_logit": done.folded.scale, "side_effects": done.tasks.to_dicts(),
             "text": done.text, "left_out": done.left_out}
        )  # fmt: skip
        return
    show(done)


def show(done: Any) -> None:
    """What was folded, what it costs elsewhere."""
    gates = done.folded.gates
    closed = sum(gate == 0 for gate in gates.values())
    common.out.print(Text(f"{len(gates)} gates folded ({closed} closed), fallback {done.folded.fallback}: logits are the gated model's to "
                          f"{done.folded.difference:.1e} (the largest is {done.folded.scale:.1f})"))  # fmt: skip
    if done.folded.biases:
        common.out.print(Text("Biases were added to the configuration, to hold the means.", style="dim"))
    common.out.print()
    common.print_rows(
        [{"task": row["task"], "n": row["n"], "right": f"{row['accuracy_before']:.0%} -> {row['accuracy_after']:.0%}",
          "metric": f"{row['before']:.2f} -> {row['after']:.2f}", "change": change_of(row)}
         for row in done.tasks.iter_rows(named=True)]
    )  # fmt: skip
    text = done.text
    common.out.print()
    common.out.print(Text(f"Plain text ({text['texts']} texts, {text['source']}): {text['nll_before']:.3f} nats a token before, "
                          f"{text['nll_after']:.3f} after; KL {text['kl']:.3f} a token"))  # fmt: skip
    if done.left_out:
        common.out.print(
            Text(f"Left out, for the model cannot do them or its tokenizer does not fit: {', '.join(done.left_out)}", style="dim")
        )
    common.out.print(Text(str(done.folder), style="bold"))


def change_of(row: dict[str, Any]) -> str:
    """A change with its interval."""
    if row["low"] is None:
        return f"{row['change']:+.2f}"
    return f"{row['change']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"


def opened(run: Path) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The model of a run, its confirm and fit prompts, and how model and task were named."""
    from patchclamp.store import load_plan
    from patchclamp.study import Plan

    if common.run_folder(str(run)) is None:
        raise PatchclampError(f"{run} is not the folder of a run: runs are made by `patchclamp map MODEL TASK` and its like")
    stored = load_plan(run)
    source = stored.get("source")
    if not isinstance(source, dict):
        raise PatchclampError(f"{run} does not say which model and task it is of, so they cannot be loaded again")
    plan, asked = Plan.of(stored["plan"]), source["asked"]
    task = common.find_task(
        source["task"], asked.get("options"), asked.get("columns"), asked.get("chat", False), asked.get("bos")
    )
    model = common.load_model(source["model"], **source["loading"])
    split = task.split(model.tokenizer, plan.n, seed=plan.seed)
    return model, split.confirm, split.fit, {"model": source["model"], "task": source["task"]}


def circuit_of(keep: str | None, run: Path) -> "Circuit | None":
    """The run's circuit, or one from a file."""
    if keep is None:
        return None
    if keep != "circuit":
        if not Path(keep).is_file():
            raise PatchclampError(f"--keep {keep!r} was given: write --keep circuit, or name a file of a circuit (JSON)")
        from patchclamp.circuit import Circuit

        return Circuit.from_json(Path(keep).read_text(encoding="utf-8"))
    from patchclamp.store import load_record

    found = load_record(run).circuit
    if found is None:
        raise PatchclampError(f"{run} has found no circuit: run `patchclamp discover {run}` first")
    return found


def scales_of(given: list[str] | None) -> dict[str, float]:
    """SITE=g, as numbers by part or pattern."""
    found: dict[str, float] = {}
    for text in given or ():
        site, equals, gate = text.partition("=")
        try:
            found[site.strip()] = float(gate)
        except ValueError:
            equals = ""
        if not equals or not site.strip():
            raise GateError(f"{text!r} is not understood: write SITE=g, such as L3.h2=0.5 or L1.mlp=1.5")
    return found


def lines_of(path: Path) -> list[str]:
    """The texts of a file, one a line."""
    if not path.is_file():
        raise PatchclampError(f"there is no file {path}: give plain text, a text per line")
    found = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not found:
        raise PatchclampError(f"{path} holds no text")
    return found
