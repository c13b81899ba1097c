"""The counterfactual learning curve: the same seeds and rows with and without clamps, and what that does to the phase change."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.files import write_atomically
from patchclamp.models.model import Model
from patchclamp.training.checkpoint import write_json
from patchclamp.training.clamp import Clamp, joined
from patchclamp.training.clamps.read import require_fit
from patchclamp.training.clamps.targets import successors
from patchclamp.training.data import Data, Rows
from patchclamp.training.forward import logits_of
from patchclamp.training.loss import next_token
from patchclamp.training.phases import crossing, phase_change
from patchclamp.training.plan import Training
from patchclamp.training.trainer import Trained, train

UNCLAMPED = "unclamped"
CURVE, FREE = "held_out", "free"
FEWEST = 3
"""Pairs of runs below which nothing is said."""
FILES = ("table", "arms", "curves")
Weights = Callable[[Rows], Float[Tensor, "row position"]]
"""How much each prediction counts in the curve."""
Told = Callable[[str, int, int, int], None]
"""Called with an arm, a seed, and how many of how many runs are done."""


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """Learning curves with and without clamps.

    Args:
        table: a row per arm and seed: `step` of the phase change (null: there is none), its interval and width (see `phases`),
            `level` (the height half-way between the unclamped run's plateaus), `crossing` (the step at which this run's curve
            passes that level; null: it never does), `last` (the curve's last value) and `free` (the same without clamps).
        arms: a row per arm but the unclamped: `pairs` of runs, `never` (runs that do not cross), `factor` (geometric mean of
            crossing steps over the unclamped run's, paired by seed) with interval `low` to `high`, and `verdict`.
        curves: arm, seed, step, value, free.
        about: training, seeds, clamps by arm, confidence.
    """

    table: pl.DataFrame
    arms: pl.DataFrame
    curves: pl.DataFrame
    about: Mapping[str, Any]

    def verdict(self, arm: str) -> str:
        """Earlier, later, never, no difference, or that there is too little to tell."""
        found = self.arms.filter(pl.col("arm") == arm)
        if not len(found):
            raise TrainingError(f"there is no arm {arm!r}: there are {', '.join(self.arms['arm'])}")
        return str(found["verdict"][0])

    def save(self, folder: str | Path) -> Path:
        """Write three tables (Parquet) and counterfactual.json, each whole or not at all."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            write_atomically(folder / f"{name}.parquet", getattr(self, name).write_parquet)
        write_json(folder / "counterfactual.json", dict(self.about))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Counterfactual":
        """What `save` wrote.

        Raises:
            TrainingError: something is missing or damaged.
        """
        folder = Path(folder)
        try:
            tables = {name: pl.read_parquet(folder / f"{name}.parquet") for name in FILES}
            return cls(**tables, about=json.loads((folder / "counterfactual.json").read_text()))
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            raise TrainingError(f"{folder} holds no counterfactual that can be read ({error}): run it again") from None


def counterfactual(
    build: Callable[[int], Model],
    data: Callable[[int], Data],
    training: Training,
    arms: Mapping[str, Sequence[Clamp]],
    out: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    always: Sequence[Clamp] = (),
    weights: Weights | None = None,
    rows: int = 256,
    confidence: float = 0.95,
    told: Told | None = None,
) -> Counterfactual:
    """Train the same models on the same rows unclamped and with each arm's clamps, and compare their phase changes.

    The curve is the loss on rows of step -1, which are never trained on, with the arm's clamps on as they are at that step
    (`held_out`); beside it stands the loss without them (`free`). For each seed the level half-way between the plateaus of the
    unclamped run's phase change is what every arm of that seed must pass:

        difference = log(crossing of the arm + 1) - log(crossing of the unclamped run + 1)

    A run that never passes counts with the last step, which is less than its difference is. The interval is that of the mean
    over seeds, each resampled with replacement (all combinations up to 6 seeds, 4000 beyond). With five seeds such an interval
    is too narrow (a nominal 95 % holds the mean in about 83 of 100); differences near its edge are not to be trusted.

    verdict: "never" where no run of the arm passes, "later" or "earlier" where the interval is on that side of 0, "no
    difference" where it holds 0, "too few" where fewer than three unclamped runs have a phase change.

    Args:
        build: seed -> a model with its first weights, a new object each time.
        data: seed -> rows by step.
        training: its numbers; its seed is replaced by each seed. `evaluate` is the resolution of the curve.
        arms: clamps by name of the arm.
        out: folder of all runs, ARM/seed-N; runs that are there already, whole or in part, are gone on with. The tables go
            there, too.
        seeds: of models and data.
        always: clamps of every arm, the unclamped one included (another kind of attention, say).
        weights: which predictions the curve counts; None: as in training. See `repeated`.
        rows: held out.
        confidence: of intervals.
        told: called after each run.

    Cost: (1 + arms) x seeds trainings, and two forward passes over the held-out rows at each evaluation.

    Raises:
        TrainingError: no arms, no seeds, names that are no folders', fewer than 8 evaluations; what `train` raises.
        SiteError: a clamp of a part that the model lacks, before anything is trained.

    Paper: https://arxiv.org/abs/2404.07129.
    """
    _require(arms, seeds, training)
    out, done = Path(out), 0
    trial = data(seeds[0]).rows(-1, 2)
    require_fit(build(seeds[0]), [*always, *(clamp for clamps in arms.values() for clamp in clamps)], trial)
    found: list[pl.DataFrame] = []
    for seed in seeds:
        for arm, clamps in {UNCLAMPED: (), **arms}.items():
            held = (*always, *clamps)
            rest = data(seed)
            run = train(
                build(seed), rest, replace(training, seed=seed), out / arm / f"seed-{seed}", clamps=held,
                measures=[Curve(rest.rows(-1, rows), held, tuple(always), weights)],
            )  # fmt: skip
            found.append(_curve(run, arm, seed))
            done += 1
            if told is not None:
                told(arm, seed, done, len(seeds) * (1 + len(arms)))
    said = {"clamps": {arm: [repr(c) for c in clamps] for arm, clamps in arms.items()}, "always": [repr(c) for c in always]}
    numbers = {"training": asdict(training), "seeds": list(seeds), "confidence": confidence, "rows": rows}
    result = compared(pl.concat(found), training.steps, confidence, {**said, **numbers})
    result.save(out)
    return result


@dataclass(frozen=True, eq=False)
class Curve:
    """A measure: the loss on held-out rows with clamps on, and without those that an arm adds.

    Args:
        rows: held out.
        clamps: on at each step as in training.
        always: those of them that stay on for `free`.
        weights: which predictions count; None: as the rows say.
    """

    rows: Rows
    clamps: tuple[Clamp, ...]
    always: tuple[Clamp, ...] = ()
    weights: Weights | None = None

    def __call__(self, model: Model, step: int) -> dict[str, float]:
        """The two losses, in nats."""
        rows = self.rows.to(model.device)
        if self.weights is not None:
            rows = replace(rows, weights=self.weights(rows))
        held = self._loss(model, rows, self.clamps, step)
        return {CURVE: held, FREE: held if self.clamps == self.always else self._loss(model, rows, self.always, step)}

    def _loss(self, model: Model, rows: Rows, clamps: Iterable[Clamp], step: int) -> float:
        edits = [clamp.edits(model, step, rows) for clamp in clamps]
        with torch.no_grad(), joined(model, edits, rows):
            return float(next_token(logits_of(model, rows), rows))


def repeated(rows: Rows) -> Float[Tensor, "row position"]:
    """Weights of those tokens alone that follow an earlier occurrence of the token before them as they did then.

    These are the predictions that an induction head gets right.
    """
    after = successors(rows.tokens, rows.real)
    copied = torch.where(after >= 0, rows.tokens.gather(1, after.clamp_min(0)), -1)
    right = torch.zeros_like(rows.weights)
    right[:, 1:] = (copied[:, :-1] == rows.tokens[:, 1:]).to(right)
    return rows.weights * right


def compared(
    curves: pl.DataFrame, steps: int, confidence: float = 0.95, about: Mapping[str, Any] | None = None, resamples: int = 200
) -> Counterfactual:
    """Tables and verdicts from curves (arm, seed, step, value, free); see `counterfactual`. `resamples`: of each phase change."""
    rows: list[dict[str, Any]] = []
    for seed in curves["seed"].unique(maintain_order=True):
        of_seed = curves.filter(pl.col("seed") == seed)
        base = _points(of_seed, UNCLAMPED)
        turn = phase_change(base["step"].to_numpy(), base["value"].to_numpy(), resamples=resamples, confidence=confidence)
        level = turn.middle if turn.step is not None else None
        for arm in of_seed["arm"].unique(maintain_order=True):
            own = _points(of_seed, arm)
            at, value = own["step"].to_numpy(), own["value"].to_numpy()
            phase = turn if arm == UNCLAMPED else phase_change(at, value, resamples=resamples, confidence=confidence)
            rows.append({
                "arm": arm, "seed": seed, "step": phase.step, "low": phase.low, "high": phase.high, "width": phase.width,
                "level": level, "crossing": None if level is None else crossing(at, value, level, turn.direction == "down"),
                "last": float(value[-1]), "free": float(own["free"][-1]),
            })  # fmt: skip
    numbers = ("step", "low", "high", "width", "level", "crossing", "last", "free")
    table = pl.DataFrame(rows, schema={"arm": pl.String, "seed": pl.Int64, **dict.fromkeys(numbers, pl.Float64)})
    names = [arm for arm in table["arm"].unique(maintain_order=True) if arm != UNCLAMPED]
    arms = pl.DataFrame([_judged(table, arm, steps, confidence) for arm in names], schema=_ARMS)
    return Counterfactual(table, arms, curves, about or {"confidence": confidence})


_ARMS = {"arm": pl.String, "pairs": pl.Int64, "never": pl.Int64, "factor": pl.Float64, "low": pl.Float64, "high": pl.Float64,
         "verdict": pl.String}  # fmt: skip


def _judged(table: pl.DataFrame, arm: str, steps: int, confidence: float) -> dict[str, Any]:
    """One arm beside the unclamped runs of its seeds."""
    base = table.filter((pl.col("arm") == UNCLAMPED) & pl.col("crossing").is_not_null()).select("seed", base="crossing")
    pairs = table.filter(pl.col("arm") == arm).join(base, on="seed")
    never = pairs["crossing"].null_count()
    differences = np.log1p(pairs["crossing"].fill_null(float(steps)).to_numpy()) - np.log1p(pairs["base"].to_numpy())
    if len(pairs) < FEWEST:
        return {"arm": arm, "pairs": len(pairs), "never": never, "factor": None, "low": None, "high": None, "verdict": "too few"}
    low, high = interval(differences, confidence)
    verdict = "never" if never == len(pairs) else "later" if low > 0 else "earlier" if high < 0 else "no difference"
    factors = (float(np.exp(value)) for value in (differences.mean(), low, high))
    return {"arm": arm, "pairs": len(pairs), "never": never, **dict(zip(("factor", "low", "high"), factors, strict=True)),
            "verdict": verdict}  # fmt: skip


def interval(values: NDArray[np.float64], confidence: float = 0.95, draws: int = 4000) -> tuple[float, float]:
    """Percentiles of the mean under resampling with replacement: of all n^n samples up to n = 6, of `draws` beyond."""
    n = len(values)
    if n <= 6:
        means = values[np.array(list(product(range(n), repeat=n)))].mean(1)
    else:
        means = values[np.random.default_rng(0).integers(0, n, (draws, n))].mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _points(curves: pl.DataFrame, arm: str) -> pl.DataFrame:
    return curves.filter(pl.col("arm") == arm).sort("step")


def _curve(run: Trained, arm: str, seed: int) -> pl.DataFrame:
    both = run.curve(CURVE).join(run.curve(FREE).rename({"value": "free"}), on="step")
    return both.select(pl.lit(arm).alias("arm"), pl.lit(seed, pl.Int64).alias("seed"), "step", "value", "free")


def _require(arms: Mapping[str, Sequence[Clamp]], seeds: Sequence[int], training: Training) -> None:
    if not arms or not seeds or len(set(seeds)) < len(seeds):
        raise TrainingError(
            f"{len(arms)} arms and the seeds {list(seeds)} were asked: give at least one arm, and seeds that differ"
        )
    for arm, clamps in arms.items():
        if arm == UNCLAMPED or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", arm):
            raise TrainingError(
                f"an arm was called {arm!r}: give a name of letters, digits, '-', '_' and '.', other than {UNCLAMPED}"
            )
        if not clamps:
            raise TrainingError(f"the arm {arm!r} has no clamps: the run without any is there by itself")
    if training.steps < 8:
        raise TrainingError(
            f"a curve of {training.steps} steps was asked for: a phase change needs 8 points, so train 8 steps or more"
        )
    if training.steps // training.evaluate < 8:
        raise TrainingError(
            f"a curve of {training.steps} steps measured every {training.evaluate} has too few points for a phase change: measure at "
            f"least every {max(1, training.steps // 8)}"
        )
