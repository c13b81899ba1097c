"""Limits: how many settings and prompts a pass may hold at once, from what passes before it took."""

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from patchclamp.models.checkpointing import Room

if TYPE_CHECKING:
    from patchclamp.parts.gated import Gated

CACHE = 24 << 20
"""Bytes that the widest activation of one folded pass may take on a CPU: more settings at once run slower, out of its cache."""


@dataclass
class Limits:
    """What is known of the memory that passes of some parts take: backward passes, but for `prompts`.

    Args:
        settings: at once at most, since memory ran out.
        every: whether every block is computed again, since memory ran out.
        examples: at once at most, since memory ran out.
        rows: by columns that ran, the bytes that a row takes where nothing is computed again.
        prompts: at once at most in passes without gradient, since memory ran out with one setting or in the model's own run.
    """

    settings: int | None = None
    every: bool = False
    examples: int | None = None
    rows: dict[int, float] = field(default_factory=dict[int, float])
    prompts: int | None = None

    def together(self, memory: int, rows: int, columns: int) -> int:
        """How many settings may run at once: 1 until a pass has shown what one takes."""
        if self.every or not self.rows:
            return 1
        # at most proportional to columns in shorter rows, at most to their square (attention) in longer ones
        row = min(known * (columns / at) ** (1 if columns <= at else 2) for at, known in self.rows.items())
        most = max(1, int(memory // (rows * row + 1)))
        return most if self.settings is None else min(most, self.settings)

    def saw(self, room: Room, rows: int, columns: int) -> None:
        """Remember what a pass took."""
        self.rows[columns] = max(self.rows.get(columns, 0.0), room.needed / rows)

    def tighten(self, settings: int, examples: int) -> bool:
        """Memory ran out: what the next try leaves out, said aloud. Whether there is anything left to leave out."""
        if settings > 1:
            self.settings = settings // 2
            warnings.warn(f"memory ran out with {settings} settings at once: going on with {self.settings}", stacklevel=6)
        elif not self.every:
            self.every = True
            warnings.warn(
                "memory ran out in a backward pass: going on with every block's activations computed again", stacklevel=6
            )
        elif examples > 1:
            self.examples = examples // 2
            warnings.warn(f"memory ran out with {examples} prompts at once: going on with {self.examples}", stacklevel=6)
        else:
            return False
        return True


_LIMITS: "WeakKeyDictionary[Gated, Limits]" = WeakKeyDictionary()


def limits_of(parts: "Gated") -> Limits:
    """What is known of the parts' passes so far."""
    return _LIMITS.setdefault(parts, Limits())
