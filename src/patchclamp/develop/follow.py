"""Follow a training: measures and maps at each of its checkpoints, and what they say of when things form."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from patchclamp.develop.checkpoints import Checkpoint
from patchclamp.develop.lives import lives
from patchclamp.errors import TrainingError
from patchclamp.files import sha256
from patchclamp.models.model import Model
from patchclamp.store import Run, digest, load_record, load_step
from patchclamp.store.manifest import Manifest
from patchclamp.store.record import Record
from patchclamp.study.plan import Plan
from patchclamp.study.provenance import REVISIONS
from patchclamp.sweep import Case, sweep
from patchclamp.training.phases import phase_change

Measure = Callable[[Model], pl.DataFrame]
"""Model -> a row per number: `name`, `part` (empty for the whole model), `value`, and `low`, `high` where it has an interval."""
Progress = Callable[[str, int, int], None]
"""Told what is done: (what, how many, of how many)."""

CURVES = {"step": pl.Int64, "measure": pl.String, "name": pl.String, "part": pl.String, "value": pl.Float64,
          "low": pl.Float64, "high": pl.Float64}  # fmt: skip
BASELINES = {"task": pl.String, "step": pl.Int64, "n": pl.Int64, "accuracy": pl.Float64, "open": pl.Float64,
             "open_low": pl.Float64, "open_high": pl.Float64, "closed": pl.Float64, "faithfulness": pl.Float64,
             "run": pl.String, "error": pl.String}  # fmt: skip
PHASES = {"curve": pl.String, "verdict": pl.String, "step": pl.Float64, "low": pl.Float64, "high": pl.Float64,
          "width": pl.Float64, "before": pl.Float64, "after": pl.Float64}  # fmt: skip
RESULT = "development"
WHOLE = "model"
"""What measures call the whole model."""
SCHEDULED = ("rate", "tokens", "scale")
"""Numbers of an update that were chosen, not found."""
FEWEST = 8
"""Points of a curve that is asked for a turn."""
POINTS = 300
"""Of a curve that the training wrote down."""
_MAP = ("site", "layer", "kind", "index", "exact", "exact_low", "exact_high", "exact_q", "role")
_PAIRS = ("a", "b", "interaction", "low", "high", "word", "relation")


@dataclass(frozen=True, eq=False)
class Development:
    """What was found at the checkpoints of one training.

    Args:
        curves: a row per step and number of a measure: step, measure, name, part, value, low, high. What the training itself
            wrote down (`measure` "training") is there, too.
        baselines: a row per task and step: n, accuracy, metric open (with interval) and closed, the circuit's faithfulness, the
            folder of its run, or why there is none.
        maps: a row per task, step and part: site, layer, kind, index, exact, exact_low, exact_high, exact_q, role (where gates
            were learned), circuit (where one was looked for).
        pairs: a row per task, step and pair of parts, where relations were asked for: a, b, interaction, low, high, word, relation.
        lives: a row per task and part: when its effect formed, and whether it stayed (`develop.lives.lives`).
        phases: a row per curve of the whole model, and per curve of a part that turns: curve, verdict ("turns", "no turn", or that
            there are too few points), step with low and high, width (a factor in steps), before and after (`training.phases`).
        about: source, steps, plan.
    """

    curves: pl.DataFrame
    baselines: pl.DataFrame
    maps: pl.DataFrame
    pairs: pl.DataFrame
    lives: pl.DataFrame
    phases: pl.DataFrame
    about: Mapping[str, Any]

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps that were looked at."""
        return tuple(self.about["steps"])


def follow(
    found: Sequence[Checkpoint],
    out: str | Path | None = None,
    *,
    tasks: Sequence[str] = (),
    measures: Mapping[str, Measure] | None = None,
    plan: Plan | None = None,
    steps: Sequence[str] = ("verify",),
    metrics: pl.DataFrame | None = None,
    loading: Mapping[str, Any] | None = None,
    asked: Mapping[str, Any] | None = None,
    on: str = "here",
    address: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Development, Path]:
    """Measure and map every checkpoint; what is done is kept, and an interrupted run goes on.

    Args:
        found: from `checkpoints`.
        out: the folder; by default runs/ and the digest of the question.
        tasks: names or files of tasks to map at each checkpoint.
        measures: by name.
        plan: of the maps. A checkpoint that does not show the behaviour is mapped all the same: its effects are what they are.
        steps: of the maps: verify for exact effects, gate for roles, discover, trust, relate for interactions.
        metrics: what the training wrote down: step, name, value.
        loading, asked: how models and tasks are loaded, see `sweep.Case`.
        on, address, workers: where the maps run, see `sweep.sweep`.
        progress: told as checkpoints are done.

    Returns:
        what was found, and the folder: patchclamp's manifest, steps/, maps/ with a run per checkpoint and task.

    Cost: a map and the measures per checkpoint.

    Raises:
        TrainingError: fewer than two checkpoints, or nothing to do at them.
        PatchclampError: a task or model that cannot be loaded. Maps that fail are rows with their errors.
    """
    measures = measures or {}
    if len(found) < 2:
        raise TrainingError(f"{len(found)} checkpoint was given: development needs at least 2")
    if not tasks and not measures:
        raise TrainingError("nothing is asked of the checkpoints: give a task to map, or measures")
    plan = plan or Plan(force=True, min_accuracy=0.0)
    cases = [Case(one.model, task, plan, tuple(steps), _loading(one, loading), asked or {}) for task in tasks for one in found]
    for case in cases:
        case.check()
    body = {"checkpoints": [(one.step, one.model, one.revision) for one in found], "tasks": list(tasks), "plan": plan,
            "steps": list(steps), "measures": sorted(measures), "asked": dict(asked or {})}  # fmt: skip
    identity = digest(_identity(found), ",".join(case.load_task().hash for case in cases[:: len(found)]), body, REVISIONS)
    name = found[0].model
    told: Progress = progress or (lambda what, done, of: None)
    with Run.open(out, body, digest=identity, task="development", model=name) as run:
        assert run.folder is not None
        curves = _measured(run, found, measures, loading, told)
        rows = _mapped(run.folder / "maps", cases, found, on, address, workers, told)
        about = {**body, "steps": [one.step for one in found], "map": list(steps)}
        # maps that failed are tried again next time, and then this is another result
        missing = digest("", "", [row[:2] for row in rows if row[2] is None], {})[:12] if any(r[2] is None for r in rows) else ""
        result = run.step(f"{RESULT}-without-{missing}" if missing else RESULT, _development, curves, rows, metrics, about)
        if not missing:
            run.finish(_headline(result, tasks, measures))
        return result, run.folder


def _headline(found: Development, tasks: Sequence[str], measures: Mapping[str, Measure]) -> str:
    """For a list of runs: which checkpoints, what was asked, how many parts' effects came and stayed."""
    ends = f"{len(found.steps)} checkpoints, step {found.steps[0]} to {found.steps[-1]}"
    stay = f"; {found.lives.filter(found.lives['word'] == 'stays').height} parts come and stay" if found.lives.height else ""
    return f"{ends}: {', '.join([*tasks, *measures])}{stay}"


def load_development(folder: str | Path) -> Development:
    """What `follow` found the last time, from its folder; raises `StoreError` where it is not finished, or damaged."""
    done = [name for name in Manifest.read(Path(folder)).steps if name.startswith(RESULT)]
    return load_step(folder, RESULT if RESULT in done or not done else done[-1])


def _loading(one: Checkpoint, loading: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**(loading or {}), **({} if one.revision is None else {"revision": one.revision})}


def _identity(found: Sequence[Checkpoint]) -> str:
    """Of weights and configurations: hashes of local files; a hub revision by its name."""
    state = hashlib.sha256()
    for one in found:
        state.update(f"{one.step} {one.model if one.revision else ''} {one.revision}".encode())
        if one.revision is None:
            files = (path for kind in ("config.json", "*.safetensors", "*.bin") for path in sorted(Path(one.model).glob(kind)))
            for file in files:
                if "optimizer" not in file.name:
                    state.update(sha256(file).encode())
    return state.hexdigest()


def _measured(
    run: Run, found: Sequence[Checkpoint], measures: Mapping[str, Measure], loading: Mapping[str, Any] | None, told: Progress
) -> pl.DataFrame:
    """Every measure at every checkpoint; a model is loaded only where something is missing."""
    frames = [pl.DataFrame(schema=CURVES)]
    for number, one in enumerate(found):
        case = Case(one.model, "", Plan(), ("verify",), _loading(one, loading))
        held = cache(case.load_model)
        for name, measure in measures.items():
            frame = run.step(f"{name}-{one.step}", lambda measure, held: measure(held()), measure, held)
            empty = [pl.lit(None, CURVES[column]).alias(column) for column in ("low", "high") if column not in frame.columns]
            whole = pl.when(pl.col("part") == WHOLE).then(pl.lit("")).otherwise(pl.col("part")).alias("part")
            frame = frame.with_columns(pl.lit(one.step).alias("step"), pl.lit(name).alias("measure"), whole, *empty)
            frames.append(frame.select(*CURVES).cast(CURVES))  # pyright: ignore[reportArgumentType]
        told("checkpoints measured", number + 1, len(found))
    return pl.concat(frames)


def _mapped(
    out: Path,
    cases: Sequence[Case],
    found: Sequence[Checkpoint],
    on: str,
    address: str | None,
    workers: int | None,
    told: Progress,
) -> list[tuple[str, int, Record | None, str, str]]:
    """(task, step, its record, its folder, its error) of every map."""
    if not cases:
        return []
    swept = sweep(
        cases, out, on=on, address=address, workers=workers, progress=lambda row, done, of: told("checkpoints mapped", done, of)
    )
    rows: list[tuple[str, int, Record | None, str, str]] = []
    for number, row in enumerate(swept.rows):
        record = None if row.folder is None else load_record(row.folder)
        task = Path(row.case.task).stem if Path(row.case.task).suffix else row.case.task
        where = "" if row.folder is None else f"maps/{row.folder.name}"
        rows.append((task, found[number % len(found)].step, record, where, row.error))
    return rows


def _development(
    curves: pl.DataFrame,
    rows: Sequence[tuple[str, int, Record | None, str, str]],
    metrics: pl.DataFrame | None,
    about: Mapping[str, Any],
) -> Development:
    if metrics is not None and metrics.height:
        own = _paired(_thinned(metrics)).with_columns(pl.lit("training").alias("measure"), pl.lit("").alias("part"))
        curves = pl.concat([curves, own.select(*CURVES).cast(CURVES)])  # pyright: ignore[reportArgumentType]
    there = [(task, step, record) for task, step, record, _, _ in rows if record is not None]
    maps = _joined([_map_rows(task, step, record) for task, step, record in there])
    baselines = pl.DataFrame([_baseline(*row) for row in rows], schema=BASELINES)
    pairs = _joined([_pair_rows(task, step, record) for task, step, record in there if record.relations is not None])
    lived = lives(maps) if maps.height else pl.DataFrame()
    return Development(curves, baselines, maps, pairs, lived, _phases(curves, baselines), dict(about))


def _thinned(metrics: pl.DataFrame) -> pl.DataFrame:
    """Of numbers that every update wrote down, at most `POINTS` of each, evenly spaced in log(1 + step); not the schedule's."""
    metrics = metrics.filter(~pl.col("name").is_in(SCHEDULED))
    steps = metrics["step"].unique().sort().to_numpy()
    if len(steps) <= POINTS:
        return metrics
    place = np.log1p(steps)
    near = np.searchsorted(place, np.linspace(place[0], place[-1], POINTS)).clip(max=len(steps) - 1)
    return metrics.filter(pl.col("step").is_in(steps[np.unique(near)]))


def _paired(metrics: pl.DataFrame) -> pl.DataFrame:
    """step, name, value, low, high: where NAME, `NAME low` and `NAME high` were written down, they are one number with its interval."""
    names = set(metrics["name"])
    both = [name for name in names if {f"{name} low", f"{name} high"} <= names]
    found = metrics.filter(~pl.col("name").is_in([f"{name} {end}" for name in both for end in ("low", "high")]))
    for end in ("low", "high"):
        ends = metrics.filter(pl.col("name").is_in([f"{name} {end}" for name in both]))
        named = pl.col("name").str.strip_suffix(f" {end}")
        found = found.join(ends.select("step", named, pl.col("value").alias(end)), on=["step", "name"], how="left")
    return found


def _joined(frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame()


def _baseline(task: str, step: int, record: Record | None, where: str, error: str) -> dict[str, Any]:
    row: dict[str, Any] = {"task": task, "step": step, "run": where, "error": error}
    if record is not None:
        base = record.baseline
        row |= {"n": base.n, "accuracy": base.accuracy, "open": base.open.mean, "open_low": base.open.low, "open_high": base.open.high,
                "closed": base.closed.mean, "faithfulness": None if record.trust is None else record.trust.faithfulness.mean}  # fmt: skip
    return {name: row.get(name) for name in BASELINES}


def _map_rows(task: str, step: int, record: Record) -> pl.DataFrame:
    scores = record.scores.filter(pl.col("kind") != "embed")
    frame = scores.select([name for name in _MAP if name in scores.columns])
    if record.circuit is not None:
        inside = {str(site) for site in record.circuit}
        frame = frame.with_columns(pl.col("site").is_in(inside).alias("circuit"))
    return frame.select(pl.lit(task).alias("task"), pl.lit(step).alias("step"), pl.all())


def _pair_rows(task: str, step: int, record: Record) -> pl.DataFrame:
    assert record.relations is not None
    pairs = record.relations.pairs
    frame = pairs.select([name for name in _PAIRS if name in pairs.columns])
    return frame.select(pl.lit(task).alias("task"), pl.lit(step).alias("step"), pl.all())


def _phases(curves: pl.DataFrame, baselines: pl.DataFrame) -> pl.DataFrame:
    """Where each curve turns, and each task's metric: of curves of single parts, those that do. What never changes is no curve."""
    rows: list[dict[str, Any]] = []
    curves = curves.filter(pl.col("value").n_unique().over("measure", "name", "part") > 1)
    for (measure, name, part), frame in curves.group_by("measure", "name", "part", maintain_order=True):
        rows.append(_phase(f"{measure}: {name}" + (f" of {part}" if part else ""), frame, "value", bool(part)))
    for (task,), frame in baselines.drop_nulls("open").group_by("task", maintain_order=True):
        rows.append(_phase(f"{task}: metric", frame, "open", False))
    frame = pl.DataFrame(rows, schema={**PHASES, "part": pl.Boolean}).sort("part", maintain_order=True)
    return frame.filter(~pl.col("part") | (pl.col("verdict") == "turns")).drop("part")


def _phase(curve: str, frame: pl.DataFrame, column: str, part: bool) -> dict[str, Any]:
    there = frame.select("step", column).drop_nulls().filter(pl.col(column).is_finite()).unique("step").sort("step")
    empty: dict[str, Any] = {**dict.fromkeys(PHASES), "curve": curve, "part": part}
    if there.height < FEWEST:
        return {**empty, "verdict": f"{there.height} points, too few to ask"}
    found = phase_change(there["step"].to_numpy(), there[column].to_numpy())
    if found.step is None:
        return {**empty, "verdict": "no turn", "before": found.before, "after": found.after}
    return {"curve": curve, "verdict": "turns", "step": found.step, "low": found.low, "high": found.high, "width": found.width,
            "before": found.before, "after": found.after, "part": part}  # fmt: skip
