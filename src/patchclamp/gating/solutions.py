"""Solutions are not unique: which distinct sub-circuits suffice, what they share, and what stands in for what.

Every seed's G- is a set of parts. Each is reduced until no part can be left out, judged alone on prompts that neither the fit nor
the reduction saw, and compared with the others. Parts in which sufficient sets differ are tested as substitutes by closing them
together in the whole model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float

from patchclamp.gating.descent import full_gates
from patchclamp.gating.fit import Gated
from patchclamp.gating.judge import clear
from patchclamp.gating.sufficiency import shares
from patchclamp.methods import groups_of
from patchclamp.metrics import METRICS
from patchclamp.parts import Fallback, Parts, benefits
from patchclamp.scores.statistics import mean_interval
from patchclamp.tasks import Examples

SHARE = 0.9
PAIRS = 200  # of parts in which sufficient sets differ, closed together at most
LIKE = 0.5  # sets of one family share at least half of their parts with one another (Jaccard, average linkage)


@dataclass(frozen=True, eq=False)
class Solutions:
    """Sub-circuits that suffice, and how they go together.

    Args:
        table: a row per distinct set: solution (number), kept (parts joined by blanks), size, seeds (how many ended there), share,
            low, high (what it alone keeps on the confirm prompts), sufficient, family (sets alike).
        substitutes: a row per tested pair of parts in which sufficient sets differ: a, b, alone_a, alone_b, joint (nats of
            log-probability that closing costs), excess = joint - alone_a - alone_b with low, high; clear (q < .05, and at least the
            pressure); swaps (whether a sufficient set with one of them stays sufficient with the other in its place);
            substitutes (clear and swaps).
        core: the parts of every sufficient set.
        union: the parts of any.
        distinct: how many distinct sufficient sets there are; families: how many once those alike are one.
        wanted: the share of the behaviour that counts as sufficient (the interval's lower end must reach it).
        about: task, metric, fallback, n of each set of prompts, seeds.
    """

    table: pl.DataFrame
    substitutes: pl.DataFrame
    core: tuple[str, ...]
    union: tuple[str, ...]
    distinct: int
    families: int
    wanted: float
    about: Mapping[str, Any]

    def to_record(self) -> dict[str, Any]:
        """Frames and scalars."""
        return {
            "table": self.table, "substitutes": self.substitutes, "core": list(self.core), "union": list(self.union),
            "distinct": self.distinct, "families": self.families, "wanted": self.wanted, "about": dict(self.about),
        }  # fmt: skip


def solutions(
    parts: Parts,
    gated: Gated,
    select: Examples,
    confirm: Examples,
    fallback: Fallback,
    *,
    share: float = SHARE,
    metric: str | None = None,
    seed: int = 0,
) -> Solutions:
    """Distinct sufficient sub-circuits of the seeds of one gating.

    Args:
        parts: what was gated.
        gated: the fit, of as many seeds as there are (10 or more say more).
        select: prompts on which sets are reduced.
        confirm: prompts on which they are judged.
        fallback: what closed gates pass.
        share: of the behaviour that a sufficient set keeps at least (lower end of its 95 % interval).
        metric: what shares are of; by default the task's.
        seed: of the bootstrap and the sign flips.

    Cost: one forward pass over `select` per part and step of the reduction of each distinct set (a part that can go, goes: as many
    steps as parts leave); one over `confirm` per set, per part in which sets differ, and per pair of these (at most 200).
    """
    names = [str(site) for site in gated.labels]
    ends, back = np.unique(gated.gate_minus >= 0.5, axis=0, return_inverse=True)
    less = np.stack([reduced(parts, mask, select, fallback, share, metric, seed) for mask in ends])
    sets, which = np.unique(less, axis=0, return_inverse=True)
    seeds = np.bincount(which.ravel()[back.ravel()], minlength=len(sets))
    found = shares(parts, sets, confirm, fallback, metric, seed)
    good = np.nan_to_num(found.low, nan=-np.inf) >= share
    order = np.lexsort((-found.share, sets.sum(1), ~good))
    sets, seeds, good = sets[order], seeds[order], good[order]
    family = _families(sets, good)
    table = pl.DataFrame(
        {
            "solution": range(1, len(sets) + 1),
            "kept": [" ".join(names[number] for number in np.flatnonzero(one)) for one in sets],
            "size": sets.sum(1), "seeds": seeds, "share": found.share[order], "low": found.low[order], "high": found.high[order],
            "sufficient": good, "family": pl.Series(family, dtype=pl.Int64),
        }
    )  # fmt: skip
    fit = sets[good]
    core = fit.all(0) if len(fit) else np.zeros(len(names), dtype=bool)
    pairs = _pairs(fit)
    tested = _substitutes(parts, fit, pairs, names, confirm, fallback, share, metric, gated.pressure, seed)
    about = {
        "task": confirm.task, "metric": found.metric, "fallback": fallback.kind, "selected_on": len(select), "n": len(confirm),
        "seeds": len(gated.gate_minus), "seed": seed,
    }  # fmt: skip
    return Solutions(
        table, tested, tuple(np.array(names)[core].tolist()), tuple(np.array(names)[fit.any(0)].tolist()),
        len(fit), len(set(family[: len(fit)])), share, about,
    )  # fmt: skip


def reduced(
    parts: Parts,
    mask: Bool[np.ndarray, " part"],
    examples: Examples,
    fallback: Fallback,
    share: float = SHARE,
    metric: str | None = None,
    seed: int = 0,
) -> Bool[np.ndarray, " part"]:
    """The set without what it can spare: as long as the set keeps the share (the mean; of what a set that keeps less, what it
    keeps), the part goes whose leaving costs least. Cost: one forward pass per part left, at each step."""
    mask = mask.copy()
    floor = min(share, float(shares(parts, mask[None], examples, fallback, metric, seed).share[0]) - 1e-6)
    while mask.any():
        inside = np.flatnonzero(mask)
        rows = np.repeat(mask[None], len(inside), 0)
        rows[np.arange(len(inside)), inside] = False
        kept = shares(parts, rows, examples, fallback, metric, seed).share
        if kept.max() < floor:
            break
        mask = rows[int(kept.argmax())]
    return mask


def _families(sets: Bool[np.ndarray, "set part"], good: Bool[np.ndarray, " set"]) -> list[int | None]:
    """Sufficient sets by likeness: average linkage on 1 - Jaccard, cut at 1 - LIKE; None for the others."""
    some = sets[good].astype(bool)
    if not len(some):
        return [None] * len(sets)
    if len(some) == 1:
        numbers = [1]
    else:
        from scipy.cluster.hierarchy import fcluster, linkage
        from scipy.spatial.distance import pdist

        numbers = fcluster(linkage(pdist(some, "jaccard"), "average"), 1 - LIKE, "distance").tolist()
    given = iter(numbers)
    return [next(given) if one else None for one in good]


def _pairs(sets: Bool[np.ndarray, "set part"]) -> list[tuple[int, int]]:
    """Pairs of parts that take turns: one set has only the first, another only the second. Those that do so most come first."""
    if not len(sets):
        return []
    differ = np.flatnonzero(sets.any(0) & ~sets.all(0)).tolist()
    turns = {pair: _turns(sets, *pair) for pair in combinations(differ, 2)}
    return sorted((pair for pair, many in turns.items() if many), key=lambda pair: -turns[pair])[:PAIRS]


def _turns(sets: Bool[np.ndarray, "set part"], one: int, other: int) -> int:
    first, second = (sets[:, one] & ~sets[:, other]).sum(), (sets[:, other] & ~sets[:, one]).sum()
    return int(min(first, second))


def _substitutes(
    parts: Parts,
    sets: Bool[np.ndarray, "set part"],
    pairs: list[tuple[int, int]],
    names: list[str],
    examples: Examples,
    fallback: Fallback,
    share: float,
    metric: str | None,
    pressure: float,
    seed: int,
) -> pl.DataFrame:
    """Every pair closed together in the whole model, and put in each other's place in the sufficient sets."""
    schema = {"a": pl.String, "b": pl.String, **dict.fromkeys(("alone_a", "alone_b", "joint", "excess", "low", "high"), pl.Float64),
              "clear": pl.Boolean, "swaps": pl.Boolean, "substitutes": pl.Boolean}  # fmt: skip
    if not pairs:
        return pl.DataFrame(schema=schema)
    singles = sorted({part for pair in pairs for part in pair})
    rows = np.ones((1 + len(singles) + len(pairs), len(names)))
    for number, closed in enumerate([*((part,) for part in singles), *pairs]):
        rows[1 + number, list(closed)] = 0
    values = benefits(parts, examples, full_gates(parts, torch.from_numpy(rows)), fallback, METRICS["log_probability"])
    lost = (values[:1] - values[1:]).double().numpy()
    alone, joint = dict(zip(singles, lost, strict=False)), lost[len(singles) :]
    excess = joint - np.stack([alone[a] + alone[b] for a, b in pairs])
    groups = groups_of(examples)
    sure = clear(excess, groups, seed) & (excess.mean(1) >= pressure)
    swaps = _swaps(parts, sets, pairs, examples, fallback, share, metric, seed)
    found: list[dict[str, object]] = []
    for number, (a, b) in enumerate(pairs):
        span = mean_interval(excess[number], groups, seed=seed)
        found.append({
            "a": names[a], "b": names[b], "alone_a": alone[a].mean(), "alone_b": alone[b].mean(), "joint": joint[number].mean(),
            "excess": span.mean, "low": span.low, "high": span.high, "clear": bool(sure[number]), "swaps": swaps[number],
            "substitutes": bool(sure[number]) and swaps[number],
        })  # fmt: skip
    return pl.DataFrame(found, schema=schema)


def _swaps(
    parts: Parts, sets: Bool[np.ndarray, "set part"], pairs: list[tuple[int, int]], examples: Examples, fallback: Fallback,
    share: float, metric: str | None, seed: int,
) -> list[bool]:  # fmt: skip
    """By pair, whether some sufficient set with either alone stays sufficient (its share, the mean) with the other instead."""
    rows: list[np.ndarray] = []
    of: list[tuple[int, int]] = []
    for number, pair in enumerate(pairs):
        for way, (one, other) in enumerate((pair, pair[::-1])):
            for each in sets[sets[:, one] & ~sets[:, other]]:
                changed = each.copy()
                changed[[one, other]] = False, True
                rows.append(changed)
                of.append((number, way))
    kept: Float[np.ndarray, " set"] = shares(parts, np.stack(rows), examples, fallback, metric, seed).share
    fine = {key for key, value in zip(of, kept, strict=True) if value >= share}
    return [{(number, 0), (number, 1)} <= fine for number in range(len(pairs))]
