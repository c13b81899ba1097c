"""Shapley values and Shapley interaction indices of parts, by sampling permutations.

A coalition S is a set of open parts, v(S) the benefit with the others closed. With n parts:

    phi(i)    = mean over permutations of  v(before i, with i) - v(before i)
    I(i, j)   = sum over S without i, j of |S|! (n - |S| - 2)! / (n - 1)!  [v(S+i+j) - v(S+i) - v(S+j) + v(S)]

A permutation opens parts one by one, so its marginals add up to v(all) - v(none) exactly: efficiency holds in every
permutation. For the interaction of two parts that stand side by side in it, one more run (the two exchanged) is enough, and the
set before them is drawn as the index wants it. In one round, n / 2 paths cross every pair exactly once (Walecki's
decomposition of the complete graph), with parts assigned to its points at random. Every permutation is also run backwards
(antithetic).

Shapley 1953; Castro et al. 2009 (https://doi.org/10.1016/j.cor.2008.04.004); Grabisch and Roubens 1999
(https://doi.org/10.1007/s001820050125).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.dependence.closings import Progress, closed_gates, held_norm
from patchclamp.dependence.table import Dependence
from patchclamp.errors import PatchclampError
from patchclamp.methods import counted, groups_of
from patchclamp.metrics import Metric, metric_named
from patchclamp.parts import Fallback, Parts
from patchclamp.scores import Scores
from patchclamp.scores.statistics import grouped, names_of
from patchclamp.tasks import Examples

ROUNDS = 2
RESAMPLES = 1000
TOGETHER = 4096
"""Settings of one call."""
Path = tuple[np.ndarray, np.ndarray]
"""A permutation of the parts, and which of its neighbours count."""


@dataclass(frozen=True, eq=False)
class Shapley:
    """Sampled Shapley values and interactions.

    Args:
        values: a row per part: `score` = phi with `low`, `high` (bootstrap over groups of examples and over rounds of permutations
            together), `p`, `q` (over examples), `sampling` (standard error from permutations alone; empty with one round).
        pairs: a row per pair: `score` = the Shapley interaction index, `low`, `high`, `p`, `q`, `sampling` likewise.
        efficiency: the largest |sum of a permutation's marginals - (v(all) - v(none))| over permutations and examples, both ends
            measured by themselves: rounding.
        about: what produced them; `permutations` is how many were run.
    """

    values: Scores
    pairs: Dependence
    efficiency: float
    about: Mapping[str, Any]

    def to_record(self) -> dict[str, Any]:
        """As plain frames."""
        return {
            "values": self.values.table, "pairs": self.pairs.table, "efficiency": self.efficiency, "about": dict(self.about),
        }  # fmt: skip


def shapley(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    *,
    metric: str | Metric | None = None,
    rounds: int = ROUNDS,
    frozen_norm: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Shapley:
    """Shapley value of every part and Shapley interaction index of every pair.

    Args:
        parts: the players are the counted ones.
        examples: on which prompts.
        fallback: what a closed gate passes.
        metric: by default the task's.
        rounds: of n / 2 paths (n the parts, one more if odd), each forwards and backwards; every pair gets two samples a round.
        frozen_norm: hold the final norm's scale at the model's own run.
        batch_size: examples at once.
        seed: of permutations, bootstrap and sign flips.
        about: provenance to add.
        progress: called with (permutations x examples done, in all).

    Cost: about 2 n^2 forward passes a round (n permutations of n prefixes, and one exchange for each of n - 1 neighbours), and two.

    Raises:
        PatchclampError: fewer than two parts, or no rounds.
    """
    chosen = metric if isinstance(metric, Metric) else metric_named(metric or examples.metric)
    labels = counted(parts)
    n = len(labels)
    if n < 2 or rounds < 1:
        raise PatchclampError(f"Shapley values of {n} parts in {rounds} rounds were asked for: give 2 parts and 1 round at least")
    measuring: Parts = held_norm(parts) if frozen_norm else parts
    draw = np.random.default_rng(seed)
    paths = [permutations(n, draw.permutation(n + n % 2)) for _ in range(rounds)]
    singles, doubles, worst = _sampled(measuring, examples, fallback, chosen, n, paths, batch_size, progress)
    facts = {
        "method": "shapley", "metric": chosen.name, "fallback": fallback.kind, "seed": seed, "rounds": rounds,
        "permutations": sum(map(len, paths)), "norm": "frozen" if frozen_norm else "free", "model": parts.model.name,
        "task": examples.task, **(about or {}),
    }  # fmt: skip
    groups = groups_of(examples)
    upper = np.triu_indices(n, 1)
    values = Scores.from_samples(labels, singles.mean(0), facts, groups, seed=seed)
    values = Scores(values.table.with_columns(**_spread(singles, groups, seed)), values.about)
    crossed = doubles[:, upper[0], upper[1]]
    pairs = Dependence.from_samples(
        labels, list(zip(*(one.tolist() for one in upper), strict=True)), crossed.mean(0), facts, groups, seed=seed
    )
    pairs = Dependence(pairs.table.with_columns(**_spread(crossed, groups, seed)), pairs.parts, pairs.about)
    return Shapley(values, pairs, worst, facts)


def _sampled(
    parts: Parts, examples: Examples, fallback: Fallback, metric: Metric, n: int, rounds: Sequence[Sequence[Path]],
    batch_size: int, progress: Progress | None,
) -> tuple[Float[np.ndarray, "round part example"], Float[np.ndarray, "round part part example"], float]:  # fmt: skip
    """Of every round, the mean marginal of each part and the index of each pair; and how far permutations are from efficient."""
    singles, doubles = (np.zeros((len(rounds), *(n,) * axes, len(examples))) for axes in (1, 2))
    worst, first, done, total = 0.0, 0, 0, sum(map(len, rounds)) * len(examples)
    for batch in examples.batches(batch_size):
        here = slice(first, first := first + len(batch))
        none, every = _values(parts, batch, fallback, metric, [range(n), ()])
        for number, (path, count) in ((number, path) for number, paths in enumerate(rounds) for path in paths):
            chain, swapped = _walk(parts, batch, fallback, metric, path)
            gains = np.diff(chain, axis=0)
            worst = max(worst, float(np.abs(gains.sum(0) - (every - none)).max()))
            singles[number, path, here] += gains / len(rounds[number])
            pair = chain[2:] - chain[1:-1] - swapped + chain[:-2]
            a, b = np.minimum(path[:-1], path[1:]), np.maximum(path[:-1], path[1:])
            doubles[number, a[count], b[count], here] += pair[count] / 2  # every pair is met forwards and backwards
            done += len(batch)
            if progress is not None:
                progress(done, total)
    return singles, doubles, worst


def _walk(
    parts: Parts, batch: Any, fallback: Fallback, metric: Metric, path: np.ndarray
) -> tuple[Float[np.ndarray, "prefix example"], Float[np.ndarray, "neighbour example"]]:
    """v of every prefix of the path, from none to all; and of each prefix with the second of the next two alone."""
    n, order = len(path), path.tolist()
    closed = [order[k:] for k in range(n + 1)]
    exchanged = [[order[k], *order[k + 2 :]] for k in range(n - 1)]
    values = _values(parts, batch, fallback, metric, [*closed, *exchanged])
    return values[: n + 1], values[n + 1 :]


def _values(
    parts: Parts, batch: Any, fallback: Fallback, metric: Metric, closed: Sequence[Sequence[int]]
) -> Float[np.ndarray, "setting example"]:
    """v with each of these sets closed."""
    found: list[Tensor] = []
    for start in range(0, len(closed), TOGETHER):
        gates = closed_gates(parts, closed[start : start + TOGETHER])
        found.append(metric.sign * parts.measure(batch, gates, fallback, metric))
    return torch.cat(found).cpu().double().numpy()


def permutations(n: int, names: np.ndarray) -> list[Path]:
    """Paths through n parts in which each two are neighbours exactly once, and the same backwards; and which neighbours count.

    Walecki's zigzags through an even number of points, at which the parts stand as `names` says. An odd number of parts gets one
    point more, which is left out again: those whom it parted become neighbours by that, and do not count. (A player that does
    nothing changes no Shapley interaction.)
    """
    found: list[Path] = []
    for path in _zigzags(names):
        places = np.flatnonzero(path != n)
        count = np.diff(places) == 1
        found += [(path[places], count), (path[places][::-1].copy(), count[::-1].copy())]
    return found


def _zigzags(names: np.ndarray) -> list[np.ndarray]:
    """n / 2 paths that cross each pair of n points once: 0, 1, n - 1, 2, n - 2, ..., turned by one each time."""
    n = len(names)
    steps = np.array([(k + 1) // 2 if k % 2 else -(k // 2) for k in range(n)])
    return [names[(steps + turn) % n] for turn in range(n // 2)]


def _spread(samples: Float[np.ndarray, "round row example"], groups: Sequence[str], seed: int) -> dict[str, pl.Series]:
    """Intervals that resample groups of examples and rounds at once, and the standard error over rounds."""
    rounds, rows, _ = samples.shape
    pieces = [grouped(one, names_of(groups)) for one in samples]
    sums, sizes = np.stack([one for one, _ in pieces]), pieces[0][1]
    draw = np.random.default_rng([seed, 2])
    empty = pl.Series([None] * rows, dtype=pl.Float64)
    error = samples.mean(2).std(0, ddof=1) / np.sqrt(rounds) if rounds > 1 else None
    if len(sizes) < 2:
        return {"low": empty, "high": empty, "sampling": empty if error is None else pl.Series(error)}
    by_round = draw.multinomial(rounds, np.full(rounds, 1 / rounds), size=RESAMPLES) / rounds
    by_group = draw.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=RESAMPLES).astype(float)
    means = np.stack([
        np.tensordot(some, sums, 1) @ counts / (counts @ sizes) for some, counts in zip(by_round, by_group, strict=True)
    ])  # fmt: skip
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return {"low": pl.Series(low), "high": pl.Series(high), "sampling": empty if error is None else pl.Series(error)}
