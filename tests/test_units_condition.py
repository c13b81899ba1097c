"""Ranks in closed form, changes of weights written out; the three nested logits as an equation and in models."""

import math

import numpy as np
import pytest
import torch

import cases
from patchclamp.errors import MeasureError
from patchclamp.models.model import Model
from patchclamp.units import MEASURES, repeated
from patchclamp.units.condition import changes, chosen, condition, frozen, ranks
from patchclamp.units.table import SCHEMA
from patchclamp.units.three_logits import Contexts, learned, loss, pace, slopes, three_logits, transition
from patchclamp.zoo import wired


def numbers(table) -> dict[tuple[str, str], float]:  # type: ignore[no-untyped-def]
    return {(part, name): value for part, name, value, *_ in table.rows()}


@pytest.mark.parametrize("name", sorted(MEASURES))
def test_every_measure_gives_the_same_table_and_says_what_it_is(name: str) -> None:
    """Without rows, too; `patchclamp develop` shows the first line of what each says."""
    hf = cases.tiny("llama")
    hf.resize_token_embeddings(30)  # the measure of modular addition runs all pairs of tokens
    model = Model.load(hf)
    weights = {key: value.clone() for key, value in hf.state_dict().items()}
    for table in (MEASURES[name](model, None), *([MEASURES[name](model, repeated(model, 3, 10))] if name != "fourier" else [])):
        assert dict(table.schema) == SCHEMA and not table.is_duplicated().any() and len(table)
        assert table.select("part", "name").n_unique() == len(table)
        known = table.drop_nulls(["value", "low"])
        assert ((known["low"] <= known["value"] + 1e-9) & (known["value"] <= known["high"] + 1e-9)).all()
    assert all(value.equal(weights[key]) for key, value in hf.state_dict().items())
    assert (MEASURES[name].__doc__ or "").strip().partition("\n")[0]


def test_ranks_of_known_singular_values() -> None:
    assert ranks(torch.full((5,), 3.0)) == pytest.approx(
        {"condition": 1, "effective_rank": 5, "stable_rank": 5, "participation": 5}
    )
    one = ranks(torch.tensor([2.0, 0.0, 0.0]))
    assert one == {"condition": math.inf, "effective_rank": 1, "stable_rank": 1, "participation": 1}
    two = ranks(torch.tensor([3.0, 1.0]))
    assert (
        two["condition"] == 3 and two["stable_rank"] == pytest.approx(10 / 9) and two["participation"] == pytest.approx(100 / 82)
    )
    assert two["effective_rank"] == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert math.isnan(ranks(torch.zeros(2))["condition"])


def test_weights_and_the_stream_have_the_ranks_they_were_given() -> None:
    hf = cases.tiny("llama")
    with torch.no_grad():
        hf.model.layers[0].mlp.down_proj.weight.copy_(torch.eye(32, 64) * 2)
        hf.model.layers[1].self_attn.o_proj.weight.zero_()[:, 0] = 1.0
        hf.model.embed_tokens.weight[10:] = torch.outer(
            torch.randn(87, generator=torch.Generator().manual_seed(0)), torch.ones(32)
        )
    model = Model.load(hf)
    tokens = torch.arange(10, 34).view(3, 8)
    found = numbers(condition(model, tokens))
    assert found["model.layers.0.mlp.down_proj.weight", "condition"] == pytest.approx(1)
    assert found["model.layers.0.mlp.down_proj.weight", "effective_rank"] == pytest.approx(32, rel=1e-5)
    assert found["model.layers.1.self_attn.o_proj.weight", "stable_rank"] == pytest.approx(1)
    assert found["embed", "effective_rank"] == pytest.approx(1, abs=1e-3) and ("embed", "condition") not in found
    with torch.no_grad():
        last = hf.model.layers[1](hf.model.layers[0](hf.model.embed_tokens(tokens), **_rope(hf, tokens)), **_rope(hf, tokens))
    x = last.flatten(0, 1).double()
    s = np.linalg.svd((x - x.mean(0)).numpy(), compute_uv=False)
    assert found["L1.resid.post", "effective_rank"] == pytest.approx(np.exp(-(s / s.sum() * np.log(s / s.sum())).sum()), rel=1e-3)
    table = condition(model)
    order = sorted((value, part) for (part, name), value in numbers(table).items() if name == "condition")
    assert chosen(table, 2) == tuple(part for _, part in order[:2]) and chosen(table, 1, lowest=False) == (order[-1][1],)
    with pytest.raises(MeasureError, match="999 weights"):
        chosen(table, 999)


def _rope(hf, tokens):  # type: ignore[no-untyped-def]
    n = tokens.shape[1]
    where = torch.arange(n)[None]
    mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
    return {"position_embeddings": hf.model.rotary_emb(torch.zeros(1, n, 32), where), "attention_mask": mask}


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt_oss"])
def test_every_matrix_is_there(name: str) -> None:
    table = condition(cases.model_of(name))
    found = numbers(table)
    for part, weight in cases.model_of(name).hf.named_parameters():
        if weight.dim() == 2:
            s = np.linalg.svd(weight.detach().numpy(), compute_uv=False)
            assert found[part, "condition"] == pytest.approx(s[0] / s[-1], rel=1e-2)
        if weight.dim() == 3:
            assert all((f"{part}[{i}]", "stable_rank") in found for i in range(len(weight)))


def test_changes_between_checkpoints() -> None:
    before, hf = cases.model_of("llama"), cases.tiny("llama")
    with torch.no_grad():
        for weight in hf.model.layers[1].parameters():
            weight.mul_(1.25)
    after = Model.load(hf)
    table = changes(before, after)
    found = numbers(table)
    assert found["L0", "relative"] == 0 and found["L1", "relative"] == pytest.approx(0.25, rel=1e-5)
    assert found["model.layers.1.mlp.up_proj.weight", "relative"] == pytest.approx(0.25, rel=1e-5)
    moved = sum(float(weight.detach().abs().sum()) for weight in before.hf.model.layers[1].parameters()) / 4
    assert found["model", "relative"] == pytest.approx(
        moved / sum(float(weight.detach().abs().sum()) for weight in before.hf.parameters()), rel=1e-4
    )
    assert frozen([table, table], 0.5) == (0,) and frozen([table], 0.0) == ()
    with pytest.raises(MeasureError, match="two checkpoints"):
        changes(before, cases.model_of("gpt2"))
    with pytest.raises(MeasureError, match="0 to 1"):
        frozen([table], 2.0)


# --- three nested logits


def test_slopes_are_differences() -> None:
    rng = np.random.default_rng(0)
    for contexts in (Contexts(), Contexts(8, 2, 16, 64), Contexts(4, 4, 9)):
        for state in rng.normal(1, 1, size=(5, 4)):
            step = 1e-6 * np.eye(4)
            found = [(loss(state + one, contexts) - loss(state - one, contexts)) / 2e-6 for one in step]
            np.testing.assert_allclose(slopes(state, contexts), found, atol=1e-8)  # central differences at 1e-6
    assert loss(np.zeros(4), Contexts()) == pytest.approx(math.log(32))


def test_nothing_moves_alone_and_both_grow_at_the_pace() -> None:
    contexts = Contexts(8, 2, 16)
    assert slopes(np.array([0.0, 0.0, 2.0, 0.0]), contexts)[:2] == pytest.approx([0, 0])  # a saddle
    tiny = 1e-5
    for xi, w in ((2.0, 0.0), (1.0, 0.5)):
        rate = pace(xi, w, contexts)
        assert -slopes(np.array([0.0, tiny, xi, w]), contexts)[0] / tiny == pytest.approx(rate, rel=1e-3)
        assert -slopes(np.array([tiny, 0.0, xi, w]), contexts)[1] / tiny == pytest.approx(rate, rel=1e-3)
    assert pace(0.0, 0.0, contexts) == 0
    table = learned(contexts, start=1e-4, horizon=60.0, points=600)
    rates = [pace(xi, w, contexts) for xi, w in zip(table["xi"], table["w"], strict=True)]
    grown = np.concatenate([[0], np.cumsum((np.array(rates)[1:] + np.array(rates)[:-1]) / 2 * np.diff(table["time"]))])
    np.testing.assert_allclose((table["b1"] + table["b2"]).to_numpy(), 2e-4 * np.exp(grown), rtol=0.01)  # to first order in b


def test_induction_comes_at_once_and_when_depends_on_the_data() -> None:
    contexts = Contexts()
    table = learned(contexts, points=2000)
    when = transition(table, contexts)
    assert when is not None and table["loss"][-1] < 0.2 and table["loss"][0] == pytest.approx(math.log(32), abs=0.01)
    m = table["attention"].to_numpy()
    part = (m - m[0]) / (m[-1] - m[0])
    begins, half = table["time"].to_numpy()[np.searchsorted(part, [0.1, 0.5])]
    assert half - begins < begins / 10  # abrupt: from a tenth to half in less than a tenth of the wait before it
    earlier, later = (transition(learned(one), one) for one in (Contexts(burst=2), Contexts(pairs=16)))
    assert earlier is not None and later is not None and earlier < when < later
    slower = transition(learned(contexts, start=1e-4), contexts)
    assert slower is not None and slower > when


def test_few_classes_are_learned_by_heart_instead() -> None:
    found = []
    for classes in (4, 64, 1e6):
        contexts = Contexts(classes=classes)
        table = learned(contexts, horizon=1000.0)
        found.append((float(table["in_context"][-1]), float(table["in_weights"][-1])))
    assert found[0][0] < 0.3 and found[0][1] > 0.9
    assert found[2][0] > 0.9 and found[2][1] < 0.1
    with pytest.raises(MeasureError, match="multiple"):
        Contexts(pairs=7, burst=2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_three_logits_of_the_wired_model(family: str) -> None:
    """LOOK is 40 (160 over rotary frequencies) before the scale of the scores, and a full match 48."""
    made = wired("induction", family)
    model = Model.load(made.hf, tokenizer=made.tokenizer)
    concepts = [
        token for token in range(len(made.wiring.vocabulary)) if made.wiring.embed[token, made.wiring.space["concept"]].any()
    ]
    found = numbers(
        three_logits(model, torch.tensor([[1, *concepts[:12], *concepts[:12]], [1, *concepts[9:21], *concepts[9:21]]]))
    )
    assert found["model", "previous"] == found["L0.h1", "previous"] and found["model", "induction"] == found["L1.h2", "induction"]
    assert found["L1.h2", "induction"] > 5 and found["model", "answer"] > 5
    if family == "gpt2":
        assert found["L0.h1", "previous"] == pytest.approx(40, abs=0.01)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "bloom", "gpt_oss"])
def test_logits_of_families_are_loops_over_scores(name: str) -> None:
    model = cases.model_of(name)
    rows = repeated(model, n=2, length=6)
    found = numbers(three_logits(model, rows))
    kept = {str(site): value.detach().double().numpy() for site, value in model.record(rows, "L*.scores").items()}
    for layer in range(2):
        for h in range(4):
            for kind, step in (("previous", -1), ("induction", -5)):
                each = []
                for row in range(2):
                    odds = []
                    for i in range(6, 12):
                        scores = {j: kept[f"L{layer}.scores"][row, h, i, j] for j in range(i + 1)}
                        scores = {j: score for j, score in scores.items() if score > -1e30}
                        if i + step in scores and len(scores) > 1:
                            rest = np.mean([np.exp(score) for j, score in scores.items() if j != i + step])
                            odds.append(scores[i + step] - np.log(rest))
                    each.append(np.mean(odds) if odds else np.nan)
                expected = np.mean(each)
                value = found[f"L{layer}.h{h}", kind]
                assert (value is None and np.isnan(expected)) or value == pytest.approx(expected, abs=1e-4)
    for kind in ("previous", "induction"):  # layers whose windows hide the targets leave it to the others
        known = [value for (part, name), value in found.items() if name == kind and part != "model" and value is not None]
        assert found["model", kind] == (max(known) if known else None)
