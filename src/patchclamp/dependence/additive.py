"""Additivity: whether what several parts do together is the sum of what each does, from every set of them that can be closed.

With e(S) what closing the set S takes from the benefit m, n parts are additive where e(S) = sum of e({i}) over S for all 2^n sets. How far
they are from it is told in two ways: set by set, by e(S) - sum of e({i}); and in one number an order, by the Walsh decomposition of m
over all settings (each as likely as any other),

    m(S) = sum over T of w(T) (-1)^|S and T|,      share(k) = sum of w(T)^2 over |T| = k / sum of w(T)^2 over |T| > 0

share(1) is the R2 of the best additive law, share(2) what pairs add to it, and so on; shares add up to 1.

Papers: Singh et al. 2024, What needs to go right for an induction head?, https://arxiv.org/abs/2404.07129 (P024: ablations of induction
heads alone and together).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from patchclamp.dependence.closings import Progress, closed_gates, held_norm, place_of
from patchclamp.errors import PatchclampError
from patchclamp.methods import counted, groups_of
from patchclamp.metrics import Metric, metric_named
from patchclamp.parts import Fallback, Parts
from patchclamp.scores import Part
from patchclamp.scores.statistics import bootstrap, grouped, names_of
from patchclamp.tasks import Examples

MOST = 12
"""More parts than this have more than 4096 sets."""
TOGETHER = 1024
"""Settings of one call."""


@dataclass(frozen=True, eq=False)
class Additivity:
    """What every set of some parts does.

    Args:
        parts: the n parts, in forward order.
        sets: a row per set but the empty one, by size: `closed` (its parts, joined by blanks), `size`, `effect` (what closing it
            takes from the benefit) with `low`, `high`; `sum` (of its parts' own effects); `beyond` = effect - sum with `beyond_low`,
            `beyond_high` (of a single part: 0). Above 0 the parts stand in for each other, below 0 they need each other.
        orders: a row per order k from 1 to n: `share` with `low`, `high`.
        alone: a row per part: `first` (its effect, all others open), `last` (the same, all others of these parts closed) and
            `difference` = last - first with `low`, `high`: what the others' absence changes in its effect.
        about: metric, fallback, n, norm (frozen or free), model, task, benefit with all open.
    """

    parts: tuple[str, ...]
    sets: pl.DataFrame
    orders: pl.DataFrame
    alone: pl.DataFrame
    about: Mapping[str, Any]


def additivity(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    names: Sequence[Part | str] | None = None,
    *,
    metric: str | Metric | None = None,
    frozen_norm: bool = False,
    batch_size: int = 64,
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Additivity:
    """Close every set of some parts, exactly.

    Args:
        parts: of any kind; those that are not named stay open.
        examples: on which prompts.
        fallback: what a closed gate passes.
        names: which parts, at most 12 (all induction heads, say); by default all counted ones.
        metric: by default the task's. Additive in which units is part of the question: log-probabilities of heads that agree add
            up less than their logits do.
        frozen_norm: hold the final norm's scale at the model's own run (`Gated.frozen_norm`). Then what heads of the last layer do to
            logits adds up exactly, where no MLP reads them; what is left free is the norm's: a head that is closed makes the stream
            smaller, and all others count more.
        batch_size: examples at once.
        resamples: of groups of examples, for 95 % percentile intervals.
        seed: of the intervals.
        progress: called with (settings x examples done, in all).

    Cost: 2^n forward passes, each from its first closed part's block on, with what settings have in common run once.

    Raises:
        GateError: a part that is not there; or a norm to be frozen under parts that have none.
        PatchclampError: fewer than two parts, one twice, or more than 12.
    """
    chosen = metric if isinstance(metric, Metric) else metric_named(metric or examples.metric)
    labels = counted(parts)
    places = sorted(place_of(labels, name) for name in names) if names is not None else list(range(len(labels)))
    if not 2 <= len(places) <= MOST or len(set(places)) < len(places):
        raise PatchclampError(
            f"every set of {len(places)} parts ({len(set(places))} different) was to be closed: name 2 to {MOST} that differ"
        )
    said = [str(labels[place]) for place in places]
    settings = [tuple(place for bit, place in enumerate(places) if number >> bit & 1) for number in range(2 ** len(places))]
    measuring = held_norm(parts) if frozen_norm else parts
    values = _measured(measuring, examples, fallback, chosen, settings, batch_size, progress)
    groups = names_of(groups_of(examples))
    about = {
        "metric": chosen.name, "fallback": fallback.kind, "off_distribution": fallback.off_distribution, "n": len(examples),
        "norm": "frozen" if frozen_norm else "free", "model": parts.model.name, "task": examples.task, "open": float(values[0].mean()), "seed": seed,
    }  # fmt: skip
    return Additivity(
        tuple(said), _sets(said, values, groups, resamples, seed), _orders(values, groups, resamples, seed),
        _alone(said, values, groups, resamples, seed), about,
    )  # fmt: skip


def _measured(
    parts: Parts, examples: Examples, fallback: Fallback, metric: Metric, settings: Sequence[tuple[int, ...]], batch_size: int,
    progress: Progress | None,
) -> Float[np.ndarray, "setting example"]:  # fmt: skip
    """The benefit of every setting; settings are given in an order in which those with one beginning stand together."""
    order = sorted(range(len(settings)), key=lambda number: settings[number])
    columns: list[np.ndarray] = []
    done, total = 0, len(settings) * len(examples)
    for batch in examples.batches(batch_size):
        values = np.empty((len(settings), len(batch)))
        for start in range(0, len(order), TOGETHER):
            some = order[start : start + TOGETHER]
            gates = closed_gates(parts, [settings[number] for number in some])
            values[some] = (metric.sign * parts.measure(batch, gates, fallback, metric)).cpu().double().numpy()
            done += len(some) * len(batch)
            if progress is not None:
                progress(done, total)
        columns.append(values)
    return np.concatenate(columns, 1)


def _between(
    samples: Float[np.ndarray, "row example"], groups: list[str] | None, resamples: int, seed: int
) -> tuple[list[float | None], list[float | None]]:
    """Percentile intervals of means; none with fewer than two groups."""
    sums, sizes = grouped(samples, groups)
    if len(sizes) < 2:
        return [None] * len(samples), [None] * len(samples)
    low, high = bootstrap(sums, sizes, resamples, seed)
    return low.tolist(), high.tolist()


def _sets(
    said: Sequence[str], values: Float[np.ndarray, "setting example"], groups: list[str] | None, resamples: int, seed: int
) -> pl.DataFrame:
    n = len(said)
    effects = values[0] - values
    picked = [sum(1 << i for i in some) for size in range(1, n + 1) for some in combinations(range(n), size)]
    sums = np.stack([sum((effects[1 << i] for i in range(n) if number >> i & 1), np.zeros(values.shape[1])) for number in picked])
    beyond = effects[picked] - sums
    low, high = _between(effects[picked], groups, resamples, seed)
    beyond_low, beyond_high = _between(beyond, groups, resamples, seed)
    return pl.DataFrame({
        "closed": [" ".join(said[i] for i in range(n) if number >> i & 1) for number in picked],
        "size": [number.bit_count() for number in picked], "effect": effects[picked].mean(1), "low": low, "high": high,
        "sum": sums.mean(1), "beyond": beyond.mean(1), "beyond_low": beyond_low, "beyond_high": beyond_high,
    }, schema_overrides=dict.fromkeys(("low", "high", "beyond_low", "beyond_high"), pl.Float64))  # fmt: skip


def walsh(values: Float[np.ndarray, "setting *rest"]) -> Float[np.ndarray, "setting *rest"]:
    """w(T) = 2^-n sum over S of m(S) (-1)^|S and T|, sets as bits of their number; n 2^n additions."""
    found, count, step = np.array(values, dtype=np.float64), len(values), 1
    while step < count:
        pairs = found.reshape(count // (2 * step), 2, step, *found.shape[1:])
        found = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).reshape(found.shape)
        step *= 2
    return found / count


def _orders(values: Float[np.ndarray, "setting example"], groups: list[str] | None, resamples: int, seed: int) -> pl.DataFrame:
    """Shares of the mean benefit's variance by order; intervals by drawing groups anew."""
    size = np.array([number.bit_count() for number in range(len(values))])
    orders = range(1, int(size[-1]) + 1)

    def shares(weights: Float[np.ndarray, "setting draw"]) -> Float[np.ndarray, "order draw"]:
        squares = weights**2
        whole = squares[1:].sum(0)
        by_order = np.stack([squares[size == order].sum(0) for order in orders])
        return np.divide(by_order, whole, out=np.full_like(by_order, np.nan), where=whole > 0)

    weights = walsh(values)
    found = shares(weights.mean(1, keepdims=True))[:, 0]
    sums, sizes = grouped(weights, groups)
    low: list[float | None] = [None] * len(found)
    high = list(low)
    if len(sizes) > 1:
        counts = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=resamples)
        drawn = shares((sums @ counts.T) / (counts @ sizes))
        low, high = (end.tolist() for end in np.percentile(drawn, [2.5, 97.5], axis=1))
    return pl.DataFrame(
        {"order": list(orders), "share": found, "low": low, "high": high},
        schema_overrides=dict.fromkeys(("low", "high"), pl.Float64),
    )


def _alone(
    said: Sequence[str], values: Float[np.ndarray, "setting example"], groups: list[str] | None, resamples: int, seed: int
) -> pl.DataFrame:
    every = len(values) - 1
    first = np.stack([values[0] - values[1 << i] for i in range(len(said))])
    last = np.stack([values[every ^ 1 << i] - values[every] for i in range(len(said))])
    low, high = _between(last - first, groups, resamples, seed)
    return pl.DataFrame(
        {
            "part": said,
            "first": first.mean(1),
            "last": last.mean(1),
            "difference": (last - first).mean(1),
            "low": low,
            "high": high,
        },
        schema_overrides=dict.fromkeys(("low", "high"), pl.Float64),
    )
