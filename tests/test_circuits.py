"""Discover and trust: on hand-wired models where the circuit is known, and against brute force."""

import numpy as np
import pytest
import torch

from patchclamp.circuit import Circuit
from patchclamp.discover import discover, faithfulness_curve
from patchclamp.discover.threshold import ranked, sizes_of
from patchclamp.errors import MetricError, PatchclampError
from patchclamp.methods import attribute, effects, groups_of
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Nodes, benefits, edges, nodes
from patchclamp.trust import resampled_circuits, trust
from patchclamp.zoo import wired
from patchclamp.zoo._wired import Wired

DIFF = METRICS["logit_diff"]


@pytest.fixture(scope="module")
def induction() -> tuple[Wired, Nodes]:
    model = wired("induction")
    return model, nodes(Model.load(model.hf, tokenizer=model.tokenizer))


def test_the_wired_circuit_is_found_and_trusted(induction: tuple[Wired, Nodes]):
    model, parts = induction
    fit, select, confirm = model.task.split(model.tokenizer, 160, seed=1)
    fallback = parts.fallback("resample", fit=fit)
    scores = attribute(parts, select, fallback)
    circuit, curve = discover(parts, select, fallback, scores, faithfulness=0.95)
    planted = {site for site, role in model.truth.roles.items() if role == "facilitating"}
    assert {str(site) for site in circuit} == planted
    again = resampled_circuits(scores, effects(parts, select, fallback), len(circuit), groups_of(select))
    found = trust(parts, confirm, fallback, circuit, ranked(scores), groups=groups_of(confirm), resampled=again)
    assert found.faithfulness.mean == pytest.approx(1, abs=1e-6)
    assert found.rest.mean == pytest.approx(0, abs=1e-6)  # without the circuit nothing is left
    assert found.stability == 1.0 and found.accuracy == 1.0
    assert found.beats == 1.0 and found.random.n == 100
    assert all(loss == pytest.approx(1, abs=1e-6) for loss, _, _ in found.minimality.values())
    ends = found.curve.filter(found.curve["k"].is_in([0, len(parts.counted)]))["faithfulness"].to_list()
    assert ends == pytest.approx([0, 1])
    assert curve.faithfulness()[0] == 0 and curve.faithfulness()[-1] == 1


def test_faithfulness_is_a_ratio_of_means_by_hand(induction: tuple[Wired, Nodes]):
    model, parts = induction
    some = model.task.examples(model.tokenizer, 12, seed=2)
    fallback = parts.fallback("zero")
    order = ranked(attribute(parts, some, fallback))
    curve = faithfulness_curve(parts, some, fallback, order, sizes=(0, 3, len(order)))
    values = [benefits(parts, some, parts.only(order[:k]), fallback, DIFF)[0].mean() for k in (0, 3, len(order))]
    by_hand = (values[1] - values[0]) / (values[2] - values[0])
    assert float(curve.faithfulness()[1]) == pytest.approx(float(by_hand), abs=1e-9)


def test_random_circuits_have_the_same_size_and_shape(induction: tuple[Wired, Nodes]):
    model, parts = induction
    some = model.task.examples(model.tokenizer, 12, seed=2)
    fallback = parts.fallback("resample")
    circuit = Circuit([*parts.labels[1:3], next(site for site in parts.labels if site.kind == "mlp")])
    seen: list[torch.Tensor] = []
    measure = parts.measure

    class Watched(Nodes):
        def measure(self, batch, gates, fallback, metric=None):
            seen.append(gates)
            return measure(batch, gates, fallback, metric)

    watched = Watched(parts.model)
    found = trust(watched, some, fallback, circuit, parts.labels[1:], groups=groups_of(some), random_circuits=30)
    gates = seen[0][:, 0, 0]
    kinds = np.array([site.kind for site in parts.labels])
    last = gates[-len(found.draws) :][:30]
    assert bool((last[:, kinds == "head"].sum(1) == 2).all()) and bool((last[:, kinds == "mlp"].sum(1) == 1).all())
    assert len({tuple(row.tolist()) for row in last}) > 5
    again = trust(parts, some, fallback, circuit, parts.labels[1:], groups=groups_of(some), random_circuits=30)
    assert again.draws.equals(found.draws)  # same seed, same draws


def test_the_circuit_keeps_its_faithfulness_at_larger_sizes():
    """An order whose curve dips after it first reaches the wanted share: the first crossing is not enough."""
    model = wired("interfering")
    parts = nodes(Model.load(model.hf, tokenizer=model.tokenizer))
    some = model.task.examples(model.tokenizer, 24, seed=5)
    fallback = parts.fallback("resample")
    scores = attribute(parts, some, fallback)
    circuit, curve = discover(parts, some, fallback, scores, faithfulness=0.9)
    shares = curve.faithfulness()
    size = len(circuit)
    assert bool((shares[size:] >= 0.9).all()) and (size == 0 or float(shares[size - 1]) < 0.9)


def test_sizes_are_all_or_a_grid():
    assert sizes_of(45) == tuple(range(46))
    many = sizes_of(5000)
    assert many[0] == 0 and many[-1] == 5000 and len(many) <= 102


def test_what_cannot_be_judged_is_refused(induction: tuple[Wired, Nodes]):
    model, parts = induction
    some = model.task.examples(model.tokenizer, 8, seed=2)
    scores = attribute(parts, some, parts.fallback("resample"))
    with pytest.raises(PatchclampError, match=r"0\.85"):
        discover(parts, some, parts.fallback("resample"), scores, faithfulness=1.5)
    same = model.task.examples(model.tokenizer, 3, seed=3)
    items = tuple(type(item)(**{**vars(item), "corrupt": item.clean}) for item in same)
    frozen = type(same)(items, same.tokenizer, "still")
    with pytest.raises(MetricError, match="no behaviour"):
        trust(parts, frozen, parts.fallback("resample"), Circuit([parts.labels[1]]), parts.labels[1:], groups=groups_of(frozen))


def test_a_circuit_of_edges_is_found_and_trusted(induction: tuple[Wired, Nodes]):
    model, _ = induction
    parts = edges(Model.load(model.hf, tokenizer=model.tokenizer))
    _, select, confirm = model.task.split(model.tokenizer, 60, seed=1)
    fallback = parts.fallback("resample")
    scores = attribute(parts, select, fallback)
    circuit, _ = discover(parts, select, fallback, scores, faithfulness=0.95)
    # what the wiring says: the word before is written beside each word; the induction head matches it, copies, and is heard
    assert {"embed>L0.kv1.v", "L0.h1>L1.kv2.k", "L1.h2>logits"} <= {str(edge) for edge in circuit} and len(circuit) <= 5
    found = trust(parts, confirm, fallback, circuit, ranked(scores), groups=groups_of(confirm), random_circuits=20)
    assert found.faithfulness.mean == pytest.approx(1, abs=1e-6) and found.beats == 1.0
    assert set(found.minimality) == {str(edge) for edge in circuit}
