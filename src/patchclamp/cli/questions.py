"""Commands that ask something of a model and keep a run: map, gate, attribute, verify, discover, relate, trust."""

import inspect
import pkgutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from patchclamp.cli import common
from patchclamp.cli.common import Bos, Chat, Columns, Device, DeviceMap, Dtype, Json, Options, Revision, Tokenizer, Trust
from patchclamp.errors import PatchclampError

Subject = Annotated[
    str, typer.Argument(metavar="MODEL|RUN", help="A hub name, a folder, zoo/NAME; or the folder of a run.", show_default=False)
]
TaskArgument = Annotated[
    str | None,
    typer.Argument(metavar="[TASK]", help="A built-in task, or a JSONL, CSV, Parquet, text or Python file.", show_default=False),
]
Out = Annotated[Path | None, typer.Option("--out", help="The run's folder; by default runs/ and the question's digest.")]
N = Annotated[int | None, typer.Option("--n", help="Prompts in all (fit : select : confirm = 2 : 1 : 1).")]
Seed = Annotated[int | None, typer.Option(help="Of the draw, the split, the fits and the intervals. [default: 0]")]
Metric = Annotated[str | None, typer.Option(help="logit_diff, log_probability, nll, ...; by default the task's.")]
Fallback = Annotated[
    str | None,
    typer.Option(
        help="What a closed gate passes: resample, mean, zero, optimal (learned constants), model (another's: --other). "
        "[default: resample with pairs, else mean]"
    ),
]
Second = Annotated[str | None, typer.Option(help="The fallback that effects are repeated under.")]
Direction = Annotated[str | None, typer.Option(help="noising or denoising. [default: noising]")]
Routing = Annotated[
    str | None, typer.Option(help="Of a mixture of experts: free, or frozen to that of the model's own run. [default: free]")
]
METHODS = sorted(
    module.name
    for module in pkgutil.iter_modules([str(Path(__file__).parent.parent / "methods")])
    if not module.name.startswith("_")
)
"""`methods.method_names()`, without what they import."""
Method = Annotated[str | None, typer.Option(help=f"One of {', '.join(METHODS)}. [default: integrated]")]
Parts = Annotated[
    str | None,
    typer.Option(
        "--parts",
        help="nodes (heads and MLPs), edges or neurons: of these a screen finds those worth an exact effect. [default: nodes]",
    ),
]
Tied = Annotated[
    str | None,
    typer.Option(
        "--tied",
        help="A mixture of parts instead of heads and MLPs, with commas between: L*.block (whole layers), L*.kv* (key/value heads), L0.h*, "
        "L*.mlp, L1.mlp.e* (experts), L3.mlp.n* (neurons), L9.h6@-1.",
    ),
]
Other = Annotated[
    str | None, typer.Option("--other", help="The model whose values --fallback model puts in: the base of a fine-tuned one.")
]
OtherRevision = Annotated[str | None, typer.Option("--other-revision", help="Its branch, tag or commit on the hub.")]
Screen = Annotated[str | None, typer.Option("--screen", help="The method that ranks edges or neurons first. [default: gradient]")]
Methods = Annotated[
    str | None, typer.Option("--methods", help="Those to put side by side, with commas between: gradient,inputs,relevance.")
]
Search = Annotated[
    str | None,
    typer.Option(
        "--search",
        help="Of the circuit: threshold (by effect), acdc, greedy, masks (learned gates), codes (of heads, from a few pairs), path (of "
        "neurons, one a layer). [default: threshold]",
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        "--threshold", help="acdc: what a part must be worth to stay, in nats or units of --metric. [default: 1% of the whole]"
    ),
]
Sparsity = Annotated[float | None, typer.Option("--sparsity", help="masks: the share of parts that they close. [default: 0.9]")]
MaskPrice = Annotated[
    float | None, typer.Option("--mask-price", help="masks: what open gates cost instead, in units of the objective.")
]
Updates = Annotated[int | None, typer.Option("--updates", help="masks: steps of their descent. [default: 200]")]
Budget = Annotated[str | None, typer.Option(help="Of the learned gates: default, code (the authors' code), paper (its text).")]
Pressure = Annotated[float | None, typer.Option("--lambda", help="Pressure on the gates; by default the budget's.")]
Faithfulness = Annotated[float | None, typer.Option(help="What the circuit is to keep. [default: 0.85]")]
MinAccuracy = Annotated[float | None, typer.Option(help="Below it there is nothing to map. [default: 0.75]")]
Draws = Annotated[int | None, typer.Option("--random-circuits", help="Of the circuit's size and shape. [default: 100]")]
NoNulls = Annotated[bool, typer.Option("--no-nulls", help="Do not fit gates to shuffled answers and re-initialised weights.")]
Force = Annotated[bool, typer.Option("--force", help="Fit gates even where answers hardly vary.")]
Dynamic = Annotated[
    str | None, typer.Option(help="Gates that are a function of the input instead: phase, example or token; against static ones.")
]
Sight = Annotated[str | None, typer.Option(help="The residual stream that dynamic gates read: L2.resid.pre.")]
Contrast = Annotated[
    str | None, typer.Option(help="Another task: gates that keep this one and lose that, and the other way round.")
]
Keep = Annotated[
    list[int] | None, typer.Option("--keep", help="Learn the set of exactly so many parts that keeps most. May be repeated.")
]
Price = Annotated[
    list[float] | None,
    typer.Option("--price", help="Learn the set that is left where an open gate costs so many nats. May be repeated."),
]
Solutions = Annotated[bool, typer.Option("--solutions", help="Also the distinct sets that suffice, and what stands in for what.")]
ShapleyOption = Annotated[bool, typer.Option("--shapley", help="Also Shapley values and interactions among these parts.")]
ScreenPairs = Annotated[
    bool,
    typer.Option("--screen-pairs", help="Also screen the pairs of all parts, by random masks, with a bound on what is missed."),
]
PairsOf = Annotated[
    int | None, typer.Option(help="relate: parts, of largest effect, whose pairs are closed together. [default: 60]")
]
Memory = Annotated[
    str | None, typer.Option(help="For settings that run at once: 2GB, 512MiB, 50% of what is free. [default: a quarter of it]")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say how many passes, how much memory and about how long; run nothing.")]

CHOICES = {
    "direction": ("noising", "denoising"),
    "routing": ("free", "frozen"),
    "budget": ("default", "code", "paper"),
    "dynamic": ("phase", "example", "token"),
    "parts": ("nodes", "edges", "neurons"),
    "search": ("threshold", "acdc", "greedy", "masks", "codes", "path"),
}


def _ask(steps: tuple[str, ...] | None, subject: str, task: str | None, out: Path | None, as_json: bool, given: dict[str, Any],
         loading: dict[str, Any], asked: dict[str, Any], memory: str | None, dry: bool) -> None:  # fmt: skip
    """One question: open its run, do the steps, write the report, say what was found. Or, dry, say what that would take."""
    for name, allowed in CHOICES.items():
        if given.get(name) is not None and given[name] not in allowed:
            raise PatchclampError(f"--{name} {given[name]!r} was asked for: choose from {', '.join(allowed)}")
    folder = common.run_folder(subject)
    if task is None and folder is None:
        raise PatchclampError(
            f"{subject!r} is not the folder of a run, and no TASK was given: say MODEL TASK (see `patchclamp tasks`)"
        )
    from patchclamp.report import write_report
    from patchclamp.study import STEPS, Plan, map, open_run

    plan = Plan(**{name: value for name, value in given.items() if value is not None})
    if task is None:
        assert folder is not None
        subject, task, plan, loading, asked, out = _from_run(folder, given, loading, asked, out)
    found = common.find_task(str(task), asked.get("options"), asked.get("columns"), asked.get("chat", False), asked.get("bos"))
    model = common.load_model(subject, **loading)
    other = _other(loading, asked)
    if dry:
        from patchclamp.cli.costs import show_cost

        return show_cost(model, found, plan, steps or STEPS, out, memory, as_json, other)
    source = {"model": subject, "task": task, "loading": loading, "asked": asked}
    from patchclamp.study.cost import pieces_of

    pieces = pieces_of(model, found, plan, steps or STEPS, memory)
    with (
        said_when_interrupted(),
        common.bars(pieces) as bars,
        open_run(out, model, found, plan, watch=bars.step, source=source, other=other) as run,
    ):
        common.err.print(Text(f"{subject} on {found.name}: {run.folder}"))
        study = map(model, found, plan, run, do=steps or STEPS, progress=bars.progress, memory=memory, other=other)
        assert study.folder is not None
        report = write_report(study.folder)
    if as_json:
        common.print_json(_summary(study, report))
    else:
        from patchclamp.cli.show import show

        show(study, report, steps or STEPS)


def _other(loading: dict[str, Any], asked: dict[str, Any]) -> Any:
    """The model whose values closed gates pass, loaded as the first one is."""
    if asked.get("other") is None:
        if asked.get("other_revision") is not None:
            raise PatchclampError(
                f"--other-revision {asked['other_revision']} was given, and no model that it is of: --other MODEL"
            )
        return None
    return common.load_model(asked["other"], **{**loading, "revision": asked["other_revision"]})


@contextmanager
def said_when_interrupted() -> Generator[None]:
    """Ctrl-C says that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        common.err.print(Text("interrupted; finished steps are kept: run the same command again to go on"))
        raise typer.Exit(130) from None


def _from_run(folder: Path, given: dict[str, Any], loading: dict[str, Any], asked: dict[str, Any], out: Path | None) -> Any:
    from patchclamp.store import load_plan
    from patchclamp.study import Plan

    for name, value in {**loading, **asked}.items():
        common.refuse_both(value or None, f"--{name.replace('_', '-')}")
    stored = load_plan(folder)
    source = stored.get("source")
    if not isinstance(source, dict):
        raise PatchclampError(f"{folder} does not say which model and task it is of: give MODEL TASK")
    changed = {name: value for name, value in given.items() if value is not None}
    question = replace(Plan.of(stored["plan"]), **changed)
    same = question == Plan.of(stored["plan"])
    return source["model"], source["task"], question, source["loading"], source["asked"], out or (folder if same else None)


def _summary(study: Any, report: Path) -> dict[str, Any]:
    record = study.record
    many = None if "exact" in record.scores.columns else record.localisation
    return {
        "headline": record.headline,
        "folder": str(study.folder),
        "report": str(report),
        "baseline": record.baseline,
        "circuit": None if record.circuit is None else [str(site) for site in record.circuit],
        "trust": record.trust,
        "nulls": record.nulls,
        "sets": None if record.sets is None else record.sets.table.to_dicts(),
        "alternatives": None if record.alternatives is None else record.alternatives.table.to_dicts(),
        "claims": record.claims,
        "warnings": record.warnings,
        "scores": (record.scores if many is None else many.scores).to_dicts(),
        "verified": None if record.localisation is None else record.localisation.about.get("verified"),
    }


def add(app: typer.Typer) -> None:
    """Put the commands on the app."""
    for name, steps, about in (
        ("map", None, "Map a behaviour: roles, exact effects, a circuit, how far to trust it, a report."),
        ("gate", ("gate",), "Learn gates: which parts facilitate, interfere, do not matter; with nulls."),
        ("attribute", ("attribute",), "Score every part with one method, beside exact effects."),
        ("verify", ("verify",), "Exact effect of every part, two fallbacks, random prefixes, agreement of methods."),
        ("discover", ("discover",), "Find a circuit: the fewest parts that keep the behaviour."),
        (
            "relate",
            ("relate",),
            "How parts depend on each other: interactions, conditional roles, self-repair, connectome, outputs.",
        ),
        (
            "localise",
            ("localise",),
            "Several methods on the same parts, side by side: agreement, faithfulness of their circuits, routes of one prompt.",
        ),
        ("trust", ("discover", "trust"), "Judge the circuit: faithfulness, completeness, minimality, random circuits."),
    ):
        app.command(name, help=about)(_command(name, steps))


OWN = {
    "pairs_of": ("relate",), "shapley": ("relate",), "screen_pairs": ("relate",), "dynamic": ("gate",), "sight": ("gate",),
    "contrast": ("gate",), "keep": ("gate",), "price": ("gate",), "solutions": ("gate",),
    "parts": ("attribute", "discover", "trust", "localise"), "screen": ("attribute", "discover", "trust", "localise"),
    "methods": ("localise",),
    "tied": ("map", "gate", "attribute", "verify", "discover", "trust"),
    "budget": ("map", "gate"), "pressure": ("map", "gate"), "random_circuits": ("map", "trust"),
    "search": ("map", "discover", "trust"), "threshold": ("map", "discover", "trust"),
    "sparsity": ("map", "discover", "trust"), "mask_price": ("map", "discover", "trust"), "updates": ("map", "discover", "trust"),
}  # fmt: skip
"""Options that not every command has."""


def _command(name: str, steps: tuple[str, ...] | None) -> Any:
    def command(
        subject: Subject, task: TaskArgument = None, out: Out = None, n: N = None, seed: Seed = None, metric: Metric = None,
        fallback: Fallback = None, second: Second = None, direction: Direction = None,
        routing: Routing = None, method: Method = None, tied: Tied = None, other: Other = None,
        other_revision: OtherRevision = None, parts: Parts = None, screen: Screen = None, methods: Methods = None, search: Search = None,
        threshold: Threshold = None, sparsity: Sparsity = None, mask_price: MaskPrice = None, updates: Updates = None, budget: Budget = None,
        pressure: Pressure = None, pairs_of: PairsOf = None, dynamic: Dynamic = None, sight: Sight = None, contrast: Contrast = None,
        keep: Keep = None, price: Price = None, solutions: Solutions = False, shapley: ShapleyOption = False,
        screen_pairs: ScreenPairs = False,
        faithfulness: Faithfulness = None, min_accuracy: MinAccuracy = None, random_circuits: Draws = None,
        no_nulls: NoNulls = False, force: Force = False, option: Options = None, columns: Columns = None, chat: Chat = False,
        bos: Bos = None, dtype: Dtype = None, device: Device = None, device_map: DeviceMap = None, revision: Revision = None,
        tokenizer: Tokenizer = None, trust_remote_code: Trust = False, memory: Memory = None, dry_run: DryRun = False, as_json: Json = False,
    ) -> None:  # fmt: skip
        given = {"n": n, "seed": seed, "metric": metric, "fallback": fallback, "second": second, "direction": direction,
                 "routing": routing, "method": method, "parts": parts,
                 "tied": None if tied is None else tuple(name.strip() for name in tied.split(",")), "screen": screen,
                 "compared": None if methods is None else tuple(name.strip() for name in methods.split(",")),
                 "search": search, "threshold": threshold, "sparsity": sparsity, "mask_price": mask_price, "updates": updates,
                 "budget": budget, "pressure": pressure, "faithfulness": faithfulness, "min_accuracy": min_accuracy,
                 "random_circuits": random_circuits, "pairs_of": pairs_of, "dynamic": dynamic, "sight": sight, "contrast": contrast,
                 "keep": tuple(keep) if keep else None, "prices": tuple(price) if price else None,
                 "shapley": True if shapley else None, "screen_pairs": True if screen_pairs else None,
                 "nulls": False if no_nulls else None, "force": True if force else None}  # fmt: skip
        loading = {"dtype": dtype, "device": device, "device_map": device_map, "revision": revision, "tokenizer": tokenizer,
                   "trust": trust_remote_code}  # fmt: skip
        asked = {
            "options": option,
            "columns": columns,
            "chat": chat,
            "bos": bos,
            "other": other,
            "other_revision": other_revision,
        }
        beyond = (("dynamic", dynamic), ("contrast", contrast), ("sets", keep or price), ("solutions", solutions))
        wanted = tuple(step for step, asked_for in beyond if asked_for)
        _ask(wanted or steps, subject, task, out, as_json, given, loading, asked, memory, dry_run)

    whole = inspect.signature(command)  # typer reads it: options of other commands are left out
    kept = [one for one in whole.parameters.values() if name in OWN.get(one.name, (name,))]
    command.__signature__ = whole.replace(parameters=kept)  # type: ignore[attr-defined]
    return command
