"""Conformance of every family: edited, the model does what the edit says and nothing else, and gradients reach every tensor."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import tiny
from patchclamp.edits import Add, Put, Zero
from patchclamp.models.editing import Seen
from patchclamp.models.inputs import token_batch
from patchclamp.models.model import Model
from patchclamp.sites import KINDS, Site
from watching import FAMILY, MOE, TOKENS, WHOLE, close, model_of, plain_logits, recorded, whole_sites

# --- edits take effect


@FAMILY
def test_zeroing_any_site_changes_the_logits(name: str) -> None:
    model = model_of(name)
    for site in whole_sites(model, writable=True):
        logits = model.run(TOKENS, {site: Zero()})
        # a row of keys or scores may be constant, but a random model's are not
        assert not torch.allclose(logits, plain_logits(name), atol=1e-5), f"zeroing {site} changes nothing"


@FAMILY
def test_an_edit_puts_what_it_says(name: str) -> None:
    """What is read behind an edit is what the edit put; what lies before it is as it was."""
    model, before = model_of(name), recorded(name)
    chance = torch.Generator().manual_seed(0)
    for site in [s for s in model.sites if s.layer == 1 and KINDS[s.kind].writable and s.index in (None, 0)]:
        if site.kind in ("scores", "pattern", "expert"):
            continue  # masked keys; experts that are not chosen
        wanted = torch.randn(before[site].shape, generator=chance)
        after = model.record(TOKENS, [site, "L0.resid.post"], {site: Put(wanted)})
        assert torch.equal(after[Site("resid.post", 0)], before[Site("resid.post", 0)])
        close(after[site], wanted, 1e-5)


@FAMILY
def test_a_position_is_edited_alone(name: str) -> None:
    model, before = model_of(name), recorded(name)
    for text in ("L0.h1@3", "L0.mlp@-2", "L1.kv0.v@0", "L0.h2.pattern@4", "L1.resid.pre@3"):
        site = Site.parse(text)
        whole = Site("z", 0, 1) if site.kind == "head" else site.at(None)
        after = model.record(TOKENS, whole, {site: Zero()})[whole]
        column = site.position if isinstance(site.position, int) else 0
        rows = after.transpose(1, -2) if site.kind == "pattern" else after
        assert not rows[:, column].any()
        expected = (before[whole].transpose(1, -2) if site.kind == "pattern" else before[whole]).clone()
        expected[:, column] = 0
        assert torch.equal(rows, expected), text


@FAMILY
def test_an_edited_pattern_is_what_mixes_the_values(name: str) -> None:
    model = model_of(name)
    uniform = torch.ones(9, 9).tril() / torch.arange(1, 10)[:, None]
    after = model.record(TOKENS, ["L0.v", "L0.h3.z"], {Site("pattern", 0, 3): Put(uniform)})
    v = after[Site("v", 0)]
    close(after[Site("z", 0, 3)], uniform @ v[:, :, v.shape[2] - 1])


@FAMILY
def test_edited_queries_and_scores_reach_the_pattern(name: str) -> None:
    model, before = model_of(name), recorded(name)
    for site in (Site("q", 1, 0), Site("k", 1, 0), Site("scores", 1, 0)):
        after = model.record(TOKENS, "L1.h0.pattern", {site: Zero()})[Site("pattern", 1, 0)]
        assert not torch.allclose(after, before[Site("pattern", 1, 0)], atol=1e-4), site
        if site.kind == "scores" and name != "gpt_oss":  # equal scores, no mask left: attention to all
            close(after, torch.full_like(after, 1 / 9))


@pytest.mark.parametrize("name", MOE)
def test_routers_and_experts_are_edited(name: str) -> None:
    model = model_of(name)
    to_last = torch.tensor([0.0, 0.0, 30.0, 60.0])
    after = model.record(TOKENS, ["L1.mlp.e", "L1.mlp"], {Site("router", 1): Put(to_last)})
    weights = after[Site("expert", 1)]
    close(weights, torch.tensor([0.0, 0.0, 0.0, 1.0]).expand_as(weights))
    with model.editing({Site("router", 1): Put(to_last)}):  # nested: the inner edit sees what the outer one made
        shifted = model.record(TOKENS, "L1.router", {Site("router", 1): Add(torch.ones(4))})[Site("router", 1)]
    close(shifted, (to_last + 1).expand_as(shifted))
    routed = model.record(TOKENS, ["L1.mlp.e", "L1.mlp"])
    doubled = model.record(TOKENS, "L1.mlp", {Site("expert", 1): Put(routed[Site("expert", 1)] * 2)})
    close(doubled[Site("mlp", 1)], routed[Site("mlp", 1)] * 2, 1e-4)
    without = model.record(TOKENS, "L1.mlp", {Site("expert", 1, expert): Zero() for expert in range(4)})
    close(without[Site("mlp", 1)], torch.zeros_like(without[Site("mlp", 1)]))


def test_a_patched_pattern_row_equals_a_llama_written_by_hand() -> None:
    model = model_of("llama")
    row = torch.tensor([0.1, 0.5, 0.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0])
    edited = model.run(TOKENS, {Site("pattern", 0, 1, position=4): Put(row)})
    close(edited, llama_by_hand(model.hf, TOKENS, {(0, 1, 4): row}), 1e-5)
    close(plain_logits("llama"), llama_by_hand(model.hf, TOKENS, {}), 1e-5)
    assert not torch.allclose(edited, plain_logits("llama"), atol=1e-3)


def llama_by_hand(hf: Any, tokens: Tensor, rows: dict[tuple[int, int, int], Tensor]) -> Tensor:
    """Llama in twenty lines, with pattern rows put at (layer, head, query)."""
    weights = {name: value.detach() for name, value in hf.state_dict().items()}
    count, eps, base = tokens.shape[1], hf.config.rms_norm_eps, hf.config.rope_parameters["rope_theta"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weights[name]

    angle = torch.arange(count)[:, None] * base ** (-torch.arange(0, 8, 2) / 8)

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., :4], x[..., 4:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(2):
        w = {key: weights[f"model.layers.{layer}.{key}"] for key in (
            "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
            "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")}  # fmt: skip
        h = norm(x, f"model.layers.{layer}.input_layernorm.weight")
        q, k, v = ((h @ w[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, 8)).transpose(1, 2) for n in "qkv")
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / 8**0.5
        pattern = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf).softmax(-1)
        for (at, head, query), row in rows.items():
            if at == layer:
                pattern[:, head, query] = row
        x = x + (pattern @ v).transpose(1, 2).flatten(2) @ w["self_attn.o_proj.weight"].T
        h = norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(h @ w["mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].T


# --- rows


@FAMILY
def test_padded_rows_give_what_they_give_alone(name: str) -> None:
    model = model_of(name)
    rows = [TOKENS[0, :4].tolist(), TOKENS[1].tolist(), TOKENS[0, 2:9].tolist()]
    batch = token_batch(rows)
    together = model.record(batch, ["logits", "L1.h0.pattern", "L0.h1.z"])
    for i, row in enumerate(rows):
        alone = model.record(torch.tensor([row]), ["logits", "L1.h0.pattern", "L0.h1.z"])
        close(together[Site("logits")][i, -len(row) :], alone[Site("logits")][0])
        close(together[Site("z", 0, 1)][i, -len(row) :], alone[Site("z", 0, 1)][0])
        close(together[Site("pattern", 1, 0)][i, -len(row) :, -len(row) :], alone[Site("pattern", 1, 0)][0])


@FAMILY
def test_settings_are_copies_of_the_rows(name: str) -> None:
    model = model_of(name)
    batch = token_batch([TOKENS[0, :5].tolist(), TOKENS[1].tolist()])
    gates = torch.tensor([0.0, 1.0, 0.5]).repeat_interleave(2)[:, None, None, None]

    class Gate:
        def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
            assert seen.settings == 3 and seen.mask.shape == value.shape[:2]
            return value * gates

    logits = model.forward(batch, {Site("z", 0): Gate()}, settings=3, columns=torch.tensor([8])).detach().unflatten(0, (3, 2))
    close(logits[1], model.run(batch)[:, [8]])
    close(logits[0], model.run(batch, {Site("z", 0): Zero()})[:, [8]])


# --- gradients


@FAMILY
def test_gradients_flow_to_every_tapped_tensor(name: str) -> None:
    model = model_of(name)
    kinds = [kind for kind in WHOLE if kind not in ("logits", "expert")]
    sites = [Site(kind, None if kind in ("embed", "final") else 0) for kind in kinds]
    sites = [site for site in sites if model.anatomy.why_not(site) is None]
    values = model.record(TOKENS, [*sites, "logits"], grad=True)
    weight = torch.randn(97, generator=torch.Generator().manual_seed(2))
    slopes = torch.autograd.grad((values[Site("logits")][:, -1] @ weight).sum(), [values[site] for site in sites])
    for site, slope in zip(sites, slopes, strict=True):
        assert bool(slope.isfinite().all() and slope.abs().max() > 0), f"no gradient at {site}"


def test_gradients_are_the_finite_differences() -> None:
    model = Model.load(tiny("gpt2", dtype=torch.float64))
    chance = torch.Generator().manual_seed(3)
    weight = torch.randn(97, generator=chance, dtype=torch.float64)
    for site in whole_sites(model, writable=True):
        if site.layer == 1:
            continue
        values = model.record(TOKENS, [site, "logits"], grad=True)
        slope = torch.autograd.grad((values[Site("logits")][:, -1] @ weight).sum(), values[site])[0]
        direction = torch.randn(slope.shape, generator=chance, dtype=torch.float64)
        if site.kind == "scores":  # the mask must stay what it is
            direction = direction.tril()
        step = 1e-5
        up, down = (model.run(TOKENS, {site: Add(direction, sign * step)})[:, -1] @ weight for sign in (1, -1))
        slope = torch.where(slope.isfinite(), slope, 0)
        torch.testing.assert_close((up - down).sum() / (2 * step), (slope * direction).sum(), rtol=1e-5, atol=1e-8, msg=str(site))
