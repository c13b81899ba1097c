"""Scores: intervals that cover, p-values that are calibrated, correction for many parts, agreement, keeping."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from patchclamp.errors import NumericsError, PatchclampError
from patchclamp.scores import Scores
from patchclamp.scores.statistics import mean_interval
from patchclamp.sites import Edge, Site

HEADS = [Site("head", layer, index) for layer in range(5) for index in range(8)]
ABOUT = {"method": "exact", "metric": "logit_diff", "fallback": "resample", "seed": 0}


def planted(n: int = 100, seed: int = 0) -> np.ndarray:
    """40 heads of which the first works for the behaviour, the second against it, and the others do nothing."""
    samples = np.random.default_rng(seed).normal(size=(40, n))
    samples[0] += 2
    samples[1] -= 1
    return samples


def test_mean_interval_and_provenance() -> None:
    samples = planted()
    scores = Scores.from_samples(HEADS, samples, ABOUT)
    np.testing.assert_allclose(scores.values(), samples.mean(1))
    row = scores["L0.h0"]
    error = samples[0].std(ddof=1) / 10
    assert row["low"] == pytest.approx(row["score"] - 1.96 * error, abs=0.05)
    assert row["high"] == pytest.approx(row["score"] + 1.96 * error, abs=0.05)
    assert scores.about == {**ABOUT, "n": 100, "groups": 100, "resamples": 1000}
    assert scores.top(2)["site"].to_list() == ["L0.h0", "L0.h1"]
    assert set(scores.significant()["site"]) == {"L0.h0", "L0.h1"}
    assert scores.table.columns == ["site", "layer", "kind", "index", "score", "low", "high", "p", "q"]


def test_intervals_cover_the_mean() -> None:
    samples = np.random.default_rng(1).exponential(size=(500, 60))
    table = Scores.from_samples([Site("neuron", 0, i) for i in range(500)], samples, ABOUT).table
    covered = ((table["low"] < 1) & (table["high"] > 1)).mean()
    assert 0.90 <= covered <= 0.98  # the percentile bootstrap of 60 skewed numbers covers a little under 95 %


def test_p_is_calibrated_under_the_null() -> None:
    for n in (8, 40):  # 8: all sign flips are tried, 40: random ones
        samples = np.random.default_rng(2).standard_t(3, size=(1500, n))
        p = Scores.from_samples([Site("neuron", 0, i) for i in range(1500)], samples, ABOUT).values(column="p")
        for level in (0.05, 0.2, 0.5):
            assert (p <= level).mean() == pytest.approx(level, abs=4 * (level * (1 - level) / 1500) ** 0.5 + 2 / 2**n)


def test_exact_p_is_brute_force() -> None:
    samples = np.random.default_rng(3).normal(0.5, 1, size=(3, 7))
    p = Scores.from_samples(HEADS[:3], samples, ABOUT).values(column="p")
    for row, value in zip(samples, p, strict=True):
        sums = [abs(sum(s * x for s, x in zip(signs, row, strict=True))) for signs in product((1, -1), repeat=7)]
        assert value == pytest.approx(np.mean([total >= abs(row.sum()) - 1e-9 for total in sums]))


def test_groups_are_resampled_whole() -> None:
    """Ten copies of five numbers hold what five numbers hold: interval and p are those of the five."""
    values = np.random.default_rng(4).normal(1, 1, size=(40, 5))
    copies, names = np.repeat(values, 10, axis=1), np.repeat(list("abcde"), 10)
    alone, grouped = Scores.from_samples(HEADS, values, ABOUT), Scores.from_samples(HEADS, copies, ABOUT, groups=list(names))
    for column in ("score", "low", "high", "p", "q"):
        np.testing.assert_allclose(alone.values(column=column), grouped.values(column=column))
    assert grouped.about["n"] == 50 and grouped.about["groups"] == 5


def test_unequal_groups_keep_the_mean() -> None:
    values = np.array([[1.0, 1.0, 1.0, 5.0]])
    scores = Scores.from_samples(HEADS[:1], values, ABOUT, groups=["a", "a", "a", "b"])
    row = scores["L0.h0"]
    assert row["score"] == 2 and (row["low"], row["high"]) == (1, 5)


def test_benjamini_hochberg_by_hand() -> None:
    table = Scores.from_samples(HEADS, planted(), ABOUT).table.sort("p")
    p = table["p"].to_numpy()
    stepped = np.minimum.accumulate((p * 40 / np.arange(1, 41))[::-1])[::-1]
    np.testing.assert_allclose(table["q"].to_numpy(), np.minimum(stepped, 1))


def test_too_few_examples_give_no_top_ten() -> None:
    scores = Scores.from_samples(HEADS, planted(n=8) + 5, ABOUT)
    assert scores.table["q"].max() < 0.05  # every part would pass, and that says nothing of which
    assert not len(scores.significant())
    assert scores.too_few is not None and "n = 8 examples" in scores.too_few and scores.too_few in str(scores)
    assert Scores.from_samples(HEADS, planted(n=30), ABOUT).too_few is None


def test_one_example_has_no_interval() -> None:
    scores = Scores.from_samples(HEADS, planted(n=1), ABOUT)
    assert scores.table["low"].null_count() == scores.table["q"].null_count() == 40
    assert mean_interval(np.array([2.0])) == (2.0, None, None, 1)


def test_null_effect_is_not_significant() -> None:
    scores = Scores.from_samples(HEADS, np.zeros((40, 30)), ABOUT, noise=1e-6)
    assert scores.values(column="p").min() == 1 and scores.table["below_noise"].all()
    assert scores.share()["share"].sum() == 0


def test_not_a_number_names_the_part() -> None:
    samples = planted()
    samples[9, 3] = np.nan
    with pytest.raises(NumericsError, match=r"L1\.h1 on example 3 is nan"):
        Scores.from_samples(HEADS, samples, ABOUT)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(PatchclampError, match=r"\[40, examples\], not \[100, 40\]"):
        Scores.from_samples(HEADS, planted().T, ABOUT)
    with pytest.raises(PatchclampError, match="2 groups were named for 100"):
        Scores.from_samples(HEADS, planted(), ABOUT, groups=["a", "b"])
    with pytest.raises(PatchclampError, match=r"L0\.h0 has several"):
        Scores.of([HEADS[0], HEADS[0]], [1, 2], ABOUT)


def test_share() -> None:
    share = Scores.of(HEADS[:3], [1, -3, 0], ABOUT).share()
    assert share["share"].to_list() == [0.75, 0.25, 0] and share["cumulative"].to_list() == [0.75, 1, 1]


def test_agreement() -> None:
    true = Scores.of(HEADS[:5], [5, 4, 3, 2, -1], ABOUT)
    assert str(true.agreement(true)) == "Spearman +1.00, Kendall +1.00, 0 of 5 clear signs wrong (n = 5 parts)"
    turned = Scores.of(HEADS[:5], [-5, -4, -3, -2, 1], ABOUT).agreement(true)
    assert (turned.spearman, turned.kendall, turned.wrong_signs) == (pytest.approx(-1), pytest.approx(-1), 5)
    moved = Scores.of(HEADS[:4], [5, 4, 3, -9], ABOUT).agreement(true)
    assert (moved.n, moved.wrong_signs, moved.worst) == (4, 1, None)  # the ranks agree, one sign does not
    assert Scores.of(HEADS[:4], [0, 4, 3, 2], ABOUT).agreement(true).worst == "L0.h0"
    vague = Scores.of(HEADS[:5], [5, 4, 3, 2, -1], ABOUT, low=[4, 3, 2, 1, -2], high=[6, 5, 4, 3, 1])
    assert Scores.of(HEADS[:5], [-1, 1, 1, 1, 1], ABOUT).agreement(vague).wrong_signs == 1  # the last one's interval holds zero
    assert Scores.of(HEADS[:5], [1] * 5, ABOUT).agreement(true).spearman is None


def test_keeping(tmp_path: Path) -> None:
    scores = Scores.from_samples(HEADS, planted(), ABOUT)
    again = Scores.load(scores.save(tmp_path / "scores.parquet"))
    assert again.table.equals(scores.table) and again.about == scores.about
    assert Scores.load(scores.save(tmp_path / "scores.csv")).top(3)["site"].to_list() == scores.top(3)["site"].to_list()
    with pytest.raises(PatchclampError, match=r"\.parquet or \.csv"):
        scores.save(tmp_path / "scores.pkl")


def test_edges_and_showing() -> None:
    edges = [Edge.parse("L0.h1>L1.h0.q"), Edge.parse("embed>L0.h1.q")]
    scores = Scores.of(edges, [1, 2], {"model": "<b>"})
    assert scores.sites == tuple(edges) and scores.table["layer"].to_list() == [1, 0]
    assert "L0.h1&gt;L1.h0.q" in scores._repr_html_()
    shown = Scores.of([*HEADS, Site("mlp", 0)], range(41), ABOUT)._repr_html_()
    assert shown.count("<th>") == 8 + 1 + 5 and "L4.h7 +39.0000" in shown


def test_torch_goes_in_and_order_can_be_asked_for() -> None:
    import torch

    scores = Scores.from_samples(HEADS[:2], torch.tensor([[1.0, 3.0], [2.0, 2.0]]), ABOUT)
    assert scores.values([HEADS[1], HEADS[0]]).tolist() == [2, 2]
    assert np.isnan(scores.values([HEADS[5]])).all()
    with pytest.raises(PatchclampError, match=r"L4\.h7 has no score"):
        scores["L4.h7"]
