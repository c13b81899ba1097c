"""AtP*: the QK fix against softmax computed anew, GradDrop against hooks, and the bound on what was missed."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import tiny
from patchclamp.edits import Put
from patchclamp.errors import PatchclampError
from patchclamp.methods import corrected, gradient, largest_missed
from patchclamp.methods._attention import key_changes, query_changes
from patchclamp.metrics import METRICS, Metric
from patchclamp.models.model import Model
from patchclamp.parts import Nodes, gated, nodes
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch
from test_parts import examples

DIFF = METRICS["logit_diff"]


def test_changed_queries_and_keys_by_brute_force():
    """Softmax once more for every key by itself; scores far apart, so that rows are saturated both ways."""
    draw = torch.Generator().manual_seed(0)
    scores, changed = (12 * torch.randn(2, 3, 6, 6, generator=draw).double() for _ in range(2))
    mask = torch.ones(6, 6).triu(1).bool()
    scores, changed = scores.masked_fill(mask, -torch.inf), changed.masked_fill(mask, -torch.inf)
    slope, pattern = torch.randn(2, 3, 6, 6, generator=draw).double(), scores.softmax(-1)
    wanted = torch.stack([((changed.softmax(-1) - pattern) * slope)[..., query, :].sum(-1) for query in range(6)], -1)
    torch.testing.assert_close(query_changes(changed.softmax(-1), pattern, slope), wanted, rtol=0, atol=1e-12)
    for key in range(6):
        mixed = scores.clone()
        mixed[..., key] = changed[..., key]
        wanted = ((mixed.softmax(-1) - pattern) * slope).sum((-1, -2))
        torch.testing.assert_close(key_changes(changed, scores, pattern, slope)[..., key], wanted, rtol=0, atol=1e-12)


def pattern_slopes(model: Model, batch: Batch, layer: int) -> Tensor:
    """d metric / d attention weights, by autograd through a recorded run."""
    found = model.record(batch, [Site("pattern", layer), Site("logits")], grad=True)
    logits = found[Site("logits")][batch.target_row, batch.target_position]
    (slope,) = torch.autograd.grad(DIFF(logits[None], batch).sum(), found[Site("pattern", layer)])
    return slope


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", pytest.param("falcon-new", marks=pytest.mark.long)])
def test_the_fix_is_the_models_own_softmax_of_other_queries_and_keys(name: str):
    """Grouped-query attention, sinks, soft caps and windows: one query head or key/value head after the other is put in, in the
    model itself, and its layer's attention recorded."""
    model = Model.load(tiny(name))
    batch = examples(2, lengths=(7, 5)).batch()
    batch = replace(batch, spans={**batch.spans, "pair": batch.spans["fact"] + torch.tensor([-1, 0])})
    labels = ["L*.h*.q", "L*.kv*.k", "L1.h1.q@fact", "L0.kv1.k@fact", "L1.kv0.k@end", "L1.kv0.k@pair"]
    parts = gated(model, labels[:2]), gated(model, labels[2:])
    for some in parts:
        fallback = some.fallback("resample")
        found = corrected.samples(some, batch, fallback, DIFF, 0)
        for row, number in enumerate(some.counted):
            site = some.labels[number]
            assert site.layer is not None
            whole = Site(site.kind, site.layer, site.index)
            other = Put(model.record(batch.swapped(), [whole])[whole])  # at the site's own position
            pattern = Site("pattern", site.layer)
            before, after = (model.record(batch, [pattern], edits)[pattern] for edits in ({}, {site: other}))
            wanted = ((before - after) * pattern_slopes(model, batch, site.layer)).sum((1, 2, 3))
            torch.testing.assert_close(found[row], wanted, rtol=1e-4, atol=1e-5)  # float32


def test_the_fix_sees_through_a_saturated_softmax():
    """A head whose query decides everything, at attention weights of 1: the gradient says it does nothing."""
    hf = tiny("gpt2", dtype=torch.float64)
    with torch.no_grad():
        hf.transformer.h[1].attn.c_attn.weight[:, :64] *= 30
    model = Model.load(hf)
    parts = gated(model, ["L1.h*.q"])
    batch, fallback = examples(6).batch(), parts.fallback("resample")
    from patchclamp.methods.exact import samples as exact

    wanted, fixed, plain = (
        method(parts, batch, fallback, DIFF, 0).mean(1) for method in (exact, corrected.samples, gradient.samples)
    )
    errors = [float((one - wanted).norm() / wanted.norm()) for one in (fixed, plain)]
    assert errors[0] < 0.2 and errors[1] > 0.9, errors  # what is left is the bend of the norm and the MLP behind


def test_without_dropped_layers_other_parts_have_the_gradients_score():
    model = Model.load(tiny("gpt2", dtype=torch.float64))
    parts, batch = nodes(model), examples(3).batch()
    fallback = parts.fallback("resample")
    wanted = gradient.samples(parts, batch, fallback, DIFF, 0)
    torch.testing.assert_close(
        corrected.samples(parts, batch, fallback, DIFF, 0, drop=False).float(), wanted, rtol=1e-5, atol=1e-6
    )
    # two layers: nothing is dropped unless one asks
    torch.testing.assert_close(corrected.samples(parts, batch, fallback, DIFF, 0).float(), wanted, rtol=1e-5, atol=1e-6)


def dropped(model: Model, batch: Batch, parts: Nodes, layer: int) -> Tensor:
    """Slopes in gates with a layer's attention and MLP cut off from the backward pass in one go, by hooks of the test's own."""
    block = model.hf.transformer.h[layer]

    def cut(module: Any, args: Any, output: Any) -> Any:
        return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()

    handles = [block.attn.register_forward_hook(cut), block.mlp.register_forward_hook(cut)]
    gates = parts.open().double().expand(-1, len(batch), -1, -1).clone().requires_grad_()
    values = DIFF(model.target_logits(batch, parts.edits(gates, parts.fallback("resample"), batch)), batch)
    (slope,) = torch.autograd.grad(values.sum(), gates)
    for handle in handles:
        handle.remove()
    slope = slope[0, :, 0, list(parts.counted)].T.clone()
    own = [row for row, number in enumerate(parts.counted) if parts.labels[number].layer == layer]
    slope[own] = 0  # the tests' hooks come before the gates, which act on what they have cut off
    return slope


def test_dropped_layers_are_hooks_of_the_tests_own():
    """Attention and MLP of a layer drop together, and sizes are taken example by example before they are averaged."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config: Any = AutoConfig.for_model("gpt2", vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    hf: Any = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.05)
    model, batch = Model.load(hf), examples(3).batch()
    parts = nodes(model)
    found = corrected.samples(parts, batch, parts.fallback("resample"), DIFF, 0, drop=True)
    each = torch.stack([dropped(model, batch, parts, layer) for layer in range(3)])
    torch.testing.assert_close(found.abs(), each.abs().sum(0) / 2, rtol=1e-9, atol=1e-12)
    plain = gradient.samples(parts, batch, parts.fallback("resample"), DIFF, 0)
    assert bool((found.sign() == plain.sign()).all()) and not torch.allclose(found.abs().float(), plain.abs(), rtol=0.1)


# --- what may have been missed


class Table(Nodes):
    """Parts whose metric is known for every set of closed gates."""

    def __init__(self, model: Model, value: Any):
        super().__init__(model)
        self.value = value

    def measure(self, batch: Batch, gates: Tensor, fallback: Any, metric: Metric | None = None) -> Tensor:
        closed = 1 - gates[:, 0, 0, 1:].double().numpy()
        return torch.tensor(np.array([self.value(one) for one in closed]))[:, None].expand(-1, len(batch))


@pytest.fixture(scope="module")
def gpt2() -> Model:
    return Model.load(tiny("gpt2"))


def test_the_bound_holds_for_additive_parts_and_for_those_that_interact(gpt2: Model):
    draw = np.random.default_rng(0)
    weights, pairs = draw.normal(size=10) * (draw.random(10) < 0.4), draw.normal(size=(10, 10)) * 0.3
    some = examples(2)
    everything = np.array(list(product([0.0, 1.0], repeat=10)))
    for interact in (False, True):
        parts = Table(gpt2, lambda closed, also=interact: -(closed @ weights) - also * (closed @ pairs @ closed))
        effect = -np.array([parts.value(one) for one in everything])
        exact = np.array([effect[everything[:, n] == 1].mean() - effect[everything[:, n] == 0].mean() for n in range(10)])
        assert interact or np.allclose(exact, weights)
        true = float(np.abs(exact).max())
        found = [largest_missed(parts, some, parts.fallback("zero"), [], seed=seed) for seed in range(60)]
        assert np.mean([one.bound >= true for one in found]) >= 0.95  # by triangle inequality mostly far above
        assert found[0].bound < 12 * true  # and yet it says something


def test_good_estimates_make_the_bound_tight(gpt2: Model):
    weights = np.zeros(10)
    weights[3] = 1.0
    parts, some = Table(gpt2, lambda closed: -(closed @ weights)), examples(2)
    labels: Sequence[Any] = [parts.labels[number] for number in parts.counted]
    fallback = parts.fallback("zero")
    blind = largest_missed(parts, some, fallback, [])
    seeing = largest_missed(parts, some, fallback, [], dict(zip(labels, weights.tolist(), strict=True)))
    assert seeing.error == pytest.approx(0, abs=1e-9) and seeing.bound == pytest.approx(1) and seeing.worst == str(labels[3])
    assert blind.bound > 1 and blind.worst == str(labels[0])
    verified = largest_missed(parts, some, fallback, [labels[3]])
    assert verified.bound == pytest.approx(0, abs=1e-9) and verified.unverified == 9
    assert "9 unverified parts" in str(verified)
    with pytest.raises(PatchclampError, match="every part is verified"):
        largest_missed(parts, some, fallback, labels)
    with pytest.raises(PatchclampError, match="two at least"):
        largest_missed(parts, some, fallback, [], subsets=1)
