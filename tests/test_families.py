"""Conformance of every family: observed, the model is itself; edited, it does what the edit says and nothing else.

The suite walks `cases.CONFIGS`; a family's row is tested by adding a tiny configuration there.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CONFIGS, tiny
from patchclamp.edits import Add, Put, Zero
from patchclamp.errors import FamilyError, GateError, SiteError
from patchclamp.models.editing import Seen
from patchclamp.models.families import FAMILIES, family_of
from patchclamp.models.inputs import token_batch
from patchclamp.models.model import Model
from patchclamp.sites import KINDS, Site

FAMILY = pytest.mark.parametrize("name", CONFIGS)
TOKENS = torch.tensor([[5, 11, 23, 42, 7, 31, 64, 80, 13], [61, 17, 3, 90, 28, 28, 45, 9, 71]])
WHOLE = [kind for kind in KINDS if kind not in ("head", "write")]
MOE = ("mixtral", "qwen3_moe", "gpt_oss")
# transformers has no sdpa attention for these (soft-cap, sinks, code that predates it)
SDPA = pytest.mark.parametrize(
    "name", [name for name in CONFIGS if name not in ("gemma2", "gpt_oss", "bloom", "gptj", "gpt_neo")]
)


@cache
def model_of(name: str, attention: str = "eager") -> Model:
    """A tiny model of the family; tests leave it as it was, and `test_left_as_found` sees to it."""
    return Model.load(tiny(name, attention))


@cache
def plain_logits(name: str, attention: str = "eager") -> Tensor:
    with torch.no_grad():
        return model_of(name, attention).hf(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits


@cache
def recorded(name: str) -> dict[Site, Tensor]:
    return model_of(name).record(TOKENS, ["embed", "final", "logits", "L*.*", "L*.*.*"])


def whole_sites(model: Model, writable: bool = False) -> list[Site]:
    """Whole-layer sites that the model has."""
    sites = [
        Site(kind) if kind in ("embed", "final", "logits") else Site(kind, layer)
        for kind in WHOLE
        for layer in range(model.layers)
    ]
    return sorted({site for site in sites if model.anatomy.why_not(site) is None and (KINDS[site.kind].writable or not writable)})


def close(one: Tensor, two: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


class Same:
    """An edit that gives back an equal tensor."""

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        return value.clone()


def test_every_model_type_has_a_case() -> None:
    types = {kind for family in FAMILIES for kind in family.types}
    assert types == {name.partition("-")[0] for name in CONFIGS}


# --- observed, the model is itself


@FAMILY
def test_observed_at_every_site_the_logits_are_the_same(name: str) -> None:
    values = recorded(name)
    model = model_of(name)
    assert set(values) == set(model.sites)
    assert len(values) > 80 or name.startswith("falcon")
    assert torch.equal(values[Site("logits")], plain_logits(name))
    assert torch.equal(model.run(TOKENS), plain_logits(name))


@SDPA
def test_under_sdpa_what_needs_no_scores_leaves_the_kernel(name: str) -> None:
    model = model_of(name, "sdpa")
    kinds = ("resid.pre", "z", "attn", "mlp.write", "resid.post")
    values = model.record(TOKENS, [Site(kind, layer) for kind in kinds for layer in range(model.layers)] + [Site("logits")])
    assert torch.equal(values[Site("logits")], plain_logits(name, "sdpa"))
    same = model.run(TOKENS, {Site("z", layer): Same() for layer in range(model.layers)})
    assert torch.equal(same, plain_logits(name, "sdpa"))


@SDPA
def test_under_sdpa_scores_and_patterns_come_from_eager_attention(name: str) -> None:
    model = model_of(name, "sdpa")
    values = model.record(TOKENS, ["L*.h*.pattern", "logits"])
    close(values[Site("logits")], plain_logits(name, "eager"), 1e-6)
    close(values[Site("pattern", 1, 3)], recorded(name)[Site("pattern", 1, 3)], 1e-6)
    assert torch.equal(model.run(TOKENS), plain_logits(name, "sdpa"))  # the kernel is back


@FAMILY
def test_an_identity_edit_is_a_bitwise_no_op(name: str) -> None:
    model = model_of(name)
    edits = {site: Same() for site in whole_sites(model, writable=True)}
    assert torch.equal(model.run(TOKENS, edits), plain_logits(name))
    single = {site: Same() for site in model.sites if KINDS[site.kind].writable and site.index is not None}
    assert torch.equal(model.run(TOKENS, single), plain_logits(name))


# --- the parts are what they are called


@FAMILY
def test_no_look_ahead(name: str) -> None:
    changed = TOKENS.clone()
    changed[:, -1] = torch.tensor([2, 50])
    other = model_of(name).record(changed, ["embed", "final", "logits", "L*.*", "L*.*.*"])
    for site, value in recorded(name).items():
        if site.kind in ("scores", "pattern"):
            queries = range(value.shape[-2] - 1)
            for query in queries:
                close(value[..., query, : query + 1], other[site][..., query, : query + 1])
            assert site.kind == "scores" or not value.triu(1).any(), f"{site} looks ahead"
        else:
            close(value[:, :-1], other[site][:, :-1])
            assert not torch.equal(value[:, -1], other[site][:, -1]), f"{site} does not see its own token"


@FAMILY
def test_the_residual_stream_is_the_sum_of_what_is_written(name: str) -> None:
    model, values = model_of(name), recorded(name)
    stream = values[Site("embed")]
    for layer in range(model.layers):
        assert torch.equal(values[Site("resid.pre", layer)], stream if layer == 0 else values[Site("resid.post", layer - 1)])
        stream = stream + values[Site("attn.write", layer)]
        if model.anatomy.parallel:
            assert "parallel" in (model.anatomy.why_not(Site("resid.mid", layer)) or "")
        else:
            close(values[Site("resid.mid", layer)], stream)
        stream = stream + values[Site("mlp.write", layer)]
        close(values[Site("resid.post", layer)], stream)


@FAMILY
def test_the_middle_is_what_the_mlp_reads(name: str) -> None:
    """resid.mid is computed as a sum: what follows attention must read just that."""
    model = model_of(name)
    if model.anatomy.parallel:
        return
    shift = torch.randn(TOKENS.shape[1], model.width, generator=torch.Generator().manual_seed(1))
    values = model.record(TOKENS, ["L0.mlp.write", "L0.resid.post"], {Site("resid.mid", 0): Add(shift)})
    before = recorded(name)
    close(values[Site("resid.post", 0)], before[Site("resid.mid", 0)] + shift + values[Site("mlp.write", 0)], 1e-4)
    assert not torch.allclose(values[Site("mlp.write", 0)], before[Site("mlp.write", 0)], atol=1e-3)


@FAMILY
def test_head_writes_and_the_bias_are_what_attention_writes(name: str) -> None:
    model, values = model_of(name), recorded(name)
    for layer in range(model.layers):
        heads = sum(values[Site("write", layer, head)] for head in range(model.anatomy.sizes[layer].heads))
        rest = values[Site("attn.write", layer)] - heads
        close(rest, rest[:1, :1].expand_as(rest))  # what is left depends on nothing: it is the bias
        bias = getattr(model.anatomy.layers[layer].output, "bias", None)
        close(rest[0, 0], torch.zeros_like(rest[0, 0]) if bias is None else bias.detach())


@FAMILY
def test_a_heads_write_is_what_zeroing_it_takes_away(name: str) -> None:
    model, before = model_of(name), recorded(name)
    if model.anatomy.layers[0].attn_post is not None:  # a norm: linear at this run's scale only
        return
    after = model.record(TOKENS, "L0.attn.write", {Site("head", 0, 2): Zero()})
    close(before[Site("attn.write", 0)] - after[Site("attn.write", 0)], before[Site("write", 0, 2)])


@FAMILY
def test_patterns_sum_to_one_and_weigh_the_values(name: str) -> None:
    model, values = model_of(name), recorded(name)
    for layer in range(model.layers):
        whole = model.record(TOKENS, [Site(kind, layer) for kind in ("pattern", "v", "z", "scores")])
        pattern, v = whole[Site("pattern", layer)], whole[Site("v", layer)]
        total = pattern.sum(-1)
        if name == "gpt_oss":  # the sink takes its share
            assert bool((total < 1).all() and (total > 0).all())
        else:
            close(total, torch.ones_like(total))
            close(whole[Site("scores", layer)].softmax(-1), pattern)
        group = pattern.shape[1] // v.shape[2]
        close(torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(group, 2)), whole[Site("z", layer)])
        assert torch.equal(values[Site("z", layer, 1)], whole[Site("z", layer)][:, :, 1])


@FAMILY
def test_queries_and_keys_make_the_scores(name: str) -> None:
    """Where nothing is done to q·k but scaling and masking: their ratio is one number."""
    if name in ("gemma2", "gpt_oss", "bloom", "falcon-alibi"):  # soft-cap, less the row's largest, position bias
        return
    values = recorded(name)
    q = torch.stack([values[Site("q", 1, head)] for head in range(4)], 1)
    scores = torch.stack([values[Site("scores", 1, head)] for head in range(4)], 1)
    kv_heads = model_of(name).anatomy.sizes[1].kv_heads
    k = torch.stack([values[Site("k", 1, head)] for head in range(kv_heads)], 1).repeat_interleave(4 // kv_heads, 1)
    product = q @ k.transpose(-1, -2)
    real = (scores > -1e4) & (product.abs() > 1e-2)
    ratio = scores[real] / product[real]
    close(ratio, ratio[:1].expand_as(ratio), 1e-3)


@FAMILY
def test_neurons_go_through_the_down_projection(name: str) -> None:
    model = model_of(name)
    for layer in range(model.layers):
        if model.anatomy.why_not(Site("neuron", layer)):
            assert name in MOE
            continue
        values = model.record(TOKENS, [Site("neuron", layer), Site("mlp", layer)])
        down = model.anatomy.layers[layer].down
        assert down is not None
        with torch.no_grad():
            close(down(values[Site("neuron", layer)]), values[Site("mlp", layer)])


@pytest.mark.parametrize("name", MOE)
def test_routing_weights_belong_to_the_likeliest_experts(name: str) -> None:
    values = model_of(name).record(TOKENS, ["L1.router", "L1.mlp.e"])
    logits, weights = values[Site("router", 1)], values[Site("expert", 1)]
    assert logits.shape == weights.shape == (2, 9, 4)
    chosen = logits.topk(2, dim=-1).indices
    assert torch.equal((weights > 0).long(), torch.zeros_like(logits).scatter(-1, chosen, 1).long())
    if name != "qwen3_moe":  # whose weights are shares among all experts
        close(weights.sum(-1), torch.ones(2, 9))


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


# --- refused


def test_unknown_families_are_refused_by_name() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict[str, dict[str, Any]] = {
        "rwkv": {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2},
        "mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
        "ctrl": {"n_embd": 16, "dff": 16, "n_layer": 1, "n_head": 2},
    }
    for kind, size in sizes.items():
        config: Any = AutoConfig.for_model(kind, vocab_size=20, **size)
        with pytest.raises(FamilyError, match=f"the architecture '{kind}' is not understood .*Understood: bloom, cohere"):
            Model.load(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("gpt2", {"reorder_and_upcast_attn": True}, "computes attention outside the attention function"),
        ("gpt2", {"add_cross_attention": True}, "blocks have a second attention"),
        ("opt", {"do_layer_norm_before": False}, "the norm sits on the residual stream itself"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "the residual stream is replaced by its norm"),
    ],
)
def test_configurations_that_are_not_understood_are_refused(name: str, change: dict[str, Any], reason: str) -> None:
    from transformers import AutoConfig

    with pytest.raises(FamilyError, match=f"{name} is understood, but not this configuration: .*{reason}"):
        family_of(AutoConfig.for_model(name, **CONFIGS[name], **change))


@pytest.mark.parametrize(
    ("name", "site", "reason"),
    [
        ("llama", "L2.attn", "the model has layers 0 to 1"),
        ("llama", "L0.h4", "layer 0 has heads 0 to 3"),
        ("llama", "L0.kv2.k", "layer 0 has key/value heads 0 to 1"),
        ("llama", "L0.mlp.n64", "layer 0 has neurons 0 to 63"),
        ("llama", "L0.router", "the layer is not a mixture of experts"),
        ("llama", "L0.resid.post.f3:SAE", "no dictionary is attached"),
        ("phi", "L0.resid.mid", "parallel blocks have no middle"),
        ("mixtral", "L0.mlp.n3", "experts keep their neurons inside a fused kernel"),
        ("mixtral", "L0.mlp.e1.n3", "experts keep their neurons inside a fused kernel"),
        ("mixtral", "L0.mlp.e4", "layer 0 has experts 0 to 3"),
        ("qwen3_moe", "L0.router", "the layer is not a mixture of experts"),
    ],
)
def test_sites_that_are_not_there_say_why(name: str, site: str, reason: str) -> None:
    model = model_of(name)
    with pytest.raises(SiteError, match=f"this model .* has no {site}: {reason}"):
        model.record(TOKENS, site)
    with pytest.raises(SiteError, match=reason):
        model.run(TOKENS, {Site.parse(site): Zero()})


def test_edits_that_do_not_fit_say_why() -> None:
    model = model_of("llama")
    with pytest.raises(SiteError, match=r"L0\.h1\.write can be read but not written: edit L0\.h1\.z instead"):
        model.run(TOKENS, {Site("write", 0, 1): Zero()})
    with pytest.raises(GateError, match=r"changed the shape \(2, 9, 32\) to \(2, 9\)"):
        model.run(TOKENS, {Site("mlp", 0): lambda value, seen: value.sum(-1)})
    with pytest.raises(GateError, match=r"shapes do not fit: \(5, 32\) at L0\.mlp, whose value is \(2, 9, 32\)"):
        model.run(TOKENS, {Site("mlp", 0): Put(torch.zeros(5, 32))})


# --- the model is left as it was found


@pytest.fixture(params=["llama", "gpt2", "bloom", "gemma3", "falcon"])
def watched(request: pytest.FixtureRequest) -> Iterator[Model]:
    """A model whose state is compared before and after the test."""
    from transformers import AttentionInterface

    attention = "eager" if request.param == "bloom" else "sdpa"
    hf = tiny(request.param, attention)
    hf.train()
    hf.get_input_embeddings().eval()
    hf.get_output_embeddings().requires_grad_(False)

    def state() -> Any:
        modules = [(type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in hf.modules()]
        registry = dict(AttentionInterface._global_mapping)
        kinds = [m.config._attn_implementation for m in hf.modules() if hasattr(m, "config")]
        return modules, [p.requires_grad for p in hf.parameters()], [p.grad is None for p in hf.parameters()], registry, kinds

    before = state()
    model = Model.load(hf)
    assert state() == before
    yield model
    assert state() == before
    hf.eval()
    plain = hf(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    fresh = tiny(request.param, attention)(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    assert torch.equal(plain, fresh)


def test_left_as_found(watched: Model) -> None:
    watched.record(TOKENS, ["L*.*", "L*.*.*"], {Site("pattern", 0): Same()})
    watched.run(TOKENS, {Site("z", 0, 1): Zero()})


def test_left_as_found_after_an_error(watched: Model) -> None:
    class Oops(Exception):
        pass

    def oops(value: Tensor, seen: Seen, /) -> Tensor:
        raise Oops

    for kind in ("pattern", "q", "z", "mlp", "resid.mid", "resid.post"):
        site = Site(kind, 1)
        if watched.anatomy.why_not(site):
            continue
        with pytest.raises(Oops):
            watched.record(TOKENS, ["L*.*", "L*.*.*"], {site: oops})
        with pytest.raises(Oops), watched.editing({Site("scores", 0): Same()}), watched.editing({site: oops}):
            watched.run(TOKENS)
