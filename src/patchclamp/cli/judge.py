"""The command that tests what a circuit stands for: hypotheses with p-values, and what happens when only some of the rest is closed."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from patchclamp.cli import common
from patchclamp.cli.change import circuit_of, opened
from patchclamp.cli.common import Bos, Chat, Columns, Device, DeviceMap, Dtype, Json, Options, Revision, Tokenizer, Trust
from patchclamp.cli.patching import Memory, Metric, Seed
from patchclamp.errors import PatchclampError

if TYPE_CHECKING:
    from patchclamp.circuit import Circuit
    from patchclamp.models.model import Model
    from patchclamp.tasks import Examples

Subject = Annotated[
    str, typer.Argument(metavar="MODEL|RUN", help="A hub name, a folder, zoo/NAME; or the folder of a run.", show_default=False)
]
TaskArgument = Annotated[str | None, typer.Argument(metavar="[TASK]", help="A task, beside a model.", show_default=False)]
File = Annotated[
    Path | None, typer.Option("--circuit", help="A circuit or a graph file (JSON); of a run, by default its own circuit.")
]
Fallback = Annotated[
    str | None, typer.Option(help="What closed parts pass. [default: the run's; resample with pairs, else mean]")
]
N = Annotated[int | None, typer.Option("--n", help="Prompts in all; a quarter judges.")]
Draws = Annotated[int, typer.Option(help="Random circuits.")]


def add(app: typer.Typer) -> None:
    """Put the command on the app."""
    app.command("judge")(judge)


def judge(
    subject: Subject, task: TaskArgument = None, circuit: File = None, fallback: Fallback = None, n: N = None, seed: Seed = 0,
    metric: Metric = None, draws: Draws = 200, option: Options = None, columns: Columns = None, chat: Chat = False, bos: Bos = None,
    dtype: Dtype = None, device: Device = None, device_map: DeviceMap = None, revision: Revision = None, tokenizer: Tokenizer = None,
    trust_remote_code: Trust = False, memory: Memory = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Test a circuit's hypotheses on unseen prompts, and whether it is fragile: each in words, with its p-value."""
    from patchclamp.models.memory import budget
    from patchclamp.parts import edges, nodes
    from patchclamp.sites import Edge
    from patchclamp.trust import fragility, hypotheses

    if draws < 1:
        raise PatchclampError(f"--draws {draws} was given: choose 1 or more")
    run = common.run_folder(subject)
    if run is not None:
        for given, name in ((task, "TASK"), (n, "--n")):
            common.refuse_both(given, name)
        model, confirm, search, kind = _of_run(run)
        found = circuit_of("circuit", run) if circuit is None else _read(circuit, model)
    else:
        if task is None or circuit is None:
            raise PatchclampError(
                "a circuit of a model and a task is judged: give MODEL TASK --circuit FILE, or the folder of a run"
            )
        asked = common.find_task(task, option, columns, chat, bos)
        model = common.load_model(subject, dtype, device, device_map, revision, tokenizer, trust_remote_code)
        search, _, confirm = asked.split(model.tokenizer, n, seed=seed)
        found, kind = _read(circuit, model), None
    assert found is not None  # a run without one has said so
    held = None if memory is None else budget(model.device, memory)
    parts = edges(model, memory=held) if any(isinstance(part, Edge) for part in found) else nodes(model, memory=held)
    rule = parts.fallback(fallback or kind or ("resample" if confirm[0].corrupt is not None else "mean"), fit=search)
    with common.err.status("testing"):
        tested = hypotheses(parts, confirm, rule, found, metric=metric, draws=draws, seed=seed)
        shaken = fragility(parts, search, confirm, rule, found, metric=metric, seed=seed)
    if as_json:
        rows = [{**vars(one), "rejected": one.rejected, "passed": one.passed} for one in tested.tests]
        body: dict[str, Any] = {"tests": rows, "parts": tested.parts.to_dicts(), "about": tested.about}
        body["fragility"] = {
            "verdict": shaken.verdict,
            "says": str(shaken),
            "worst": shaken.worst.to_dicts(),
            "about": shaken.about,
        }
        common.print_json(body)
        return
    about = tested.about
    text = f"{model.name} on {confirm.task}: {len(found)} of {len(parts.counted)} parts, fallback {about['fallback']}, {about['n']} prompts"
    common.out.print(Text(text, style="bold"))
    for one in tested.tests:
        common.out.print(Text(str(one), style="" if one.passed else "yellow"))
    common.out.print(Text(str(shaken), style="" if shaken.verdict == "robust" else "yellow"))


def _of_run(run: Path) -> "tuple[Model, Examples, Examples, str | None]":
    """Model, confirm and fit prompts and fallback of a run."""
    from patchclamp.store import load_plan
    from patchclamp.study import Plan

    model, confirm, fit, _ = opened(run)
    return model, confirm, fit, Plan.of(load_plan(run)["plan"]).fallback


def _read(path: Path, model: "Model") -> "Circuit":
    """A circuit from its own file, or from a graph file of other tools."""
    from patchclamp.bench import sizes_of
    from patchclamp.circuit import Circuit
    from patchclamp.exchange import from_graph

    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PatchclampError(f"--circuit {path} cannot be read: {error}") from error
    if not (isinstance(body, dict) and "cfg" in body):
        return Circuit.from_json(json.dumps(body))
    found = from_graph(body, sizes_of(model).kv_heads).circuit  # pyright: ignore[reportUnknownArgumentType]
    if found is None:
        raise PatchclampError(f"--circuit {path} marks no part as in the graph: it holds scores, and no circuit")
    return found
