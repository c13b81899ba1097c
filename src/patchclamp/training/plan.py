"""Training: every number that decides what a run ends in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from patchclamp.errors import TrainingError

SCHEDULES = ("constant", "linear", "cosine", "wsd")
OPTIMIZERS = ("adamw", "sgd")
PRECISIONS = ("float32", "bfloat16", "float16")
STATES = ("all", "last")


def log_spaced(steps: int, count: int = 20) -> tuple[int, ...]:
    """At most `count` + 1 steps from 0 to `steps`: 0, then evenly spaced in the logarithm, rounded, without repeats."""
    if steps < 1 or count < 1:
        raise TrainingError(f"{count} checkpoints over {steps} steps were asked: give at least 1 of each")
    found = {0, steps} | {round(math.exp(math.log(steps) * i / (count - 1))) for i in range(count) if count > 1}
    return tuple(sorted(found))


@dataclass(frozen=True)
class Training:
    """Every number of a training.

    Args:
        steps: updates.
        batch: rows of an update.
        accumulate: passes that an update is split into (of each process); the gradient is that of the whole batch.
        rate: the highest learning rate.
        schedule: what follows the warm-up: "constant"; "linear" or "cosine" down to `floor` * rate behind the last update; "wsd"
            (warm-up, stable, decay: https://arxiv.org/abs/2404.06395), constant but for the last `cooldown` updates, over which
            it falls linearly to `floor` * rate.
        warmup: updates over which the rate grows linearly from 0.
        cooldown: of "wsd".
        floor: share of the rate that is left at the end.
        optimizer: "adamw" (https://arxiv.org/abs/1711.05101), or "sgd" (with `betas[0]` as momentum).
        decay: weight decay (AdamW's is decoupled from the gradient), on tensors of two axes and more.
        betas: AdamW's.
        epsilon: AdamW's.
        clip: largest norm of the whole gradient; None: as it is.
        precision: of the forward and backward pass; weights and moments stay as they are (float32). In float16 the loss is scaled, and
            an update whose scaled gradients overflow is left out (https://arxiv.org/abs/1710.03740).
        seed: of what the model draws by chance (dropout); data has its own.
        checkpoints: steps to keep, or how many, log-spaced.
        states: which checkpoints keep the optimizer's state: "all", or the "last" only (AdamW's takes twice the weights' room).
        evaluate: measures are taken every so many steps, and at checkpoints.
        save: a state to go on from is written every so many steps, too (it is dropped when the next one is there).

    Raises:
        TrainingError: a number that makes no sense, with what would.
    """

    steps: int
    batch: int = 32
    accumulate: int = 1
    rate: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 0
    cooldown: int = 0
    floor: float = 0.0
    optimizer: str = "adamw"
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip: float | None = 1.0
    precision: str = "float32"
    seed: int = 0
    checkpoints: int | tuple[int, ...] = 20
    states: str = "all"
    evaluate: int = 100
    save: int = 500

    def __post_init__(self) -> None:
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("states", self.states, STATES)
        for name in ("steps", "batch", "accumulate", "evaluate", "save"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        _require(self.accumulate <= self.batch, "accumulate", self.accumulate, f"at most the {self.batch} rows of a batch")
        _require(0 < self.rate < math.inf, "rate", self.rate, "above 0")
        _require(0 <= self.floor <= 1, "floor", self.floor, "a share between 0 and 1")
        _require(0 <= self.warmup <= self.steps, "warmup", self.warmup, f"between 0 and the {self.steps} steps")
        room = self.steps - self.warmup
        _require(0 <= self.cooldown <= room, "cooldown", self.cooldown, f"between 0 and the {room} steps behind the warm-up")
        wsd = self.schedule == "wsd"
        _require((self.cooldown > 0) == wsd, "cooldown", self.cooldown,
                 "the steps of the descent" if wsd else "0 (only schedule='wsd' has one)")  # fmt: skip
        _require(self.decay >= 0, "decay", self.decay, "0 or more")
        _require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "from 0 to below 1")
        _require(self.epsilon > 0, "epsilon", self.epsilon, "above 0")
        _require(self.clip is None or self.clip > 0, "clip", self.clip, "above 0, or None")
        if isinstance(self.checkpoints, int):
            _require(self.checkpoints >= 1, "checkpoints", self.checkpoints, "1 or more, or steps")
        else:
            outside = [step for step in self.checkpoints if not 0 <= step <= self.steps]
            _require(not outside, "checkpoints", outside, f"steps between 0 and {self.steps}")

    @property
    def kept(self) -> tuple[int, ...]:
        """Steps whose checkpoint stays."""
        if isinstance(self.checkpoints, int):
            return log_spaced(self.steps, self.checkpoints)
        return tuple(sorted({*self.checkpoints, 0, self.steps}))

    def rate_at(self, step: int) -> float:
        """The learning rate of the update that follows `step` updates."""
        up = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        falling = self.cooldown if self.schedule == "wsd" else self.steps - self.warmup
        done = (step - (self.steps - falling)) / max(falling, 1)
        if self.schedule == "constant" or done < 0:
            return self.rate * up
        down = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.rate * up * (self.floor + (1 - self.floor) * down)


def _one_of(name: str, given: object, known: Sequence[str]) -> None:
    if given not in known:
        raise TrainingError(f"{name} {given!r} was asked: choose from {', '.join(known)}")


def _require(holds: bool, name: str, given: object, wanted: str) -> None:
    if not holds:
        raise TrainingError(f"{name} {given!r} was asked: give {wanted}")
