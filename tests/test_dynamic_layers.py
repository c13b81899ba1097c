"""Experts forced on or off against routing written out here; void layers skipped against a block that is not run."""

from functools import cache
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from cases import tiny
from patchclamp.errors import GateError, SiteError
from patchclamp.gating.dynamic.experts import chosen_at_once, force, forced_effect, relevance
from patchclamp.gating.dynamic.voids import growth, skip_curve, skip_gates, skip_live, skipping, void, void_map
from patchclamp.metrics import METRICS
from patchclamp.models.inputs import token_batch
from patchclamp.models.model import Model
from patchclamp.sites import Site
from test_parts import examples

CLOSE = {"atol": 1e-4, "rtol": 1e-4}  # float32, sums in another order
MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


@cache
def model_of(name: str) -> Model:
    hf = tiny(name, seed=1)
    hf.generation_config.eos_token_id = None
    hf.config.eos_token_id = None
    return Model.load(hf)


def routed(name: str, model: Model, x: Tensor, on: list[int], off: list[int]) -> Tensor:
    """The second layer's mixture with experts chosen by hand: first those that are on, then the best of the others."""
    block: Any = model.hf.model.layers[1].mlp
    router = block.router if name == "gpt_oss" else block.gate
    logits = x @ router.weight.T + (router.bias if name == "gpt_oss" else 0)
    best = [[i for i in row.argsort(descending=True).tolist() if i not in on and i not in off] for row in logits]
    chosen = torch.tensor([on + row[: 2 - len(on)] for row in best])
    highest = torch.tensor([max(float(value) for i, value in enumerate(row) if i not in off) for row in logits])
    mine = logits.clone()
    mine[:, off] = -torch.inf
    for expert in on:
        mine[:, expert] = highest + 1e-3 * (1 + highest.abs())
    picked = mine.gather(1, chosen)
    whole = mine if name == "qwen3_moe" and not router.norm_topk_prob else picked
    weights = picked.exp() / whole.exp().sum(1, keepdim=True)
    return block.experts(x, chosen, weights)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(("on", "off"), [([], [2]), ([3], []), ([1], [0, 3]), ([0, 2], [])])
def test_forced_experts_are_routing_by_hand(name: str, on: list[int], off: list[int]) -> None:
    model, tokens = model_of(name), torch.randint(3, 90, (3, 6), generator=torch.Generator().manual_seed(0))
    how = {**{f"L1.mlp.e{i}": "on" for i in on}, **{f"L1.mlp.e{i}": 0 for i in off}}
    edits = force(model, how)
    kept: list[Tensor] = []
    handle = model.hf.model.layers[1].mlp.register_forward_pre_hook(lambda _m, args: kept.append(args[0].detach()))
    values = model.record(tokens, ["L1.mlp", "L1.mlp.e"], edits)
    handle.remove()
    x = kept[0].reshape(-1, model.width)
    with torch.no_grad():
        torch.testing.assert_close(values[Site("mlp", 1)].reshape(-1, model.width), routed(name, model, x, on, off), **CLOSE)
    weights = values[Site("expert", 1)]
    assert bool(((weights != 0).sum(-1) == 2).all())
    assert all(bool((weights[..., i] > 0).all()) for i in on) and not any(bool(weights[..., i].any()) for i in off)
    plain = model.record(tokens, "L1.mlp")[Site("mlp", 1)]
    assert not torch.allclose(values[Site("mlp", 1)], plain, atol=1e-3)


def test_forced_experts_act_while_generating() -> None:
    model, prompt = model_of("mixtral"), [[5, 11, 23, 42]]
    edits = force(model, {"L0.mlp.e1": "off", "L1.mlp.e2": "on"})
    for cache_on in (True, False):
        said = model.generate(token_batch(prompt), edits, max_new_tokens=5, cache=cache_on)
        whole = torch.tensor([[*prompt[0], *said.tokens[0][:-1]]])
        assert model.run(whole, edits)[0, 3:].argmax(-1).tolist() == list(said.tokens[0])
        chosen = model.record(whole, ["L0.mlp.e", "L1.mlp.e"], edits)
        assert not chosen[Site("expert", 0)][..., 1].any() and bool((chosen[Site("expert", 1)][..., 2] > 0).all())


def test_what_cannot_be_forced_is_refused() -> None:
    model = model_of("mixtral")
    assert chosen_at_once(model) == 2
    for how, said in (
        ({"L1.mlp.e0": 2}, "say 'on' or 'off'"),
        ({f"L1.mlp.e{i}": "off" for i in range(3)}, "fewer than the 2"),
        ({f"L1.mlp.e{i}": "on" for i in range(3)}, "a token has 2"),
        ({"L1.mlp": "off"}, "is not one"),
    ):
        with pytest.raises(GateError, match=said):
            force(model, how)  # type: ignore[arg-type]
    with pytest.raises(SiteError):
        force(model, {"L1.mlp.e9": "off"})
    with pytest.raises(GateError, match="no experts"):
        relevance(model_of("llama"), examples(4), examples(4))


def test_the_planted_expert_ranks_first_and_beats_random_ones() -> None:
    """The router's first row points along one token's embedding: prompts that end in it choose that expert."""
    hf = tiny("mixtral", seed=3)
    with torch.no_grad():
        hf.model.layers[0].mlp.gate.weight[0] = 0
    model = Model.load(hf)
    base = examples(24, (6,), 7)
    plain = [tuple(one.clean[:-1]) for one in base]
    from dataclasses import replace

    def ending(token: int):
        return replace(base, items=tuple(replace(one, clean=(*front, token)) for one, front in zip(base, plain, strict=True)))

    eliciting, control = ending(91), ending(92)
    x = model.record(eliciting.batch(), "L0.resid.mid")[Site("resid.mid", 0)][:, -1]
    other = model.record(control.batch(), "L0.resid.mid")[Site("resid.mid", 0)][:, -1]
    norm = hf.model.layers[0].post_attention_layernorm
    with torch.no_grad():
        direction = norm(x).mean(0) - norm(other).mean(0)
        hf.model.layers[0].mlp.gate.weight[0] = 4 * direction / direction.norm()
    ranked = relevance(model, eliciting, control)
    assert ranked["site"][0] == "L0.mlp.e0" and ranked["relevance"][0] == ranked["relevance"].max() > 0.5 and ranked["low"][0] > 0
    assert ranked.height == 8 and set(ranked["n"]) == {48}
    totals = ranked.group_by("layer").agg(pl.col("eliciting", "control").sum())
    assert totals["eliciting"].to_list() == totals["control"].to_list() == [2, 2], "two experts a token"
    table = forced_effect(model, ["L0.mlp.e0"], eliciting, "off", metric="kl", draws=3)
    assert table["kind"].to_list() == ["ranked", "random", "random", "random"]
    assert all(sites[0] != "L0.mlp.e0" for sites in table["sites"].to_list()[1:])
    batch = eliciting.batch()
    by_hand = METRICS["kl"](
        model.target_logits(batch, force(model, {"L0.mlp.e0": "off"})).detach(), batch, model.target_logits(batch)[0].detach()
    )
    assert table["effect"][0] == pytest.approx(-float(by_hand.mean()), abs=1e-6)
    assert table["effect"][0] < 0 and 0 < table["p"][0] <= 1


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_a_skipped_layer_leaves_the_stream_as_it_was(name: str) -> None:
    model = model_of(name)
    batch = examples(4, (7, 5), 2).batch()
    stream = model.record(batch, ["L*.resid.pre", "L*.resid.post"])
    norms = torch.stack([stream[Site("resid.pre", 0)], stream[Site("resid.pre", 1)], stream[Site("resid.post", 1)]]).norm(dim=-1)
    delta = growth(model, batch)
    torch.testing.assert_close(delta, (norms[1:] - norms[:-1]).movedim(0, -1), atol=1e-4, rtol=1e-4)
    parts = skipping(model)
    skip = torch.zeros_like(delta, dtype=torch.bool)
    skip[:, -1, 0] = skip[:, 4, 1] = True
    edits = parts.edits(skip_gates(parts, skip), parts.fallback("zero"), batch)
    values = model.record(batch, ["L0.resid.pre", "L0.resid.post", "L1.resid.pre", "L1.resid.post"], edits)
    for layer, column in ((0, -1), (1, 4)):
        before, after = values[Site("resid.pre", layer)], values[Site("resid.post", layer)]
        torch.testing.assert_close(after[:, column], before[:, column], **CLOSE)
        assert not torch.allclose(after[:, 3], before[:, 3], atol=1e-3)


def test_void_layers_are_those_below_the_threshold() -> None:
    delta = torch.tensor([[5.0, 0.4, -1.0, 2.0]])
    assert void(delta, 0.1).tolist() == [[False, True, True, False]]  # threshold .6
    assert void(delta, 0.0).tolist() == [[False, False, True, False]]
    with pytest.raises(GateError, match="from 0 to 1"):
        void(delta, 1.5)


@pytest.mark.parametrize("cache_on", [True, False])
def test_voids_are_skipped_live(cache_on: bool) -> None:
    """With two layers, by a pass written out: layer 0 first, and layer 1 where it passes the threshold of both."""
    model, prompt = model_of("llama"), torch.tensor([[5, 11, 23, 42, 7, 31, 8, 15]])
    stream = model.record(prompt, ["L0.resid.pre", "L0.resid.post"])
    first = stream[Site("resid.post", 0)].norm(dim=-1) - stream[Site("resid.pre", 0)].norm(dim=-1)
    own = model.record(prompt, "L1.resid.post")[Site("resid.post", 1)].norm(dim=-1) - stream[Site("resid.post", 0)].norm(dim=-1)
    alpha = next(
        a
        for a in np.linspace(0.05, 0.95, 19)
        if 0 < int((own < a * (torch.maximum(first, own) - torch.minimum(first, own))).sum()) < 8
    )
    edits = skip_live(model, float(alpha))
    values = model.record(prompt, ["L0.resid.pre", "L0.resid.post", "L1.resid.post"], edits)
    delta = torch.stack([first.clamp(min=0) if bool((first < 0).any()) else first, own], -1)
    assert not bool((first < 0).any()), "this seed's first layer always grows, so that it is never void"
    skipped = void(delta, float(alpha))[..., 1]
    same = (values[Site("resid.post", 1)] == values[Site("resid.post", 0)]).all(-1)
    assert same.tolist() == skipped.tolist() and 0 < int(same.sum()) < 8
    said = model.generate(prompt, edits, max_new_tokens=4, cache=cache_on)
    whole = torch.tensor([[*prompt[0].tolist(), *said.tokens[0][:-1]]])
    assert model.run(whole, edits)[0, 7:].argmax(-1).tolist() == list(said.tokens[0])


def test_maps_and_curves_of_voids() -> None:
    model = model_of("gpt2")
    found = void_map(model, token_batch([[5, 11, 23, 42, 7], [61, 17, 3]]), 0.3, max_new_tokens=3)
    assert found.table["phase"].to_list() == ["prompt"] * 2 + ["generation"] * 2
    assert found.table["tokens"].to_list() == [8, 8, 6, 6] and found.tokens.height == 14
    assert int(np.nansum(found.void)) == found.tokens["void"].sum() and int(np.isnan(found.void).sum()) == 2 * 2
    per_row = found.tokens.filter(phase="prompt").group_by("row").agg(pl.col("void").mean())["void"].mean()
    assert found.table.filter(phase="prompt")["void"].sum() == pytest.approx(per_row)
    some = examples(6, (7, 5), 2)
    curve = skip_curve(model, some, (0.0, 0.5, 1.0), draws=2)
    assert curve.height == 6 and curve.filter(kind="void")["skipped"].is_sorted()
    parts, batch = skipping(model), some.batch()
    skip = void(growth(model, batch), 1.0) & batch.mask[..., None]
    by_hand = parts.measure(batch, skip_gates(parts, skip), parts.fallback("zero"), METRICS["kl"]).mean()
    assert curve.row(by_predicate=(pl.col("alpha") == 1.0) & (pl.col("kind") == "void"), named=True)["value"] == pytest.approx(
        float(by_hand)
    )
    assert float(by_hand) > 0.01
    with pytest.raises(GateError, match="no phase"):
        skip_curve(model, some, (0.5,), phase="night")
