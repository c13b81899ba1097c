"""The circuit on unseen prompts: faithfulness, completeness, minimality, the curve, and random circuits beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.circuit import Circuit
from patchclamp.metrics import metric_named
from patchclamp.parts import Fallback, Gates, Parts, benefits
from patchclamp.scores import Part, Scores
from patchclamp.scores.ratios import Shares
from patchclamp.scores.statistics import Interval
from patchclamp.tasks import Examples
from patchclamp.trust.draws import Shape, chance, pick


@dataclass(frozen=True)
class Trusted:
    """What was measured of one circuit.

    Attributes:
        faithfulness: (m(circuit) - m(none)) / (m(all) - m(none)).
        rest: the same ratio for everything but the circuit (what is left without it); completeness = 1 - rest.
        random: the ratio of random circuits of the same size and shape: mean, 2.5 % and 97.5 % quantile, number of draws.
        beats: share of random circuits that the circuit's faithfulness exceeds.
        p: of being as faithful by chance: the circuit against circuits of its size and shape (`draws.chance`); it is never below
            1 / the number of circuits that there are of that shape.
        minimality: part -> (loss of faithfulness when it alone leaves the circuit, low, high).
        curve: k, faithfulness, low, high, completeness, along the order of the scores.
        draws: k, draw, faithfulness, of random circuits; `same_size` of those as large as the circuit.
        stability: mean Jaccard index of the circuits that resampled select prompts give, with the one that was chosen.
        accuracy: share of examples on which the circuit alone still has benefit > 0.
    """

    faithfulness: Interval
    rest: Interval
    random: Interval
    beats: float
    minimality: Mapping[str, tuple[float, float, float]]
    curve: pl.DataFrame
    draws: pl.DataFrame
    stability: float | None
    accuracy: float
    p: float = 1.0


def trust(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    circuit: Circuit,
    order: Sequence[Part],
    *,
    groups: Sequence[str],
    metric: str | None = None,
    random_circuits: int = 100,
    resampled: Sequence[Circuit] = (),
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Trusted:
    """Judge a circuit on the confirm set.

    Args:
        parts: what the circuit is made of.
        examples: the confirm set.
        fallback: what parts outside it pass.
        circuit: the circuit.
        order: the parts, best first: the order of the curve.
        groups: which examples belong together when intervals are drawn.
        metric: by default the task's.
        random_circuits: how many of the same size and shape (as many heads, as many MLPs).
        resampled: circuits from resampled select prompts, for stability.
        seed: of the draws.

    Cost: one forward pass over the examples per point of the curve (about 3 P for P parts up to 24, else about 40), per part of
    the circuit, and per random circuit (plus a band of 5 draws at each of up to 10 other sizes).

    Raises:
        MetricError: closing everything changes nothing.
    """
    chosen = metric_named(metric or examples.metric)
    grid = curve_sizes(len(order), len(circuit))
    members = [*circuit]
    plan: list[Gates] = [parts.open(), parts.closed(), parts.only(members), parts.without(members)]
    plan += [parts.only(order[:k]) for k in grid] + [parts.without(order[:k]) for k in grid]
    plan += [parts.only([other for other in members if other != site]) for site in members]
    drawn = _random_circuits(parts, members, grid, random_circuits, seed)
    plan += [parts.only(sites) for _, sites in drawn]
    values = benefits(parts, examples, torch.cat(plan), fallback, chosen, batch_size, progress).double().numpy()
    rows = iter(values)
    opened, closed, kept, rest = (next(rows) for _ in range(4))
    ratio = Shares.of(opened, closed, groups, metric=chosen.name, seed=seed)
    curve = [(k, *ratio.interval(next(rows))[:3]) for k in grid]
    without = [1 - float(ratio.point(next(rows))) for _ in grid]
    lost = {str(site): _ends(ratio.difference(kept, next(rows))) for site in members}
    draws = [(k, float(ratio.point(next(rows)))) for k, _ in drawn]
    same = np.array([share for _, share in draws[:random_circuits]])
    below, above = (float(end) for end in np.percentile(same, [2.5, 97.5]))
    faithful, shape = ratio.interval(kept), Shape.of(parts, members)
    return Trusted(
        faithfulness=faithful,
        rest=ratio.interval(rest),
        random=Interval(float(same.mean()), below, above, len(same)),
        beats=float((same < faithful.mean).mean()),
        minimality=lost,
        curve=pl.DataFrame(
            {"k": grid, "faithfulness": [c[1] for c in curve], "low": [c[2] for c in curve], "high": [c[3] for c in curve],
             "completeness": without},
        ),
        draws=pl.DataFrame({"k": [k for k, _ in draws], "draw": list(range(len(draws))), "faithfulness": [f for _, f in draws]}),
        stability=float(np.mean([circuit.jaccard(other) for other in resampled])) if resampled else None,
        accuracy=float((kept > 0).mean()),
        p=chance(int((same >= faithful.mean).sum()), len(same), shape.combinations),
    )  # fmt: skip


def _ends(interval: Interval) -> tuple[float, float, float]:
    """Mean, low, high; the mean itself for ends that there are none of."""
    mean, low, high, _ = interval
    return mean, mean if low is None else low, mean if high is None else high


def resampled_circuits(
    scores: Scores, samples: Float[Tensor, "part example"], size: int, groups: Sequence[str], draws: int = 20, seed: int = 0
) -> list[Circuit]:
    """Circuits of the same size from the scores of resampled prompts (groups drawn with replacement). No forward pass."""
    rng, names = np.random.default_rng(seed), sorted(set(groups))
    member = np.array([names.index(group) for group in groups])
    found: list[Circuit] = []
    for _ in range(draws):
        weight = rng.multinomial(len(names), np.full(len(names), 1 / len(names)))[member]
        means = np.abs((samples.numpy() * weight).sum(1))
        best = np.argsort(-means, kind="stable")[:size]
        found.append(Circuit([scores.sites[int(i)] for i in best], {"resampled": True}))
    return found


def curve_sizes(parts: int, size: int) -> list[int]:
    """Sizes of the curve: every one up to 24 parts, some 20 spread ones beyond, with both ends and the circuit's own."""
    if parts <= 24:
        return list(range(parts + 1))
    fine = np.unique(np.concatenate([np.linspace(0, parts, 12), np.linspace(0, min(parts, 2 * size), 9)]).round().astype(int))
    return sorted({0, size, parts, *map(int, fine)})


def _random_circuits(
    parts: Parts, members: Sequence[Part], grid: Sequence[int], draws: int, seed: int
) -> list[tuple[int, list[Part]]]:
    """Circuits of the same size and shape (as many parts of each kind), then a few of other sizes for the band."""
    rng, shape = np.random.default_rng([seed, 7]), Shape.of(parts, members)
    everything = [parts.labels[number] for number in parts.counted]
    found = [(len(members), shape.another(rng, members)) for _ in range(draws)]
    return found + [(k, pick(rng, everything, k)) for k in band_sizes(grid, len(members))]


def band_sizes(grid: Sequence[int], size: int) -> list[int]:
    """Sizes of the random circuits that show the band: about 8 of the curve's other than its ends and the circuit's, 5 draws of each."""
    others = [k for k in grid if k not in (grid[0], size, grid[-1])]
    return [k for k in others[:: max(1, len(others) // 8)] for _ in range(5)]
