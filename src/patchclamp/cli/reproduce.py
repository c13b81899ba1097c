"""The command that measures what a paper reports again."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from patchclamp.cli import common
from patchclamp.cli.common import Device, DeviceMap, Dtype, Json, Revision, Tokenizer, Trust
from patchclamp.cli.patching import Seed
from patchclamp.errors import PatchclampError

Name = Annotated[str, typer.Argument(help="ioi-heads, greater-than, p032, p089, p171, p257.", show_default=False)]
On = Annotated[str, typer.Option("--model", help="A hub name, a folder, or zoo/NAME.")]
N = Annotated[int, typer.Option("--n", help="Prompts of each task.")]
Figure = Annotated[
    Path | None, typer.Option("--out", help="Where the figure is written: .svg, .png, .pdf or .html. [default: NAME.svg]")
]
FORMS = (".svg", ".png", ".pdf", ".html")


def add(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("reproduce")(reproduce)


def reproduce(
    name: Name, model: On = "zoo/small", n: N = 96, seed: Seed = 0, out: Figure = None, dtype: Dtype = None, device: Device = None,
    device_map: DeviceMap = None, revision: Revision = None, tokenizer: Tokenizer = None, trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure what a paper reports again: its number, ours with an interval, whether it agrees, differs or is undecided, and the figure."""
    from patchclamp.reproduce import reproduce as run
    from patchclamp.reproduce import reproduction_names

    if name not in reproduction_names():
        raise PatchclampError(f"there is nothing called {name!r} to reproduce: choose from {', '.join(reproduction_names())}")
    target = out or Path(f"{name}.svg")
    if target.suffix not in FORMS or not target.parent.is_dir():
        raise PatchclampError(f"--out {target} was given: figures are written as {', '.join(FORMS)}, into a folder that there is")
    loaded = common.load_model(model, dtype, device, device_map, revision, tokenizer, trust_remote_code)
    with common.bars() as bars:
        done = run(name, loaded, n, seed, bars.progress)
    common.write_table(lambda hidden: done.figure.save(str(hidden)), target)
    if as_json:
        rows = [vars(row) for row in done.rows]
        common.print_json(
            {"name": name, "paper": done.paper, "model": model, "rows": rows, "about": done.about, "figure": str(target)}
        )
        return
    common.out.print(Text(f"{done.paper}, on {loaded.name}", style="bold"))
    common.print_rows([{
        "claim": row.what, "paper": row.paper,
        "here": f"{row.ours:.2f}" + ("" if row.low is None else f" [{row.low:.2f}, {row.high:.2f}]"),
        "verdict": row.verdict,
    } for row in done.rows])  # fmt: skip
    common.out.print(Text(str(target)))
