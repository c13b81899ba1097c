"""Neurons as parts: what closing one does, slopes of all from one backward pass, and layers that have none."""

from functools import cache

import pytest
import torch

from cases import tiny
from patchclamp.errors import GateError, SiteError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import gated, neurons
from patchclamp.sites import Site
from test_parts import examples

DIFF = METRICS["logit_diff"]


@cache
def model_of(name: str, dtype: torch.dtype = torch.float64) -> Model:
    return Model.load(tiny(name, dtype=dtype))


def test_neurons_are_what_the_pattern_names():
    model = model_of("llama")
    assert neurons(model).labels == gated(model, ["L*.mlp.n*"]).labels and len(neurons(model).labels) == 128
    assert neurons(model, [1], ["end"]).labels == tuple(Site("neuron", 1, number, position="end") for number in range(64))
    assert {site.layer for site in neurons(model_of("qwen3_moe", torch.float32)).labels} == {0}, "its second layer has experts"
    with pytest.raises(SiteError, match=r"no L1\.mlp\.n"):
        neurons(model_of("qwen3_moe", torch.float32), [1])
    with pytest.raises(GateError, match="no neurons that can be reached"):
        neurons(model_of("mixtral", torch.float32))


def test_closing_a_neuron_takes_its_column_of_the_down_projection():
    """By a hook of the test's own on the down projection's input; float64."""
    model = model_of("gpt2")
    parts, batch = neurons(model), examples(3, lengths=(7, 5)).batch()
    chosen, rule = [0, 77, 130, 255], parts.fallback("resample")
    gates = torch.cat([parts.without([parts.labels[number]]) for number in chosen])
    found, corrupt = parts.measure(batch, gates, rule), model.record(batch.swapped(), "L*.mlp.n")
    for number, value in zip(chosen, found, strict=True):
        site = parts.labels[number]

        def put(_, args, site=site):
            given = args[0].clone()
            given[..., site.index] = corrupt[Site("neuron", site.layer)][..., site.index]
            return (given,)

        handle = model.hf.transformer.h[site.layer].mlp.c_proj.register_forward_pre_hook(put)
        expected = DIFF(model.target_logits(batch).detach(), batch)[0]
        handle.remove()
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-11)


def test_slopes_of_all_neurons_take_one_backward_pass():
    model = model_of("gpt2")
    parts, batch = neurons(model), examples(3, lengths=(7,)).batch()
    ran = []
    handle = model.hf.transformer.h[0].mlp.c_proj.register_full_backward_hook(lambda *_: ran.append(1))
    _, slopes = parts.gradient(batch, parts.open(), parts.fallback("resample"))
    handle.remove()
    assert len(ran) == 1 and slopes.shape == (1, 3, 256)
    step = torch.zeros_like(parts.open()).double()
    for number in (3, 100, 250):
        way = step.clone()
        way[..., number] = 1e-6
        up, down = (parts.measure(batch, parts.open() + sign * way, parts.fallback("resample")) for sign in (1, -1))
        torch.testing.assert_close(slopes[..., number].double(), (up - down).double() / 2e-6, rtol=1e-5, atol=1e-8)
