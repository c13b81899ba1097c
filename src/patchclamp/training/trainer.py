"""The trainer: updates, clamps, measures, checkpoints; killed and begun again it ends in the same weights."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from patchclamp.errors import TrainingError
from patchclamp.models.model import Model
from patchclamp.training import checkpoint, distributed
from patchclamp.training.clamp import Clamp
from patchclamp.training.data import Data
from patchclamp.training.identity import claim, identity, provenance
from patchclamp.training.interrupt import Interrupt
from patchclamp.training.loss import Loss, next_token
from patchclamp.training.metrics import UPDATE, Metrics
from patchclamp.training.plan import Training
from patchclamp.training.update import Update

Measure = Callable[[Model, int], Mapping[str, float]]
"""(model, step) -> numbers by name. Must leave the model as it is. It runs in evaluation mode, in the first process only."""
Progress = Callable[[int, Mapping[str, float]], None]
"""Called with a step and its numbers, whenever measures were taken."""
Tick = Callable[[int, int, Mapping[str, float]], None]
"""Called with updates done, of how many, and the last update's numbers."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A finished training.

    Args:
        model: the model that was given, with its last weights.
        out: the run's folder: training.json, metrics.parquet, checkpoints/step-NNNNNNN.
        metrics: a row per step and number: step, name, value. Of an update: loss, rate, gradient, tokens (see `metrics.UPDATE`).
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
    tick: Tick | None = None,
) -> Trained:
    """Train a model's weights in place, or go on with a run that was cut off.

    On one process, or on those of torch.distributed: then each calls this alike, with the same folder; the first one writes.
    Modes (train, eval) and hooks are left as they were found; gradients are cleared.

    Args:
        model: a model (`begin`, `lora`, `Model.load`); its weights that require gradients are changed.
        data: rows by step.
        training: the numbers.
        out: the run's folder. One that holds a run of the same training goes on from its last checkpoint.
        clamps: what is held while it learns.
        measures: what is measured every `training.evaluate` steps and at every checkpoint.
        loss: of the logits and the rows.
        progress: called whenever measures were taken.
        tick: called after every update.

    Raises:
        TrainingError: the folder holds another training, or a damaged checkpoint; rows that the model cannot take.
        NumericsError: the loss or its gradient is not finite.
        KeyboardInterrupt: Ctrl-C; the state behind the last update is written first. (A second Ctrl-C does not wait for it.)
    """
    with as_found(model):
        return _Run(model, data, training, Path(out), clamps, measures, loss, progress, tick).carry_out()


class _Run:
    """One call of `train`."""

    def __init__(
        self, model: Model, data: Data, training: Training, out: Path, clamps: Sequence[Clamp], measures: Sequence[Measure],
        loss: Loss, progress: Progress | None, tick: Tick | None,
    ) -> None:  # fmt: skip
        distributed.require_room(training.batch)
        self.model, self.training, self.out, self.first = model, training, out, distributed.rank() == 0
        self.measures, self.progress, self.tick = measures, progress, tick
        distributed.alike(model.hf)
        self.update = Update(model, data, training, clamps, loss)
        self.update.require_fit()
        said = identity(model, data, training, clamps, loss)
        if self.first:
            claim(out, said)
        self.step = self._go_on()
        self.metrics = Metrics(out, self.step) if self.first else None
        self.tokens = self.metrics.tokens if self.metrics else 0.0
        self.begun, self.timed = time.time(), [(self.step, time.perf_counter())]

    def carry_out(self) -> Trained:
        """Everything that is left."""
        training, model = self.training, self.model
        object.__setattr__(
            model, "loaded", False
        )  # its weights are no longer those of files, whose hash would be taken for theirs
        with Interrupt() as interrupt:
            stop = False
            while True:
                due = self.step in training.kept
                if due or self.step % training.evaluate == 0:
                    self._measure()
                stop = stop or (interrupt.asked and distributed.world() == 1)  # of several processes, all stop behind one update
                if due or (self.step % training.save == 0 and self.step) or stop:
                    self._save(due)
                if stop:
                    raise KeyboardInterrupt
                if self.step >= training.steps:
                    break
                stop = self._advance(interrupt.asked)
        frame = self.metrics.whole() if self.metrics else pl.DataFrame()
        distributed.together(model.device)
        return Trained(replace(model, loaded=False), self.out, frame)

    def _go_on(self) -> int:
        """Load the last checkpoint, if there is one; the step that it is behind."""
        distributed.together(self.model.device)
        step = distributed.agreed(checkpoint.resumable(self.out) if self.first else None, self.model.device)
        if step is None:
            for clamp in self.update.clamps:
                clamp.updated(self.model, 0)
            return 0
        if step not in checkpoint.steps_of(self.out):
            raise TrainingError(f"process {distributed.rank()} does not see {self.out}: give a folder that all processes share")
        checkpoint.restore(self.out, self.model, self.update.optimizer, self.update.scaler, step)
        return step

    def _advance(self, asked: bool) -> bool:
        """One update; whether any process was asked to stop."""
        numbers, stop = self.update(self.step, asked)
        self.tokens += numbers["tokens"]
        numbers["tokens"] = self.tokens
        if self.metrics:
            self.metrics.add(self.step, numbers)
        self.step += 1
        if self.tick is not None and self.first:
            self.tick(self.step, self.training.steps, numbers)
        return stop

    def _measure(self) -> None:
        if self.metrics is None or self.step in self.metrics.measured:
            return
        self.model.hf.eval()
        numbers: dict[str, float] = {}
        for measure in self.measures:
            numbers |= measure(self.model, self.step)
        if taken := sorted(set(numbers) & set(UPDATE)):
            raise TrainingError(f"a measure is called {taken[0]!r}, which is a number of the update: choose another name")
        self.metrics.add(self.step, numbers)
        self.metrics.measured.add(self.step)
        if self.progress is not None:
            self.progress(self.step, numbers)

    def _save(self, kept: bool) -> None:
        """Numbers first, so that no checkpoint is without its own; then what it replaces is taken away."""
        if self.metrics:
            self.metrics.whole() if kept else self.metrics.piece(self.step)
            checkpoint.keep(self.out, self.model, self.update.optimizer, self.update.scaler, self.step)
            self._provenance()
            for step in checkpoint.steps_of(self.out):
                if step < self.step and step not in self.training.kept:
                    checkpoint.drop(self.out, step)
                elif step < self.step and self.training.states == "last":
                    checkpoint.forget(self.out, step)
        distributed.together(self.model.device)

    def _provenance(self) -> None:
        """Versions and seconds, apart from what is compared: a file per call that trained."""
        self.timed.append((self.step, time.perf_counter()))
        start = self.timed[0][1]
        body = {**provenance(self.model, distributed.world()), "began": self.begun,
                "seconds": [[step, round(at - start, 4)] for step, at in self.timed]}  # fmt: skip
        (self.out / "provenance").mkdir(exist_ok=True)
        checkpoint.write_json(self.out / "provenance" / f"{self.begun:.3f}.json", body)


@contextmanager
def as_found(model: Model) -> Generator[None, None, None]:
    """Put modes back and clear gradients, also after an exception."""
    modes = [(module, module.training) for module in model.hf.modules()]
    with ExitStack() as stack:
        stack.callback(model.hf.zero_grad, set_to_none=True)
        for module, training in modes:
            stack.callback(setattr, module, "training", training)
        yield
