"""Trust in circuits: ends and masks against passes by hand, random circuits, hypotheses, fragility, stability."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import binom

from cases import tiny
from patchclamp.circuit import Circuit
from patchclamp.discover import discover
from patchclamp.errors import MetricError, PatchclampError
from patchclamp.methods import attribute, groups_of
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import FALLBACKS, Nodes, benefits, edges, nodes
from patchclamp.parts.optimal import learn_optimal
from patchclamp.scores.ratios import Shares
from patchclamp.sites import Site
from patchclamp.trust import Shape, chance, fragility, hypotheses, stability, trust
from patchclamp.trust.fragile import kept
from patchclamp.trust.hypotheses import equivalence, independence
from patchclamp.trust.stable import _chance
from patchclamp.zoo import wired
from patchclamp.zoo._wired import Wired
from test_parts import examples

DIFF = METRICS["logit_diff"]
FAMILIES = ("gpt2", "llama", "gemma2", "qwen3", "gpt_neox")
"""Pre-norm with fused QKV; grouped-query attention; post-norms; QK-norms; parallel blocks."""


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_is_faithful_and_nothing_is_not(name: str):
    """f = 1 and f = 0 to 1e-5 for every fallback, of nodes and of edges, against runs of the model that no gate took part in."""
    model = Model.load(tiny(name))
    some = examples(4, (7,))
    batch = some.batch()
    plain = DIFF(model.target_logits(batch).detach(), batch)[0].double().numpy()
    corrupt = DIFF(model.target_logits(batch.swapped()).detach(), batch)[0].double().numpy()
    for parts in (nodes(model), edges(model)):
        everything = [parts.labels[number] for number in parts.counted]
        for kind in FALLBACKS:
            fit = examples(4, (7,), seed=1)
            rule = learn_optimal(parts, fit, updates=1) if kind == "optimal" else parts.fallback(kind, fit=fit)
            gates = torch.cat([parts.open(), parts.closed(), parts.only(everything), parts.without(everything)])
            opened, closed, whole, empty = benefits(parts, some, gates, rule, DIFF).double().numpy()
            assert np.allclose(opened, plain, atol=1e-6)
            ratio = Shares.of(opened, closed)
            assert float(ratio.point(whole)) == pytest.approx(1, abs=1e-5)
            assert float(ratio.point(empty)) == pytest.approx(0, abs=1e-5)
            if kind == "resample" and parts.labels[0] != Site(
                "embed"
            ):  # every edge closed: all that is read is the corrupt run's
                assert np.allclose(closed, corrupt, atol=1e-5)


@pytest.fixture(scope="module")
def induction() -> tuple[Wired, Nodes]:
    model = wired("induction")
    return model, nodes(Model.load(model.hf, tokenizer=model.tokenizer))


def planted(model: Wired) -> Circuit:
    return Circuit([site for site, role in model.truth.roles.items() if role == "facilitating"])


# --- random circuits


def test_chance_is_calibrated():
    """A circuit that is itself drawn at random: p <= alpha in at most a share alpha of repeats, for few and for many circuits."""
    for count in (2, 5, 40, 10_000):
        rng, hits = np.random.default_rng(count), Counter[float]()
        for _ in range(2000):
            rank = int(rng.integers(count))  # how many of the others are better
            better = int(rng.binomial(50, rank / (count - 1)))
            p = chance(better, 50, count)
            assert 1 / count <= p <= 1 + 1e-12
            hits.update(alpha for alpha in (0.05, 0.25, 0.5) if p <= alpha)
        for alpha in (0.05, 0.25, 0.5):
            # three standard errors of a share of 2000 repeats above alpha at most
            assert hits[alpha] / 2000 <= alpha + 3 * (alpha * (1 - alpha) / 2000) ** 0.5
    assert chance(0, 99, 10**9) == pytest.approx(0.01) and chance(0, 10**6, 4) == pytest.approx(0.25, abs=1e-5)


def test_p_of_random_circuits_of_a_model_is_calibrated(induction: tuple[Wired, Nodes]):
    """Every pair of heads as the circuit in turn: its p is at most alpha for at most a share alpha of them."""
    model, parts = induction
    some = model.task.examples(model.tokenizer, 6, seed=2)
    heads = [site for site in parts.labels if site.kind == "head"]
    rule = parts.fallback("resample")
    pairs = list(combinations(heads, 2))
    gates = torch.cat([parts.open(), parts.closed(), *map(parts.only, pairs)])
    opened, closed, *values = benefits(parts, some, gates, rule, DIFF).double().numpy()
    scores = Shares.of(opened, closed).point(np.array(values)) + np.random.default_rng(0).normal(0, 1e-3, len(pairs))
    found = []
    for number, score in enumerate(scores):
        others, rng = np.delete(scores, number), np.random.default_rng(number)
        found.append(chance(int((rng.choice(others, 100) >= score).sum()), 100, len(pairs)))
    shape = Shape.of(parts, list(pairs[0]))
    assert shape.combinations == len(pairs) == 28 and shape.size == 2
    for alpha in (0.05, 0.1, 0.3, 0.6):
        assert np.mean(np.array(found) <= alpha) <= alpha + 2 / 28  # each circuit has one set of draws: a rank or two of luck
    assert min(found) < 0.06  # and it does find the best


def test_shapes_count_kinds_and_draw_outside(induction: tuple[Wired, Nodes]):
    _, parts = induction
    members = [Site.parse(name) for name in ("L0.h1", "L1.h2", "L1.mlp")]
    shape, rng = Shape.of(parts, members), np.random.default_rng(0)
    assert shape.counts == {"head": 2, "mlp": 1} and shape.combinations == 28 * 2
    assert all(set(shape.another(rng, members)) != set(members) for _ in range(50))
    apart = Shape.of(parts, members, outside=True)
    assert apart.combinations == 15 * 1 and not any(set(apart.draw(rng)) & set(members) for _ in range(20))
    everything = [parts.labels[number] for number in parts.counted]
    assert Shape.of(parts, everything).another(rng, everything) == everything


def test_a_circuit_with_few_others_of_its_shape_proves_little(induction: tuple[Wired, Nodes]):
    """Two MLPs of two: no draw can make p small."""
    model, parts = induction
    some = model.task.examples(model.tokenizer, 8, seed=2)
    mlps = Circuit([site for site in parts.labels if site.kind == "mlp"])
    found = trust(parts, some, parts.fallback("resample"), mlps, parts.labels[1:], groups=groups_of(some), random_circuits=20)
    assert found.p == 1.0
    right = trust(
        parts, some, parts.fallback("resample"), planted(model), parts.labels[1:], groups=groups_of(some), random_circuits=200
    )
    assert right.beats == 1.0 and right.p == pytest.approx((1 + 27 / 201) / 28)


# --- hypotheses


def test_a_right_circuit_passes_and_a_wrong_one_does_not(induction: tuple[Wired, Nodes]):
    model, parts = induction
    some = model.task.examples(model.tokenizer, 40, seed=3)
    rule = parts.fallback("resample")
    found = hypotheses(parts, some, rule, planted(model), draws=60, margin=0.3)
    assert found["sufficiency"].passed and found["sufficiency"].statistic == 1.0
    assert found["partial necessity"].passed and found["independence"].passed and found["minimality"].passed
    assert not found["non-equivalence"].rejected
    assert set(found.parts["site"]) == {"L0.h1", "L1.h2"} and found.parts["effect"].to_list() == pytest.approx([1, 1], abs=1e-6)
    wrong = hypotheses(parts, some, rule, Circuit(["L0.h0", "L1.h1"]), draws=60)
    assert not wrong["sufficiency"].passed and not wrong["partial necessity"].passed
    assert wrong["non-equivalence"].rejected and not wrong["equivalence"].passed
    assert wrong["partial necessity"].n == 60 and "faithfulness 0.00" in str(wrong["sufficiency"])
    more = hypotheses(parts, some, rule, planted(model) | Circuit(["L0.h0"]), draws=60)
    idle = more.parts.filter(more.parts["site"] == "L0.h0").row(0, named=True)
    assert idle["q"] <= 0.05 and not more["minimality"].passed and "L0.h0" in str(more["minimality"])
    with pytest.raises(PatchclampError, match="there is no test 'truth'"):
        found["truth"]


def test_equivalence_is_the_binomial_sum_written_out():
    rng = np.random.default_rng(0)
    model = rng.normal(size=40)
    circuit = model + rng.normal(0.1, 1, 40)
    groups = [str(number) for number in range(40)]
    differ, same = equivalence(model, circuit, groups, 0.1, 0.05)
    k = int((circuit > model).sum())
    far = [j for j in range(41) if abs(j / 40 - 0.5) >= abs(k / 40 - 0.5) - 1e-12]
    assert differ.p == pytest.approx(min(1, sum(binom.pmf(j, 40, 0.6) for j in far)))
    assert same.p == pytest.approx(
        max(sum(binom.pmf(j, 40, 0.4) for j in range(k, 41)), sum(binom.pmf(j, 40, 0.6) for j in range(k + 1)))
    )
    twice = [np.concatenate([one, one]) for one in (model, circuit)]
    assert equivalence(*twice, groups * 2, 0.1, 0.05)[0].p == differ.p  # prompts of one group count once
    equal = equivalence(model, model, groups, 0.1, 0.05)
    assert equal[0].p == pytest.approx(1) and "40 ties" in equal[0].evidence
    assert equivalence(np.zeros(2000), rng.normal(size=2000), [*map(str, range(2000))], 0.1, 0.05)[1].passed


def test_both_p_values_hold_their_level():
    """Under the null each rejects in at most 5 % of repeats (three standard errors of 400 allowed), and away from it it does."""
    groups, rejected, rng = [*map(str, range(60))], Counter[str](), np.random.default_rng(1)
    for number in range(400):
        model = rng.normal(size=60)
        sign = np.where(rng.uniform(size=60) < 0.6, 1.0, -1.0)  # at the edge of both nulls
        differ, same = equivalence(model, model + sign, groups, 0.1, 0.05)
        rejected.update({"differ": differ.rejected, "same": same.rejected})
        if number < 25:
            rejected.update({"alone": independence(model, rng.normal(size=60), groups, 0.05, number).rejected})
            rejected.update({"bound": independence(model, model**2 + 0.1 * rng.normal(size=60), groups, 0.05, number).rejected})
    assert rejected["differ"] <= 400 * 0.05 + 13 and rejected["same"] <= 400 * 0.05 + 13
    assert rejected["alone"] <= 25 * 0.05 + 3.3 and rejected["bound"] >= 23


def test_hypotheses_refuse_what_cannot_be_tested(induction: tuple[Wired, Nodes]):
    model, parts = induction
    some = model.task.examples(model.tokenizer, 4, seed=3)
    rule = parts.fallback("resample")
    everything = Circuit([parts.labels[number] for number in parts.counted])
    for circuit in (Circuit([]), everything):
        with pytest.raises(PatchclampError, match="leaves some out"):
            hypotheses(parts, some, rule, circuit)
    with pytest.raises(PatchclampError, match=r"quantile of 1\.5"):
        hypotheses(parts, some, rule, planted(model), quantile=1.5)
    with pytest.raises(PatchclampError, match="nothing outside"):
        fragility(parts, some, some, rule, everything)
    with pytest.raises(PatchclampError, match="between 0 and 1"):
        fragility(parts, some, some, rule, planted(model), shares=(1.0,))
    with pytest.raises(MetricError, match="no behaviour"):
        Shares.of(np.ones(3), np.ones(3))


# --- fragility


def test_verdicts_where_the_effects_are_known():
    """A head copies the answer (8 logits), another argues against it (5). m(all) = 3, m(none) = -3, m(the first alone) = 8 + 5 = 13."""
    model = wired("interfering")
    parts = nodes(Model.load(model.hf, tokenizer=model.tokenizer))
    search, judge = model.task.examples(model.tokenizer, 12, seed=1), model.task.examples(model.tokenizer, 12, seed=2)
    rule = parts.fallback("resample")
    both = fragility(parts, search, judge, rule, Circuit(["L0.h1", "L1.h3"]), draws=8)
    assert both.verdict == "robust" and both.worst.is_empty() and both.closed.mean == pytest.approx(1, abs=1e-5)
    helper = fragility(parts, search, judge, rule, Circuit(["L0.h1"]), draws=8)
    assert helper.closed.mean == pytest.approx(16 / 6, abs=1e-4) and helper.verdict == "insufficient"
    idle = fragility(parts, search, judge, rule, Circuit(["L1.mlp"]), draws=4)
    assert idle.closed.mean == pytest.approx(0, abs=1e-5) and idle.verdict == "insufficient"


def test_parts_that_cancel_when_all_are_closed_make_a_fragile_circuit():
    """OR of two heads: one of them and the MLP are enough, whatever else is closed. With two parts outside that add 3 logits and take
    them off again, the same circuit is right with both closed, and wrong with one."""
    model = wired("or")
    parts = nodes(Model.load(model.hf, tokenizer=model.tokenizer))
    search, judge = model.task.examples(model.tokenizer, 12, seed=1), model.task.examples(model.tokenizer, 12, seed=2)
    rule, circuit = parts.fallback("resample"), Circuit(["L0.h0", "L1.mlp"])
    one = fragility(parts, search, judge, rule, circuit, draws=8)
    assert one.verdict == "robust" and one.closed.mean == pytest.approx(1, abs=1e-3)
    pair = with_a_cancelling_pair(parts)
    found = fragility(pair, search, judge, pair.fallback("resample"), circuit, draws=30)
    assert found.closed.mean == pytest.approx(1, abs=1e-3) and found.verdict == "fragile"
    worst = {row["direction"]: row for row in found.worst.iter_rows(named=True)}
    assert "L1.h0" in worst["down"]["parts"] and "L1.h1" in worst["up"]["parts"]
    opened, closed = benefits(parts, judge, torch.cat([parts.open(), parts.closed()]), rule, DIFF).double().mean(1)
    for direction, sign in (("down", -1), ("up", 1)):
        assert worst[direction]["f"] == pytest.approx(1 + sign * 3 / float(opened - closed), abs=0.02)
    assert "fragile" in str(found) and found.subsets.height == 90


def with_a_cancelling_pair(parts: Nodes) -> Nodes:
    """The same parts, of which one idle head adds 3 to what is measured, and another takes 3 off, where they are open."""
    measure = parts.measure
    first, second = parts.index[Site.parse("L1.h0")], parts.index[Site.parse("L1.h1")]

    class Cancelling(Nodes):
        def measure(self, batch, gates, fallback, metric=None):
            return measure(batch, gates, fallback, metric) + 3 * (gates[:, 0, 0, first] - gates[:, 0, 0, second])[:, None]

    return Cancelling(parts.model)


def test_what_a_circuit_keeps_prompt_by_prompt_does_not_cancel():
    opened, closed = np.array([4.0, 4, 4, 4]), np.zeros(4)
    groups = ["a", "b", "c", "d"]
    swung = np.array([8.0, 0, 8, 0])  # right on average, wrong on every prompt
    assert float(Shares.of(opened, closed).point(swung)) == 1.0 and kept(opened, closed, swung, groups).mean == 0.0
    assert kept(opened, closed, opened, groups).mean == 1.0


def test_a_nonsense_task_is_kept_by_what_keeps_everything(induction: tuple[Wired, Nodes]):
    """The planted circuit does all that the model does, so it keeps nonsense too, and the sentence says so; half of it keeps neither."""
    model, parts = induction
    search, judge = model.task.examples(model.tokenizer, 8, seed=1), model.task.examples(model.tokenizer, 16, seed=2)
    rule = parts.fallback("resample")
    found = fragility(parts, search, judge, rule, planted(model), draws=2)
    assert found.kept.mean == pytest.approx(1, abs=1e-6) and found.nonsense is not None
    assert found.nonsense.mean == pytest.approx(1, abs=1e-6) and "nonsense" in str(found)
    half = fragility(parts, search, judge, rule, Circuit(["L0.h1"]), draws=2)
    assert half.nonsense is not None and half.nonsense.mean < 0.1 and half.kept.mean < 0.1


# --- stability


def test_a_planted_circuit_is_found_again(induction: tuple[Wired, Nodes]):
    model, parts = induction
    some = model.task.examples(model.tokenizer, 16, seed=4)
    rule = parts.fallback("resample")

    def find(examples, /, *, method, seed, order):
        scores = attribute(parts, examples, rule, method, seed=seed)
        if order:  # ties visited from the other end: the circuit must not change
            scores = type(scores)(scores.table.reverse(), scores.about)
        return discover(parts, examples, rule, scores, faithfulness=0.95)[0]

    found = stability(find, some, len(parts.counted), methods=("exact", "random"), seeds=(0, 1), orders=(0, 1), resamples=3)
    assert found.reference == planted(model)
    rows = {row["source"]: row for row in found.table.iter_rows(named=True)}
    assert [*rows] == ["prompts", "seed", "order", "method"] and rows["prompts"]["searches"] == 3
    assert rows["prompts"]["jaccard"] == rows["seed"]["jaccard"] == rows["order"]["jaccard"] == 1.0
    assert rows["method"]["jaccard"] < 1 and rows["prompts"]["chance"] < 0.3
    assert found.parts["share"][0] == 1.0 and len(found.circuits) == 6 and "Jaccard" in str(found)
    with pytest.raises(PatchclampError, match="needs a method"):
        stability(find, some, 10, methods=())


def test_chance_of_sharing_parts_is_the_mean_over_all_sets():
    sets = [set(one) for one in combinations(range(6), 2)], [set(one) for one in combinations(range(6), 3)]
    every = [len(a & b) / len(a | b) for a in sets[0] for b in sets[1]]
    assert _chance(2, 3, 6) == pytest.approx(np.mean(every)) and _chance(0, 0, 6) == 1.0
