"""Codes of heads and paths of neurons: closed forms, loops written out here, and wired models whose answer is known."""

from itertools import product

import numpy as np
import pytest
import torch

from cases import tiny
from patchclamp.circuit import Circuit
from patchclamp.discover.codes import Recovery, codes
from patchclamp.discover.neuron_paths import neuron_path
from patchclamp.errors import PatchclampError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import gated, nodes
from patchclamp.sites import Site
from patchclamp.tasks import Example, Examples, Pair
from patchclamp.zoo import wired
from test_parts import examples


def test_the_planted_head_has_codes_of_its_own_where_a_word_is_repeated():
    """Eight pairs: a prompt whose last word was there before, and the same prompt where it was not. Then the induction head looks
    at the first token instead of at what followed; heads that read the last word alone see no difference."""
    truth = wired("induction")
    model = Model.load(truth.hf, tokenizer=truth.tokenizer)
    drawn = truth.task.examples(truth.tokenizer, 8, seed=4)
    items = []
    for item in drawn:
        at = item.clean.index(item.clean[-1])
        other = next(
            token for token in range(40) if truth.tokenizer.decode([token]) in ("so", "then") and token not in item.clean
        )
        absent = tuple(other if place == at else token for place, token in enumerate(item.clean))
        items.append(
            Example(**{**vars(item), "corrupt": absent, "pair": Pair(item.clean, item.pair.answer, absent, item.pair.wrong)})
        )
    some = Examples(tuple(items), drawn.tokenizer, "present or absent")
    found = codes(model, some)
    circuit = found.circuit()
    assert {str(head) for head in circuit} == {"L1.h2"}
    assert found.scores["L1.h2"]["score"] == 1.0 and found.scores["L1.h2"]["p"] <= 0.05 and found.codes.shape == (8, 16)
    assert Recovery.of(circuit, Circuit(["L1.h2"])) == Recovery(1.0, 1.0)
    assert Recovery.of(circuit, Circuit(["L1.h2", "L0.h1"])) == Recovery(1.0, 0.5)
    assert Recovery.of(Circuit([]), Circuit(["L0.h1"])) == Recovery(1.0, 0.0)


def test_codes_are_clusters_and_p_counts_every_way_of_swapping():
    model, some = Model.load(tiny("gpt2")), examples(4)
    found = codes(model, some)
    clean, corrupt = (model.record(batch, [Site("write", 0, 1)])[Site("write", 0, 1)][:, -1].detach() for batch in
                      (some.batch(), some.batch().swapped()))  # fmt: skip
    values = torch.cat([clean, corrupt]).double().numpy()
    row = found.codes[1]
    size = np.sqrt((values**2).sum(1).mean())
    for one in range(8):
        for other in range(8):
            if row[one] == row[other]:
                assert np.linalg.norm(values[one] - values[other]) <= 0.5 * size + 1e-6
    for number in (1, 5):
        row = found.codes[number]
        shares = []
        for ways in product((False, True), repeat=4):
            first = [row[4 + i] if swap else row[i] for i, swap in enumerate(ways)]
            second = [row[i] if swap else row[4 + i] for i, swap in enumerate(ways)]
            shares.append(np.mean([code not in second for code in first]))
        assert found.scores.values()[number] == pytest.approx(shares[0])
        assert found.scores.table["p"][number] == pytest.approx(np.mean(np.array(shares) >= shares[0] - 1e-9))
    with pytest.raises(PatchclampError, match="3 or more"):
        codes(model, some.take([0, 1]))


def test_the_joint_influence_is_the_integral_of_slopes_along_the_joint_line():
    """The published definition by quadrature against what closing the set measures: midpoints, error of order 1 / steps^2."""
    parts, some = gated(Model.load(tiny("gpt2", dtype=torch.float64)), ["L*.mlp.n*"]), examples(2)
    fallback, batch = parts.fallback("zero"), some.batch()
    found = neuron_path(parts, some, fallback, draws=3, candidates=4)
    chosen = [parts.labels.index(site) for site in found.path]
    assert [site.layer for site in found.path] == [0, 1]
    steps = 64
    gates = parts.open(steps)
    gates[..., chosen] = ((torch.arange(steps) + 0.5) / steps).to(gates)[:, None, None, None]
    slopes = parts.gradient(batch, gates, fallback)[1]
    integral = float(slopes[..., chosen].sum(-1).mean(0).mean())
    assert found.influence[-1] == pytest.approx(integral, rel=1e-3)
    assert found.judged["removal"][0] == pytest.approx(found.influence[-1], abs=1e-9)


def test_each_step_takes_the_best_of_its_candidates():
    parts, some = gated(Model.load(tiny("gpt2", dtype=torch.float64)), ["L*.mlp.n*"]), examples(2)
    fallback, batch = parts.fallback("zero"), some.batch()
    found = neuron_path(parts, some, fallback, draws=3, candidates=6, width=2)
    path: list[int] = []
    whole = float(parts.measure(batch, parts.open(), fallback).mean())
    for layer in range(2):
        for _ in range(2):
            here = parts.open()
            here[..., path] = 0
            slope = parts.gradient(batch, here, fallback)[1][0].mean(0)
            mine = [n for n in parts.counted if parts.labels[n].layer == layer and n not in path]
            few = sorted(mine, key=lambda n: -float(slope[n]))[:6]
            taken = []
            for one in few:
                gates = here.clone()
                gates[..., one] = 0
                taken.append(whole - float(parts.measure(batch, gates, fallback).mean()))
            path.append(few[int(np.argmax(taken))])
    assert [str(site) for site in found.path] == [str(parts.labels[n]) for n in path]
    assert {row["choice"] for row in found.judged.to_dicts()} == {"path", "activation", "slope", "random"}
    assert 0 < found.p <= 1


def test_the_planted_fact_is_on_the_path():
    """The wired memory has one neuron per person and relation: for prompts of one fact, closing the path forgets it, doubling says it
    louder, and random paths do nothing."""
    truth = wired("facts")
    model = Model.load(truth.hf, tokenizer=truth.tokenizer)
    drawn = truth.task.examples(truth.tokenizer, 64, seed=1)
    facts: dict[object, list[int]] = {}
    for at, item in enumerate(drawn):
        facts.setdefault((item.answers, item.clean[-1]), []).append(at)
    some = drawn.take(max(facts.values(), key=len))
    parts = gated(model, ["L*.mlp.n*"])
    found = neuron_path(parts, some, parts.fallback("zero"), draws=30)
    judged = {row["choice"]: row for row in found.judged.to_dicts()}
    span = METRICS["logit_diff"](model.target_logits(some.batch()).detach(), some.batch())[0].mean()
    assert judged["path"]["removal"] == pytest.approx(truth.truth.effects["zero"]["L1.mlp"], rel=0.02)
    assert judged["path"]["enhancement"] > 0.9 * float(span) and abs(judged["random"]["removal"]) < 0.2 * float(span)
    assert found.p <= 0.1 and found.influence[0] == pytest.approx(0, abs=1e-3)  # layer 0 says nothing


def test_what_is_no_neuron_is_refused():
    parts = nodes(Model.load(tiny("gpt2")))
    with pytest.raises(PatchclampError, match=r"L0\.h0 is none"):
        neuron_path(parts, examples(2), parts.fallback("zero"))
    neurons = gated(parts.model, ["L0.mlp.n*"])
    with pytest.raises(PatchclampError, match="neurons per layer"):
        neuron_path(neurons, examples(2), neurons.fallback("zero"), width=1000)
