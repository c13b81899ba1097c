"""Screen: of many parts, the pairs that interact, found by estimates, verified exactly, and what was missed bounded."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import polars as pl

from patchclamp.dependence.closings import Pairs, close_pairs
from patchclamp.dependence.curvature import Fit, agreement, curvature, largest, require_curved
from patchclamp.dependence.interactions import interaction_table
from patchclamp.dependence.masks import masked, sparse_pairs
from patchclamp.dependence.table import Dependence
from patchclamp.errors import PatchclampError
from patchclamp.methods import counted, effects
from patchclamp.metrics import Metric, metric_named
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks import Examples


@dataclass(frozen=True)
class Missed:
    """What a random sample of the pairs that were not verified says of all of them, with 95 % confidence.

    Args:
        pairs: that were not verified.
        sampled: of these, drawn at random and measured exactly.
        threshold: an interaction's mean |I| counts as large from here on.
        above: of the sample, how many are large.
        share: at most this share of the pairs that were not verified is large (Clopper and Pearson; with none seen, about 3 / sampled).
        most: at most so many pairs.
        largest: of the sample, the largest mean |I|.
        beyond: at most this share of the pairs that were not verified has a larger one.
    """

    pairs: int
    sampled: int
    threshold: float
    above: int
    share: float
    most: int
    largest: float
    beyond: float

    def __str__(self) -> str:
        return (
            f"of {self.pairs} pairs not verified, at most {self.share:.2%} ({self.most}) have |I| >= {self.threshold:.3g}, with 95 % "
            f"confidence: {self.above} of {self.sampled} drawn at random have, the largest {self.largest:.3g}"
        )

    def to_record(self) -> dict[str, Any]:
        """As plain numbers."""
        return dict(vars(self))


@dataclass(frozen=True, eq=False)
class Screened:
    """What a screen found.

    Args:
        found: the pairs that estimates put first, measured exactly, largest first; columns `by_masks`, `by_curvature` are the estimates
            (empty where one had none).
        sample: pairs drawn at random from all others, measured exactly.
        missed: what the sample says of all others.
        fits: by estimate, how it agrees with exact on `found` and `sample` together.
        about: what produced it.
    """

    found: Dependence
    sample: Dependence
    missed: Missed
    fits: Mapping[str, Fit]
    about: Mapping[str, Any]

    def to_record(self) -> dict[str, Any]:
        """As plain frames and numbers."""
        return {
            "found": self.found.table, "sample": self.sample.table, "missed": self.missed.to_record(),
            "fits": {name: fit.to_record() for name, fit in self.fits.items()}, "about": dict(self.about),
        }  # fmt: skip


def screen(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    *,
    metric: str | Metric | None = None,
    top: int = 200,
    sample: int = 300,
    threshold: float | None = None,
    passes: int = 64,
    share: float = 0.05,
    rows: int = 0,
    by: Examples | None = None,
    batch_size: int = 64,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Screened:
    """Find the interactions of parts too many for all pairs: random masks with sparse regression, and second derivatives.

    Estimates choose `top` pairs (`masks.sparse_pairs`, then `curvature` of the parts that matter most); these and `sample` pairs
    drawn at random from all others are measured exactly; the random ones bound what was missed.

    Args:
        parts: of any kind.
        examples: on which prompts.
        fallback: what a closed gate passes.
        metric: by default the task's.
        top: pairs to verify.
        sample: pairs to draw from the others.
        threshold: |I| that counts as large; by default half of the largest that was found.
        passes: random masks per example. With n examples, passes x n x share^2 observations close any given pair: some tens are needed.
        share: of parts closed in a mask.
        rows: second derivatives are taken of the pairs with one of so many parts of largest |effect|; 0: none (parts of which none are
            known: edges).
        by: other prompts, on which estimates are made, so that what is verified was not chosen by its own noise; by default the same.
        batch_size: examples at once.
        seed: of masks, sample, bootstrap and sign flips.
        about: provenance to add.
        progress: told (what is running, how much is done, how much there is).

    Cost: `passes` forward passes over the examples for the masks, one per part and `rows` backward passes for the second
    derivatives, and one per verified pair and per part in one.

    Raises:
        PatchclampError: fewer pairs than are to be verified and drawn; masks that close nothing or everything; or masks that point
            to no pair, where no threshold was given either.
        GateError, MetricError: second derivatives of parts, or of a metric, that have none.
    """
    labels = counted(parts)
    total = comb(len(labels), 2)
    if top < 1 or sample < 1 or total <= top + sample:
        raise PatchclampError(f"{top} + {sample} pairs are to be measured of {total}: measure all of them (interactions)")
    if rows:  # before anything runs
        require_curved(parts, metric if isinstance(metric, Metric) else metric_named(metric or examples.metric))
    told = progress or (lambda what, done, of: None)
    told("masks", 0, 1)
    first = by or examples
    seen = masked(parts, first, fallback, metric=metric, passes=passes, share=share, batch_size=batch_size, seed=seed)
    pairs, estimate = sparse_pairs(seen)
    guesses = {"by_masks": dict(zip(pairs, estimate.tolist(), strict=True))}
    told("masks", 1, 1)
    if rows:
        told("second derivatives", 0, 1)
        guesses["by_curvature"] = _bends(parts, first, fallback, metric, rows, top, batch_size)
        told("second derivatives", 1, 1)
    chosen = _interleaved([list(guess) for guess in guesses.values()], top)
    if not chosen and threshold is None:
        raise PatchclampError(
            f"{len(seen.loss)} masks point to no pair, so it is not known what a large interaction is: give more prompts or masks, or a threshold"
        )
    drawn = _others(len(labels), set(chosen), sample, seed)
    names = [str(label) for label in labels]
    closings = close_pairs(
        parts, examples, fallback, metric=metric, pairs=[(names[i], names[j]) for i, j in [*chosen, *drawn]],
        batch_size=batch_size, progress=lambda done, of: told("pairs", done, of),
    )  # fmt: skip
    facts = {"method": "screen", "passes": passes, "share": share, "rows": rows, "screened_on": len(first), **(about or {})}
    table = interaction_table(closings, seed=seed, about=facts)
    return _judged(table, closings.pairs, guesses, set(chosen), total, threshold)


def _judged(
    table: Dependence, pairs: Pairs, guesses: Mapping[str, Mapping[tuple[int, int], float]], chosen: set[tuple[int, int]],
    total: int, threshold: float | None,
) -> Screened:  # fmt: skip
    """What was measured, with the estimates beside it, parted into the pairs that were chosen and those that were drawn."""
    known = {name: [guess.get(pair) for pair in pairs] for name, guess in guesses.items()}
    table = Dependence(table.table.with_columns(**_floats(known)), table.parts, table.about)
    mine = np.array([pair in chosen for pair in pairs])
    found, random = (Dependence(table.table.filter(rows), table.parts, table.about) for rows in (mine, ~mine))
    limit = 0.5 * float(np.abs(found.table["score"].to_numpy()).max()) if threshold is None else threshold
    missed = bound(np.abs(random.table["score"].to_numpy()), total - len(chosen), limit)
    # a pair that an estimate does not name, it says nothing of
    guessed = {name: table.table.select("a", "b", score=pl.col(name).fill_null(0.0)) for name in guesses}
    fits = {name: agreement(Dependence(rows, table.parts, {}), table) for name, rows in guessed.items()}
    return Screened(Dependence(found.top(len(found)), found.parts, found.about), random, missed, fits, table.about)


def bound(sizes: np.ndarray, pairs: int, threshold: float) -> Missed:
    """What the |I| of pairs drawn at random say of `pairs` pairs, with 95 % confidence (one-sided)."""
    from scipy.stats import beta

    drawn, above = len(sizes), int((sizes >= threshold).sum())
    share = 1.0 if above == drawn else float(beta.ppf(0.95, above + 1, drawn - above))
    beyond = 1 - 0.05 ** (1 / drawn)
    return Missed(pairs, drawn, threshold, above, share, int(np.floor(share * pairs)), float(sizes.max(initial=0)), beyond)


def _bends(
    parts: Parts, examples: Examples, fallback: Fallback, metric: str | Metric | None, rows: int, top: int, batch_size: int
) -> dict[tuple[int, int], float]:
    """Second derivatives of the pairs of those parts that do most alone."""
    labels = counted(parts)
    sizes = effects(parts, examples, fallback, metric=metric, batch_size=batch_size).mean(1).abs()
    most = sizes.argsort(descending=True)[:rows].tolist()
    table = curvature(
        parts, examples, fallback, metric=metric, rows=[labels[number] for number in most], batch_size=min(16, batch_size)
    )
    scores = dict(zip(zip(table.table["a"], table.table["b"], strict=True), table.table["score"], strict=True))
    names = [str(label) for label in labels]
    return {(i, j): scores[names[i], names[j]] for i, j in largest(table, top)}


def _interleaved(lists: list[list[tuple[int, int]]], top: int) -> list[tuple[int, int]]:
    """The first `top` of several lists, in turn, each once."""
    found: dict[tuple[int, int], None] = {}
    for place in range(max(map(len, lists), default=0)):
        for one in lists:
            if place < len(one) and len(found) < top:
                found.setdefault(one[place])
    return list(found)


def _others(parts: int, chosen: set[tuple[int, int]], sample: int, seed: int) -> Pairs:
    """Pairs drawn at random from those that were not chosen, each as likely as any other."""
    draw, found = np.random.default_rng([seed, 3]), dict[tuple[int, int], None]()
    while len(found) < sample:
        i, j = sorted(draw.integers(0, parts, 2).tolist())
        if i < j and (i, j) not in chosen:
            found.setdefault((i, j))
    return list(found)


def _floats(columns: Mapping[str, list[float | None]]) -> dict[str, Any]:
    return {name: pl.Series(values, dtype=pl.Float64) for name, values in columns.items()}
