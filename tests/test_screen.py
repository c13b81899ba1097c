"""Screen, then verify: bounds on what was missed against simulation and counting, screens against all exact effects."""

from functools import cache
from itertools import combinations
from math import comb

import numpy as np
import polars as pl
import pytest

from cases import tiny
from patchclamp.discover import missed, screened, verified_recall
from patchclamp.discover.missed import looks
from patchclamp.errors import MetricError, PatchclampError
from patchclamp.methods import attribute, effects
from patchclamp.models.model import Model
from patchclamp.parts import Parts, edges, gated, nodes
from patchclamp.scores import Scores
from patchclamp.sites import Site
from patchclamp.zoo import wired
from test_parts import examples


@cache
def neurons() -> Parts:
    return gated(Model.load(tiny("gpt2")), ["L*.mlp.n*"])


def test_how_many_exceed_is_counted():
    """By brute force over the hypergeometric: M + 1 larger ones escape the sample by a chance of at most alpha, M do not."""
    for left, sampled, confidence in ((30, 10, 0.95), (300, 40, 0.9), (9, 3, 0.5), (1000, 1, 0.95)):
        found = missed(np.arange(float(sampled)), np.ones(sampled), np.ones(left), confidence).count
        every = left + sampled

        def escape(many: int, every: int = every, sampled: int = sampled) -> float:
            return comb(every - many, sampled) / comb(every, sampled)

        assert escape(found + 1) <= 1 - confidence < escape(found) or found == left


@pytest.mark.parametrize("tail", ["power", "normal"])
def test_both_bounds_hold_as_often_as_they_say(tail: str):
    """400 populations of 1000 whose errors are relative. The count holds whatever the errors are; the size where they are relative."""
    rng, broken = np.random.default_rng(0), np.zeros(2)
    for _ in range(400):
        screen = np.exp(rng.normal(0, 1, 1000))
        error = rng.pareto(2.0, 1000) + 0.1 if tail == "power" else np.abs(rng.normal(0, 1, 1000))
        exact = 0.7 * screen + rng.choice([-1, 1], 1000) * error * (screen + np.median(screen))
        leading = screen > np.quantile(screen, 0.8)
        rest = np.flatnonzero(~leading)
        drawn = rng.choice(rest, 60, replace=False)
        left = np.setdiff1d(rest, drawn)
        found = missed(exact[drawn], screen[drawn], screen[left])
        assert found.largest == pytest.approx(np.abs(exact[drawn]).max())
        sizes = np.abs(exact[left])
        broken += [(sizes > found.largest).sum() > found.count, sizes.max() > found.size]
    # 5 % of 400 is 20, with a standard error of 4.4: three of these above is the most that chance would give
    assert (broken <= 33).all(), broken


def test_a_bound_follows_the_calibration():
    """The tighter exact effects keep to the screen, the less can have been missed; a screen that knows nothing spares nothing."""
    rng = np.random.default_rng(1)
    screen = np.exp(rng.normal(0, 2, 2000))
    known = np.sort(screen)[:1600]
    drawn, left = known[::20], np.delete(known, np.arange(0, 1600, 20))
    sizes = [missed(drawn * np.exp(rng.normal(0, s, 80)), drawn, left).size for s in (0.01, 0.3, 1.0)]
    assert sizes == sorted(sizes) and sizes[0] < 2 * left.max()
    blind = missed(np.exp(rng.normal(0, 2, 80)), np.zeros(80), np.zeros(1520))
    assert blind.size > np.exp(2 * 3) and blind.count > 0
    assert missed(np.ones(3), np.ones(3), np.zeros(0)).size == 0
    assert missed(np.zeros(0), np.zeros(0), np.ones(4)).size == float("inf")


def test_the_screen_finds_what_all_exact_effects_find_for_a_quarter_of_them():
    parts, some = neurons(), examples(4)
    fallback = parts.fallback("resample")
    exact = attribute(parts, some, fallback)
    told: list[tuple[int, int]] = []
    found = screened(parts, some, fallback, top=5, progress=lambda done, of: told.append((done, of)))
    assert found.settings <= 0.25 * len(parts.counted) and told[-1] == (found.settings, 64)
    assert found.scores.top(5)["site"].to_list() == exact.top(5)["site"].to_list()
    np.testing.assert_allclose(found.scores.values(), exact.values(found.scores.sites), atol=1e-5)  # float32, in other groups
    assert found.missed.size > max(abs(exact.values([p for p in exact.sites if p not in set(found.scores.sites)])))
    rest = found.ranking.table.filter(~pl.col("verified"))
    assert rest["score"].to_list() == rest["screen"].to_list() and rest.height == found.missed.left
    assert found.scores.table["drawn"].sum() == found.missed.sampled == 32
    assert found.goal == pytest.approx(abs(found.scores.top(5)["score"][4]))
    recall = verified_recall(attribute(parts, some, fallback, "gradient"), exact)
    assert recall.cost(5) <= 0.25 * len(parts.counted) and recall.area < 0.25


def test_with_the_whole_budget_everything_ends_verified_or_bounded():
    parts, some = neurons(), examples(2)
    fallback = parts.fallback("resample")
    blind = screened(parts, some, fallback, "random", top=5, budget=1.0)
    assert blind.stopped == "everything" and blind.missed.left == 0 and blind.settings == len(parts.counted)
    assert "nothing can have been missed" in str(blind)
    again = screened(parts, some, fallback, "random", top=5, budget=1.0)
    assert again.scores.table.equals(blind.scores.table)
    short = screened(parts, some, fallback, "random", top=5)
    assert short.stopped == "budget" and "budget ended" in str(short) and short.missed.size > short.goal
    assert (short.agreement or 0) < 0.5


def test_a_screen_without_errors_is_bounded_at_once(monkeypatch: pytest.MonkeyPatch):
    """Exact effects as their own screen, under another name: then the bound is narrow, and the rest is spared."""
    parts, some = neurons(), examples(2)

    def themselves(parts, examples, fallback, method, **named):
        return effects(parts, examples, fallback, "exact", **named)

    monkeypatch.setattr("patchclamp.discover.screen.effects", themselves)
    found = screened(parts, some, parts.fallback("resample"), top=2, sample=24)
    assert found.stopped == "bounded" and found.settings < len(parts.counted) / 2
    assert found.missed.size < found.goal and found.agreement == pytest.approx(1.0)


def test_edges_of_a_wired_model_are_all_verified_and_the_planted_ones_come_first():
    model = wired("induction")
    parts = edges(Model.load(model.hf, tokenizer=model.tokenizer))
    some = model.task.examples(model.tokenizer, 6, seed=1)
    found = screened(parts, some, parts.fallback("resample"), top=3, budget=1.0)
    assert set(found.scores.top(3)["site"]) == {"embed>L0.kv1.v", "L0.h1>L1.kv2.k", "L1.h2>logits"}
    assert (found.scores.top(4)["score"][3]) == pytest.approx(0, abs=1e-4)


def test_recall_is_counted_by_hand():
    sites = [Site("head", 0, h) for h in range(6)]
    exact = Scores.of(sites, [5, -4, 3, 2, 1, 0], {})
    ranking = Scores.of(sites, [9, 1, -8, 0.5, 7, 0.1], {})  # order: 0, 2, 4, 1, 3, 5
    found = verified_recall(ranking, exact, most=4)
    assert found.table["cost"].to_list() == [1, 4, 4, 5]
    assert found.table["chance"].to_list() == pytest.approx([3.5, 14 / 3, 21 / 4, 28 / 5])
    assert found.area == pytest.approx((1 + 4 + 4 + 5) / 24)
    weights = np.array([1, 1 / 2, 1 / 3, 1 / 4])
    assert found.relative == pytest.approx(np.exp((np.log([1, 2, 4 / 3, 5 / 4]) * weights).sum() / weights.sum()))
    assert verified_recall(exact, exact).relative == pytest.approx(1)
    # chance: the mean over all places that the k largest can have of the last of them
    for k in range(1, 5):
        assert found.table["chance"][k - 1] == pytest.approx(np.mean([max(places) for places in combinations(range(1, 7), k)]))
    with pytest.raises(PatchclampError, match="not the same"):
        verified_recall(Scores.of(sites[:2], [1, 2], {}), exact)


def test_what_cannot_be_screened_is_refused():
    model = Model.load(tiny("gpt2"))
    parts, some = nodes(model), examples(2)
    fallback = parts.fallback("resample")
    with pytest.raises(MetricError, match="logit_diff"):  # its slope at the open run is zero: it says what to use
        screened(parts, some, fallback, metric="kl")
    with pytest.raises(PatchclampError, match="a screen of themselves"):
        screened(parts, some, fallback, "exact")
    with pytest.raises(PatchclampError, match=r"budget 0\.0"):
        screened(parts, some, fallback, budget=0.0)
    items = tuple(type(item)(**{**vars(item), "corrupt": item.clean}) for item in some)
    with pytest.raises(MetricError, match="nothing to rank"):
        screened(parts, type(some)(items, some.tokenizer, "still"), fallback)
    with pytest.raises(PatchclampError, match="confidence"):
        missed(np.ones(2), np.ones(2), np.ones(2), 1.0)
    assert looks(0.95, 0) == pytest.approx(0.975) and looks(0.95, 2) == pytest.approx(0.99375)
