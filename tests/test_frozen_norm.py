"""The final norm's scale held: against a pass with hooks of the tests' own, in every family, from the middle and as whole runs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import CONFIGS, model_of, tiny
from patchclamp.errors import FamilyError, GateError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.models.norms import scale_of
from patchclamp.parts import Gated, nodes
from patchclamp.parts.fallbacks import Fallback
from patchclamp.tasks._batch import Batch
from test_parts import examples

DIFF, NLL = METRICS["logit_diff"], METRICS["nll"]


def by_hand(parts: Gated, batch: Batch, gates: Tensor, rule: Fallback) -> Tensor:
    """Logits at the targets, one setting at a time: the norm's own weight and bias on what it reads divided by the own run's."""
    norm: Any = parts.model.anatomy.norm
    centred = "LayerNorm" in type(norm).__name__
    eps = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0].double()
        x = x - x.mean(-1, keepdim=True) if centred else x
        size = (x.square().mean(-1, keepdim=True) + eps).sqrt()
        seen.append(size)
        weight = norm.weight.double() + (1 if "Gemma" in type(norm).__name__ else 0)
        bias = 0 if getattr(norm, "bias", None) is None else norm.bias.double()
        return (x / seen[0] * weight + bias).to(out.dtype)

    handle = norm.register_forward_hook(hook)
    try:
        with torch.no_grad():
            parts.model.target_logits(batch)
            return torch.cat([parts.model.target_logits(batch, parts.edits(one[None], rule, batch)) for one in gates])
    finally:
        handle.remove()


def settings(parts: Gated) -> Tensor:
    """Nothing closed, each part, pairs, and one gate half open."""
    gates = torch.cat([parts.open(), 1 - torch.eye(len(parts.labels))[1:, None, None], parts.open(len(parts.labels) - 2)])
    for number in range(len(parts.labels) - 2):
        gates[len(parts.labels) + number, ..., [1 + number, 2 + number]] = 0
    gates[-1, ..., 3] = 0.5
    return gates


def test_without_a_norm_nothing_is_held() -> None:
    parts, batch = nodes(model_of("normless")), examples(3, lengths=(7, 5)).batch()
    rule, gates = parts.fallback("resample"), settings(parts)
    torch.testing.assert_close(parts.frozen_norm().measure(batch, gates, rule), parts.measure(batch, gates, rule))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "normless"])
def test_a_held_scale_is_the_own_runs(name: str) -> None:
    parts, batch = nodes(model_of(name)), examples(3, lengths=(7, 5)).batch()
    rule, gates = parts.fallback("resample"), settings(parts)
    logits = by_hand(parts, batch, gates, rule)
    frozen = parts.frozen_norm()
    for metric in (DIFF, NLL):
        torch.testing.assert_close(frozen.measure(batch, gates, rule, metric), metric(logits, batch), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(frozen.measure(batch, gates[:1], rule), parts.measure(batch, gates[:1], rule), atol=1e-5, rtol=0)
    one = torch.cat([frozen.measure(batch, gates[n : n + 1], rule) for n in range(1, 4)])  # whole runs, one by one
    torch.testing.assert_close(one, DIFF(logits, batch)[1:4], atol=1e-5, rtol=1e-5)
    assert (frozen.measure(batch, gates, rule) - parts.measure(batch, gates, rule)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama", "cohere", "gemma2"])
def test_slopes_with_a_held_scale_are_differences(name: str) -> None:
    parts, batch = nodes(Model.load(tiny(name, dtype=torch.float64))), examples(3).batch()
    frozen, rule = parts.frozen_norm(), parts.fallback("zero")
    step = 3e-3 * torch.eye(len(parts.labels), dtype=torch.float64)[:, None, None]  # norms compute in float32
    for gates in (parts.open().double(), 0.5 * parts.open().double()):
        values, slopes = frozen.gradient(batch, gates, rule)
        torch.testing.assert_close(values, frozen.measure(batch, gates, rule), atol=1e-6, rtol=1e-5)
        up, down = (frozen.measure(batch, gates + sign * step, rule) for sign in (1, -1))
        torch.testing.assert_close(slopes[0], (up - down).T / 6e-3, atol=1e-3, rtol=1e-3)


def test_what_cannot_be_held_is_refused() -> None:
    model = Model.load(tiny("gpt2"))
    parts = nodes(model)
    with pytest.raises(GateError, match="edits alone cannot hold"):
        parts.frozen_norm().edits(parts.open(), parts.fallback("zero"))

    class Odd(nn.Module):
        eps = 1e-5

        def forward(self, value: Tensor) -> Tensor:
            return value / (1 + value.abs().amax(-1, keepdim=True))

    with pytest.raises(FamilyError, match="Odd is neither a LayerNorm nor an RMS norm"):
        scale_of(Odd(), 32)
