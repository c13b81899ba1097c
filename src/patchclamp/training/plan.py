"""Training: every number that decides what a run ends in."""

import math
from dataclasses import dataclass
from typing import Literal

from patchclamp.errors import TrainingError


def log_spaced(steps: int, count: int = 20) -> tuple[int, ...]:
    """At most `count` + 1 steps from 0 to `steps`: 0, then evenly spaced in the logarithm, rounded, without repeats."""
    if steps < 1 or count < 1:
        raise TrainingError(f"{count} checkpoints over {steps} steps were asked: give at least 1 of each")
    found = {round(math.exp(math.log(steps) * i / max(count - 1, 1))) for i in range(count)} | {0, steps}
    return tuple(sorted(found))


@dataclass(frozen=True)
class Training:
    """Every number of a training.

    Args:
        steps: updates.
        batch: rows of an update.
        accumulate: passes that an update is split into; the gradient is that of the whole batch.
        rate: the highest learning rate.
        schedule: what follows the warm-up: "constant", "linear" or "cosine" down to `floor` * rate at the last step.
        warmup: updates over which the rate grows linearly from 0.
        floor: share of the rate that is left at the end.
        optimizer: "adamw", or "sgd" (with `betas[0]` as momentum).
        decay: weight decay (decoupled), on tensors of two axes and more.
        betas: AdamW's.
        epsilon: AdamW's.
        clip: largest norm of the whole gradient; None: as it is.
        precision: of the forward and backward pass; weights and moments stay float32.
        seed: of what the model draws by chance (dropout); data has its own.
        checkpoints: steps to keep, or how many, log-spaced.
        evaluate: measures are taken every so many steps, and at checkpoints.
        save: a state to go on from is written every so many steps, too (it is dropped when the next one is there).
    """

    steps: int
    batch: int = 32
    accumulate: int = 1
    rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: int = 0
    floor: float = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    clip: float | None = 1.0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    checkpoints: int | tuple[int, ...] = 20
    evaluate: int = 100
    save: int = 500

    @property
    def kept(self) -> tuple[int, ...]:
        """Steps whose checkpoint stays."""
        if isinstance(self.checkpoints, int):
            return log_spaced(self.steps, self.checkpoints)
        return tuple(sorted({*self.checkpoints, 0, self.steps}))

    def rate_at(self, step: int) -> float:
        """The learning rate of the update that follows `step` updates."""
        up = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        if self.schedule == "constant" or done < 0:
            return self.rate * up
        down = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.rate * up * (self.floor + (1 - self.floor) * down)
