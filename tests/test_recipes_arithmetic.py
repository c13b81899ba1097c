"""zoo/arithmetic: rows by their law; an adder wired by hand, whose operands meet where the paper has it, found, and one elsewhere, not."""

import math

import pytest
import torch

from patchclamp.models.model import Model
from patchclamp.models.normless import NormlessConfig, NormlessForCausalLM
from patchclamp.sites import Site
from patchclamp.zoo.recipes import _arithmetic_flow, _arithmetic_neurons, arithmetic
from patchclamp.zoo.recipes._arithmetic import (
    ASK,
    ASKS,
    END,
    EQUALS,
    HIGHEST,
    LOWEST,
    NUMBERS,
    SUMS,
    VOCABULARY,
    ZERO,
    A,
    Arithmetic,
    B,
    N,
    Pairs,
    all_pairs,
    kept_back,
)
from patchclamp.zoo.recipes._arithmetic_flow import Flow
from patchclamp.zoo.recipes._arithmetic_neurons import Bag, Heuristic, as_many, heuristics, matched

# --- rows


def test_rows_are_right_and_no_pair_is_on_both_sides() -> None:
    """Words read back and computed anew; pairs of negative steps are never trained on, in neither order, for no question, by no seed."""
    says = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "first": lambda a, b: a, "second": lambda a, b: b}
    pairs: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    asked: list[str] = []
    for seed in (0, 1):
        for step in (0, 1, 2, -1, -2):
            rows = Arithmetic(seed).rows(step, 1500)
            for row in rows.tokens.tolist():
                begin, a, ask, b, equals, c = (VOCABULARY[token] for token in row)
                assert begin == "<bos>" and equals == "=" and 0 <= int(a) < N and 0 <= int(b) < N
                assert int(c) == says[ask](int(a), int(b))
                pairs[step >= 0].add((int(a), int(b)))
                asked += [ask] * (step >= 0)
            assert torch.equal(rows.weights.sum(0), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1500.0]))
    assert not pairs[True] & pairs[False] and not pairs[True] & {(b, a) for a, b in pairs[False]}
    assert len(pairs[False]) > 500 and len(pairs[True]) > 2500
    for ask, wanted in zip(ASKS, (0.4, 0.4, 0.1, 0.1), strict=True):  # of 9000, within 5 errors
        assert asked.count(ask) / 9000 == pytest.approx(wanted, abs=5 * math.sqrt(wanted * (1 - wanted) / 9000))


def test_kept_back_pairs_are_spread_over_all_numbers() -> None:
    """A share of about .15, the same both ways round; each number is in pairs of both sides."""
    back = kept_back()
    assert torch.equal(back, back.T) and float(back.float().mean()) == pytest.approx(0.15, abs=0.02)
    assert int(back.sum(0).min()) >= 2 and int(back.sum(0).max()) < N // 2


# --- an adder wired by hand

GATE, HEAT = 200.0, 0.02
"""What a question adds to its neuron against what it takes away without it; how steep logits are."""
VALUE, ONE, FIRST, SECOND, SAID = 0, 1, 2, 3, 4
ASKED = 5
PLACE = ASKED + 2 * len(ASKS)
WIDTH = PLACE + 6


def adder(layer: int) -> Model:
    """Two layers: in layer 0 the last token looks at both numbers and at the question, and its MLP copies a number that is only
    retrieved; sums and differences are made by the MLP of `layer`.

    The stream holds numbers as they are: a number's value, what the last token has of both, the result, and which question
    (what it is, and what the last token has of it). The logit of n is HEAT (2 n r - n^2) for the result r: highest at n = r.
    """
    config = NormlessConfig(
        vocab_size=len(VOCABULARY), hidden_size=WIDTH, intermediate_size=len(ASKS), num_hidden_layers=2, num_attention_heads=3,
        head_dim=len(ASKS), hidden_act="relu", max_position_embeddings=16, causal=True,
    )  # fmt: skip
    hf = NormlessForCausalLM(config)
    values = torch.arange(LOWEST, HIGHEST + 1).float()
    with torch.no_grad():
        for weight in hf.parameters():
            weight.zero_()
        words, places = hf.model.embed_tokens.weight, hf.model.embed_positions.weight
        words[ZERO + LOWEST :, VALUE] = values
        words[EQUALS, ONE] = 1.0
        words[range(ASK, EQUALS), range(ASKED, ASKED + len(ASKS))] = 1.0
        places[range(6), range(PLACE, PLACE + 6)] = 1.0
        first, attention = hf.model.layers[0], hf.model.layers[0].self_attn
        for head, place in enumerate((A, A + 1, B)):
            start = head * len(ASKS)
            attention.q_proj.weight[start, PLACE + END] = 1.0
            attention.k_proj.weight[start, PLACE + place] = GATE
        copied = torch.eye(len(ASKS))
        attention.v_proj.weight[0, VALUE], attention.v_proj.weight[2 * len(ASKS), VALUE] = 1.0, 1.0
        attention.v_proj.weight[len(ASKS) : 2 * len(ASKS), ASKED : ASKED + len(ASKS)] = copied
        attention.o_proj.weight[FIRST, 0], attention.o_proj.weight[SECOND, 2 * len(ASKS)] = 1.0, 1.0
        has = slice(ASKED + len(ASKS), PLACE)
        attention.o_proj.weight[has, len(ASKS) : 2 * len(ASKS)] = copied
        inputs = {"+": (1.0, 1.0), "-": (1.0, -1.0), "first": (1.0, 0.0), "second": (0.0, 1.0)}
        for number, name in enumerate(ASKS):
            mlp = first.mlp if number in NUMBERS else hf.model.layers[layer].mlp
            mlp.up_proj.weight[number, [FIRST, SECOND]] = torch.tensor(inputs[name])
            mlp.up_proj.weight[number, ASKED + len(ASKS) + number] = GATE
            mlp.up_proj.weight[number, ONE], mlp.up_proj.bias[number] = N, -GATE  # a - b + N is never negative
            mlp.down_proj.weight[SAID, number] = 1.0
        hf.lm_head.weight[ZERO + LOWEST :, SAID] = 2 * HEAT * values
        hf.lm_head.weight[ZERO + LOWEST :, ONE] = -HEAT * values.square() - 2 * HEAT * N * values
        hf.lm_head.weight[: ZERO + LOWEST, ONE] = -100.0
    return Model.load(hf.eval())


def test_an_adder_wired_by_hand_is_found_and_one_that_adds_early_is_not() -> None:
    """All claims hold where the last layer's MLP at the last token adds; where the first layer's does, what rests on it does not."""
    data = Arithmetic()
    model = adder(1)
    assert arithmetic.measure(model)["accuracy"] == arithmetic.measure(model)["numbers"] == 1.0
    findings = _arithmetic_flow.found(model, data)
    assert len(findings) == 12 and all(one.holds for one in findings), [(one.claim, one.number) for one in findings]
    early = adder(0)
    assert arithmetic.measure(early)["accuracy"] == 1.0
    broken = {one.claim: one.holds for one in _arithmetic_flow.found(early, data)}
    assert not any(holds for claim, holds in broken.items() if "make the result" in claim or "sums are lost" in claim)
    assert not any(holds for claim, holds in broken.items() if "relative importance" in claim)
    assert all(holds for claim, holds in broken.items() if "out of" in claim)


def test_a_model_that_answers_nothing_has_no_arithmetic() -> None:
    model = Model.load(arithmetic.build(0))
    findings = _arithmetic_flow.found(model, Arithmetic())
    assert len(findings) == 1 and findings[0].number == 0 and not findings[0].holds


def test_pairs_are_new_and_have_other_answers() -> None:
    """Of the wired adder, which is always right: all drawn pairs with other answers, the same question in both."""
    pairs = Pairs.of(adder(1), SUMS, Arithmetic(), 200)
    assert len(pairs.said) > 180 and bool((pairs.said != pairs.other).all())
    assert torch.equal(pairs.here[:, A + 1], pairs.there[:, A + 1])
    for tokens in (pairs.here, pairs.there):
        assert bool(kept_back()[tokens[:, A] - ZERO, tokens[:, B] - ZERO].all())
    assert set((pairs.here[:, A + 1] - ASK).tolist()) == set(SUMS)


def test_all_of_other_operands_put_in_is_their_answer() -> None:
    """On random weights: everything behind the last layer is the other run; nothing put in, and nothing out of sight, is this one."""
    model = Model.load(arithmetic.build(0))
    here, there = all_pairs(0).tokens[:300, :-1], all_pairs(1).tokens[300:600, :-1]
    said, other = (model.run(one)[:, -1].argmax(-1) for one in (here, there))
    flow = Flow(model, Pairs(here, there, said, other))
    assert flow.moved("resid.post", (3,), (END,)) == 1.0 and flow.unseen((END,), ()) == 1.0
    assert flow.moved("resid.post", (3,), (A, B)) == pytest.approx(float((said == other).float().mean()))
    assert flow.late == (2, 3)
    assert flow.moved("resid.post", (1,), (A, A + 1, B, END)) == 1.0 and flow.unseen((B,), (END,)) == 1.0


# --- heuristics


def test_a_heuristic_is_its_set() -> None:
    """By a loop over numbers; and every one that is tried differs from all others."""
    values = torch.arange(LOWEST, HIGHEST + 1)
    for one in heuristics():
        wanted = [n % one.m == one.low if one.m else one.low <= n < one.high for n in range(LOWEST, HIGHEST + 1)]
        assert one.holds(values).tolist() == wanted
        assert one.kind == ("modulo" if one.m else "range") and one.variable in str(one)
    assert len(set(heuristics())) == len(heuristics())


def test_neurons_that_are_heuristics_are_known_and_others_are_not() -> None:
    """Indicators with noise of half their deviation (correlation about .9), one of them turned round; and mere noise."""
    labels = all_pairs(1).labels
    assert labels is not None
    truth = (Heuristic("a", 12, 30), Heuristic("c", 3, m=7), Heuristic("b", 1, m=2))
    draw = torch.Generator().manual_seed(0)
    sets = torch.stack([one.holds(labels[one.variable]).float() for one in truth], 1)
    signs = torch.tensor([1.0, 3.0, -2.0])
    noise = torch.randn(len(sets), 4, generator=draw)
    activations = torch.cat([signs * (sets + 0.5 * sets.std(0) * noise[:, :3]), noise[:, 3:]], 1)
    found, match, on = matched(activations, labels)
    assert tuple(found[:2]) == truth[:2]
    assert torch.equal(on[:, :2], sets[:, :2].bool())
    assert torch.equal(on[:, 2], ~sets[:, 2].bool()) and found[2].m == 2  # off for odd numbers is on for even ones
    assert bool(((match[:3] > 0.85) & (match[:3] < 0.95)).all()) and float(match[3]) < 0.15


def test_as_many_others_are_as_many_and_others() -> None:
    draw = torch.Generator().manual_seed(0)
    off = torch.rand(50, 40, generator=draw) < 0.3
    chosen = as_many(off, ~off, torch.Generator().manual_seed(1))
    assert torch.equal(chosen.sum(1), torch.minimum(off.sum(1), (~off).sum(1))) and not (chosen & off).any()
    few = torch.zeros_like(off)
    few[:, :3] = True
    assert torch.equal(as_many(off | few, few, draw).sum(1), torch.full((50,), 3))


def test_neurons_forced_off_are_at_their_mean() -> None:
    """Layer by layer and row by row, at the last token alone; and nothing off changes nothing."""
    model = Model.load(arithmetic.build(0))
    bag = Bag.of(model, 0)
    off = torch.zeros(len(bag.tokens), len(bag.heuristic), dtype=torch.bool)
    per = off.shape[1] // 2
    values = model.record(bag.tokens, [Site("neuron", 2), Site("neuron", 3)])
    torch.testing.assert_close(bag.mean[per:], values[Site("neuron", 3)][:, END].mean(0))
    rows = torch.arange(len(off))
    off[rows, per + rows % per] = True
    edit = _arithmetic_neurons.Held(off[:, per:], bag.mean[per:])
    after = model.record(bag.tokens, [Site("neuron", 3)], {Site("neuron", 3): edit})[Site("neuron", 3)]
    before = values[Site("neuron", 3)]
    assert torch.equal(after[:, :END], before[:, :END])
    assert torch.equal(after[rows, END, rows % per], bag.mean[per + rows % per])
    changed = (after[:, END] != before[:, END]).sum(1)
    assert int(changed.max()) <= 1 and float(changed.float().mean()) > 0.99
    said = model.run(bag.tokens)[:, -1].argmax(-1)
    plain = float((said == bag.answers)[bag.new].float().mean())
    assert bag.without(model, torch.zeros_like(off)) == pytest.approx(plain)
