"""Interactions: what closing two parts does beyond what closing each alone does.

    I(i, j) = m(both open) - m(i closed) - m(j closed) + m(both closed)      on the benefit m

In effects (what a closing takes from the benefit), I = e(i) + e(j) - e(both). Above 0 closing both costs less than the sum: the
parts need each other (AND). Below 0 it costs more: they stand in for each other (OR).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from patchclamp.dependence.closings import Closings, Progress, close_pairs
from patchclamp.dependence.table import Dependence
from patchclamp.errors import PatchclampError
from patchclamp.metrics import Metric
from patchclamp.parts import Fallback, Parts
from patchclamp.scores import Part
from patchclamp.scores.statistics import Judged, judged
from patchclamp.tasks import Examples

ALPHA = 0.05
MARGIN = 0.02
MUCH = 0.1


def interactions(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    *,
    metric: str | Metric | None = None,
    pairs: Sequence[tuple[Part | str, Part | str]] | None = None,
    frozen_norm: bool = False,
    batch_size: int = 64,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Dependence:
    """Exact interaction of every pair of parts, in units of the benefit; see `close_pairs` for arguments, cost and errors.

    Norms make every pair interact a little: with `frozen_norm` the last of them divides by what it divides by in the model's
    own run, and what is left is the parts' own. Intervals are bootstraps over groups of examples, q Benjamini and Hochberg's
    over all pairs, `below_noise` marks what rounding alone can make.
    """
    found = close_pairs(
        parts, examples, fallback, metric=metric, pairs=pairs, frozen_norm=frozen_norm, batch_size=batch_size, progress=progress
    )
    return interaction_table(found, seed=seed, about=about)


def interaction_table(closings: Closings, *, seed: int = 0, about: Mapping[str, Any] | None = None) -> Dependence:
    """Interactions from what was measured; columns `effect_a`, `effect_b`, `effect_both` are what each closing takes."""
    samples = closings.interaction
    facts = {"method": "interaction", **closings.about, "seed": seed, "noise_floor": 2 * closings.noise, **(about or {})}
    effects, together = closings.effects.mean(1), closings.together.mean(1)
    return Dependence.from_samples(
        closings.parts, closings.pairs, samples, facts, closings.groups, seed=seed,
        effect_a=effects[closings.first], effect_b=effects[closings.second], effect_both=together,
        below_noise=np.abs(samples.mean(1)) <= 2 * closings.noise,
    )  # fmt: skip


def relations(
    first: Closings,
    second: Closings,
    *,
    repair: Sequence[Dependence] = (),
    alpha: float = ALPHA,
    margin: float = MARGIN,
    seed: int = 0,
) -> Dependence:
    """Name every pair's relation, where it holds under two fallbacks.

    Definitions, each of which must hold under both fallbacks. The size of a fallback is the largest mean |effect| of closing
    one part or one pair under it. "Clear": q <= alpha over all pairs, the 95 % interval leaves zero out, more than rounding.
    "Nothing": the whole interval lies within +- margin x size. "Much": clear, and at least a tenth of the size.

    `word`:
    - "none": the interaction is nothing;
    - "AND": it is clearly above 0 (the parts need each other);
    - "OR": it is clearly below 0 (they stand in for each other);
    - "undecided": none of these under both.

    `relation`, what kind of dependence it is, or empty:
    - "redundancy": OR; each part alone does nothing, both together much;
    - "backup": redundancy in which the later part works only when the earlier is closed: its direct effect rises clearly then,
      by at least half of what closing both does. Told from redundancy by `repair` alone (`SelfRepair.table`, one per fallback);
    - "suppression": the later part's effect is clearly negative (it works against the benefit), and nothing once the earlier
      part is closed: closing the source makes the suppressor idle. I is then below 0, but nothing stands in for anything: word "OR"
      says the sign, `relation` what it is.

    Args:
        first: measured under one fallback.
        second: under the other, the same parts, pairs and examples.
        repair: compensation under the first and under the second fallback, which tells backups.
        alpha: of q.
        margin: share of the size that counts as nothing.
        seed: of the bootstrap and the sign flips.

    Returns:
        A row per pair: `score`, `low`, `high`, `q` (under the first fallback), `other`, `other_low`, `other_high`, `other_q` (under
        the second), `word`, `relation`.

    Raises:
        PatchclampError: the two were not measured on the same pairs, or under one and the same fallback; or compensation is
            known under one of them alone.
    """
    if repair and len(repair) != 2:
        raise PatchclampError(
            f"backups are told by compensation under both fallbacks, and {len(repair)} table was given: give two"
        )
    if [str(part) for part in first.parts] != [str(part) for part in second.parts] or first.pairs != second.pairs:
        raise PatchclampError("relations compare the same pairs of the same parts under two fallbacks: measure both alike")
    if first.about["fallback"] == second.about["fallback"]:
        raise PatchclampError(f"both were measured under the fallback {first.about['fallback']!r}: a relation needs two")
    if len(repair) not in (0, 2):
        raise PatchclampError(f"repair is one table per fallback: give two, not {len(repair)}")
    sides = [_Side.of(one, alpha, margin, seed) for one in (first, second)]
    one, two = (side.interaction for side in sides)
    word = np.full(len(first.pairs), "undecided", dtype=object)
    word[(sides[0].sign > 0) & (sides[1].sign > 0)] = "AND"
    word[(sides[0].sign < 0) & (sides[1].sign < 0)] = "OR"
    word[sides[0].nothing & sides[1].nothing] = "none"
    redundant = sides[0].redundant & sides[1].redundant & (word == "OR")
    relation = np.where(redundant, "redundancy", "").astype(object)
    relation[sides[0].suppression & sides[1].suppression & (word == "OR")] = "suppression"
    if repair:
        wakes = np.logical_and.reduce([_wakes(each, side, alpha) for each, side in zip(repair, sides, strict=True)])
        relation[redundant & wakes] = "backup"
    about = {
        "method": "relations", **first.about, "second": second.about["fallback"], "alpha": alpha, "margin": margin, "seed": seed,
        "sizes": [side.size for side in sides],
    }  # fmt: skip
    return Dependence.of(
        first.parts, first.pairs, one.mean, about, low=one.low, high=one.high, q=one.q, other=two.mean, other_low=two.low,
        other_high=two.high, other_q=two.q, word=pl.Series(word.tolist(), dtype=pl.String),
        relation=pl.Series(relation.tolist(), dtype=pl.String),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Side:
    """What one fallback says of every pair."""

    closings: Closings
    interaction: Judged
    size: float
    sign: Float[np.ndarray, " pair"]
    nothing: Bool[np.ndarray, " pair"]
    redundant: Bool[np.ndarray, " pair"]
    suppression: Bool[np.ndarray, " pair"]

    @classmethod
    def of(cls, closings: Closings, alpha: float, margin: float, seed: int) -> "_Side":
        i, j, groups = closings.first, closings.second, closings.groups
        used = sorted({*i, *j})
        place = {number: row for row, number in enumerate(used)}
        alone = judged(closings.effects[used], groups, seed)
        i, j = [place[number] for number in i], [place[number] for number in j]
        together, interaction = judged(closings.together, groups, seed), judged(closings.interaction, groups, seed)
        left = judged(closings.alone[closings.first] - closings.both, groups, seed)  # of the later part, the earlier closed
        size = float(max(np.abs(alone.mean).max(initial=0), np.abs(together.mean).max(initial=0)))
        idle = alone.within(margin * size)
        much = (together.clear(closings.noise, alpha) != 0) & (np.abs(together.mean) >= MUCH * size)
        against = alone.clear(max(closings.noise, margin * size), alpha) < 0
        return cls(
            closings, interaction, size, interaction.clear(2 * closings.noise, alpha), interaction.within(margin * size),
            idle[i] & idle[j] & much, against[j] & left.within(margin * size),
        )  # fmt: skip


def _wakes(repair: Dependence, side: _Side, alpha: float) -> Bool[np.ndarray, " pair"]:
    """Whether the later part's direct effect rises clearly, by half of what both together do, when the earlier is closed."""
    names, half = [str(part) for part in side.closings.parts], 0.5 * np.abs(side.closings.together.mean(1))
    rows = repair.table.select("a", "b", "score", "low", "q").iter_rows()
    known = {(a, b): (score, low, q) for a, b, score, low, q in rows}
    out = np.zeros(len(side.closings.pairs), dtype=bool)
    for number, (i, j) in enumerate(side.closings.pairs):
        score, low, q = known.get((names[i], names[j]), (0.0, None, None))
        out[number] = low is not None and q is not None and low > 0 and q <= alpha and score >= half[number]
    return out


def named(table: Dependence, *words: str) -> pl.DataFrame:
    """The rows of `relations` whose word or relation is among `words`."""
    return table.table.filter(pl.col("word").is_in(words) | pl.col("relation").is_in(words))
