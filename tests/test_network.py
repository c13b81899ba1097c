"""The connectome against graphs whose structure is known, brute force, and wired models of two tasks."""

from dataclasses import replace
from functools import cache
from itertools import combinations

import networkx as nx
import numpy as np
import pytest

from patchclamp.dependence.network import (
    Connectome,
    affinity,
    communities,
    connectome,
    double_dissociation,
    edge_names,
    factorise,
    hub_table,
    lesion,
    modularity,
    motifs,
    moving_connectome,
    of_matrix,
    over_time,
    overlap,
    participation,
    rewired,
    rich_club,
    similarity,
)
from patchclamp.dependence.table import Dependence
from patchclamp.errors import PatchclampError
from patchclamp.methods import attribute
from patchclamp.models.model import Model
from patchclamp.parts import Nodes, nodes
from patchclamp.zoo import wired
from patchclamp.zoo._wired import Wired
from test_association import drawn


@cache
def built(name: str, family: str = "gpt2") -> tuple[Wired, Nodes]:
    one = wired(name, family)
    return one, nodes(Model.load(one.hf, tokenizer=one.tokenizer))


def planted(seed: int = 0, directed: bool = True, inside: float = 0.7, between: float = 0.03) -> tuple[Connectome, np.ndarray]:
    """Three communities of 8 parts, and which part is in which."""
    rng, truth = np.random.default_rng(seed), np.repeat(np.arange(3), 8)
    chance = np.where(truth[:, None] == truth[None], inside, between)
    weights = (rng.random((24, 24)) < chance) * rng.uniform(0.5, 1.5, (24, 24))
    weights = weights if directed else np.triu(weights, 1) + np.triu(weights, 1).T
    np.fill_diagonal(weights, 0)
    return of_matrix([f"L{i}.mlp" for i in range(24)], weights, directed), truth


def with_hubs(seed: int = 0) -> Connectome:
    """40 parts in a sparse ring, of which 4 are joined to half of all parts and to each other."""
    rng, weights = np.random.default_rng(seed), np.zeros((40, 40))
    for i in range(40):
        weights[i, (i + 1) % 40] = 1.0
    for hub in (0, 10, 20, 30):
        weights[hub, rng.choice(40, 20, replace=False)] = 1.0
    for one, two in combinations((0, 10, 20, 30), 2):
        weights[one, two] = 3.0
    weights = np.maximum(weights, weights.T)
    np.fill_diagonal(weights, 0)
    return of_matrix([f"L{i}.mlp" for i in range(40)], weights)


# --- graphs


def table_of(names: tuple[str, ...], scores: dict[tuple[int, int], tuple[float, float]], directed: bool = False) -> Dependence:
    pairs = list(scores)
    return Dependence.of(names, pairs, [s for s, _ in scores.values()], {"method": "test"}, directed=directed,
                         q=[q for _, q in scores.values()])  # fmt: skip


def test_edges_are_the_pairs_that_stand():
    names = ("L0.h0", "L0.h1", "L0.mlp")
    causal = table_of(names, {(0, 1): (0.5, 0.01), (0, 2): (-0.4, 0.02), (1, 2): (0.9, 0.5)})
    graph = connectome(causal, table_of(names, {(0, 1): (0.8, 0.01), (0, 2): (0.1, 0.9), (1, 2): (0.7, 0.01)}))
    np.testing.assert_allclose(graph.weights, [[0, 0.5, 0.4], [0.5, 0, 0], [0.4, 0, 0]])
    assert graph.count == 2 and graph.density == pytest.approx(2 / 3)
    assert connectome(causal, sign="positive").count == 1 and connectome(causal, sign="negative").weights[0, 2] == 0.4
    assert connectome(causal, alpha=None, floor=0.45).count == 2
    assert graph.agreement()["causal_in_statistical"] == 0.5 and graph.to_frame()["beside"].to_list() == [0.8, 0.0]
    directed = connectome(table_of(names, {(0, 1): (0.5, 0.01), (1, 2): (0.4, 0.01)}, directed=True))
    assert directed.weights[1, 0] == 0 and directed.count == 2 and sorted(directed.networkx().edges) == [(0, 1), (1, 2)]
    with pytest.raises(PatchclampError, match="of sign absolute"):
        connectome(causal, sign="both")
    with pytest.raises(PatchclampError, match="other parts"):
        connectome(causal, table_of(names[:2], {(0, 1): (0.5, 0.1)}))


@pytest.mark.parametrize("directed", [True, False])
def test_rewiring_keeps_degrees_and_nearly_strengths(directed: bool):
    graph, _ = planted(directed=directed)
    other = rewired(graph, seed=3)
    for axis in (0, 1):
        np.testing.assert_array_equal(other.edges.sum(axis), graph.edges.sum(axis))
        assert np.corrcoef(other.weights.sum(axis), graph.weights.sum(axis))[0, 1] > 0.75
    np.testing.assert_allclose(np.sort(other.weights[other.edges]), np.sort(graph.weights[graph.edges]))
    assert (other.edges & graph.edges).sum() < 0.6 * graph.edges.sum()
    assert np.array_equal(rewired(graph, seed=3).weights, other.weights)


@pytest.mark.parametrize("directed", [True, False])
def test_planted_communities_are_found_and_beyond_chance(directed: bool):
    graph, truth = planted(directed=directed)
    found = communities(graph, nulls=19)
    assert similarity(found.label, truth) == 1.0 and [len(one) for one in found.sets] == [8, 8, 8]
    wanted = nx.community.modularity(graph.networkx(), [set(np.flatnonzero(truth == c).tolist()) for c in range(3)])
    assert found.modularity == pytest.approx(wanted, abs=1e-12) == pytest.approx(modularity(graph, truth), abs=1e-12)
    assert found.p == 0.05 and found.z > 5 and found.null_95 < found.modularity and found.stability > 0.9
    assert found.to_record()["communities"].height == 24 and "modularity" in str(found)


def test_modularity_of_a_random_graph_is_not_beyond_chance():
    """12 random graphs: p <= .1 in about 1 of them; more than 5 has probability .0005 at the nominal level."""
    hits = 0
    for seed in range(12):
        graph, _ = planted(seed, inside=0.2, between=0.2)
        hits += communities(graph, seeds=2, nulls=9, seed=seed).p <= 0.1
    assert hits <= 5


def test_hubs_are_found_and_form_a_club():
    graph = with_hubs()
    table = hub_table(graph, np.arange(40) // 10)
    assert set(table["part"][:4]) == {"L0.mlp", "L10.mlp", "L20.mlp", "L30.mlp"}
    between = nx.betweenness_centrality(graph.networkx(), weight="distance")
    assert table.filter(table["part"] == "L10.mlp")["betweenness"][0] == pytest.approx(between[10])
    club = rich_club(graph, nulls=49)
    top = club.filter(club["parts"] <= 6)
    assert top["normalised"].max() > 1.2 and top["p"].min() == 0.02


def test_participation_by_hand():
    weights = np.zeros((4, 4))
    weights[0, 1], weights[0, 2] = 3.0, 1.0
    graph = of_matrix(["L0.h0", "L0.h1", "L1.h0", "L1.h1"], weights + weights.T)
    np.testing.assert_allclose(participation(graph, np.array([0, 0, 1, 1])), [1 - (9 + 1) / 16, 0, 0, 0])


def test_what_is_no_graph_is_refused():
    with pytest.raises(PatchclampError, match="symmetric"):
        of_matrix(["L0.h0", "L0.h1"], np.array([[0, 1.0], [0, 0]]))
    with pytest.raises(PatchclampError, match="not negative"):
        of_matrix(["L0.h0", "L0.h1"], np.array([[0, -1.0], [-1.0, 0]]))
    with pytest.raises(PatchclampError, match="too few edges"):
        communities(of_matrix(["L0.h0", "L0.h1"], np.zeros((2, 2))), nulls=3)


# --- lesions


def test_closing_what_the_task_needs_does_more_than_closing_random_parts():
    one, parts = built("shared")
    some = one.task.examples(one.tokenizer, 16, seed=5)
    found = lesion(parts, some, parts.fallback("zero"), ["L0.mlp"], match="kind", draws=9)
    truth = one.truth
    assert found.effect.mean == pytest.approx(truth.effects["zero"]["L0.mlp"], abs=1e-4)
    assert set(np.round(found.random, 3)) <= {round(truth.effects["zero"][f"L{layer}.mlp"], 3) for layer in (0, 1)}
    heads = lesion(parts, some, parts.fallback("zero"), ["L0.h1"], draws=39)
    assert heads.p < 0.5 and 0 < heads.random.mean() < heads.effect.mean and "takes" in str(heads)
    with pytest.raises(PatchclampError, match="cannot be closed"):
        lesion(parts, some, parts.fallback("zero"), ["L9.h1"])


def test_random_sets_are_drawn_from_those_that_the_set_was_chosen_from():
    """Of three heads that matter, one against the others: among all heads it looks special, among the three it is one of them."""
    one, parts = built("shared")
    some, heads = one.task.examples(one.tokenizer, 16, seed=5), ["L0.h1", "L1.h1", "L0.h2"]
    found = lesion(parts, some, parts.fallback("zero"), ["L0.h1"], draws=39, among=heads)
    truth = [one.truth.effects["zero"][head] for head in heads]
    assert found.about["among"] == 3 and set(np.round(found.random, 3)) <= set(np.round(truth, 3))
    with pytest.raises(PatchclampError, match=r"cannot be closed: the parts are L0.h1"):
        lesion(parts, some, parts.fallback("zero"), ["L0.mlp"], among=heads)


# --- reuse


def test_overlap_has_its_chance_by_brute_force():
    """Hypergeometric by all subsets; matched: with one head of L0 in each of 4, L0's shared head is a matter of 1 in 4."""
    names = [f"L{layer}.{part}" for layer in (0, 1) for part in ("h0", "h1", "h2", "h3", "mlp")]
    found = overlap(["L0.h1", "L0.mlp", "L1.h1", "L1.mlp"], ["L0.h2", "L0.mlp", "L1.h2", "L1.mlp"], names)
    sets = [set(one) for one in combinations(range(10), 4)]
    many = np.mean([len(one & {0, 1, 2, 3}) >= 2 for one in sets])
    assert found.shared == 2 and found.share == 0.5 and found.jaccard == pytest.approx(1 / 3)
    assert found.p == pytest.approx(many, abs=1e-12) and found.expected == pytest.approx(1.6)
    assert (
        found.matched_expected == pytest.approx(2.5, abs=0.05) and found.matched_p == 1.0
    )  # both MLPs always, a quarter of each head
    one = overlap(["L0.h1", "L1.h1"], ["L0.h1", "L1.h2"], names)
    assert one.matched_p == pytest.approx(1 - (3 / 4) ** 2, abs=0.02)
    edges = overlap(["L0.h1>L1.h2.q"], ["L0.h1>L1.h2.q"], ["L0.h1>L1.h2.q", "L0.h2>L1.h2.q", "L0.mlp>L1.h2.q"])
    assert edges.p == pytest.approx(1 / 3) and edges.matched_p == pytest.approx(0.5, abs=0.02)
    with pytest.raises(PatchclampError, match="empty circuit"):
        overlap([], ["L0.h1"], names)


def test_matched_overlap_is_calibrated():
    """Random circuits of the same make-up: matched p <= .05 in at most .05 of draws (p is discrete, so it may be fewer)."""
    rng, names = np.random.default_rng(0), [f"L{layer}.h{h}" for layer in range(6) for h in range(8)]
    hits = 0
    for seed in range(300):
        one, two = ([names[8 * layer + h] for layer in range(6) for h in rng.choice(8, 3, replace=False)] for _ in range(2))
        hits += overlap(one, two, names, draws=499, seed=seed).matched_p <= 0.05
    assert hits / 300 <= 0.08


def test_change_over_checkpoints():
    names = tuple(f"L{i}.mlp" for i in range(4))
    steps = [
        table_of(names, {(0, 1): (1.0, 0.9), (2, 3): (1.0, 0.9), (1, 2): (0.5, 0.01)}),
        table_of(names, {(0, 1): (1.0, 0.01), (2, 3): (1.0, 0.9), (1, 2): (0.5, 0.9)}),
        table_of(names, {(0, 1): (1.0, 0.01), (2, 3): (2.0, 0.01), (1, 2): (0.5, 0.9)}),
    ]
    rows = over_time(steps, ["step0", "step1", "step2"])
    assert rows["edges"].to_list() == [1, 1, 2] and rows["jaccard"].to_list() == [0, 0.5, 1]
    assert rows["new"].to_list() == [0, 1, 1] and rows["gone"].to_list() == [0, 1, 0] and rows["rand"][2] == 1
    assert edge_names(steps[1]) == ["L0.mlp & L1.mlp"]
    with pytest.raises(PatchclampError, match="name each table"):
        over_time(steps, ["step0"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_two_tasks_that_share_half_their_parts_come_apart(family: str):
    """The truth: L0.h1 or L1.h1 (either alone breaks the chain) for seeing, L0.h2 or L1.h2 for hearing; the MLPs are both's."""
    one, parts = built("shared", family)
    sets = {name: task.split(one.tokenizer, 96, seed=1) for name, task in one.tasks.items()}
    fallbacks = {name: parts.fallback("resample") for name in sets}
    found = double_dissociation(
        parts,
        {name: three[1] for name, three in sets.items()},
        {name: three[2] for name, three in sets.items()},
        fallbacks,
        draws=9,
    )
    assert found.double and found.single("see") and found.single("hear")
    assert set(found.sets["see"]) <= {"L0.h1", "L1.h1"} and set(found.sets["hear"]) <= {"L0.h2", "L1.h2"}
    for task, other in (("see", "hear"), ("hear", "see")):
        assert found.lost[task, task].mean == pytest.approx(1, abs=1e-3) and abs(found.lost[task, other].mean) < 1e-3
        assert found.contrast[task].low > 0.99 and found.random[task][0] < 0.5
    assert "double dissociation" in str(found) and found.to_frame().height == 4
    with pytest.raises(PatchclampError, match="among its select prompts"):
        double_dissociation(parts, {n: t[1] for n, t in sets.items()}, {n: t[1] for n, t in sets.items()}, fallbacks)
    alike = {n: replace(t[2], items=tuple(replace(item, group="one") for item in t[2])) for n, t in sets.items()}
    with pytest.raises(PatchclampError, match="all of one group"):
        double_dissociation(parts, {n: t[1] for n, t in sets.items()}, alike, fallbacks)


def test_tasks_with_the_same_parts_do_not_come_apart():
    one, parts = built("redundant")
    _, select, confirm = one.task.split(one.tokenizer, 96, seed=1)
    _, again, last = one.task.split(one.tokenizer, 96, seed=2)
    fallback = parts.fallback("resample")
    taken = {item.clean for item in again}
    clean = [i for i, item in enumerate(last) if item.clean not in taken]
    found = double_dissociation(
        parts,
        {"one": select, "two": again},
        {"one": confirm, "two": last.take(clean)},
        {"one": fallback, "two": fallback},
        draws=9,
    )
    assert not found.double and found.sets == {"one": (), "two": ()} and "no set was found" in str(found)


# --- over tokens


def test_planted_motifs_are_factored_out():
    """Two blocks of parts, one on early and one on late: memberships, courses and error; the squared error never rises."""
    member = np.zeros((10, 2))
    member[:5, 0], member[5:, 1] = 1, 1
    course = np.stack([np.r_[np.ones(6), np.zeros(6)], np.r_[np.zeros(6), 2 * np.ones(6)]], 1)
    tensor = np.einsum("ir,jr,tr->ijt", member, member, course)
    one = factorise(tensor, 2, seed=1)
    assert (np.diff(one.errors) <= 1e-9 * (tensor**2).sum()).all()
    assert ((tensor - one.rebuilt()) ** 2).sum() == pytest.approx(one.errors[-1], rel=1e-6, abs=1e-9 * (tensor**2).sum())
    found = motifs(tensor, 2)
    assert found.explained > 0.999 and found.stability > 0.99
    np.testing.assert_allclose(found.out, np.stack([member[:, 1], member[:, 0]], 1) / 5, atol=0.01)  # the stronger one first
    np.testing.assert_allclose(found.course, 25 * course[:, ::-1], atol=0.3)
    with pytest.raises(PatchclampError, match="0 or more"):
        factorise(-tensor, 2)


def test_the_moving_connectome_finds_who_goes_together_when():
    """Parts 0-3 share a signal at tokens 0-5 and parts 4-7 at tokens 6-11; the rest is noise."""
    rng, prompts, tokens = np.random.default_rng(0), 60, 12
    values = 0.3 * rng.normal(size=(prompts, tokens, 8))
    values[:, :6, :4] += rng.normal(size=(prompts, 6, 1))
    values[:, 6:, 4:] += rng.normal(size=(prompts, 6, 1))
    outputs = drawn(values.reshape(-1, 8), tokens)
    tensor, starts = affinity(outputs, window=3)
    assert starts == list(range(10)) and tensor[0, 1, 0] > 0.8 and tensor[0, 1, 9] < 0.2
    found = moving_connectome(outputs, 2, window=3)
    early = int(np.argmax(found.factors.course[0]))
    courses = found.factors.course[:, [early, 1 - early]]
    assert courses[0, 0] > 5 * courses[9, 0] and courses[9, 1] > 5 * courses[0, 1]
    assert (found.labels[early] >= 0).tolist() == [True] * 4 + [False] * 4
    assert len(set(found.labels[early][:4])) == 1
    record = found.to_record()
    assert record["membership"].height == 16 and record["course"].height == 20 and record["explained"] > 0.7
    with pytest.raises(PatchclampError, match="no window of 3"):
        affinity(outputs, prompts=61)
    with pytest.raises(PatchclampError, match="0 apart"):
        affinity(outputs, step=0)
    with pytest.raises(PatchclampError, match="given 'mood'"):
        affinity(outputs, given=("mood",))


def test_reuse_of_two_circuits_that_were_found():
    """Circuits by exact effects above 1 logit: 4 parts each, 2 of them shared; by chance 1.6, with layers and kinds matched 2.5."""
    one, parts = built("shared")
    found = {}
    for name, task in one.tasks.items():
        scores = attribute(parts, task.examples(one.tokenizer, 16, seed=3), parts.fallback("resample"), "exact")
        found[name] = [str(site) for site, score in zip(scores.sites, scores.values(), strict=True) if score > 1]
        assert set(found[name]) == {part for part, role in one.truths[name].roles.items() if role == "facilitating"}
    shared = overlap(found["see"], found["hear"], [parts.labels[i] for i in parts.counted])
    assert (shared.one, shared.two, shared.universe, shared.shared) == (4, 4, 10, 2) and shared.share == 0.5
    assert (
        shared.expected == pytest.approx(1.6) and shared.p > 0.05 and shared.matched_p == 1.0
    )  # half shared, and no more than chance
