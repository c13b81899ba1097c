"""The tree of runs: what settings have in common runs once.

Two settings whose gates agree below block l hold the same there, so they are one run until they part. The root is the model's
own run, which is kept; a setting starts where it first differs from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Pattern = tuple[int, ...]
"""What a setting does at each stage, as a number (0: nothing, every gate there is open). Stage 2 l is the input of block l
(behind the last block: what is done there), stage 2 l + 1 is inside block l."""


@dataclass(frozen=True)
class Level:
    """The runs at one block, those that go on from the block below first.

    Args:
        settings: by run, a setting that it is a run of.
        parents: by run, the run of the block below that it goes on from; -1 where it starts, from the model's own run.
        reads: by run, the first run with the same input; -1 where the input is that of the model's own run.
    """

    settings: tuple[int, ...]
    parents: tuple[int, ...]
    reads: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.settings)

    @property
    def going(self) -> int:
        """How many runs go on from the block below."""
        return sum(parent >= 0 for parent in self.parents)


@dataclass(frozen=True)
class Tree:
    """The runs of several settings, by block and behind the last one; and, by setting, its run there."""

    levels: tuple[Level, ...]
    leaves: tuple[int, ...]

    @property
    def widest(self) -> int:
        """Most runs at one block; at least 1, for a model is never called with no rows."""
        return max(1, *map(len, self.levels))


def grow(patterns: Sequence[Pattern], joins: Sequence[int]) -> Tree:
    """The tree of settings that each start at the block `joins`; what they do below it is in what they start from."""
    levels: list[Level] = []
    runs: dict[int, int] = {}
    for block in range(len(patterns[0]) // 2 + 1):
        going = sorted(runs, key=runs.__getitem__)
        starting = [setting for setting, join in enumerate(joins) if join == block]
        found: dict[tuple[object, ...], int] = {}
        firsts: dict[tuple[object, ...], int] = {}
        settings, parents, reads, here = list[int](), list[int](), list[int](), dict[int, int]()
        for setting in (*going, *starting):
            pattern, parent = patterns[setting], runs.get(setting, -1)
            entry = (parent, pattern[: 2 * block] if parent < 0 else (), pattern[2 * block])
            key = (entry, pattern[2 * block : 2 * block + 2])
            if key not in found:
                found[key] = len(settings)
                settings.append(setting)
                parents.append(parent)
                own = parent < 0 and not any(entry[1]) and not entry[2]
                reads.append(-1 if own else firsts.setdefault(entry, found[key]))
            here[setting] = found[key]
        levels.append(Level(tuple(settings), tuple(parents), tuple(reads)))
        runs = here
    return Tree(tuple(levels), tuple(runs[setting] for setting in range(len(patterns))))


def apart(starts: Sequence[Sequence[int]]) -> Tree:
    """Runs of one block each: by block, the settings that run there from the model's own run, and end with it."""
    levels = [Level(tuple(here), (-1,) * len(here), (-1,) * len(here)) for here in starts]
    return Tree((*levels, Level((), (), ())), ())
