"""Differences passed back in place of derivatives: each rule by its definition, summation to delta through whole models."""

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CONFIGS, tiny
from patchclamp.errors import FamilyError, GateError, MetricError
from patchclamp.methods import attribute, deeplift
from patchclamp.metrics import METRICS
from patchclamp.models.differences import Differences, multiplied, normed, rescaled, softened
from patchclamp.models.model import Model
from patchclamp.parts import edges, gated, nodes
from test_parts import examples

DIFF = METRICS["logit_diff"]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double() * 2


def passed_back(step: Callable[..., Tensor], *values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The first half's output less the second's, summed with weights of 1, 2, 3, ..., and what flows back into each first half."""
    leaves = [value.clone().requires_grad_() for value in values]
    out = step(*leaves)
    weights = torch.arange(1.0, out[: len(out) // 2].numel() + 1).double().view_as(out[: len(out) // 2])
    (out[: len(out) // 2] * weights).sum().backward()
    first, second = out.detach().chunk(2)
    found = [leaf.grad for leaf in leaves]
    assert all(one is not None and not one[len(one) // 2 :].abs().max() for one in found)  # nothing into the reference
    return ((first - second) * weights).sum(), [one.chunk(2)[0] for one in found if one is not None]


def apart(value: Tensor) -> Tensor:
    return value.chunk(2)[0] - value.chunk(2)[1]


@pytest.mark.parametrize("function", [torch.relu, torch.tanh, torch.nn.functional.silu, lambda x: x.pow(2)])
def test_a_function_of_one_number_is_rescaled(function: Callable[[Tensor], Tensor]):
    value = numbers(6, 5)
    value[3, 0] = value[0, 0]  # equal in both runs: the derivative
    _, (slope,) = passed_back(lambda x: rescaled(function, x), value)
    weights = torch.arange(1.0, 16).double().view(3, 5)
    wanted = weights * (function(value[:3]) - function(value[3:])) / (value[:3] - value[3:])
    point = value[:1, 0].clone().requires_grad_()
    (wanted[0, 0],) = torch.autograd.grad(function(point).sum(), point)[0]
    torch.testing.assert_close(slope, wanted, rtol=1e-12, atol=1e-12)


def test_a_products_factors_get_their_shapley_values():
    """The mean over both orders in which the two factors go from the reference to the run."""
    left, right = numbers(4, 3, 5), numbers(4, 5, 2, seed=1)
    total, slopes = passed_back(lambda a, b: multiplied(torch.matmul, a, b), left, right)
    weights = torch.arange(1.0, 13).double().view(2, 3, 2)
    shares = [0.0, 0.0]
    for order in permutations((0, 1)):
        now = [left[2:], right[2:]]
        for factor in order:
            before = (now[0] @ now[1] * weights).sum()
            now[factor] = (left, right)[factor][:2]
            shares[factor] += float((now[0] @ now[1] * weights).sum() - before) / 2
    for slope, value, share in zip(slopes, (left, right), shares, strict=True):
        assert float((slope * apart(value)).sum()) == pytest.approx(share, abs=1e-10)
    assert sum(shares) == pytest.approx(float(total), abs=1e-10)


def test_softmax_and_norm_sum_to_delta():
    scores = numbers(4, 6) * 10
    scores[:, 5] = -torch.inf
    scores[0, 1] = scores[2, 1]
    total, (slope,) = passed_back(lambda x: softened(lambda z: z.softmax(-1), x), scores)
    assert bool((slope[:, 5] == 0).all())
    assert float((slope[:, :5] * apart(scores)[:, :5]).sum()) == pytest.approx(float(total), abs=1e-10)
    value, gain = numbers(4, 8), numbers(8, seed=3)
    norm = torch.nn.functional.layer_norm
    total, (slope,) = passed_back(lambda x: normed(lambda z: norm(z, (8,), gain, gain, 1e-5), x, 8, gain, 1e-5), value)
    assert float((slope * apart(value)).sum()) == pytest.approx(float(total), abs=1e-10)
    near = torch.cat([value[:2], value[:2] + 1e-5 * value[2:]])  # where there is next to no difference: the derivative
    _, (slope,) = passed_back(lambda x: normed(lambda z: norm(z, (8,), gain, gain, 1e-5), x, 8, gain, 1e-5), near)
    leaf = near[:2].clone().requires_grad_()
    (norm(leaf, (8,), gain, gain, 1e-5) * torch.arange(1.0, 17).double().view(2, 8)).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(slope, leaf.grad, rtol=1e-3, atol=1e-3)


def test_a_step_without_a_rule_is_an_error():
    value = numbers(4, 3).requires_grad_()
    with Differences(), pytest.raises(FamilyError, match="through logsumexp"):
        torch.logsumexp(value, -1)
    with Differences():
        total = (2 * value + 1).sum()
    (slope,) = torch.autograd.grad(total, value)
    assert bool((slope == 2).all())  # linear steps have autograd's


SHORT = ("gpt2", "gemma2", "falcon-new")
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in CONFIGS])
def test_every_cut_through_the_network_sums_to_delta(name: str):
    model, batch = Model.load(tiny(name)), examples(3, lengths=(7, 5)).batch()
    delta = (DIFF(model.target_logits(batch), batch) - DIFF(model.target_logits(batch.swapped()), batch))[0].detach()
    stream = gated(model, ["L0.resid.pre", "L1.resid.pre", "L1.resid.post"])
    if name in MIXTURES:
        with pytest.raises(FamilyError, match="mixture of experts"):
            deeplift.samples(stream, batch, stream.fallback("resample"), DIFF, 0)
        return
    found = deeplift.samples(stream, batch, stream.fallback("resample"), DIFF, 0)
    torch.testing.assert_close(found, delta.expand(3, -1), rtol=1e-5, atol=1e-5)  # float32, logits of size 1


def test_parts_of_one_cut_share_its_delta():
    model, batch = Model.load(tiny("gpt2", dtype=torch.float64)), examples(3).batch()
    cut = gated(model, ["L0.resid.pre"], positions=list(range(7)))
    found = deeplift.samples(cut, batch, cut.fallback("resample"), DIFF, 0)
    delta = (DIFF(model.target_logits(batch), batch) - DIFF(model.target_logits(batch.swapped()), batch))[0].detach()
    torch.testing.assert_close(found.sum(0), delta, rtol=0, atol=1e-10)
    assert bool((found[[0, 1, 3, 4, 5, 6]] == 0).all())  # only the third token differs
    neurons, mlp = gated(model, ["L1.mlp.n*"]), gated(model, ["L1.mlp.write"])
    apart, whole = (deeplift.samples(one, batch, one.fallback("resample"), DIFF, 0) for one in (neurons, mlp))
    torch.testing.assert_close(apart.sum(0), whole[0], rtol=0, atol=1e-10)


def test_nothing_is_left_behind_and_the_gap_is_noted():
    model: Any = Model.load(tiny("llama", "sdpa"))
    parts = nodes(model)
    scores = attribute(parts, examples(2), parts.fallback("resample"), "deeplift")
    assert 0 <= scores.about["gap"] < 1e-5
    assert model.hf.config._attn_implementation == "sdpa" and "forward" not in vars(model.hf.model.layers[0].mlp.act_fn)


def test_what_does_not_fit_is_refused():
    model = Model.load(tiny("gpt2"))
    parts, some = nodes(model), examples(2)
    with pytest.raises(MetricError, match="linear in the logits"):
        attribute(parts, some, parts.fallback("resample"), "deeplift", metric="log_probability")
    with pytest.raises(GateError, match="use resample"):
        attribute(parts, some, parts.fallback("zero"), "deeplift")
    apart = edges(model, destinations=["logits"])
    with pytest.raises(GateError, match="use resample"):
        attribute(apart, some, apart.fallback("zero"), "deeplift")
