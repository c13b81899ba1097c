"""AtP*'s corrections on edges: attention weights recorded in the model itself with one edge closed, layers cut off by hooks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import tiny
from patchclamp.methods import corrected, gradient
from patchclamp.methods.exact import samples as exact
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Edges, edges
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch
from test_methods_corrected import pattern_slopes
from test_parts import examples

DIFF = METRICS["logit_diff"]


def put_in(parts: Edges, batch: Batch, number: int) -> Tensor:
    """<A - A', slope> with one edge closed in the model, its reader's layer recorded."""
    model, edge = parts.model, parts.labels[number]
    pattern = Site("pattern", edge.target.layer)
    gates = parts.without([edge])
    before = model.record(batch, [pattern])[pattern]
    after = model.record(batch, [pattern], parts.edits(gates, parts.fallback("resample"), batch))[pattern]
    by_row = ((before - after) * pattern_slopes(model, batch, edge.target.layer or 0)).sum((1, 2, 3))
    return torch.zeros(len(batch)).to(by_row).index_add(0, batch.example, by_row)


LONG = ("llama", "gemma2", "olmo2", "phi", "falcon-new")


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_edges_into_queries_and_keys_go_through_the_models_own_softmax(name: str):
    """Grouped-query attention, sinks, soft caps, norms of whole queries: some edges into each slot, closed in the model itself."""
    model, batch = Model.load(tiny(name)), examples(2, lengths=(7, 5)).batch()
    parts = edges(model)
    found, plain = (method(parts, batch, parts.fallback("resample"), DIFF, 0) for method in (corrected.samples, gradient.samples))
    draw, largest = torch.Generator().manual_seed(1), 0.0
    for kind in ("q", "k"):
        mine = [number for number, edge in enumerate(parts.labels) if edge.target.kind == kind]
        for number in [mine[at] for at in torch.randperm(len(mine), generator=draw)[:6].tolist()]:
            wanted = put_in(parts, batch, number)
            torch.testing.assert_close(found[number].to(wanted), wanted, rtol=1e-4, atol=2e-6)  # float32
            largest = max(largest, float(wanted.abs().max()))
    assert largest > 1e-4
    others = [number for number, edge in enumerate(parts.labels) if edge.target.kind not in ("q", "k")]
    torch.testing.assert_close(found[others], plain[others].to(found), rtol=1e-4, atol=1e-6)  # the slope itself


def test_edges_at_positions_go_through_softmax():
    """Of keys, what is written at one span as queries at the other read it; a span of two tokens changes together."""
    model, batch = Model.load(tiny("llama")), examples(2, lengths=(7, 6)).batch()
    batch = replace(batch, spans={**batch.spans, "pair": batch.spans["fact"] + torch.tensor([-1, 0])})
    parts = edges(model, ["embed", "L0.*"], ["L1.h1.q", "L1.kv*.k"], positions=("pair", "end"))
    found, largest = corrected.samples(parts, batch, parts.fallback("resample"), DIFF, 0), 0.0
    for kind in ("q", "k"):
        mine = [number for number, edge in enumerate(parts.labels) if edge.target.kind == kind]
        for number in mine[:: max(1, len(mine) // 12)]:
            edge, wanted = parts.labels[number], asked_at(parts, batch, number)
            torch.testing.assert_close(found[number].to(wanted), wanted, rtol=1e-4, atol=2e-6, msg=str(edge))  # float32
            largest = max(largest, float(wanted.abs().max()))
    assert largest > 1e-5


def asked_at(parts: Edges, batch: Batch, number: int) -> Tensor:
    """By hand: a block's stream with the source's change at its span, its keys (or queries) put in, rows of some queries taken."""
    model, edge = parts.model, parts.labels[number]
    layer = edge.target.layer or 0
    assert edge.source.position is not None and edge.target.position is not None
    stream, pattern = Site("resid.pre", layer), Site("pattern", layer)
    slot = replace(edge.target, position=None)
    whole = Site(slot.kind, layer)
    one = edges(model, [edge.source.at(None)], [slot])
    difference = one.fallback("resample").at(batch)
    kept = one.record(batch)
    (place,) = one.sources.places
    apart = one.sources.difference(place, [edge.source.index or 0], difference[place], kept[place])[0]
    apart = apart * batch.columns(edge.source.position)[..., None].to(apart)
    before = model.record(batch, [stream, pattern])
    changed = model.record(batch, [whole], {stream: lambda value, seen: before[stream] + apart})[whole]
    after = model.record(batch, [pattern], {slot: lambda value, seen: changed[:, :, slot.index]})[pattern]
    by_query = ((before[pattern] - after) * pattern_slopes(model, batch, layer)).sum((1, 3))
    by_row = (by_query * batch.columns(edge.target.position)).sum(1)
    return torch.zeros(len(batch)).to(by_row).index_add(0, batch.example, by_row)


def test_the_fix_sees_edges_through_a_saturated_softmax():
    """Queries that decide everything, at attention weights of 1: the gradient says that edges into them do nothing."""
    hf = tiny("gpt2", dtype=torch.float64)
    with torch.no_grad():
        hf.transformer.h[1].attn.c_attn.weight[:, :64] *= 30
    parts = edges(Model.load(hf), destinations=["L1.h*.q"])
    batch, fallback = examples(6).batch(), parts.fallback("resample")
    wanted, fixed, plain = (
        method(parts, batch, fallback, DIFF, 0).mean(1) for method in (exact, corrected.samples, gradient.samples)
    )
    errors = [float((one - wanted).norm() / wanted.norm()) for one in (fixed, plain)]
    assert errors[0] < 1 / 3 and errors[1] > 0.9, errors  # measured .26 and 1.00; what is left is the bend of norm and MLP behind


def three_layers() -> Model:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config: Any = AutoConfig.for_model("gpt2", vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    hf: Any = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.05)
    return Model.load(hf)


def dropped(parts: Edges, batch: Batch, layer: int) -> Tensor:
    """Slopes in gates with a layer's attention and MLP cut off from the backward pass by hooks of the test's own."""
    block = parts.model.hf.transformer.h[layer]

    def cut(module: Any, args: Any, output: Any) -> Any:
        return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()

    handles = [module.register_forward_hook(cut) for module in (block.attn, block.mlp)]
    try:
        gates = parts.open().double().expand(-1, len(batch), -1, -1).clone().requires_grad_()
        values = DIFF(parts.model.target_logits(batch, parts.edits(gates, parts.fallback("resample"), batch)), batch)
        (slope,) = torch.autograd.grad(values.sum(), gates)
    finally:
        for handle in handles:
            handle.remove()
    slope = slope[0, :, 0].T.clone()
    last = parts.model.layers - 1
    own = [n for n, edge in enumerate(parts.labels) if (last if edge.target.kind == "logits" else edge.target.layer) == layer]
    slope[own] = 0  # the tests' hooks come before the gates, which act on what they have cut off
    return slope


def test_dropped_layers_of_edges_are_hooks_of_the_tests_own():
    """Values, MLPs and logits, whose estimates are slopes; sizes are taken example by example before they are averaged."""
    model, batch = three_layers(), examples(3).batch()
    parts = edges(model, destinations=["L*.kv*.v", "L*.mlp", "logits"])
    found = corrected.samples(parts, batch, parts.fallback("resample"), DIFF, 0, drop=True)
    each = torch.stack([dropped(parts, batch, layer) for layer in range(3)])
    torch.testing.assert_close(found.abs(), each.abs().sum(0) / 2, rtol=1e-9, atol=1e-12)
    plain = gradient.samples(parts, batch, parts.fallback("resample"), DIFF, 0)
    assert bool((found * torch.where(plain < 0, -1.0, 1.0) >= 0).all()) and bool((found < 0).any())
