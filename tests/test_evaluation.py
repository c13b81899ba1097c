"""Evaluation of circuits: areas in closed form, paths against a graph library, faithfulness against a loop."""

import networkx as nx
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from cases import tiny
from patchclamp.discover import evaluate, evaluate_circuits, grown, pruned, rank_auroc
from patchclamp.discover.evaluation import SHARES, areas, benchmark_auroc
from patchclamp.discover.pruning import owner
from patchclamp.errors import MetricError, PatchclampError
from patchclamp.methods import attribute
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Edges, Nodes, benefits, edges, nodes
from patchclamp.scores import Scores
from patchclamp.scores.ratios import Shares
from patchclamp.sites import Edge, Site
from patchclamp.zoo import wired
from patchclamp.zoo._wired import Wired
from test_parts import examples

K = np.array(SHARES)
DIFF = METRICS["logit_diff"]


def test_areas_of_curves_whose_integrals_are_known():
    """Constant, linear and step curves; the trapezoid rule is exact for the first two."""
    flat = areas(np.full(10, 0.8), K, "signed")
    assert flat["CPR"] == pytest.approx(0.8 * 0.999) and flat["log_area"] == pytest.approx(0.8)
    assert areas(np.full(10, 0.8), K, "magnitude")["CMD"] == pytest.approx(0.2 * 0.999)
    assert areas(np.full(10, 1.3), K, "magnitude")["CMD"] == pytest.approx(0.3 * 0.999)  # above 1 counts as below
    assert areas(K, K, "signed")["CPR"] == pytest.approx((1 - 1e-6) / 2)
    step = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1.0])  # from a tenth on: half of the trapezoid from .05 to .1, then 1
    assert areas(step, K, "signed")["CPR"] == pytest.approx(0.9 + 0.05 / 2)
    logs = np.log(K)
    by_hand = (logs[9] - logs[6] + (logs[6] - logs[5]) / 2) / (logs[9] - logs[0])
    assert areas(step, K, "signed")["log_area"] == pytest.approx(by_hand)
    assert areas(np.log(K) - logs[0], K, "signed")["log_area"] == pytest.approx((logs[9] - logs[0]) / 2)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def graph(request: pytest.FixtureRequest) -> tuple[Edges, int]:
    parts = edges(Model.load(tiny(request.param)))
    sizes = parts.model.anatomy.sizes[0]
    return parts, sizes.heads // sizes.kv_heads


@pytest.mark.parametrize("seed", range(6))
def test_pruned_edges_are_those_on_a_path_from_input_to_output(graph: tuple[Edges, int], seed: int):
    """Against networkx: an edge is kept where its source descends from the embedding and its reader is an ancestor of the logits."""
    parts, group = graph
    rng = np.random.default_rng(seed)
    chosen = [edge for edge in parts.labels if rng.uniform() < (0.15, 0.3, 0.5)[seed % 3]]
    known = nx.DiGraph()
    known.add_nodes_from([Site("embed"), Site("logits")])
    for edge in chosen:
        known.add_edges_from((edge.source, part) for part in owner(edge.target, group))
    behind, before = (
        nx.descendants(known, Site("embed")) | {Site("embed")},
        nx.ancestors(known, Site("logits")) | {Site("logits")},
    )
    expected = [e for e in chosen if e.source in behind and any(part in before for part in owner(e.target, group))]
    assert list(pruned(chosen, group)) == sorted(expected)


def test_edges_that_are_pruned_change_nothing(graph: tuple[Edges, int]):
    parts, group = graph
    some = examples(4, (7,))
    rng, rule, seen = np.random.default_rng(1), parts.fallback("resample"), 0
    for _ in range(5):
        chosen = [edge for edge in parts.labels if rng.uniform() < 0.3]
        kept = pruned(chosen, group)
        whole, less = benefits(parts, some, torch.cat([parts.only(chosen), parts.only(kept)]), rule, DIFF)
        assert torch.allclose(whole, less, atol=1e-5)  # float32, the same sums
        seen += len(chosen) - len(kept)
    assert seen > 10


def test_grown_circuits_are_connected_and_take_the_best_that_can_be_read(graph: tuple[Edges, int]):
    parts, group = graph
    values = np.random.default_rng(0).normal(size=len(parts.labels))
    scores = Scores.of(parts.labels, values, {})
    found = grown(scores, (1, 5, 40, 10**6), group)
    assert set(found[10**6]) == set(parts.labels) and found[5] == found[40][:5]
    score = dict(zip(parts.labels, np.abs(values), strict=True))
    inside = {Site("logits")}
    for number, edge in enumerate(found[40]):
        can = [e for e in parts.labels if e not in found[40][:number] and inside & set(owner(e.target, group))]
        assert edge in can and score[edge] == max(score[e] for e in can)
        inside.add(edge.source)
    with pytest.raises(PatchclampError, match="score edges"):
        grown(Scores.of([Site.parse("L0.h1")], [1.0], {}), (1,))


@pytest.fixture(scope="module")
def induction() -> tuple[Wired, Edges, Nodes]:
    model = wired("induction")
    loaded = Model.load(model.hf, tokenizer=model.tokenizer)
    return model, edges(loaded), nodes(loaded)


def test_faithfulness_is_what_a_loop_gives(induction: tuple[Wired, Edges, Nodes]):
    model, parts, _ = induction
    some = model.task.examples(model.tokenizer, 10, seed=3)
    rule = parts.fallback("resample")
    scores = attribute(parts, some, rule, "gradient")
    found = evaluate(parts, some, rule, scores, shares=(0.02, 0.1, 0.5, 1.0), by="magnitude")
    order = sorted(parts.labels, key=lambda edge: -abs(scores[edge]["score"]))
    opened, closed = benefits(parts, some, torch.cat([parts.open(), parts.closed()]), rule, DIFF).double()
    for row in found.table.iter_rows(named=True):
        circuit = order[: int(row["share"] * len(order))]
        assert row["parts"] == len(circuit) and row["realised"] == len(pruned(circuit))
        value, rest = benefits(parts, some, torch.cat([parts.only(circuit), parts.without(circuit)]), rule, DIFF).double()
        span = float((opened - closed).mean())
        assert row["faithfulness"] == pytest.approx(float((value - closed).mean()) / span, abs=1e-9)
        assert row["mean_of_ratios"] == pytest.approx(float(((value - closed) / (opened - closed)).mean()), abs=1e-9)
        assert row["completeness"] == pytest.approx(1 - float((rest - closed).mean()) / span, abs=1e-9)
        assert row["low"] <= row["faithfulness"] + 1e-9 and row["faithfulness"] - 1e-9 <= row["high"]
    assert found.table["faithfulness"][-1] == pytest.approx(1, abs=1e-6) and found.reaches(0.85) is not None
    assert found.area("CMD") == pytest.approx(
        float(areas(found.table["faithfulness"].to_numpy(), np.array([0.02, 0.1, 0.5, 1]), "magnitude")["CMD"])
    )


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Ratios of means of made-up numbers whose ratio is known, in groups of two: 95 % intervals hold it in at least 90 of 100 draws."""
    hits = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        closed, span = np.repeat(rng.normal(0, 1, 40), 2), np.repeat(rng.normal(3, 1, 40), 2)
        kept = closed + 0.6 * span + np.repeat(rng.normal(0, 1, 40), 2)
        ratio = Shares.of(closed + span, closed, [str(n // 2) for n in range(80)], seed=seed)
        assert ratio.groups == 40
        _, low, high, _ = ratio.interval(kept)
        assert low is not None and high is not None
        hits += low <= 0.6 <= high
    assert hits >= 90


def test_intervals_of_some_prompts_cover_the_score_of_all(induction: tuple[Wired, Edges, Nodes]):
    """What 320 prompts give is covered by intervals from 40 of them, drawn at random, in at least 90 of 100 repeats."""
    model, _, parts = induction
    some = model.task.examples(model.tokenizer, 320, seed=7)
    gates = torch.cat([parts.open(), parts.closed(), 0.5 * (parts.open() + parts.without([Site.parse("L1.h2")]))])
    opened, closed, half = benefits(parts, some, gates, parts.fallback("mean", fit=some), DIFF).double().numpy()
    half = half + np.random.default_rng(0).normal(0, 1, len(half))  # wired prompts are much alike: noise parts them
    whole = float(Shares.of(opened, closed).point(half))
    hits = 0
    for seed in range(100):
        rows = np.random.default_rng([seed, 1]).choice(320, 40, replace=False)
        _, low, high, _ = Shares.of(opened[rows], closed[rows], seed=seed).interval(half[rows])
        assert low is not None and high is not None
        hits += low <= whole <= high
    assert hits >= 90


def test_circuits_that_are_given_are_judged_as_those_of_scores_are(induction: tuple[Wired, Edges, Nodes]):
    model, parts, _ = induction
    some = model.task.examples(model.tokenizer, 6, seed=3)
    rule = parts.fallback("resample")
    scores = attribute(parts, some, rule, "gradient")
    shares = (0.05, 0.2, 1.0)
    found = evaluate(parts, some, rule, scores, shares=shares)
    order = sorted(parts.labels, key=lambda edge: -scores[edge]["score"])
    circuits = [order[: int(share * len(order) + 1e-9)] for share in shares]
    again = evaluate_circuits(parts, some, rule, circuits, shares)
    assert again.table.equals(found.table) and again.areas.equals(found.areas)
    up = evaluate(parts, some, rule, scores, shares=shares, grow=True)
    assert up.about["selected"] == "grown"
    by_hand = grown(scores, [len(circuits[1])])[len(circuits[1])]
    value = benefits(parts, some, parts.only(by_hand), rule, DIFF)[0].double().mean()
    opened, closed = benefits(parts, some, torch.cat([parts.open(), parts.closed()]), rule, DIFF).double().mean(1)
    assert up.table["faithfulness"][1] == pytest.approx(float((value - closed) / (opened - closed)), abs=1e-9)
    with pytest.raises(PatchclampError, match="one for each"):
        evaluate_circuits(parts, some, rule, circuits[:2], shares)


def test_a_better_ranking_has_the_better_areas(induction: tuple[Wired, Edges, Nodes]):
    model, _, parts = induction
    some = model.task.examples(model.tokenizer, 12, seed=3)
    rule = parts.fallback("resample")
    by = {
        name: evaluate(parts, some, rule, attribute(parts, some, rule, name, seed=1), shares=(0.1, 0.2, 0.5, 1.0))
        for name in ("exact", "random")
    }
    assert by["exact"].area("CPR") > by["random"].area("CPR") + 0.1
    assert by["exact"].area("log_area") > by["random"].area("log_area")


def test_auroc_by_rank_is_the_library_s_and_that_of_the_benchmark_is_as_it_is_written():
    rng = np.random.default_rng(0)
    values, true = rng.normal(size=60).round(1), rng.uniform(size=60) < 0.3
    assert rank_auroc(values, true.tolist()) == pytest.approx(roc_auc_score(true, values))
    parts = [Edge.parse(f"embed>L{layer}.mlp") for layer in range(10)]
    # sizes 1, 2, 5, 10 of 10 edges, the first and the third true: TPR .5, .5, 1, 1; FPR 0, 1/8, 3/8, 1
    by_hand = 0.5 * 0.125 + 0.75 * 0.25 + 1 * 0.625
    assert benchmark_auroc([parts[:k] for k in (1, 2, 5, 10)], [parts[0], parts[2]], 10) == pytest.approx(by_hand)
    for call in (lambda: rank_auroc(values, [True] * 60), lambda: benchmark_auroc([parts], parts, 10)):
        with pytest.raises(PatchclampError, match="AUROC needs some"):
            call()


def test_bad_input_is_refused(induction: tuple[Wired, Edges, Nodes]):
    model, _, parts = induction
    some = model.task.examples(model.tokenizer, 4, seed=3)
    rule = parts.fallback("resample")
    scores = attribute(parts, some, rule)
    for shares in ((), (0.5,), (0.5, 0.1, 1.0), (0.0, 1.0)):
        with pytest.raises(PatchclampError, match="ascending"):
            evaluate(parts, some, rule, scores, shares=shares)
    idle = nodes(parts.model, mlps=False)
    dead = idle.on(idle.model)
    dead.counted = (idle.index[Site.parse("L0.h0")],)  # writes where nobody reads
    with pytest.raises(MetricError, match="no behaviour"):
        evaluate(dead, some, dead.fallback("resample"), attribute(dead, some, dead.fallback("resample")))
