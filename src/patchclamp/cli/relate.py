"""Commands that set side by side: repair (failing and succeeding prompts), compare (maps)."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from patchclamp.cli import common
from patchclamp.cli.common import (
    Bos,
    Chat,
    Columns,
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
from patchclamp.cli.patching import Memory, Metric, Out, Seed, TaskName
from patchclamp.errors import PatchclampError

if TYPE_CHECKING:
    import polars as pl

    from patchclamp.repair import Repaired

N = Annotated[int | None, typer.Option("--n", help="Prompts in all; a quarter is kept to test on.")]


def add(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command("repair")(repair)
    app.command("compare")(compare)


def repair(
    model: ModelArgument, task: TaskName, n: N = None, seed: Seed = 0, metric: Metric = None,
    fallback: Annotated[str, typer.Option(help="success (the mean over prompts that succeed), mean, zero, resample.")] = "success",
    act: Annotated[list[float] | None, typer.Option(help="A gate that is tried; may be repeated. [default: 0 and 2]")] = None,
    most: Annotated[int, typer.Option(help="Parts at most.")] = 3,
    draws: Annotated[int, typer.Option(help="Random repairs of the same size.")] = 100,
    out: Out = None, option: Options = None, columns: Columns = None, chat: Chat = False, bos: Bos = None, dtype: Dtype = None,
    device: Device = None, device_map: DeviceMap = None, revision: Revision = None, tokenizer: Tokenizer = None,
    trust_remote_code: Trust = False, memory: Memory = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Find the few parts whose intervention makes failing prompts succeed, and what they do where the model succeeds."""
    from patchclamp.models.memory import budget
    from patchclamp.parts import nodes
    from patchclamp.repair import ACTS, fallback_of
    from patchclamp.repair import repair as search

    common.check_table(out)
    found = common.find_task(task, option, columns, chat, bos)
    loaded = common.load_model(model, dtype, device, device_map, revision, tokenizer, trust_remote_code)
    fit, select, confirm = found.split(loaded.tokenizer, n=n, seed=seed)
    parts = nodes(loaded, memory=None if memory is None else budget(loaded.device, memory))
    searched = replace(fit, items=fit.items + select.items)
    rule = fallback_of(parts, fallback, fit, metric)
    with common.bars() as bars:
        done = search(
            parts,
            searched,
            confirm,
            rule,
            metric=metric,
            acts=act or ACTS,
            most=most,
            draws=draws,
            seed=seed,
            progress=bars.progress,
        )
    if out is not None:
        common.write_table(done.examples.write_parquet if out.suffix == ".parquet" else done.examples.write_csv, out)
    if as_json:
        common.print_json({**done.to_record(), **{name: frame.to_dicts() for name, frame in _frames(done).items()}})
        return
    _show(done, f"{loaded.name} on {found.name}", out)


def _frames(done: "Repaired") -> "dict[str, pl.DataFrame]":
    return {"examples": done.examples, "steps": done.steps, "differences": done.differences}


def _show(done: "Repaired", subject: str, out: Path | None) -> None:
    about = done.about
    common.out.print(Text(f"{subject}: repair of {about['failing']} failing prompts of {about['searched']} ({about['metric']}, fallback "
                          f"{about['fallback']})", style="bold"))  # fmt: skip
    mended = int(done.examples["repaired"].sum())
    common.out.print(Text(f"By acts of their own {mended} of {about['failing']} succeed."))
    rows: list[dict[str, Any]] = [{"act": row["act"], "repaired": f"{row['repaired']:.0%}", "kept": f"{row['kept']:.0%}"}
                                  for row in done.steps.iter_rows(named=True)]  # fmt: skip
    if not rows:
        common.out.print(Text("No act repairs more prompts than it breaks."))
    else:
        common.out.print()
        common.print_rows(rows)
        common.out.print()
        common.out.print(Text(f"On unseen prompts: repaired {done.repaired}; kept right {done.kept}"))
        if done.random is not None:
            common.out.print(
                Text(
                    f"As many random acts repair {done.random[0]:.0%} (97.5 % of draws below {done.random[1]:.0%}; p {done.random[2]:.3f})"
                )
            )
    common.out.print()
    common.out.print(Text("Parts that are at work otherwise where it fails (exact effects):"))
    clear = done.differences.filter(done.differences["q"] < 0.05)
    shown = clear if clear.height else done.differences
    top = shown.sort(shown["difference"].abs(), descending=True).head(8)
    common.print_rows(
        [{name: row[name] for name in ("site", "failing", "succeeding", "difference", "q")} for row in top.iter_rows(named=True)]
    )
    if not clear.height:
        common.out.print(Text("None clearly (q < .05); the largest are shown.", style="yellow"))
    if out is not None:
        common.out.print(Text(str(out)))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of two or more finished runs, of the same parts.")],
    out: Out = None, seed: Seed = 0, as_json: Json = False,
) -> None:  # fmt: skip
    """Put maps side by side (tasks, models of one shape, seeds, checkpoints): circuits, effects, roles; and chance."""
    from patchclamp.compare import compare as side_by_side
    from patchclamp.store import load_record

    common.check_table(out)
    for run in runs:
        if common.run_folder(str(run)) is None:
            raise PatchclampError(f"{run} is not the folder of a run: runs are made by `patchclamp map MODEL TASK` and its like")
    records = {_name(run, runs): load_record(run) for run in runs}
    found = side_by_side(records, seed=seed)
    if out is not None:
        common.write_table(found.parts.write_parquet if out.suffix == ".parquet" else found.parts.write_csv, out)
    if as_json:
        common.print_json({**found.to_record(), "pairs": found.pairs.to_dicts(), "parts": found.parts.to_dicts()})
        return
    rows: list[dict[str, Any]] = []
    for row in found.pairs.iter_rows(named=True):
        shown: dict[str, Any] = {"one": row["one"], "two": row["two"]}
        if row["shared"] is not None:
            sizes = f"{row['shared']} of {row['size_one']} and {row['size_two']}"
            shown |= {"shared": sizes, "by chance": f"{row['expected']:.1f} (p {row['p']:.3f})",
                      "layers matched": f"{row['matched_expected']:.1f} (p {row['matched_p']:.3f})"}  # fmt: skip
        shown |= {"effects": row["spearman"], "same sign": row["sign"], "roles": row["kappa"]}
        rows.append({name: value for name, value in shown.items() if value is not None})
    common.print_rows([{name: row.get(name) for name in dict.fromkeys(key for one in rows for key in one)} for row in rows])
    for name, sites in (("In every circuit", found.everywhere), ("In none", found.nowhere)):
        if sites:
            common.out.print(Text(f"{name} ({len(sites)}): {' '.join(sites)}"))
    common.out.print(
        Text("shared: parts in both circuits; effects: Spearman of exact effects; roles: Cohen's kappa", style="dim")
    )
    if out is not None:
        common.out.print(Text(str(out)))


def _name(run: Path, runs: list[Path]) -> str:
    """The folder's own name, or its whole path where two are called alike."""
    return run.name if sum(other.name == run.name for other in runs) == 1 else str(run)
