"""Schedule: from which step to which a clamp acts, and how strongly."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from patchclamp.errors import TrainingError

SHAPES = ("constant", "up", "down")


@dataclass(frozen=True, repr=False)
class Schedule:
    """The strength of a clamp at each step:

        s(t) = strength * shape(t)   for start <= t < stop,   0 elsewhere

        constant:  1
        up:        (t - start + 1) / (stop - start)     reaches 1 at the last step
        down:      (stop - t) / (stop - start)          is 1 at the first step

    Args:
        start: the first update that the clamp acts in.
        stop: the first update that it acts in no longer; None: to the end.
        strength: 0 (nothing) to 1 (held).
        shape: "constant", "up", "down", or a function of the step with a name, which enters the run's identity: a function
            whose numbers change must change its name.

    Raises:
        TrainingError: a strength outside 0 to 1, an end before the beginning, a ramp without end, a function without name.
    """

    start: int = 0
    stop: int | None = None
    strength: float = 1.0
    shape: str | Callable[[int], float] = "constant"

    def __post_init__(self) -> None:
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise TrainingError(
                f"a clamp from step {self.start} to {self.stop} was asked: begin at 0 or later, and end after that"
            )
        if not 0 <= self.strength <= 1:
            raise TrainingError(f"a clamp of strength {self.strength} was asked: choose from 0 (nothing) to 1 (held)")
        if isinstance(self.shape, str) and self.shape not in SHAPES:
            raise TrainingError(f"a schedule of shape {self.shape!r} was asked: choose {', '.join(SHAPES)}, or give a function")
        if self.shape in ("up", "down") and self.stop is None:
            raise TrainingError(f"a clamp that ramps {self.shape} needs the step at which it ends (stop)")
        if not isinstance(self.shape, str) and self.name == "<lambda>":
            raise TrainingError("a schedule's function has no name to be known by: define it with `def`, or give it a `name`")

    @property
    def name(self) -> str:
        """Of the shape."""
        if isinstance(self.shape, str):
            return self.shape
        found = getattr(self.shape, "name", None) or getattr(self.shape, "__name__", None) or "<lambda>"
        return str(found)

    def __repr__(self) -> str:
        return f"Schedule(start={self.start}, stop={self.stop}, strength={self.strength}, shape={self.name!r})"

    def __call__(self, step: int) -> float:
        """The strength at a step.

        Raises:
            TrainingError: the function gave a number outside 0 to 1.
        """
        if step < self.start or (self.stop is not None and step >= self.stop):
            return 0.0
        if isinstance(self.shape, str):
            if self.shape == "constant" or self.stop is None:
                return self.strength
            done = step - self.start + 1 if self.shape == "up" else self.stop - step
            return self.strength * (done / (self.stop - self.start))
        share = float(self.shape(step))
        if not (math.isfinite(share) and 0 <= share <= 1):
            raise TrainingError(f"the schedule {self.name!r} gave {share} at step {step}: it must give 0 to 1")
        return self.strength * share


ALWAYS = Schedule()
"""Held from the first update to the last."""
