"""Closings: the benefit with nothing closed, with each part closed alone, and with pairs of parts closed.

Interactions, conditional roles and relations are all read off these numbers, so they are measured once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError, PatchclampError
from patchclamp.methods import counted, groups_of, noise_floor
from patchclamp.metrics import Metric, metric_named
from patchclamp.parts import Fallback, Gated, Parts, Tied
from patchclamp.scores import Part
from patchclamp.tasks import Examples

MOST = 500
"""More parts than this have too many pairs to close every one of them."""
GATES = 1 << 26
"""Gates held at once: one for each part in each setting."""
Pairs = Sequence[tuple[int, int]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Closings:
    """What was measured.

    Args:
        parts: every counted part, in forward order.
        pairs: of indices into `parts`, the first before the second.
        opened: the benefit with every gate open.
        alone: with one part closed; NaN for parts that are in no pair.
        both: with both parts of a pair closed.
        groups: of examples, for intervals.
        noise: what rounding alone can make of an effect; of an interaction, twice that.
        about: metric, fallback, n, norm, model, task.
    """

    parts: tuple[Part, ...]
    pairs: tuple[tuple[int, int], ...]
    opened: Float[np.ndarray, " example"]
    alone: Float[np.ndarray, "part example"]
    both: Float[np.ndarray, "pair example"]
    groups: tuple[str, ...]
    noise: float
    about: Mapping[str, Any]

    def __post_init__(self) -> None:
        for array in (self.opened, self.alone, self.both):
            array.flags.writeable = False

    @property
    def first(self) -> list[int]:
        """Of every pair, the part that comes first."""
        return [i for i, _ in self.pairs]

    @property
    def second(self) -> list[int]:
        """Of every pair, the part that comes second."""
        return [j for _, j in self.pairs]

    @property
    def effects(self) -> Float[np.ndarray, "part example"]:
        """What closing one part takes from the benefit."""
        return self.opened - self.alone

    @property
    def together(self) -> Float[np.ndarray, "pair example"]:
        """What closing both parts of a pair takes from the benefit."""
        return self.opened - self.both

    @property
    def interaction(self) -> Float[np.ndarray, "pair example"]:
        """I = m(both open) - m(first closed) - m(second closed) + m(both closed)."""
        return self.opened - self.alone[self.first] - self.alone[self.second] + self.both

    def to_record(self) -> dict[str, Any]:
        """As plain arrays, a frame of the pairs, and what produced them."""
        names = [str(part) for part in self.parts]
        frame = pl.DataFrame({"a": [names[i] for i in self.first], "b": [names[j] for j in self.second]})
        return {
            "parts": names, "pairs": frame, "opened": self.opened, "alone": self.alone, "both": self.both,
            "groups": list(self.groups), "noise": self.noise, "about": dict(self.about),
        }  # fmt: skip


def close_pairs(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    *,
    metric: str | Metric | None = None,
    pairs: Sequence[tuple[Part | str, Part | str]] | None = None,
    frozen_norm: bool = False,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Closings:
    """Measure the benefit with each part and each pair of parts closed, exactly.

    Args:
        parts: of any kind.
        examples: on which prompts.
        fallback: what a closed gate passes.
        metric: by default the task's.
        pairs: of parts; by default all of the counted ones.
        frozen_norm: hold the final norm's scale at the model's own run (`Gated.frozen_norm`).
        batch_size: examples at once.
        progress: called with (settings x examples done, in all).

    Cost: a forward pass per part and per pair, each from its later part's block on: settings are given in an order in which
    what pairs have in common (one part closed) runs once (`models.tree`).

    Raises:
        GateError: a part that is not there, a pair of a part with itself; or a norm to be frozen under parts that have none.
        PatchclampError: all pairs of more than 500 parts are asked for (`screen` is for these).
    """
    chosen = metric if isinstance(metric, Metric) else metric_named(metric or examples.metric)
    labels = counted(parts)
    wanted = _indices(labels, pairs)
    measuring = held_norm(parts) if frozen_norm else parts
    used = sorted({number for pair in wanted for number in pair})
    settings: list[tuple[int, ...]] = [(), *((number,) for number in used), *wanted]
    in_forward_order = sorted(range(len(settings)), key=lambda number: settings[number])
    rows: list[Tensor] = []
    done, total = 0, len(settings) * len(examples)
    for batch in examples.batches(batch_size):
        values = torch.empty(len(settings), len(batch), dtype=torch.float64)
        for some in _chunks(in_forward_order, max(1, GATES // len(parts.labels))):
            gates = closed_gates(parts, [settings[number] for number in some])
            values[some] = (chosen.sign * measuring.measure(batch, gates, fallback, chosen)).cpu().double()
            done += len(some) * len(batch)
            if progress is not None:
                progress(done, total)
        rows.append(values)
    every = torch.cat(rows, 1).numpy()
    alone = np.full((len(labels), len(examples)), np.nan)
    alone[used] = every[1 : 1 + len(used)]
    about = {
        "metric": chosen.name, "fallback": fallback.kind, "off_distribution": fallback.off_distribution, "n": len(examples),
        "norm": "frozen" if frozen_norm else "free", "model": parts.model.name, "task": examples.task,
    }  # fmt: skip
    noise = noise_floor(measuring, examples, fallback, chosen)
    return Closings(
        tuple(labels),
        tuple(wanted),
        every[0].copy(),
        alone,
        every[1 + len(used) :].copy(),
        tuple(groups_of(examples)),
        noise,
        about,
    )


def closed_gates(parts: Parts, settings: Sequence[Sequence[int]]) -> Float[Tensor, "setting 1 1 part"]:
    """Gates, one setting for each set of counted parts that are closed."""
    gates = parts.open(len(settings))
    where = [(row, parts.counted[number]) for row, shut in enumerate(settings) for number in shut]
    if where:
        at, part = torch.tensor(where, device=gates.device).T
        gates[at, 0, 0, part] = 0
    return gates


def held_norm(parts: Parts) -> Gated | Tied:
    """The parts with the final norm's scale held; raises `GateError` where they are not parts at sites."""
    if not isinstance(parts, Gated | Tied):
        raise GateError(
            f"the norm's scale can be held under parts at sites (nodes, gated, tied), not under {type(parts).__name__}"
        )
    return parts.frozen_norm()


def place_of(labels: Sequence[Part], part: Part | str) -> int:
    """Which of the parts this is; raises `GateError` where it is none."""
    names = [str(label) for label in labels]
    if str(part) not in names:
        raise GateError(f"{part} is not among the {len(names)} parts ({', '.join(names[:3])}, ... {names[-1]})")
    return names.index(str(part))


def _indices(labels: Sequence[Part], pairs: Sequence[tuple[Part | str, Part | str]] | None) -> list[tuple[int, int]]:
    if pairs is None:
        if len(labels) > MOST:
            raise PatchclampError(
                f"all pairs of {len(labels)} parts are {len(labels) * (len(labels) - 1) // 2}: use screen, or name pairs (pairs=)"
            )
        return list(combinations(range(len(labels)), 2))
    index = {str(label): number for number, label in enumerate(labels)}
    found: list[tuple[int, int]] = []
    for pair in pairs:
        i, j = sorted(index[str(part)] if str(part) in index else place_of(labels, part) for part in pair)
        if i == j:
            raise GateError(f"a pair is of two parts, and {pair[0]} was given twice")
        found.append((i, j))
    return list(dict.fromkeys(found))


def _chunks(numbers: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield list(numbers[start : start + size])
