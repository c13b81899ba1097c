"""Tangent kernels against torch's own Jacobians; alignment in closed form; what did not learn is aligned, what did is less."""

import math

import pytest
import torch
from torch.func import functional_call, jacrev

import cases
from patchclamp.errors import MeasureError
from patchclamp.models.model import Model
from patchclamp.units.tangent import alignment, richness, tangent_kernel

ROWS, WANTED = torch.tensor([[3, 5, 7, 2], [4, 4, 9, 1], [8, 2, 6, 6]]), torch.tensor([1, 7, 7])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_kernel_is_that_of_the_jacobian(family: str) -> None:
    """In float64, by torch.func of all rows at once: to 1e-9 of the largest entry."""
    model = Model.load(cases.tiny(family).double())
    weights = dict(model.hf.named_parameters())

    def said(values: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = functional_call(model.hf, values, kwargs={"input_ids": ROWS}).logits[:, -1]
        return logits.gather(1, WANTED[:, None])[:, 0] - logits.mean(-1)

    slopes = jacrev(said)({name: weight.detach() for name, weight in weights.items()})
    flat = torch.cat([slopes[name].flatten(1) for name in weights], 1)
    kernel = tangent_kernel(model, ROWS, WANTED)
    torch.testing.assert_close(kernel, flat @ flat.T, rtol=0, atol=1e-9 * float(kernel.max()))
    assert all(weight.grad is None for weight in model.hf.parameters())


def test_weights_that_do_not_learn_are_left_out() -> None:
    hf = cases.tiny("gpt2")
    for name, weight in hf.named_parameters():
        weight.requires_grad_(name.endswith("ln_f.bias"))
    model = Model.load(hf)
    head = hf.lm_head.weight.detach()
    own = head[WANTED] - head.mean(0)
    torch.testing.assert_close(tangent_kernel(model, ROWS, WANTED), (own @ own.T).double(), rtol=1e-4, atol=1e-6)


def test_alignment_in_closed_form() -> None:
    one, two = torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 2.0]))
    assert alignment(one, 3 * one) == pytest.approx(1) and alignment(one, two) == 0
    assert alignment(one, torch.eye(2)) == pytest.approx(2**-0.5)
    assert math.isnan(alignment(one, torch.zeros(2, 2)))


def test_what_did_not_learn_is_aligned_and_what_did_is_less() -> None:
    """The same weights: 1 and 0. Larger steps of plain descent turn all of it further."""
    before = Model.load(cases.tiny("gpt2"))

    def learned(rate: float) -> dict[tuple[str, str], float]:
        hf = cases.tiny("gpt2")
        for _ in range(3):
            loss = torch.nn.functional.cross_entropy(hf(input_ids=ROWS).logits[:, -1], WANTED)
            slopes = torch.autograd.grad(loss, list(hf.parameters()), materialize_grads=True)
            for weight, slope in zip(hf.parameters(), slopes, strict=True):
                weight.data.sub_(rate * slope)
        return {(part, name): value for part, name, value, *_ in richness(before, Model.load(hf), ROWS, WANTED).rows()}

    none, little, much = learned(0.0), learned(0.01), learned(1.0)
    for key, value in none.items():
        assert value == pytest.approx(0.0 if key[1] == "relative" else 1.0, abs=1e-6)
        assert (much[key] - little[key]) * (1 if key[1] == "relative" else -1) > 0, key
    assert {part for part, _ in none} == {"model", "L0.resid.post", "L1.resid.post"}


def test_what_cannot_be() -> None:
    model = cases.model_of("gpt2")
    with pytest.raises(MeasureError, match="give fewer rows"):
        tangent_kernel(model, ROWS.repeat(20_000, 1), WANTED.repeat(20_000))
