"""Tiny models of every family, what they compute when left alone, and what is recorded of them: shared by the conformance suites."""

from functools import cache

import pytest
import torch
from torch import Tensor

from cases import CONFIGS, model_of
from patchclamp.models.editing import Seen
from patchclamp.models.model import Model
from patchclamp.sites import KINDS, Site

FAMILY = pytest.mark.parametrize("name", CONFIGS)
TOKENS = torch.tensor([[5, 11, 23, 42, 7, 31, 64, 80, 13], [61, 17, 3, 90, 28, 28, 45, 9, 71]])
WHOLE = [kind for kind in KINDS if kind not in ("head", "write")]
MOE = ("mixtral", "qwen3_moe", "gpt_oss")


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
