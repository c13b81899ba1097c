"""Commands that patch: any sites at any positions, paths between parts, causal tracing."""

from collections.abc import Callable
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
from patchclamp.errors import PatchclampError

if TYPE_CHECKING:
    from patchclamp.models.model import Model
    from patchclamp.scores import Scores
    from patchclamp.tasks import Examples

TaskName = Annotated[
    str, typer.Argument(help="A built-in task, or a JSONL, CSV, Parquet, text or Python file.", show_default=False)
]
SiteOption = Annotated[
    list[str] | None,
    typer.Option("--site", "-s", help="Sites or patterns: L*.resid.post, L*.h*, L*.h*.q, L*.mlp, L3.mlp.n*. May be repeated."),
]
Position = Annotated[
    list[str] | None,
    typer.Option(
        "--at", help="A position (-1 is the last), a range 0-11, or a named span (S2). May be repeated; default: all as one."
    ),
]
Window = Annotated[int, typer.Option(help="How many layers are patched together.")]
N = Annotated[
    int | None, typer.Option("--n", help="Prompts in all; a quarter stays sealed, and a mean is learned on half of them.")
]
Seed = Annotated[int, typer.Option(help="Of the draw and the intervals.")]
Metric = Annotated[str | None, typer.Option(help="logit_diff, log_probability, nll, ...; by default the task's.")]
Fallback = Annotated[str, typer.Option(help="What is put in: resample (the corrupt prompt's value), mean, zero, optimal.")]
Direction = Annotated[str, typer.Option(help="noising or denoising.")]
Routing = Annotated[str, typer.Option(help="Of a mixture of experts: free, or frozen to that of the model's own run.")]
Memory = Annotated[str | None, typer.Option(help="What one folded pass may take: 2GB, 512MiB, 50% of what is free.")]
Out = Annotated[Path | None, typer.Option("--out", help="Also write the whole table here (.parquet or .csv).")]
Top = Annotated[int, typer.Option(help="How many parts are shown.")]
Senders = Annotated[list[str] | None, typer.Option("--from", help="Senders: embed, L*.h*, L*.mlp. May be repeated.")]
Receivers = Annotated[
    list[str] | None, typer.Option("--to", help="Receivers: L9.h6.q, L9.kv2.k, L9.mlp, logits. May be repeated.")
]
Between = Annotated[str, typer.Option(help="What follows from the sender: frozen (nothing), mlps, recomputed (everything).")]
Joint = Annotated[bool, typer.Option("--joint", help="All receivers at once.")]


def add(app: typer.Typer) -> None:
    """Put the commands on the app."""
    app.command("patch")(patch)
    app.command("paths")(paths)
    app.command("trace")(trace)


def patch(
    model: ModelArgument, task: TaskName, site: SiteOption = None, at: Position = None, window: Window = 1, n: N = None, seed: Seed = 0,
    metric: Metric = None, fallback: Fallback = "resample", direction: Direction = "noising", routing: Routing = "free", top: Top = 20,
    out: Out = None, option: Options = None, columns: Columns = None, chat: Chat = False, bos: Bos = None, dtype: Dtype = None,
    device: Device = None, device_map: DeviceMap = None, revision: Revision = None, tokenizer: Tokenizer = None,
    trust_remote_code: Trust = False, memory: Memory = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Activation patching: the exact effect of every site you name, at every position you name."""
    way, routes = _one_of("direction", direction, ("noising", "denoising")), _one_of("routing", routing, ("free", "frozen"))
    chosen = [_position(one) for given in at or () for one in _spread(given)]

    def run(loaded: "Model", fit: "Examples", some: "Examples", progress: Callable[[int, int], None]) -> "Scores":
        from patchclamp.patching import patch as patched

        return patched(
            loaded, some, site or ("L*.resid.post",), chosen, window=window, fallback=fallback, fit=fit, metric=metric,
            direction=way, routing=routes, seed=seed, memory=_budget(loaded, memory), progress=progress,
        )  # fmt: skip

    loading = (dtype, device, device_map, revision, tokenizer, trust_remote_code)
    _ask(
        model,
        task,
        loading,
        (option, columns, chat, bos),
        n,
        seed,
        "patching",
        run,
        top,
        out,
        as_json,
        fallback.partition(":")[0] in ("mean", "optimal"),
    )


def paths(
    model: ModelArgument, task: TaskName, sender: Senders = None, receiver: Receivers = None, between: Between = "frozen",
    joint: Joint = False, n: N = None, seed: Seed = 0, metric: Metric = None, fallback: Fallback = "resample",
    direction: Direction = "noising", top: Top = 20, out: Out = None, option: Options = None, columns: Columns = None, chat: Chat = False,
    bos: Bos = None, dtype: Dtype = None, device: Device = None, device_map: DeviceMap = None, revision: Revision = None,
    tokenizer: Tokenizer = None, trust_remote_code: Trust = False, memory: Memory = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Path patching: what each sender does through what the receivers read, and through nothing else."""
    way = _one_of("direction", direction, ("noising", "denoising"))

    def run(loaded: "Model", fit: "Examples", some: "Examples", progress: Callable[[int, int], None]) -> "Scores":
        from patchclamp.paths import path_patching

        return path_patching(
            loaded, some, sender or ("L*.h*",), receiver or ("logits",), between=between, joint=joint, fallback=fallback, fit=fit,
            metric=metric, direction=way, seed=seed, memory=_budget(loaded, memory), progress=progress,
        )  # fmt: skip

    loading = (dtype, device, device_map, revision, tokenizer, trust_remote_code)
    _ask(
        model,
        task,
        loading,
        (option, columns, chat, bos),
        n,
        seed,
        "path patching",
        run,
        top,
        out,
        as_json,
        fallback.partition(":")[0] in ("mean", "optimal"),
    )


def trace(
    model: ModelArgument, task: TaskName, site: SiteOption = None, at: Position = None,
    subject: Annotated[str, typer.Option(help="The span whose embeddings are blurred.")] = "subject",
    window: Window = 1, draws: Annotated[int, typer.Option(help="Of the noise.")] = 10,
    deviations: Annotated[float, typer.Option(help="Standard deviations of the embeddings' entries.")] = 3.0,
    n: N = None, seed: Seed = 0, metric: Metric = None, top: Top = 20, out: Out = None, option: Options = None, columns: Columns = None,
    chat: Chat = False, bos: Bos = None, dtype: Dtype = None, device: Device = None, device_map: DeviceMap = None,
    revision: Revision = None, tokenizer: Tokenizer = None, trust_remote_code: Trust = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Causal tracing: blur the subject with noise, put states back one by one, see what comes back (Meng et al. 2022)."""
    chosen = [_position(one) for given in at or ("subject", "end") for one in _spread(subject if given == "subject" else given)]

    def run(loaded: "Model", fit: "Examples", some: "Examples", progress: Callable[[int, int], None]) -> "Scores":
        from patchclamp.tracing import trace as traced

        found = traced(
            loaded, some, site or ("L*.resid.post",), chosen, subject=subject, window=window, deviations=deviations, draws=draws,
            metric=metric, seed=seed, progress=progress,
        )  # fmt: skip
        common.err.print(
            Text(f"the noise ({found.scale:.3f}) takes the metric from {found.clean.mean:.3f} to {found.blurred.mean:.3f}")
        )
        return found.effects

    loading = (dtype, device, device_map, revision, tokenizer, trust_remote_code)
    _ask(model, task, loading, (option, columns, chat, bos), n, seed, "causal tracing", run, top, out, as_json)


Run = Callable[["Model", "Examples", "Examples", Callable[[int, int], None]], "Scores"]


def _ask(
    model: str, task: str, loading: tuple[Any, ...], asked: tuple[Any, ...], n: int | None, seed: int, what: str, run: Run, top: int,
    out: Path | None, as_json: bool, learns: bool = False,
) -> None:  # fmt: skip
    """Load, draw prompts, measure, print the largest, write the table."""
    common.check_table(out, top)
    found = common.find_task(task, *asked)
    loaded = common.load_model(model, *loading)
    fit, select, confirm = found.split(loaded.tokenizer, n=n, seed=seed)
    del confirm  # sealed: only a map opens it
    some = select if learns else replace(select, items=fit.items + select.items)
    with common.bars() as bars:
        scores = run(loaded, fit, some, lambda done, of: bars.progress(what, done, of))
    if out is not None:
        common.write_table(scores.save, out)
    if as_json:
        common.print_json(
            {"about": dict(scores.about), "scores": scores.table.to_dicts(), "out": None if out is None else str(out)}
        )
        return
    about = scores.about
    facts = ", ".join(
        f"{name} {about[name]}" for name in ("metric", "fallback", "direction", "between", "window", "n") if name in about
    )
    common.out.print(Text(f"{loaded.name} on {found.name}: {what}, {len(scores)} parts ({facts})", style="bold"))
    rows = scores.top(top).iter_rows(named=True)
    common.print_rows([{
        "site": row["site"],
        "effect": "below noise" if row.get("below_noise") else _interval(row),
        "q": row.get("q"),
    } for row in rows])  # fmt: skip
    if scores.too_few:
        common.out.print(Text(scores.too_few, style="yellow"))
    print_advice(scores)
    if out is not None:
        common.out.print(Text(str(out)))


def print_advice(scores: "Scores") -> None:
    """What is known to mislead about this way of patching."""
    from patchclamp.patching import advice

    about = scores.about
    fallback = "noise" if about.get("method") == "causal tracing" else str(about.get("fallback", ""))
    for sentence in advice(fallback, str(about.get("metric", "")), int(about.get("window", 1)), scores):
        common.out.print(Text(f"Beware: {sentence}", style="yellow"))


def _interval(row: dict[str, Any]) -> str:
    return f"{row['score']:+.3f}" + ("" if row.get("low") is None else f" [{row['low']:+.3f}, {row['high']:+.3f}]")


def _spread(text: str) -> list[str]:
    """A range of positions, one by one."""
    low, dash, high = text.partition("-")
    if dash and low.isdigit() and high.isdigit():
        if int(low) > int(high):
            raise PatchclampError(f"--at {text} was given: a range goes upwards, as 0-11")
        return [str(one) for one in range(int(low), int(high) + 1)]
    return [text]


def _position(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _budget(model: "Model", asked: str | None) -> int | None:
    from patchclamp.models.memory import budget

    return None if asked is None else budget(model.device, asked)


def _one_of(name: str, given: str, allowed: tuple[str, ...]) -> Any:
    """The word, if it is among those allowed."""
    if given not in allowed:
        raise PatchclampError(f"--{name} {given!r} was asked for: choose from {', '.join(allowed)}")
    return given
