"""Commands that show what is there: tasks, families, runs, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from patchclamp.cli import common
from patchclamp.cli.common import Bos, Chat, Columns, Json, Options
from patchclamp.errors import PatchclampError

if TYPE_CHECKING:
    from patchclamp.models.families import Family


def add(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command("report")(report)
    app.command("tasks")(tasks)
    app.command("families")(families)
    app.command("runs")(runs)


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    csv: Annotated[Path | None, typer.Option(help="Also write the table of parts as CSV here.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Also save every figure as SVG into this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Write a run's report again (one HTML file, no network needed), and tables and figures for a paper."""
    from patchclamp.report import write_report
    from patchclamp.store import load_record

    record = load_record(run)
    path = write_report(run)
    written = [str(path)]
    if csv is not None:
        from patchclamp.report.export import write_csv

        written.append(str(write_csv(record, csv)))
    if figures is not None:
        from patchclamp.report.export import write_figures

        written += [str(figure) for figure in write_figures(record, figures)]
    if as_json:
        common.print_json({"headline": record.headline, "written": written})
    else:
        common.out.print(Text(record.headline, style="bold"))
        for name in written:
            common.out.print(Text(name))


def tasks(
    task: Annotated[str | None, typer.Argument(help="A task to look into: a name or a file.")] = None,
    model: Annotated[str | None, typer.Option(help="Show five examples as this model's tokenizer sees them.")] = None,
    option: Options = None, columns: Columns = None, chat: Chat = False, bos: Bos = None, as_json: Json = False,
) -> None:  # fmt: skip
    """List the built-in tasks, or show one, with examples where a model is named."""
    from patchclamp.tasks import load_task, task_names

    if task is None:
        rows = [{"task": name, "about": load_task(name).about} for name in task_names()]
        if as_json:
            common.print_json(rows)
        else:
            common.print_rows(rows)
        return
    found = common.find_task(task, option, columns, chat, bos)
    preview = None
    if model is not None:
        from patchclamp.models.load import load_tokenizer

        preview = found.preview(load_tokenizer(model))
    if as_json:
        common.print_json(
            {"task": found.name, "about": found.about, "metric": found.metric, "hash": found.hash, "preview": preview}
        )
        return
    common.out.print(Text.assemble((found.name, "bold"), f": {found.about} (metric {found.metric})"))
    if preview is not None:
        common.out.print(Text(preview))


def families(as_json: Json = False) -> None:
    """List the architectures that are understood."""
    from patchclamp.models.families import FAMILIES

    rows = [
        {
            "family": family.name,
            "model types": ", ".join(family.types),
            "blocks": family.blocks,
            "attention": family.attention,
            "mlp": family.mlp,
            "special": ", ".join(_special(family)),
        }
        for family in FAMILIES
    ]
    if as_json:
        common.print_json(rows)
    else:
        common.print_rows([{name: row[name] for name in ("family", "model types", "special")} for row in rows])


def _special(family: "Family") -> list[str]:
    found = [word for given, word in (
        (family.attn_post, "post-norms"), (family.scale, "scaled residual"), (family.router, "mixture of experts"),
        (not family.interface, "attention watched inside its module"),
    ) if given]  # fmt: skip
    return [*found, "parallel blocks"] if family.may_be_parallel else found


def runs(folder: Annotated[Path, typer.Argument(help="Where runs lie.")] = Path("runs"), as_json: Json = False) -> None:
    """List the runs in a folder, the newest first."""
    from patchclamp.store import runs as list_runs

    if not folder.is_dir():
        raise PatchclampError(f"there is no folder {folder}: runs are written by `patchclamp map` and its like")
    found = list_runs(folder)
    rows = [
        {
            "run": str(info.folder),
            "model": info.model,
            "task": info.task,
            "date": info.date,
            "status": info.status,
            "headline": info.headline,
        }
        for info in found
    ]
    if as_json:
        common.print_json(rows)
    elif rows:
        common.print_rows(rows)
    else:
        common.out.print(Text(f"no runs in {folder}"))
