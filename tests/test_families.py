"""Conformance of every family: observed, the model is itself, and its parts are what they are called.

The suite walks `cases.CONFIGS`; a family's row is tested by adding a tiny configuration there.
"""

import pytest
import torch

from cases import CONFIGS
from patchclamp.edits import Add, Zero
from patchclamp.models.families import FAMILIES
from patchclamp.sites import KINDS, Site
from watching import FAMILY, MOE, TOKENS, Same, close, model_of, plain_logits, recorded, whole_sites

# transformers has no sdpa attention for these (soft-cap, sinks, code that predates it)
SDPA = pytest.mark.parametrize(
    "name", [name for name in CONFIGS if name not in ("gemma2", "gpt_oss", "bloom", "gptj", "gpt_neo")]
)


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
