"""What is not understood is refused by name, with the reason; and a model is left as it was found."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CONFIGS, tiny
from patchclamp.edits import Put, Zero
from patchclamp.errors import FamilyError, GateError, SiteError
from patchclamp.models.editing import Seen
from patchclamp.models.families import family_of
from patchclamp.models.model import Model
from patchclamp.sites import Site
from watching import TOKENS, Same, model_of

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
