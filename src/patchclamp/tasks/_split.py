"""Splitting: three sets that share no prompt, no mirror and no group."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from patchclamp.errors import TaskError
from patchclamp.tasks._examples import Example, Examples

SHARES = (1 / 2, 1 / 4, 1 / 4)
NAMES = ("fit", "select", "confirm")


class Split(NamedTuple):
    """What is learned from, what thresholds and ranks are chosen on, and what is reported."""

    fit: Examples
    select: Examples
    confirm: Examples


def clusters(items: Sequence[Example]) -> list[list[int]]:
    """Indices of examples that hang together: through a shared prompt (clean or corrupt) or a named group."""
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    seen: dict[object, int] = {}
    for i, item in enumerate(items):
        named = [("group", item.pair.group)] if item.pair.group else []
        for key in [item.clean, item.corrupt, *named]:
            if key is not None:
                parent[root(i)] = root(seen.setdefault(key, i))
    found: dict[int, list[int]] = {}
    for i in range(len(items)):
        found.setdefault(root(i), []).append(i)
    return list(found.values())


def deal(examples: Examples, seed: int, shares: Sequence[float] = SHARES) -> Split:
    """Give each cluster to the set that lacks most, largest clusters first.

    Raises:
        TaskError: a set would stay below half of its share, because there are too few clusters.
    """
    groups = clusters(examples.items)
    random.Random(seed).shuffle(groups)
    groups.sort(key=len, reverse=True)
    wanted = [share * len(examples) for share in shares]
    sets: list[list[int]] = [[] for _ in shares]
    for group in groups:
        lacking = [(want - len(have)) / want for want, have in zip(wanted, sets, strict=True)]
        sets[lacking.index(max(lacking))].extend(group)
    if any(len(have) < max(1, want / 2) for want, have in zip(wanted, sets, strict=True)):
        sizes = ", ".join(f"{name} {len(have)} (wanted {want:.0f})" for name, want, have in zip(NAMES, wanted, sets, strict=True))
        raise TaskError(
            f"{examples.task!r} cannot be split into three disjoint sets: its {len(examples)} pairs share prompts or groups, so "
            f"that they fall into {len(groups)} clusters, the largest of {max(map(len, groups))}: {sizes}; give more pairs with "
            f"prompts of their own"
        )
    return Split(*(examples.take(sorted(have)) for have in sets))
