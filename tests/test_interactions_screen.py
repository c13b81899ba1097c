"""Screening many parts: planted interactions are found, estimates are right, and the bound on what was missed holds."""

import importlib
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from scipy.stats import binom

from cases import tiny
from patchclamp.dependence import interactions, screen
from patchclamp.dependence.masks import Masked, masked, sparse_pairs
from patchclamp.dependence.screen import bound
from patchclamp.errors import GateError, MetricError, PatchclampError
from patchclamp.models.model import Model
from patchclamp.parts import Fallback, edges, gated, nodes
from patchclamp.sites import Site
from test_parts import examples

SCREEN = importlib.import_module("patchclamp.dependence.screen")
"""The module; `dependence.screen` is its function."""


class Planted:
    """600 parts of which 40 pairs interact: half of these parts do nothing alone. Every example has effects of its own around these."""

    def __init__(self, parts: int = 600, pairs: int = 40, seed: int = 0) -> None:
        draw = np.random.default_rng(seed)
        self.model: Any = Model.load(tiny("gpt2"))
        self.labels = tuple(Site("neuron", 0, number) for number in range(parts))
        self.counted = tuple(range(parts))
        chosen = draw.choice(parts, (pairs, 2), replace=False)
        self.pairs = {
            (int(min(pair)), int(max(pair))): float(size) for pair, size in zip(chosen, _sizes(draw, pairs), strict=True)
        }
        effects = 0.05 * draw.normal(size=parts)
        effects[draw.choice(parts, 30, replace=False)] = draw.normal(size=30)
        effects[chosen[: pairs // 2].ravel()] = 0.0
        self.effects = torch.tensor(effects)
        self.first, self.second = (torch.tensor([pair[end] for pair in self.pairs]) for end in (0, 1))
        self.strength = torch.tensor(list(self.pairs.values()), dtype=torch.float64)

    def open(self, settings: int = 1) -> torch.Tensor:
        return torch.ones(settings, 1, 1, len(self.labels))

    def closed(self, settings: int = 1) -> torch.Tensor:
        return 0 * self.open(settings)

    def without(self, sites: Any, settings: int = 1) -> torch.Tensor:
        gates = self.open(settings)
        gates[..., [site.index for site in sites]] = 0
        return gates

    only = on = fallback = gradient = edits = closed  # the contract names them; nothing here asks for them

    def measure(self, batch: Any, gates: torch.Tensor, fallback: Any, metric: Any = None) -> torch.Tensor:
        shut = 1 - gates[:, :, 0].double().expand(-1, len(batch), -1)
        own = 1 + 0.2 * torch.sin(batch.tokens[:, 0].double())  # by example
        value = 5 - shut @ self.effects + (shut[..., self.first] * shut[..., self.second]) @ self.strength
        return value * own


def _sizes(draw: np.random.Generator, pairs: int) -> np.ndarray:
    return draw.choice([-1, 1], pairs) * draw.uniform(0.5, 2, pairs)


def rule() -> Fallback:
    """What `Planted` passes when a gate closes is nobody's business."""
    return nodes(planted().model).fallback("zero")


@cache
def planted() -> Planted:
    return Planted()


@pytest.mark.long
def test_masks_find_planted_pairs_without_heredity() -> None:
    """40 among 179,700: 9 in 10 are among the first 50, also those whose parts do nothing alone, and sizes are right within a third."""
    parts = planted()
    seen = masked(parts, examples(64), rule(), passes=128, share=0.05)
    assert seen.closed.shape == (128 * 64, 600) and seen.closed.mean() == pytest.approx(0.05, abs=0.001)
    pairs, estimate = sparse_pairs(seen)
    first = set(pairs[:50])
    assert len(first & set(parts.pairs)) >= 36
    silent = [pair for pair in parts.pairs if not parts.effects[list(pair)].any()]
    assert len(silent) == 20 and len(first & set(silent)) >= 18
    by_pair = dict(zip(pairs, estimate, strict=True))
    found = [pair for pair in parts.pairs if pair in by_pair]
    ratio = [by_pair[pair] / parts.pairs[pair] for pair in found]
    assert np.median(ratio) == pytest.approx(1, abs=0.33) and min(ratio) > 0


@pytest.mark.long
def test_a_screen_verifies_and_bounds_what_was_missed() -> None:
    parts = planted()
    found = screen(parts, examples(64), rule(), passes=128, top=60, sample=200)
    assert len(found.found) == 60 and len(found.sample) == 200
    truth = {(f"L0.mlp.n{i}", f"L0.mlp.n{j}"): size for (i, j), size in parts.pairs.items()}
    own = float((1 + 0.2 * torch.sin(examples(64).batch().tokens[:, 0].double())).mean())
    for row in found.found.table.iter_rows(named=True):  # verified: exact, whatever the estimate said
        assert row["score"] == pytest.approx(own * truth.get((row["a"], row["b"]), 0), abs=1e-6)
    hits = sum((a, b) in truth for a, b in found.found.table.select("a", "b").iter_rows())
    assert hits >= 36
    missed = found.missed
    left = [size for pair, size in truth.items() if pair not in set(found.found.table.select("a", "b").iter_rows())]
    assert sum(abs(own * size) >= missed.threshold for size in left) <= missed.most
    assert missed.pairs == 600 * 599 // 2 - 60 and missed.sampled == 200 and "95 %" in str(missed)
    large = found.found.table.filter(pl.col("score").abs() > 0.1)
    assert (large["score"].sign() == large["by_masks"].sign()).all() and found.to_record()["missed"]["above"] == missed.above
    with pytest.raises(PatchclampError, match="measure all of them"):
        screen(parts, examples(4), rule(), top=179_000, sample=700)


@pytest.mark.parametrize(("share", "drawn"), [(0.01, 300), (0.1, 100), (0.002, 500)])
def test_the_bound_covers_at_least_95_in_100(share: float, drawn: int) -> None:
    """Over every number of large pairs that a sample can hold, weighted by its chance; and with none seen it is the rule of three."""
    chances = binom.pmf(np.arange(drawn + 1), drawn, share)
    covers = [bound(np.r_[np.ones(hits), np.zeros(drawn - hits)], 1000, 0.5).share >= share for hits in range(drawn + 1)]
    assert (chances * covers).sum() >= 0.95
    none = bound(np.zeros(drawn), 100_000, 0.5)
    assert none.share == pytest.approx(3 / drawn, rel=0.02) and none.most == int(none.share * 100_000) and none.above == 0
    assert none.beyond == pytest.approx(none.share) and bound(np.ones(drawn), 10, 0.5).share == 1


def test_on_a_small_model_the_screen_agrees_with_all_pairs() -> None:
    """Heads and neurons of a tiny model, 40 parts: what the screen calls largest is what all pairs have, and second derivatives rank
    them as they are. (GELU is smooth and its changes here small.)"""
    model, some = Model.load(tiny("gpt2", dtype=torch.float64)), examples(24)
    parts = gated(model, ["L*.h*", *(f"L{layer}.mlp.n{unit}" for layer in (0, 1) for unit in range(0, 128, 8))])
    zero = parts.fallback("zero")
    every = interactions(parts, some, zero)
    found = screen(parts, some, zero, top=60, sample=60, passes=64, share=0.1, rows=40)
    assert len(parts.labels) == 40 and set(found.fits) == {"by_masks", "by_curvature"}
    largest = {frozenset(pair) for pair in every.top(15).select("a", "b").iter_rows()}
    verified = {frozenset(pair) for pair in found.found.table.select("a", "b").iter_rows()}
    assert len(largest & verified) >= 13
    for row in found.found.table.head(10).iter_rows(named=True):
        assert row["score"] == pytest.approx(every.pair(row["a"], row["b"])["score"], abs=1e-9)
    left = [pair for pair in combinations(every.parts, 2) if frozenset(pair) not in verified]
    large = sum(abs(every.pair(*pair)["score"]) >= found.missed.threshold for pair in left)
    assert large <= found.missed.most
    assert (found.fits["by_curvature"].spearman or 0) > 0.6


def test_what_cannot_be_screened_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, some = Model.load(tiny("gpt2")), examples(4)
    parts, arrows = nodes(model), edges(model)
    monkeypatch.setattr(SCREEN, "masked", None)  # whatever runs, runs masks first
    with pytest.raises(GateError, match="not of Edges"):
        screen(arrows, some, arrows.fallback("zero"), rows=3)
    with pytest.raises(MetricError, match="kl has no slope"):
        screen(parts, some, parts.fallback("zero"), metric="kl", rows=3, top=4, sample=4)
    monkeypatch.undo()
    for passes, share in ((0, 0.1), (4, 0.0), (4, 1.0)):
        with pytest.raises(PatchclampError, match="masks that close"):
            screen(parts, some, parts.fallback("zero"), passes=passes, share=share, top=4, sample=4)
    with pytest.raises(PatchclampError, match="in 4 observations"):
        screen(parts, some, parts.fallback("zero"), passes=1, top=4, sample=4)


def test_masks_that_point_to_nothing_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no pair was found, half of the largest is no threshold; with one of the user's own, the random sample still bounds."""
    parts, some = nodes(Model.load(tiny("gpt2"))), examples(4)
    nothing = lambda *_, **__: Masked(np.zeros((20, 10), dtype=bool), np.zeros(20))  # noqa: E731
    monkeypatch.setattr(SCREEN, "masked", nothing)
    with pytest.raises(PatchclampError, match="point to no pair"):
        screen(parts, some, parts.fallback("zero"), top=4, sample=4)
    found = screen(parts, some, parts.fallback("zero"), top=4, sample=4, threshold=100.0)
    assert not len(found.found) and found.missed.pairs == 45 and found.missed.above == 0
