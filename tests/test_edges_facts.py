"""Facts about scores of edges that others got wrong: identities, linear models, norms backwards, padding, batches, kernels."""

from functools import cache

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cases import tiny
from patchclamp.methods import effects
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import edge_products, edge_slopes, edges, gated
from patchclamp.parts.edge_norms import NormSlope
from test_parts import examples

DIFF = METRICS["logit_diff"]


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Model:
    return Model.load(tiny(name, attention, dtype=dtype))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_scores_are_the_gradient_in_the_gates_and_sum_to_the_streams(name: str):
    """Closed form against autograd through gates on every reader; those into the logits sum to the gate on the stream they read."""
    model = model_of(name)
    parts, batch = edges(model), examples(3, lengths=(7, 5)).batch()
    rule = parts.fallback("resample")
    found = parts.gradient(batch, parts.open(), rule)[1][0]
    leaf = parts.open().expand(-1, 3, -1, -1).clone().requires_grad_()
    with torch.enable_grad():
        value = DIFF(model.target_logits(batch, parts.edits(leaf, rule, batch)), batch)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(found, slope[0, :, 0], rtol=0, atol=1e-5)
    stream = gated(model, [f"L{model.layers - 1}.resid.post"])
    whole = stream.gradient(batch, stream.open(), stream.fallback("resample"))[1][0, :, 0]
    into = [number for number, edge in enumerate(parts.labels) if edge.target.kind == "logits"]
    torch.testing.assert_close(found[:, into].sum(1), whole, rtol=0, atol=1e-5)
    assert float(whole.abs().max()) > 1e-2


def test_in_a_linear_model_slopes_are_effects():
    """No norm, identity for an activation, attention that does not depend on the prompt (queries and keys are 0); float64."""
    hf = tiny("normless", dtype=torch.float64)
    for module in hf.modules():
        for name, child in module.named_children():
            if name in ("q_proj", "k_proj"):
                for weight in child.parameters():
                    nn.init.zeros_(weight)
            elif type(child).__name__ in ("ReLU", "ReLUActivation"):
                setattr(module, name, nn.Identity())
    model = Model.load(hf)
    parts, batch = edges(model), examples(3, lengths=(7,)).batch()
    rule = parts.fallback("resample")
    slopes = parts.gradient(batch, parts.open(), rule)[1][0].T
    values = parts.measure(batch, torch.cat([parts.open(), *(parts.without([edge]) for edge in parts.labels)]), rule)
    torch.testing.assert_close(values[0] - values[1:], slopes, rtol=0, atol=1e-10)
    for target in {edge.target for edge in parts.labels}:
        into = [edge for edge in parts.labels if edge.target == target]
        together = values[0] - parts.measure(batch, parts.without(into), rule)[0]
        torch.testing.assert_close(together, slopes[[parts.index[edge] for edge in into]].sum(0), rtol=0, atol=1e-10)
    live = [edge.target.kind in ("v", "mlp", "logits") for edge in parts.labels]
    assert float(slopes[live].abs().median()) > 1e-6 and float(slopes[[not one for one in live]].abs().max()) == 0


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(24), lambda: LlamaRMSNorm(24), lambda: Gemma2RMSNorm(24)])
def test_norms_backwards_are_autograd(make):
    """Gains that differ by coordinate; the RMS norms compute in float32, whatever they are given."""
    torch.manual_seed(0)
    norm = make()
    with torch.no_grad():
        norm.weight.copy_(torch.randn(24))
        if getattr(norm, "bias", None) is not None:
            norm.bias.copy_(torch.randn(24))
    norm = norm.double().requires_grad_(False)
    stream, slope = (torch.randn(2, 3, 24, dtype=torch.float64) for _ in range(2))
    leaf = (2 * stream + 1).requires_grad_()
    (own,) = torch.autograd.grad(norm(leaf), leaf, slope)
    torch.testing.assert_close(NormSlope.at(norm, leaf.detach())(slope), own, rtol=0, atol=1e-6)


def test_padding_batches_and_passes_change_no_score(monkeypatch: pytest.MonkeyPatch):
    model, some = model_of("llama"), examples(5, lengths=(7, 5))
    parts = edges(model)
    rule = parts.fallback("resample")
    whole = effects(parts, some, rule, "gradient")
    alone = torch.cat([effects(parts, some.take([number]), rule, "gradient") for number in range(5)], 1)
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.mean(1), effects(parts, some, rule, "gradient", batch_size=2).mean(1), rtol=0, atol=1e-5)
    monkeypatch.setattr(edge_slopes, "PASS", 1)  # a prompt after the other
    monkeypatch.setattr(edge_products, "SLAB", 1)  # a token after the other
    torch.testing.assert_close(whole, effects(parts, some, rule, "gradient"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_kernels_give_the_same_scores(name: str):
    some = examples(3, lengths=(7, 5))
    found = [effects(one, some, one.fallback("resample"), "gradient")
             for one in (edges(model_of(name, attention=kind)) for kind in ("eager", "sdpa"))]  # fmt: skip
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


def test_differences_and_slopes_may_come_from_other_runs():
    """Slopes where the embeddings lie elsewhere, by differences that are given: as autograd in a run of those embeddings."""
    model = model_of("gpt2", torch.float64)
    parts, batch = edges(model), examples(3, lengths=(7,)).batch()
    first, second = parts.record(batch), parts.fallback("resample").at(batch)
    embed = [model.record(one, "embed") for one in (batch.swapped(), batch)]
    added = 0.4 * (next(iter(embed[0].values())) - next(iter(embed[1].values())))
    values, found = parts.under(added).slopes(batch, first, second)
    here = parts.under(added).record(batch)
    moved = {place: value - (first[place] - second[place]) for place, value in here.items()}
    assert all(not torch.equal(moved[place], second[place]) for place in here if place.kind != "embed")
    again = parts.under(added).slopes(batch, None, moved)
    torch.testing.assert_close(found, again[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(values, again[0])
    plain = parts.slopes(batch, None, second)[1]
    torch.testing.assert_close(plain, parts.gradient(batch, parts.open(), parts.fallback("resample"))[1][0])
    assert float((plain - found).abs().max()) > 1e-3
