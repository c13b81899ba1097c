"""The command line: parse, call, print. Every command leaves with code 0, or with 2 and one message."""

import sys
from typing import Annotated

import typer

from patchclamp.cli import (
    bench,
    change,
    clamp,
    develop,
    inspect,
    judge,
    look,
    patching,
    questions,
    read,
    relate,
    reproduce,
    sweep,
    train,
    zoo,
)
from patchclamp.errors import PatchclampError

app = typer.Typer(
    name="patchclamp",
    help="Which parts of a language model facilitate a behaviour, which interfere, which do not matter: mapped by intervening. Begin with: "
    "patchclamp map zoo/small ioi",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
questions.add(app)
patching.add(app)
read.add(app)
relate.add(app)
sweep.add(app)
train.add(app)
clamp.add(app)
develop.add(app)
bench.add(app)
judge.add(app)
reproduce.add(app)
change.add(app)
inspect.add(app)
look.add(app)
zoo.add(app)

PANELS = {
    "Ask about a behaviour": ("map", "gate", "attribute", "verify", "discover", "trust", "relate", "localise"),
    "Look inside": ("patch", "paths", "trace", "signals", "flow", "record"),
    "Many questions": ("compare", "sweep", "bench", "judge", "reproduce"),
    "Act on it": ("generate", "apply", "repair"),
    "Training and the zoo": ("train", "clamp", "develop", "zoo"),
    "Models, tasks and runs": ("doctor", "sites", "families", "tasks", "runs", "report"),
}
"""The commands as `--help` groups them."""

for panel, names in PANELS.items():
    for info in (*app.registered_commands, *app.registered_groups):
        if (info.name or getattr(info.callback, "__name__", "")) in names:
            info.rich_help_panel = panel


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"patchclamp {installed('patchclamp')}")
        raise typer.Exit


def main() -> None:
    """Run the command line; a `PatchclampError` becomes one message and exit code 2, Ctrl-C leaves with 130."""
    try:
        app()
    except PatchclampError as error:
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True).print(Text.assemble(("Error: ", "bold red"), str(error)))
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(0)
