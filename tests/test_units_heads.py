"""Scores of heads: against the closed form of the wired induction model, loops over attentions that models return, and weights."""

import numpy as np
import pytest
import torch

import cases
from patchclamp.edits import Scale
from patchclamp.errors import MeasureError
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.units import MEASURES, copying, heads, in_context, repeated
from patchclamp.units.heads import LOOKS, attention_scores, chance, distance_scores, unrepeated
from patchclamp.zoo import wired
from patchclamp.zoo._wiring import GROUP, Wiring, pattern_of, run, slots


def looked(tokens: list[int], pattern: np.ndarray, kind: str, first: int = 0) -> float:
    """A score of one head on one row, written out as loops."""
    found = []
    for i in range(first, len(tokens)):
        keys = {
            "previous": [i - 1],
            "current": [i],
            "first": [first] if i > first else [],
            "duplicate": [j for j in range(first, i) if tokens[j] == tokens[i]],
            "induction": [j + 1 for j in range(first, i) if tokens[j] == tokens[i] and j + 1 < i],
        }[kind]
        keys = [key for key in keys if key >= first]
        if keys:
            found.append(sum(pattern[i, key] for key in keys))
    return float(np.mean(found)) if found else float("nan")


def patterns(wiring: Wiring, tokens: tuple[int, ...]) -> list[np.ndarray]:
    """Attention of every head of a wiring, in numpy."""
    x, found = wiring.embed[list(tokens)], []
    writes = run(wiring, tokens).writes
    for layer, row in enumerate(wiring.heads):
        match, _ = slots(row, GROUP[wiring.family])
        found += [pattern_of(wiring, head, x, x, match[h]) for h, head in enumerate(row)]
        x = x + sum(writes[f"L{layer}.{part}"] for part in ("h0", "h1", "h2", "h3", "mlp"))
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_heads_of_the_wired_induction_model_are_their_closed_form(family: str) -> None:
    made = wired("induction", family)
    model = Model.load(made.hf, tokenizer=made.tokenizer)
    rows = repeated(model, n=3, length=12)
    found = attention_scores(model, rows)
    for example, row in enumerate(rows.tolist()):
        for part, pattern in enumerate(patterns(made.wiring, tuple(row))):
            for kind in LOOKS:
                # Llama's norms compute in float32; scores of 48 times its rounding stand in an exponent
                assert found[kind][part, example] == pytest.approx(looked(row, pattern, kind), abs=1e-4), (part, kind)
    table = heads(model, rows).filter(name="induction").sort("value", descending=True)
    assert table["part"][0] == "L1.h2" and heads(model, rows).filter(name="previous").sort("value")["part"][-1] == "L0.h1"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_copying_of_wired_heads_is_their_output_value_circuit(family: str) -> None:
    made = wired("induction", family)
    model = Model.load(made.hf, tokenizer=made.tokenizer)
    rows = repeated(model, n=2, length=8)
    found = copying(model, rows)
    head = made.wiring.heads[1][2]  # reads concepts as they were embedded
    for example, row in enumerate(rows.tolist()):
        ranks, raised = [], []
        for token in row:
            logits = made.wiring.embed[token] @ head.read @ head.write @ made.wiring.unembed
            others = np.delete(logits, token)
            ranks.append(
                ((others < logits[token] - 1e-9).sum() + (np.abs(others - logits[token]) <= 1e-9).sum() / 2) / len(others)
            )
            raised.append((logits[token] - logits.mean()) / logits.std() if logits.std() > 1e-9 else 0.0)
        concepts = [place for place, token in enumerate(row) if np.any(made.wiring.embed[token] @ head.read)]
        assert concepts and found["copying"][6, example] >= np.mean(np.array(ranks)) - 0.5  # dust breaks ties of silent tokens
        one = copying(model, torch.tensor([[row[place] for place in concepts]]))
        assert one["copying"][6, 0] == 1.0
        assert one["raised"][6, 0] == pytest.approx(np.mean(np.array(raised)[concepts]), rel=1e-3)


FAMILIES = ("gpt2", "llama", "gemma2", "gpt_oss", "qwen3_moe", "bloom", "gpt_neo", "olmo2")


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_loops_over_the_attentions_that_the_model_returns(name: str) -> None:
    model = Model.load(cases.tiny(name))  # its own: asked for attentions, transformers leaves hooks behind
    tokens = torch.randint(3, 9, (3, 10), generator=torch.Generator().manual_seed(0))  # few words: many repetitions
    found = attention_scores(model, tokens)
    with torch.no_grad():
        attentions = model.hf(input_ids=tokens, output_attentions=True, use_cache=False).attentions
    every = torch.cat(list(attentions), 1).numpy()
    for example, row in enumerate(tokens.tolist()):
        for part in range(every.shape[1]):
            for kind in LOOKS:
                expected = looked(row, every[example, part], kind)
                assert found[kind][part, example] == pytest.approx(expected, abs=1e-6, nan_ok=True), (part, kind)


def test_padding_is_no_key_and_no_query() -> None:
    model = cases.model_of("llama")
    rows = [[5, 6, 7, 5, 6, 7, 8], [9, 4, 9, 4]]
    both, alone = attention_scores(model, model.batch(_batch(rows))), attention_scores(model, torch.tensor(rows[1:]))
    for kind in LOOKS:
        np.testing.assert_allclose(both[kind][:, 1], alone[kind][:, 0], atol=1e-6)
    even = chance(model, _batch(rows))
    for example, row in enumerate(rows):
        pattern = np.tril(np.ones((len(row), len(row)))) / np.arange(1, len(row) + 1)[:, None]
        for kind in LOOKS:
            assert even[kind][example] == pytest.approx(looked(row, pattern, kind))


def _batch(rows: list[list[int]]):  # type: ignore[no-untyped-def]
    from patchclamp.models.inputs import token_batch

    return token_batch(rows)


def test_copying_is_what_weights_say() -> None:
    """A tiny Llama's second layer: v = W_V N(x) of shared key/value heads, through W_O, the last norm's gain and the unembedding."""
    model = cases.model_of("llama")
    tokens = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(1))
    found = copying(model, tokens)
    hf, layer = model.hf, model.hf.model.layers[1]
    with torch.no_grad():
        x = cases.tiny("llama")(input_ids=tokens, output_hidden_states=True).hidden_states[1]
        v = layer.self_attn.v_proj(layer.input_layernorm(x)).unflatten(-1, (2, 8))
        for head in range(4):
            write = v[:, :, head // 2] @ layer.self_attn.o_proj.weight[:, head * 8 : head * 8 + 8].T
            logits = (write * hf.model.norm.weight) @ hf.lm_head.weight.T
            own = logits.gather(-1, tokens[..., None])
            rank = (logits < own).float().sum(-1) / 96
            raised = ((own[..., 0] - logits.mean(-1)) / logits.std(-1, correction=0)).mean(-1)
            np.testing.assert_allclose(found["copying"][4 + head], rank.mean(-1), atol=1e-6)
            np.testing.assert_allclose(found["raised"][4 + head], raised, atol=1e-4)


def test_loss_late_less_loss_early() -> None:
    model = cases.model_of("gpt2")
    tokens = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logp = model.hf(input_ids=tokens).logits.log_softmax(-1)
    nll = [[-float(logp[row, at - 1, tokens[row, at]]) for at in range(1, 9)] for row in range(3)]
    np.testing.assert_allclose(in_context(model, tokens, 2, 7), [row[6] - row[1] for row in nll], atol=1e-5)
    expected = [np.mean(row[4:]) - np.mean(row[:3]) for row in nll]
    np.testing.assert_allclose(in_context(model, tokens, (1, 4), (5, 9)), expected, atol=1e-5)
    with pytest.raises(MeasureError, match="shortest row has 9"):
        in_context(model, tokens)
    with pytest.raises(MeasureError, match="not predicted"):
        in_context(model, tokens, 0, 5)


def test_the_front_has_intervals_and_says_what_chance_gives() -> None:
    made = wired("induction")
    model = Model.load(made.hf, tokenizer=made.tokenizer)
    table = MEASURES["heads"](model, None)
    assert table.columns == ["part", "name", "value", "low", "high", "n"]
    assert set(table["part"]) == {f"L{layer}.h{head}" for layer in range(2) for head in range(4)} | {"model"}
    assert (table.drop_nulls()["low"] <= table.drop_nulls()["value"]).all()
    by = {(part, name): (value, n) for part, name, value, _, _, n in table.rows()}
    assert by["L1.h2", "induction"][0] > 10 * by["model", "chance.induction"][0] and by["L1.h2", "induction"][1] == 32
    assert by["model", "in_context"][0] < -1  # it says what followed
    assert by["L1.h2", "distance"][0] < 0.1  # and does not look back so far where nothing is said twice


@pytest.mark.parametrize("name", sorted(cases.CONFIGS))
def test_every_family_is_measured(name: str) -> None:
    model = cases.model_of(name)
    tokens = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(0))
    table = heads(model, tokens)
    assert len(table.filter(name="copying", n=2)) == sum(size.heads for size in model.anatomy.sizes)


def test_heads_of_the_shipped_model_look_so_far_back_whatever_stands_there() -> None:
    """What looks like induction on lists of 20, the length that it was trained on, is a distance: docs/measures.md says so."""
    model = Model.load("zoo/small")
    found = attention_scores(model, repeated(model, 8, 20))["induction"].mean(1)
    distance = distance_scores(model, unrepeated(model, 8, 20), 20).mean(1)
    for head in (8 + 6, 8 + 7):  # L1.h6 and L1.h7, of 8 heads a layer
        assert found[head] > 0.9 and distance[head] > 0.9
    assert attention_scores(model, repeated(model, 8, 12))["induction"].mean(1).max() < 0.2


def test_distance_is_a_diagonal() -> None:
    model = cases.model_of("gpt2")
    rows = unrepeated(model, n=3, length=6)
    assert rows.shape == repeated(model, n=3, length=6).shape and not torch.equal(rows[:, :6], rows[:, 6:])
    found = distance_scores(model, rows, 6)
    for layer in range(2):
        (pattern,) = model.record(rows, f"L{layer}.pattern").values()
        for h in range(4):
            for row in range(3):
                expected = np.mean([float(pattern[row, h, i, i - 5].detach()) for i in range(6, 12)])
                assert found[4 * layer + h, row] == pytest.approx(expected, abs=1e-6)


def test_gated_attention_has_no_copying_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate is an edit at z, as a model with gated attention has one; its layer has no number, the other keeps its own."""
    model = cases.model_of("llama")
    rows = repeated(model, n=2, length=6)
    own = copying(model, rows)
    record = Model.record
    gate = {Site.parse("L1.z"): Scale(0.5)}
    monkeypatch.setattr(Model, "record", lambda self, inputs, sites, edits=None: record(self, inputs, sites, gate))
    gated = copying(model, rows)
    assert np.isnan(gated["copying"][4:]).all() and np.isnan(gated["raised"][4:]).all()
    np.testing.assert_array_equal(gated["copying"][:4], own["copying"][:4])


def test_too_few_words_are_refused() -> None:
    with pytest.raises(MeasureError, match="ask for fewer"):
        repeated(cases.model_of("gpt2"), length=200)
