"""The command for many plans: sweep."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from patchclamp.cli import common
from patchclamp.cli.common import Json

if TYPE_CHECKING:
    from patchclamp.sweep import Row, Swept

Plans = Annotated[
    Path, typer.Argument(help="A TOML file: [sweep] with axes (models, tasks, seeds, ...), [[plan]] for single ones.")
]
Out = Annotated[Path, typer.Option("--out", help="The folder of all runs: each goes into its digest there.")]
List = Annotated[bool, typer.Option("--list", "--dry-run", help="Print the plans with their digests and do nothing.")]
On = Annotated[str, typer.Option(help="here (one after the other), or ray.")]
Address = Annotated[str | None, typer.Option(help="Of a Ray cluster: auto, or host:port; by default one is started here.")]
Workers = Annotated[int | None, typer.Option(help="On Ray; by default as many as there is room for.")]
Cpus = Annotated[int, typer.Option(help="Processors and threads of a worker on Ray.")]
Gpus = Annotated[float | None, typer.Option(help="GPUs of a worker on Ray; by default 1 where there are any.")]
Shards = Annotated[int, typer.Option(help="Pieces that a plan's examples are dealt into, to be scored by as many workers.")]


def add(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("sweep")(sweep)


def sweep(
    plans: Plans, out: Out = Path("runs"), on: On = "here", address: Address = None, workers: Workers = None, cpus: Cpus = 1,
    gpus: Gpus = None, shards: Shards = 1, list_only: List = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Carry out many plans; finished ones are kept, interrupted ones go on. Leaves with 1 where a plan failed."""
    from patchclamp.sweep import Swept, identified, read_plans
    from patchclamp.sweep import sweep as carry_out

    common.quiet()
    cases = read_plans(plans)
    if list_only:
        with common.err.status(f"loading the models of {len(cases)} plans"):
            _show(Swept(identified(cases, out), out), as_json)
        return
    with common.bars() as bars:
        bars.progress("plans", 0, len(cases))

        def ended(row: "Row", done: int, of: int) -> None:
            bars.progress("plans", done, of)
            note = row.error if row.state == "failed" else f"{row.seconds:.1f} s" if row.state == "done" else "kept from before"
            bars.bars.console.print(Text(f"  {row.case}: {note}", style="red" if row.error else "dim"))

        try:
            swept = carry_out(
                cases, out, on=on, address=address, workers=workers, cpus=cpus, gpus=gpus, shards=shards, progress=ended
            )
        except KeyboardInterrupt:
            common.err.print(Text("interrupted; finished plans and steps are kept: run the same command again to go on"))
            raise typer.Exit(130) from None
    _show(swept, as_json)
    if swept.failed:
        raise typer.Exit(1)


def _show(swept: "Swept", as_json: bool) -> None:
    if as_json:
        common.print_json({"folder": swept.folder, "plans": swept.table.to_dicts()})
        return
    common.print_rows([_cells(row) for row in swept.rows])
    common.out.print(Text(str(swept), style="bold"))
    common.out.print(Text(str(swept.folder)), soft_wrap=True)


def _cells(row: "Row") -> dict[str, object]:
    return {
        "plan": str(row.case),
        "state": row.state,
        "found": row.error or row.headline or None,
        "seconds": round(row.seconds, 1) if row.seconds else None,
        "run": row.folder.name if row.folder else row.digest[:12] or None,
    }
