"""A lookup of two steps: where its answers are, which labels count, and a lookup wired by hand, found whole and found broken."""

import math
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from patchclamp.models.model import Model
from patchclamp.zoo.recipes import _lookup, classes
from patchclamp.zoo.recipes._recipe import attention_only
from patchclamp.zoo.recipes.classes import Contexts

SMALL = Contexts(classes=24, novel=16, labels=8)
"""Rows of the same law with few tokens."""


# --- classes


def test_labels_count_where_the_class_was_there_before() -> None:
    """By a loop: every label of a class that was there before; or the last one only."""
    for counted in ("again", "last"):
        data = replace(SMALL, burst=4, bursty=0.5, counted=counted)
        rows = data.rows(5, 64)
        for row, weights in zip(rows.tokens.tolist(), rows.weights.tolist(), strict=True):
            seen: set[int] = set()
            for place in range(0, len(row), 2):
                one, last = (row[place] - 3 - data.labels) // data.exemplars, place == len(row) - 2
                assert weights[place] == 0
                assert weights[place + 1] == float(last or (counted == "again" and one in seen))
                seen.add(one)
    assert torch.equal(replace(SMALL, counted="last").asking("icl", -1, 8).weights, SMALL.asking("icl", -1, 8).weights)


# --- the lookup


def test_lookup_says_where_answers_are() -> None:
    """Against a search through each row: the labels behind items of the asked class; `other` is what stands where keys are exchanged."""
    data = replace(SMALL, exemplars=2)
    rows = data.asking("icl", -2, 32)
    place = classes.lookup(data, rows)
    query = rows.tokens.shape[1] - 2
    for row, tokens in enumerate(rows.tokens.tolist()):
        said = [(token - 3 - data.labels) // data.exemplars for token in tokens]
        found = [at + 1 for at in range(0, query, 2) if said[at] == said[query]]
        assert len(found) == data.burst and {tokens[at] for at in found} == {tokens[query + 1]}
        assert place.after[row, query].nonzero()[:, 0].tolist() == found
        assert all(place.before[row, at].nonzero()[:, 0].tolist() == [at - 1] for at in range(1, query, 2))
        theirs = {tokens[int(place.exchange[row, at])] for at in found}
        assert theirs == {int(place.other[row, query + 1])} != {tokens[query + 1]}
        assert torch.equal(place.exchange[row][place.exchange[row]], torch.arange(len(tokens)))
        assert tokens[:-1] == place.other[row, :-1].tolist()
    assert place.asked.nonzero()[:, 1].tolist() == [query + 1] * 32 and place.chance == 0.25
    assert place.after.any(-1).nonzero()[:, 1].tolist() == [query] * 32


def wired(words: int, answers: range, sharp: float = 30.0) -> Model:
    """A model of so many tokens that looks up by construction: layer 0 looks one token back and writes what it finds to coordinates of
    its own, layer 1 finds the query there and copies what stands at that place, if it is one of `answers`: the first token of a row
    can look at nothing but itself, and so is found, too.

    Tokens are unit vectors of the first coordinates; one more coordinate, 1 for all tokens, is what layer 0 looks by: rotary positions
    turn its first pair by 1 a token, so that with a query turned back by 1 the token before fits best. What layer 1 matches by
    hardly turns at all (frequencies below 1e-4).
    """
    inner, half = 2 * words + 2, 2 * words
    config = LlamaConfig(
        vocab_size=words, hidden_size=inner, intermediate_size=4, num_hidden_layers=2, num_attention_heads=1, head_dim=2 * half,
        max_position_embeddings=128, rope_parameters={"rope_type": "default", "rope_theta": 1e9}, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    hf = attention_only(LlamaForCausalLM(config).eval())
    eye, slow = torch.eye(words), torch.arange(half - words, half)
    with torch.no_grad():
        for weight in hf.parameters():
            if weight.dim() > 1:
                weight.zero_()
        hf.get_input_embeddings().weight[:, :words] = eye
        hf.get_input_embeddings().weight[:, -1] = 1.0
        one, two = (layer.self_attn for layer in hf.model.layers)
        one.k_proj.weight[0, -1] = sharp
        one.q_proj.weight[0, -1], one.q_proj.weight[half, -1] = sharp * math.cos(1), -sharp * math.sin(1)
        one.v_proj.weight[:words, :words] = eye
        one.o_proj.weight[words : 2 * words, :words] = eye * 4
        two.q_proj.weight[slow, :words] = eye * sharp
        two.k_proj.weight[slow, words : 2 * words] = eye * sharp
        two.v_proj.weight[list(answers), list(answers)] = 1.0
        two.o_proj.weight[:words, :words] = eye * 8
        hf.lm_head.weight[:, :words] = eye * 20
    return Model.load(hf)


def test_a_lookup_wired_by_hand_is_found_whole_and_a_broken_one_is_not() -> None:
    """All that `found` claims holds of a model that looks up by construction; without layer 0's values, what rests on them does not."""
    data = Contexts(classes=8, novel=8, labels=8)
    place = classes.lookup(data, data.asking("icl", -2, 64))
    model = wired(len(data.vocabulary), range(3, 3 + data.labels))
    findings = _lookup.found(model, place)
    assert place.accuracy(model) == 1.0
    assert all(finding.holds for finding in findings), [(finding.claim, finding.number) for finding in findings]
    with torch.no_grad():
        model.hf.model.layers[0].self_attn.v_proj.weight.zero_()
    broken = {finding.claim: finding.holds for finding in _lookup.found(model, place)}
    assert not broken["layer 1 looks at the answer: none"] and broken["layer 0 looks one token back from it: L0.h0"]
    assert not broken["with all of them most are right"] and not broken["two answers' keys exchanged, the other is said"]
