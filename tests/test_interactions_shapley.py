"""Shapley values and interactions: against all subsets, the axioms, and what the sampling promises."""

from functools import cache
from itertools import combinations, permutations
from math import factorial

import numpy as np
import pytest
import torch

from cases import tiny
from patchclamp.dependence import shapley
from patchclamp.dependence.closings import closed_gates
from patchclamp.dependence.shapley import permutations as walks
from patchclamp.errors import PatchclampError
from patchclamp.models.model import Model
from patchclamp.parts import Gated, gated, nodes
from patchclamp.zoo import wired
from test_parts import examples


@cache
def every_subset(sites: tuple[str, ...]) -> tuple[Gated, dict[frozenset[int], np.ndarray]]:
    """v of every set of open parts."""
    parts, batch = gated(Model.load(tiny("gpt2")), list(sites)), examples(6).batch()
    n = len(parts.labels)
    subsets = [frozenset(some) for size in range(n + 1) for some in combinations(range(n), size)]
    gates = closed_gates(parts, [[part for part in range(n) if part not in some] for some in subsets])
    values = parts.measure(batch, gates, parts.fallback("resample")).double().numpy()
    return parts, dict(zip(subsets, values, strict=True))


def brute_force(values: dict[frozenset[int], np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """By the definitions, summed over all subsets."""
    single, double = np.zeros((n, 6)), np.zeros((n, n, 6))
    for some, value in values.items():
        for i in set(range(n)) - some:
            weight = factorial(len(some)) * factorial(n - len(some) - 1) / factorial(n)
            single[i] += weight * (values[some | {i}] - value)
        for i, j in combinations(sorted(set(range(n)) - some), 2):
            weight = factorial(len(some)) * factorial(n - len(some) - 2) / factorial(n - 1)
            double[i, j] += weight * (values[some | {i, j}] - values[some | {i}] - values[some | {j}] + value)
    return single, double


EVEN, ODD = ("L*.h*", "L*.mlp.write"), ("L*.h*", "L1.mlp.write")


@pytest.mark.parametrize("sites", [EVEN, ODD], ids=["10 parts", "9 parts"])
def test_samples_are_centred_on_all_subsets(sites: tuple[str, ...]) -> None:
    """Within a few standard errors of the sampling (of four rounds, so t with 3 degrees of freedom: 1 in 1,000 is beyond 10), and nearer
    with more rounds; efficiency to rounding in every permutation."""
    parts, values = every_subset(sites)
    n = len(parts.labels)
    single, double = (one.mean(-1) for one in brute_force(values, n))
    found = shapley(parts, examples(6), parts.fallback("resample"), rounds=4, seed=1)
    assert found.efficiency < 1e-5
    score, error = (found.values.table[name].to_numpy() for name in ("score", "sampling"))
    assert (np.abs(score - single) <= 10 * error + 1e-6).all()
    assert score.sum() == pytest.approx(float((values[frozenset(range(n))] - values[frozenset()]).mean()), abs=1e-5)
    upper = np.triu_indices(n, 1)
    pairs, spread = (found.pairs.table[name].to_numpy() for name in ("score", "sampling"))
    assert (np.abs(pairs - double[upper]) <= 10 * spread + 1e-6).mean() > 0.97
    assert np.corrcoef(pairs, double[upper])[0, 1] > 0.9 and np.corrcoef(score, single)[0, 1] > 0.99
    one = shapley(parts, examples(6), parts.fallback("resample"), rounds=1, seed=2).pairs.table["score"].to_numpy()
    assert (
        np.abs(pairs - double[upper]).mean() < 0.75 * np.abs(one - double[upper]).mean()
    )  # a half is what 4 times as many promise


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_that_can_be_drawn_together_is_the_definition(n: int) -> None:
    """No sampling: with every assignment of parts to points, the rule gives Shapley values and indices exactly, for odd n too."""
    draw = np.random.default_rng(3)
    game = {frozenset(some): draw.normal(size=1) for size in range(n + 1) for some in combinations(range(n), size)}

    single, double, rounds = np.zeros(n), np.zeros((n, n)), list(permutations(range(n + n % 2)))
    for order in rounds:
        paths = walks(n, np.array(order))
        met = np.zeros((n, n))
        for path, count in paths:
            chain = [game[frozenset(path[:k].tolist())][0] for k in range(n + 1)]
            single[path] += np.diff(chain) / len(paths)
            for k in np.flatnonzero(count):
                i, j = sorted(path[k : k + 2].tolist())
                met[i, j] += 1
                other = game[frozenset([*path[:k].tolist(), int(path[k + 1])])][0]
                double[i, j] += (chain[k + 2] - chain[k + 1] - other + chain[k]) / 2
        assert (met[np.triu_indices(n, 1)] == 2).all()
    expected = [np.zeros(n), np.zeros((n, n))]
    for some in game:
        for i in set(range(n)) - some:
            expected[0][i] += (
                factorial(len(some)) * factorial(n - len(some) - 1) / factorial(n) * (game[some | {i}] - game[some])[0]
            )
        for i, j in combinations(sorted(set(range(n)) - some), 2):
            weight = factorial(len(some)) * factorial(n - len(some) - 2) / factorial(n - 1)
            expected[1][i, j] += weight * (game[some | {i, j}] - game[some | {i}] - game[some | {j}] + game[some])[0]
    np.testing.assert_allclose(single / len(rounds), expected[0], atol=1e-10)
    np.testing.assert_allclose(double / len(rounds), expected[1], atol=1e-10)


def test_planted_relations() -> None:
    """AND of two heads and the MLP that reads them, all else idle: a game of three players of whom all are needed, so each is worth a
    third of A, pairs have A / 2, and idle parts nothing, in every permutation."""
    one = wired("and")
    parts, some = nodes(Model.load(one.hf, tokenizer=one.tokenizer)), one.task.examples(one.tokenizer, 24, seed=3)
    found = shapley(parts, some, parts.fallback("zero"), rounds=2)
    working = ("L0.h1", "L0.h2", "L1.mlp")
    for row in found.values.table.iter_rows(named=True):
        if row["site"] in working:
            assert row["score"] == pytest.approx(6.5 / 3, abs=1.5)  # 20 walks, each A or 0: a standard error of 0.7
        else:
            assert row["score"] == pytest.approx(0, abs=1e-4)
    for a, b in combinations(working, 2):
        assert found.pairs.pair(a, b)["score"] > 0
    assert found.pairs.pair("L0.h1", "L0.h0")["score"] == pytest.approx(0, abs=1e-4)
    assert found.efficiency < 1e-5 and set(found.to_record()) == {"values", "pairs", "efficiency", "about"}


def test_same_seed_same_values_with_or_without_a_held_norm() -> None:
    parts, some = nodes(Model.load(tiny("llama"))), examples(4)
    rule = parts.fallback("resample")
    one, two, held = (shapley(parts, some, rule, rounds=1, batch_size=size, frozen_norm=frozen)
                      for size, frozen in ((4, False), (3, False), (4, True)))  # fmt: skip
    np.testing.assert_allclose(one.values.table["score"], two.values.table["score"], atol=1e-5)
    assert one.values.table["sampling"].null_count() == 10 and (one.about["permutations"], one.about["norm"]) == (10, "free")
    assert (held.values.table["score"] - one.values.table["score"]).abs().max() > 1e-3
    ends = parts.frozen_norm().measure(some.batch(), torch.cat([parts.open(), parts.closed()]), rule).mean(1)
    assert held.values.table["score"].sum() == pytest.approx(float(ends[0] - ends[1]), abs=1e-4)
    with pytest.raises(PatchclampError, match="in 0 rounds"):
        shapley(parts, some, rule, rounds=0)
