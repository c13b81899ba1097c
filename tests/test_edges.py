"""Conformance of edges, over tiny models of every family, and against forward passes written out here."""

from functools import cache

import pytest
import torch
from torch import Tensor

from cases import CONFIGS, tiny
from patchclamp.errors import GateError, SiteError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Edges, Parts, edges, gated, nodes
from patchclamp.sites import Edge, Site
from test_parts import examples

DIFF = METRICS["logit_diff"]


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> Model:
    return Model.load(tiny(name, dtype=dtype))


@pytest.fixture(params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> Edges:
    return edges(model_of(request.param))


def plain(parts: Edges, batch) -> Tensor:
    return DIFF(parts.model.target_logits(batch).detach(), batch)


def test_open_edges_are_the_model_bit_for_bit_and_closed_ones_the_corrupt_run(family: Edges):
    batch = examples(4, lengths=(7, 5)).batch()
    assert isinstance(family, Parts)
    rule = family.fallback("resample")
    assert torch.equal(family.measure(batch, family.open(), rule), plain(family, batch))
    # the same stream, summed in another order: float32 rounding
    closed, corrupt = family.measure(batch, family.closed(), rule), plain(family, batch.swapped())
    torch.testing.assert_close(closed, corrupt, rtol=0, atol=1e-5)
    assert (plain(family, batch) - corrupt).abs().max() > 0.05
