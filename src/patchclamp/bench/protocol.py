"""The protocol: scores on one set of prompts, circuits of ten sizes judged on another, a row per task and method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import polars as pl

from patchclamp.circuit import Circuit
from patchclamp.discover.evaluation import Evaluation, evaluate, evaluate_circuits
from patchclamp.discover.threshold import Order, ranked
from patchclamp.errors import BaselineError, MetricError, PatchclampError
from patchclamp.exchange import Sizes, Submission, write_submission
from patchclamp.exchange.submission import SHARES as SUBMITTED
from patchclamp.exchange.submission import count_of, size_of
from patchclamp.methods import attribute, method_names
from patchclamp.metrics import metric_named
from patchclamp.models.model import Model
from patchclamp.parts import Fallback, Parts, benefits, edges, nodes
from patchclamp.scores import Part, Scores
from patchclamp.tasks import Examples, Task
from patchclamp.tasks._split import Split

Granularity = Literal["edges", "nodes"]
METHODS = ("exact", "integrated", "gradient", "random")
AREAS: Mapping[Order, str] = {"signed": "CPR", "magnitude": "CMD"}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Bench:
    """What was measured.

    Attributes:
        table: a row per task and method: fallback, parts, n, accuracy; CPR and CMD, each with low and high; log_area; enough (the
            smallest share of parts from which on faithfulness is .85 or more).
        curves: a row per task, method, order ("signed", "magnitude") and size: what `evaluate` gives.
        scores: by (task, method), the scores that circuits were taken from.
        skipped: by task or "task, method", why there is no row.
    """

    table: pl.DataFrame
    curves: pl.DataFrame
    scores: Mapping[tuple[str, str], Scores]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        return "\n".join(
            f"{row['task']}, {row['method']}: CPR {row['CPR']:.2f} [{row['CPR_low']:.2f}, {row['CPR_high']:.2f}], "
            f"CMD {row['CMD']:.2f} [{row['CMD_low']:.2f}, {row['CMD_high']:.2f}]"
            for row in self.table.iter_rows(named=True)
        )


def bench(
    model: Model,
    tasks: Sequence[Task],
    *,
    methods: Sequence[str] = METHODS,
    granularity: Granularity = "edges",
    fallback: str = "resample",
    n: int | None = None,
    seed: int = 0,
    min_accuracy: float = 0.75,
    metric: str | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Run the protocol.

    Args:
        model: the model.
        tasks: the behaviours.
        methods: attributions by name.
        granularity: "edges" or "nodes".
        fallback: what parts outside a circuit pass: resample (the benchmark's headline), zero, mean, mean:position, optimal; learned
            ones on the fit set.
        n: prompts of each task (fit : select : confirm = 2 : 1 : 1; scores on fit, circuits judged on confirm).
        seed: of the draw, the split and the intervals.
        min_accuracy: a task that the model does less often is left out, and said.
        metric: by default the task's; the benchmark's is logit_diff.
        memory: bytes that one folded pass may take.
        progress: told what runs, and how many methods of how many are done.

    Cost: that of each method on half of the prompts, and 40 passes a method over a quarter of them.

    Raises:
        PatchclampError: no such method; nothing asked.
        BaselineError: the model does none of the tasks.
    """
    if not tasks or not methods:
        raise PatchclampError("the benchmark runs methods on tasks: give at least one of each")
    if unknown := [name for name in methods if name not in method_names()]:
        raise PatchclampError(f"there is no method {unknown[0]!r}: choose from {', '.join(method_names())}")
    rows, curves, found, skipped = list[dict[str, Any]](), list[pl.DataFrame](), dict[tuple[str, str], Scores](), dict[str, str]()
    for task in tasks:
        split = task.split(model.tokenizer, n, seed=seed)
        parts = _parts(model, granularity, memory)
        rule = parts.fallback(fallback, fit=split.fit)
        right = accuracy(parts, split.confirm, rule)
        if right < min_accuracy:
            skipped[task.name] = f"the model is right in {right:.0%} of pairs, and {min_accuracy:.0%} is the least"
            continue
        for number, name in enumerate(methods):
            if progress is not None:
                progress(f"{task.name}: {name}", number, len(methods))
            try:
                row, curve, scores = _cell(parts, split, rule, name, metric, seed)
            except MetricError as error:
                skipped[f"{task.name}, {name}"] = str(error)
                continue
            facts = {"model": model.name, "task": task.name, "method": name}
            rows.append({**facts, **row, "accuracy": right})
            curves.append(curve.select(*(pl.lit(value).alias(key) for key, value in facts.items()), pl.all()))
            found[task.name, name] = scores
    if not rows:
        raise BaselineError("the benchmark has no row: " + "; ".join(f"{name}: {why}" for name, why in skipped.items()))
    return Bench(pl.DataFrame(rows), pl.concat(curves), found, skipped)


def _parts(model: Model, granularity: Granularity, memory: int | None) -> Parts:
    return edges(model, memory=memory) if granularity == "edges" else nodes(model, memory=memory)


def accuracy(parts: Parts, examples: Examples, fallback: Fallback) -> float:
    """The share of pairs in which the model is right; of prompts without wrong answers, the share whose likeliest token is."""
    wanted = "logit_diff" if examples[0].wrong else "top1"
    return float((benefits(parts, examples, parts.open(), fallback, metric_named(wanted))[0] > 0).double().mean())


def _cell(
    parts: Parts, split: Split, fallback: Fallback, method: str, metric: str | None, seed: int
) -> tuple[dict[str, Any], pl.DataFrame, Scores]:
    scores = attribute(parts, split.fit, fallback, method, metric=metric, seed=seed)
    row, curve = judged(parts, split.confirm, fallback, scores, metric=metric, seed=seed)
    return row, curve, scores


def judged(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    scores: Scores,
    *,
    metric: str | None = None,
    seed: int = 0,
    grow: bool = False,
) -> tuple[dict[str, Any], pl.DataFrame]:
    """One row of the table, and the curves behind it. Cost: 44 forward passes over the examples."""
    both: dict[Order, Evaluation] = {
        by: evaluate(parts, examples, fallback, scores, by=by, metric=metric, grow=grow, seed=seed)
        for by in ("signed", "magnitude")
    }
    return _row(both, len(parts.counted), fallback.kind, len(examples)), _curves(both)


def submitted(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    submission: Submission,
    *,
    metric: str | None = None,
    seed: int = 0,
) -> tuple[dict[str, Any], pl.DataFrame]:
    """The same of a submission that was read: of its scores, or of its nine circuits with the whole model as the tenth.

    Circuits have one order: they are judged once, by both areas, as the benchmark judges them.
    """
    if submission.scores is not None:
        return judged(parts, examples, fallback, _of(parts, submission.scores), metric=metric, seed=seed)
    assert submission.circuits is not None  # a submission holds one of the two
    known = set(parts.labels)
    for share, circuit in submission.circuits.items():
        if strange := [part for part in circuit if part not in known]:
            raise PatchclampError(f"the circuit of share {share} has {strange[0]}, which is no part of {parts.model.name}")
    everything: list[Part] = [parts.labels[number] for number in parts.counted]
    shares = [*submission.circuits, 1.0]
    circuits = [[*circuit] for circuit in submission.circuits.values()] + [everything]
    both: dict[Order, Evaluation] = {
        by: evaluate_circuits(parts, examples, fallback, circuits, shares, by=by, metric=metric, seed=seed)
        for by in ("signed", "magnitude")
    }
    return _row(both, len(everything), fallback.kind, len(examples)), _curves(both)


def _of(parts: Parts, scores: Scores) -> Scores:
    """Scores of all parts of the model, and of no others."""
    have, want = set(scores.sites), [parts.labels[number] for number in parts.counted]
    strange, missing = sorted(map(str, have - set(want))), [str(part) for part in want if part not in have]
    if strange or missing:
        raise PatchclampError(
            f"the scores are of another model: {len(strange)} parts are not here ({', '.join(strange[:3])}), {len(missing)} of this "
            f"model have none ({', '.join(missing[:3])})"
        )
    return scores


def _row(both: Mapping[Order, Evaluation], parts: int, fallback: str, n: int) -> dict[str, Any]:
    row: dict[str, Any] = {"fallback": fallback, "parts": parts, "n": n}
    for by, name in AREAS.items():
        area = both[by].areas.filter((pl.col("name") == name) & (pl.col("over") == "nominal")).row(0, named=True)
        row |= {name: area["value"], f"{name}_low": area["low"], f"{name}_high": area["high"]}
    return {**row, "log_area": both["signed"].area("log_area"), "enough": both["magnitude"].reaches(0.85)}


def _curves(both: Mapping[Order, Evaluation]) -> pl.DataFrame:
    return pl.concat([found.table.select(pl.lit(by).alias("by"), pl.all()) for by, found in both.items()])


def sizes_of(model: Model) -> Sizes:
    """A model's sizes, as names and graph files need them.

    Raises:
        PatchclampError: layers differ in their numbers of heads, which no name there can say.
    """
    sizes = {(one.heads, one.kv_heads) for one in model.anatomy.sizes}
    if len(sizes) > 1:
        raise PatchclampError(f"{model.name}: layers have different numbers of heads, which graph files cannot say")
    heads, kv_heads = sizes.pop()
    return Sizes(model.layers, heads, kv_heads, model.width, model.anatomy.parallel, _rotates(model))


def _rotates(model: Model) -> bool:
    """Whether positions are put in by rotating queries and keys."""
    config = model.anatomy.config
    said = any(getattr(config, name, None) for name in ("rope_parameters", "rope_theta", "rotary_dim", "rotary_pct"))
    return said or any("rotary" in name.lower() for name, _ in model.hf.named_modules())


def cells(folder: Path, model: Model, found: Bench, method: str, circuits: bool = False) -> tuple[Path, ...]:
    """Write a submission: a cell per task, of one method's scores, or of nine circuits of largest |score|.

    Returns:
        The files.

    Raises:
        PatchclampError: the method has no row.
    """
    tasks = [task for task, name in found.scores if name == method]
    if not tasks:
        raise PatchclampError(f"nothing was measured with the method {method!r}: a submission is of one that was")
    sizes, written = sizes_of(model), list[Path]()
    short = model.name.rstrip("/").rpartition("/")[2]
    for task in tasks:
        scores = found.scores[task, method]
        place = folder / f"{task}_{short}"
        if not circuits:
            written += write_submission(place, sizes, scores)
            continue
        written += write_submission(place, sizes, None, nine(scores, sizes))
    return tuple(written)


def nine(scores: Scores, sizes: Sizes, by: Order = "magnitude") -> dict[float, Circuit]:
    """The nine circuits of a submission: the best parts that fit into each share, counted as the benchmark counts edges."""
    order = ranked(scores, by)
    total = count_of(Circuit(order[:1]), sizes)
    found: dict[float, Circuit] = {}
    for share in SUBMITTED:
        left, chosen = max(1, int(share * total + 1e-9)), list[Part]()
        for part in order:
            size = size_of(Circuit([part]), sizes)
            if size <= left:
                left, chosen = left - size, [*chosen, part]
            if not left:
                break
        found[share] = Circuit(chosen, {**scores.about, "share": share})
    return found
