"""Association between parts' outputs: any measure, with permutation nulls, conditions, lags, and the causal counterpart beside it."""

import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float, Int
from scipy.stats import false_discovery_control
from scipy.stats import t as student
from torch import Tensor

from patchclamp.dependence.association.composition import LOG_RATIO
from patchclamp.dependence.association.contract import Measure, Pairs, Prepared, Values
from patchclamp.dependence.association.correlation import CORRELATION
from patchclamp.dependence.association.information import GAUSSIAN, KSG
from patchclamp.dependence.association.kernels import CKA, COCO, DEBIASED_CKA, HSIC
from patchclamp.dependence.association.neural import NEURAL, Critics
from patchclamp.dependence.association.partial import PARTIAL
from patchclamp.dependence.association.recording import Recorded, recorded
from patchclamp.dependence.association.table import Association, beside
from patchclamp.dependence.association.units import FEWEST, Units, blocks_of, codes_of, levels, residual, units_of
from patchclamp.dependence.table import Dependence
from patchclamp.errors import PatchclampError
from patchclamp.parts import Parts
from patchclamp.tasks import Examples

MEASURES: dict[str, Measure] = {
    one.name: one for one in (CORRELATION, PARTIAL, LOG_RATIO, KSG, GAUSSIAN, NEURAL, HSIC, COCO, CKA, DEBIASED_CKA)
}
"""Every measure by name."""
GIVEN = ("position", "token")
NOTHING = 1e-6
"""A side whose length is below this share of what it was has nothing left: what remains is rounding."""


def association(
    parts: Parts,
    examples: Examples,
    *,
    measure: str = "correlation",
    what: "str | Float[Tensor, ' width']" = "contribution",
    lag: int = 0,
    given: Sequence[str] = GIVEN,
    causal: Dependence | None = None,
    last: int | None = None,
    permutations: int = 199,
    blocks: int = 10,
    most_rows: int = 2000,
    seed: int = 0,
    batch_size: int = 32,
) -> Association:
    """How far parts' outputs go together over tokens and prompts; see `associate` and, for `what` and `last`, `recorded`.

    An association says nothing of what acts on what: give `causal` (interactions, self-repair), and it stands beside.
    """
    outputs = recorded(parts, examples, what, last=last, batch_size=batch_size)
    return associate(
        outputs, measure=measure, lag=lag, given=given, causal=causal, permutations=permutations, blocks=blocks,
        most_rows=most_rows, seed=seed,
    )  # fmt: skip


def associate(
    outputs: Recorded,
    *,
    measure: str = "correlation",
    lag: int = 0,
    given: Sequence[str] = GIVEN,
    causal: Dependence | None = None,
    permutations: int = 199,
    blocks: int = 10,
    most_rows: int = 2000,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> Association:
    """A measure of every pair of recorded parts, judged against permutations.

    The null: units (groups of prompts) of one side change places with units of the same shape, whole, so that what goes on
    within a prompt stays as it is. So that they can, groups are cut to as many prompts each (the number that keeps most), and units
    of a shape of their own are left out; `about` says how many prompts, rows and units were used. p = (1 + permutations whose
    statistic is at least as large) / (1 + permutations), of both signs where the measure has them; q is Benjamini and
    Hochberg's over pairs. `low`, `high`: score +- t times the jackknife's standard error over `blocks` blocks of units.

    Args:
        outputs: what parts put out (`recorded`).
        measure: a key of `MEASURES`.
        lag: b's output so many tokens later, a's now; above 0 the table is directed and has both directions of a pair.
        given: what is taken off both sides first, as means of its levels: "position", "token" (the token there), or the name of
            a span: which token stood there in this prompt. A common input is then no coupling. Linear: of outputs' means.
        causal: pairs with their causal dependence, which is put beside.
        permutations: how many; p resolves to 1 / (1 + permutations).
        blocks: of the jackknife; 0: no intervals.
        most_rows: at most so many tokens, whole units drawn at random; `about` says how many were used.
        seed: of permutations, blocks and draws.
        about: more provenance.

    Cost: permutations + blocks + 1 times the measure; no passes.

    Raises:
        PatchclampError: no such measure or condition, a lag that no prompt has, or too few units that can change places.
    """
    if measure not in MEASURES:
        raise PatchclampError(f"there is no measure of association {measure!r}: choose from {', '.join(MEASURES)}")
    if lag < 0 or permutations < 1:
        raise PatchclampError(f"a lag of {lag} and {permutations} permutations were asked for: give 0 or more, and 1 or more")
    chosen = MEASURES[measure]
    clean, freedom, idle = _conditioned(outputs, given)
    _warn_where_wide(chosen, clean)
    left_rows, right_rows, units = _matched(outputs, lag, most_rows, seed)
    left = [value[left_rows] for value in clean]
    right = left if lag == 0 else [value[right_rows] for value in clean]
    pairs = _pairs(len(outputs.parts), lag)
    live = [pair for pair in pairs if not idle[pair[0]] and not idle[pair[1]]]
    freedom = min(round(freedom * len(left_rows) / max(len(outputs), 1)), len(left_rows) - 2)
    columns = _judged(chosen, left, right, live, freedom, units, permutations, blocks, seed)
    facts = {**outputs.about, "method": measure, "given": ", ".join(given) or "nothing", "lag": lag, "permutations": permutations,
             "n": len(set(outputs.example[left_rows].tolist())), "rows": len(left_rows), "units": len(units.rows), "seed": seed,
             "directed": lag > 0, **(about or {})}  # fmt: skip
    return _table(outputs.parts, pairs, live, columns, facts, causal)


def _pairs(parts: int, lag: int) -> list[tuple[int, int]]:
    return list(combinations(range(parts), 2)) if lag == 0 else list(permutations(range(parts), 2))


def _conditioned(outputs: Recorded, given: Sequence[str]) -> tuple[list[np.ndarray], int, list[bool]]:
    """Every part's output less the means of the levels of what is given; degrees of freedom taken; which have nothing left."""
    factors: list[Int[np.ndarray, " row"]] = []
    for name in given:
        if name in ("position", "token"):
            factors.append(codes_of(getattr(outputs, name)))
        elif name in outputs.spans:
            factors.append(codes_of(outputs.spans[name][outputs.example]))
        else:
            known = ", ".join(("position", "token", *outputs.spans))
            raise PatchclampError(f"association given {name!r} was asked for: choose from {known}")
    clean, idle = list[np.ndarray](), list[bool]()
    for value in outputs.values:
        left = residual(value, factors) if factors else value - value.mean(0)
        nothing = float(np.linalg.norm(left)) <= NOTHING * float(np.linalg.norm(value))
        clean.append(np.zeros_like(left) if nothing else left)
        idle.append(nothing)
    return clean, levels(factors) if factors else 1, idle


def _warn_where_wide(measure: Measure, values: Values) -> None:
    widest = max(value.shape[1] for value in values)
    if measure.widest is not None and widest > measure.widest:
        warnings.warn(
            f"{measure.name} by nearest neighbours falls far short above {measure.widest} dimensions a side, and an output has "
            f"{widest}: record a norm, a contribution or a direction, or use gaussian or neural information",
            stacklevel=4,
        )


def _lagged(outputs: Recorded, lag: int) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
    place = {(int(e), int(t)): row for row, (e, t) in enumerate(zip(outputs.example, outputs.position, strict=True))}
    found = [(row, place[e, t + lag]) for (e, t), row in place.items() if (e, t + lag) in place]
    if not found:
        raise PatchclampError(f"no prompt has two recorded tokens {lag} apart")
    left, right = np.array(found).T
    return left, right


def _matched(outputs: Recorded, lag: int, most: int, seed: int) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"], Units]:
    """Rows of both sides and their units; units that cannot change places with any other are left out, and so are rows above `most`.

    A unit that stays where it is under every permutation would pull the null towards what is seen.
    """
    left, right = _lagged(outputs, lag)
    kept = np.isin(outputs.example[left], _evened(outputs, left))
    left, right = left[kept], right[kept]
    for cut in (Units.movable, lambda units: _drawn(units, most, seed), Units.movable):
        rows = cut(units_of([outputs.groups[e] for e in outputs.example[left]], _slots(outputs, left)))
        left, right = left[rows], right[rows]
    return left, right, units_of([outputs.groups[e] for e in outputs.example[left]], _slots(outputs, left))


def _evened(outputs: Recorded, rows: Int[np.ndarray, " row"]) -> Int[np.ndarray, " example"]:
    """As many prompts of every group, so that groups can change places: the number that keeps most prompts; groups with fewer drop out."""
    members: dict[str, list[int]] = {}
    for example in np.unique(outputs.example[rows]).tolist():
        members.setdefault(outputs.groups[example], []).append(example)
    sizes = np.array([len(one) for one in members.values()])
    best = max(range(1, int(sizes.max()) + 1), key=lambda k: k * int((sizes >= k).sum()) if (sizes >= k).sum() >= FEWEST else 0)
    return np.array(sorted(example for one in members.values() if len(one) >= best for example in one[:best]))


def _slots(outputs: Recorded, rows: Int[np.ndarray, " row"]) -> list[str]:
    """Which prompt of its group, and which position, each row is."""
    order: dict[str, dict[int, int]] = {}
    out: list[str] = []
    for row in rows:
        example = int(outputs.example[row])
        mates = order.setdefault(outputs.groups[example], {})
        out.append(f"{mates.setdefault(example, len(mates))}@{outputs.position[row]}")
    return out


def _drawn(units: Units, most: int, seed: int) -> Int[np.ndarray, " row"]:
    """Rows of whole units, drawn at random until there are `most`."""
    if units.size <= most:
        return np.arange(units.size)
    rows: list[np.ndarray] = []
    for unit in np.random.default_rng([seed, 2]).permutation(len(units.rows)):
        if rows and sum(map(len, rows)) + len(units.rows[unit]) > most:
            break
        rows.append(units.rows[unit])
    return np.sort(np.concatenate(rows))


def _judged(
    measure: Measure, left: Values, right: Values, pairs: Pairs, freedom: int, units: Units, draws: int, blocks: int, seed: int
) -> dict[str, np.ndarray]:
    """Columns of the table for pairs that can be compared."""
    ready = measure.prepare(left, right, pairs, freedom, seed)
    null, seen = null_of(ready, units, draws, seed), ready.statistic()
    score, mean = ready.score(), null.mean(0)
    found = {"null_mean": mean, "p": p_values(seen, null, measure.two_sided)}
    found["null_95"] = np.quantile(np.abs(null) if measure.two_sided else null, 0.95, axis=0)
    if measure.subtract:
        found["raw"], score = score, score - mean
    found["score"] = score
    if blocks > 1 and len(pairs):
        error = _jackknife(measure, left, right, pairs, freedom, units, blocks, seed)
        found["low"], found["high"] = score - error, score + error
    found["q"] = false_discovery_control(found["p"]) if len(pairs) else found["p"]
    return found


def null_of(ready: Prepared, units: Units, draws: int, seed: int) -> Float[np.ndarray, "draw pair"]:
    """The statistic with units of the right side in other places."""
    rng = np.random.default_rng([seed, 1])
    orders = np.stack([units.permutation(rng) for _ in range(draws)])
    if isinstance(ready, Critics):
        return ready.statistics(orders)
    return np.stack([ready.statistic(order) for order in orders])


def p_values(
    seen: Float[np.ndarray, " pair"], null: Float[np.ndarray, "draw pair"], two_sided: bool
) -> Float[np.ndarray, " pair"]:
    """(1 + draws at least as large) / (1 + draws); equal up to rounding counts as large."""
    seen, null = (np.abs(seen), np.abs(null)) if two_sided else (seen, null)
    return (1 + (null >= seen - 1e-12 * np.abs(seen)).sum(0)) / (1 + len(null))


def _jackknife(
    measure: Measure, left: Values, right: Values, pairs: Pairs, freedom: int, units: Units, count: int, seed: int
) -> Float[np.ndarray, " pair"]:
    """Half the width of the 95 % interval: t times the standard error when a block of units is left out in turn."""
    scores: list[np.ndarray] = []
    parted = blocks_of(units, count, seed)
    for block in parted:
        rows = units.without(block.tolist())
        one = [value[rows] for value in left]
        two = one if right is left else [value[rows] for value in right]
        scores.append(measure.prepare(one, two, pairs, freedom, seed).score())
    table, g = np.stack(scores), len(parted)
    error = np.sqrt((g - 1) / g * ((table - table.mean(0)) ** 2).sum(0))
    return float(student.ppf(0.975, g - 1)) * error


def _table(
    parts: tuple[str, ...], pairs: Pairs, live: Pairs, columns: Mapping[str, np.ndarray], facts: Mapping[str, Any],
    causal: Dependence | None,
) -> Association:  # fmt: skip
    """A row per pair; pairs of which a side has nothing left have score 0 and p 1."""
    place = {pair: row for row, pair in enumerate(live)}
    rows = [place.get(pair) for pair in pairs]
    default = {"score": 0.0, "p": 1.0, "q": 1.0, "null_mean": 0.0, "null_95": 0.0, "low": 0.0, "high": 0.0, "raw": 0.0}
    order = [name for name in ("score", "low", "high", "p", "q", "null_mean", "null_95", "raw") if name in columns]
    body = {
        name: pl.Series([default[name] if row is None else float(columns[name][row]) for row in rows], dtype=pl.Float64)
        for name in order
    }
    ends = {"a": [parts[i] for i, _ in pairs], "b": [parts[j] for _, j in pairs]}
    table = pl.DataFrame(
        {**ends, **body, "idle": [row is None for row in rows]}, schema_overrides={"a": pl.String, "b": pl.String}
    )
    return Association(beside(table, causal), parts, facts)
