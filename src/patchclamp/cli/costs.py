"""What a map will take, as a table or as JSON."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from patchclamp.cli.common import err, out, print_json, print_rows
from patchclamp.cli.progress import duration
from patchclamp.models.memory import shown

if TYPE_CHECKING:
    from patchclamp.models.model import Model
    from patchclamp.study.cost import Cost, Line
    from patchclamp.study.plan import Plan
    from patchclamp.tasks import Task


def show_cost(
    model: "Model", task: "Task", plan: "Plan", do: Collection[str], folder: Path | None, memory: str | None, as_json: bool,
    other: "Model | None" = None,
) -> None:  # fmt: skip
    """Count, calibrate, print. Nothing is written."""
    from patchclamp.study.cost import cost

    with err.status("counting, and timing this machine"):
        found = cost(model, task, plan, do, folder, memory, other)
    if as_json:
        print_json(_body(found))
        return
    out.print(Text(f"{model.name} on {task.name}: {found.folder} ({STATES[found.state]})"))
    print_rows([_row(found, line) for line in found.lines])
    total = found.total
    out.print()
    out.print(Text.assemble(("About ", "bold"), (f"{duration(total.about)}", "bold"),
                            f" ({duration(total.low)} to {duration(total.high)}), with the report"))  # fmt: skip
    out.print(Text(f"{found.forward:,.0f} forward and {found.backward:,.0f} backward passes of one prompt of {found.prompt} tokens; "
                   f"up to {shown(found.memory)} beside the model ({shown(found.budget)} at once at most)"))  # fmt: skip
    out.print(Text("fwd, bwd: passes over a row's prompts, with what replay spares. about: undisturbed; at most: as slow as the slowest "
                   "of what was timed, where descents go on to their end and most is found.", style="dim"))  # fmt: skip


STATES = {
    "new": "nothing of it has run",
    "unfinished": "it goes on: what is finished is kept",
    "finished": "finished: only means that are not kept, and the report",
}


def _row(found: "Cost", line: "Line") -> dict[str, object]:
    seconds = found.seconds(line)
    return {
        "step": line.title,
        "runs": line.settings or None,
        "prompts": line.rows,
        "fwd": "kept" if line.kept else f"{line.forward:,.1f}",
        "bwd": f"{line.backward:,.1f}" if line.backward else "",
        "about": "" if line.kept else duration(seconds.about),
        "at most": "" if line.kept else duration(seconds.high),
        "memory": "" if line.kept else shown(line.memory),
    }


def _body(found: "Cost") -> dict[str, Any]:
    lines = [
        {"step": line.step, "what": line.title, "kept": line.kept, "settings": line.settings, "rows": line.rows, "tokens": line.tokens,
         "forward": line.forward, "backward": line.backward, "seconds": found.seconds(line), "bytes": line.memory}
        for line in found.lines
    ]  # fmt: skip
    return {
        "folder": str(found.folder),
        "state": found.state,
        "forward": found.forward,
        "backward": found.backward,
        "tokens": found.prompt,
        "seconds": found.total,
        "bytes": found.memory,
        "budget": found.budget,
        "pace": found.pace,
        "lines": lines,
    }
