"""The trainer: updates, clamps, measures, checkpoints; killed and begun again it ends in the same weights."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch

from patchclamp.errors import NumericsError, TrainingError
from patchclamp.files import write_atomically
from patchclamp.models.inputs import token_batch
from patchclamp.models.model import Model
from patchclamp.training import checkpoint
from patchclamp.training.clamp import Clamp
from patchclamp.training.data import Data, Rows
from patchclamp.training.loss import Loss, next_token
from patchclamp.training.plan import Training

Measure = Callable[[Model, int], Mapping[str, float]]
"""(model, step) -> numbers by name. Must leave the model as it is."""
Progress = Callable[[int, Mapping[str, float]], None]
"""Called with a step and its numbers, whenever measures were taken."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished training.

    Args:
        model: the model that was given, with its last weights.
        out: the run's folder: training.json, metrics.parquet, checkpoints/step-NNNNNNN.
        metrics: a row per step and number: step, name, value.
    """

    model: Model
    out: Path
    metrics: pl.DataFrame

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps with a checkpoint."""
        return checkpoint.steps_of(self.out)

    def curve(self, name: str) -> pl.DataFrame:
        """One number over training: step, value."""
        return self.metrics.filter(pl.col("name") == name).select("step", "value").sort("step")


def train(
    model: Model,
    data: Data,
    training: Training,
    out: str | Path,
    *,
    clamps: Sequence[Clamp] = (),
    measures: Sequence[Measure] = (),
    loss: Loss = next_token,
    progress: Progress | None = None,
) -> Trained:
    """Train a model's weights in place, or go on with a run that was cut off.

    Args:
        model: a model object (`Model.load(hf_model)`); its weights that require gradients are changed.
        data: rows by step.
        training: the numbers.
        out: the run's folder. One that holds a run of the same training goes on from its last checkpoint.
        clamps: what is held while it learns.
        measures: what is measured every `training.evaluate` steps and at every checkpoint.
        loss: of the logits and the rows.
        progress: called whenever measures were taken.

    Raises:
        TrainingError: the folder holds another training, or a damaged checkpoint.
        NumericsError: the loss is not finite.
    """
    out = Path(out)
    _claim(out, model, data, training, clamps)
    optimizer = build_optimizer(model, training)
    begun = checkpoint.steps_of(out)
    step = begun[-1] if begun else 0
    rows: list[tuple[int, str, float]] = []
    if begun:
        checkpoint.restore(out, model, optimizer, step)
        rows = [row for row in pl.read_parquet(out / "metrics.parquet").rows() if row[0] <= step]
    else:
        for clamp in clamps:
            clamp.updated(model, 0)
    seen = {at for at, _, _ in rows}
    kept, unkept = set(training.kept), step if step not in training.kept else None
    while True:
        due = step in kept or step % training.evaluate == 0 or step == training.steps
        if due and step not in seen:
            numbers = {name: value for measure in measures for name, value in measure(model, step).items()}
            rows += [(step, name, float(value)) for name, value in numbers.items()]
            if progress is not None:
                progress(step, numbers)
        if step in kept or (step % training.save == 0 and step):
            _write_metrics(out, rows)  # before the checkpoint, so that one is never without its numbers
            checkpoint.keep(out, model, optimizer, step)
            if unkept is not None and unkept != step:
                checkpoint.drop(out, unkept)
            unkept = None if step in kept else step
        if step >= training.steps:
            break
        rows.append((step, "loss", _update(model, optimizer, data, training, clamps, loss, step)))
        step += 1
    return Trained(model, out, _write_metrics(out, rows))


def build_optimizer(model: Model, training: Training) -> torch.optim.Optimizer:
    """AdamW, or SGD; weight decay on tensors of two axes and more."""
    weights = [p for p in model.hf.parameters() if p.requires_grad]
    if not weights:
        raise TrainingError(f"{model.name} has no weights that require gradients: nothing can be trained")
    groups = [
        {"params": [p for p in weights if p.ndim > 1], "weight_decay": training.decay},
        {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.rate, momentum=training.betas[0])
    return torch.optim.AdamW(groups, lr=training.rate, betas=training.betas, eps=training.epsilon)


def _update(
    model: Model, optimizer: torch.optim.Optimizer, data: Data, training: Training, clamps: Sequence[Clamp], loss: Loss, step: int
) -> float:
    """One update; returns the loss of its rows before it."""
    for group in optimizer.param_groups:
        group["lr"] = training.rate_at(step)
    optimizer.zero_grad(set_to_none=True)
    pieces = data.rows(step, training.batch).split(training.accumulate)
    whole = sum(float(piece.weights[:, 1:].sum()) for piece in pieces)
    total = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(training.seed * 1_000_003 + step)  # what is drawn depends on the step, not on what ran before
        for piece in pieces:
            share = float(piece.weights[:, 1:].sum()) / whole
            total += share * _backward(model, piece, training, clamps, loss, step, share)
    for clamp in clamps:
        clamp.gradients(model, step)
    if training.clip is not None:
        torch.nn.utils.clip_grad_norm_([p for p in model.hf.parameters() if p.grad is not None], training.clip)
    optimizer.step()
    for clamp in clamps:
        clamp.updated(model, step + 1)
    return total


def _backward(
    model: Model, rows: Rows, training: Training, clamps: Sequence[Clamp], loss: Loss, step: int, share: float
) -> float:
    """Forward and backward of one piece, inside the clamps' edits."""
    batch = token_batch(rows.tokens)
    edits = [found for clamp in clamps if (found := clamp.edits(model, step, rows))]
    model.hf.train()
    with ExitStack() as stack:
        for found in edits:
            stack.enter_context(model.editing(found, batch))
        if training.precision != "float32":
            stack.enter_context(torch.autocast(model.device.type, getattr(torch, training.precision)))
        logits = model.hf(input_ids=rows.tokens.to(model.device), use_cache=False).logits
        value = loss(logits, rows)
        if not bool(torch.isfinite(value)):
            raise NumericsError(f"the loss is {value.item()} at step {step}: take a lower rate, or clip harder")
        (value * share).backward()
    model.hf.eval()
    return float(value.item())


def _claim(out: Path, model: Model, data: Data, training: Training, clamps: Sequence[Clamp]) -> None:
    """Write what the run is, or see that what lies there is the same."""
    said: dict[str, Any] = {"training": asdict(training), "data": data.name, "clamps": [repr(clamp) for clamp in clamps],
                            "model": model.hf.config.to_dict()}  # fmt: skip
    file = out / "training.json"
    out.mkdir(parents=True, exist_ok=True)
    if file.is_file():
        import json

        if json.loads(file.read_text()) != json.loads(json.dumps(said)):
            raise TrainingError(f"{out} holds another training (see {file}): give another --out, or delete that folder")
        return
    checkpoint.write_json(file, said)


def _write_metrics(out: Path, rows: Sequence[tuple[int, str, float]]) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema={"step": pl.Int64, "name": pl.String, "value": pl.Float64}, orient="row")
    write_atomically(out / "metrics.parquet", frame.write_parquet)
    return frame
