"""Second derivatives in gate space: against finite differences, closed forms and exact interactions."""

from itertools import combinations

import numpy as np
import pytest
import torch

from cases import tiny
from patchclamp.dependence import agreement, curvature, interactions
from patchclamp.dependence.curvature import hessian
from patchclamp.errors import GateError, MetricError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import edges, gated, nodes
from patchclamp.zoo import wired
from patchclamp.zoo._designs import A
from patchclamp.zoo._wiring import act
from test_parts import examples

FAMILIES = ("gpt2", "llama", "gemma2", "gpt_neox", "bloom", "falcon")
"""Without opt: its units bend at one point, and a difference across it is no derivative."""


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_finite_differences_of_slopes(name: str, frozen: bool) -> None:
    """Central differences of first slopes (which have tests of their own). GPT-2 is float64 throughout: 1e-6; in the others norms or
    softmax compute in float32, whose rounding (1e-7) over the step (1e-2) leaves about 1e-4."""
    parts, some = nodes(Model.load(tiny(name, dtype=torch.float64))), examples(3)
    batch, rule = some.batch(), parts.fallback("resample")
    measured = parts.frozen_norm() if frozen else parts
    step, near = (1e-4, 1e-6) if name == "gpt2" else (1e-2, 2e-3)
    for gate, metric in ((1.0, "logit_diff"), (0.5, "nll")):
        found = hessian(parts, some, rule, metric=metric, rows=range(10), gate=gate, frozen_norm=frozen)
        gates = parts.open().double()
        gates[..., 1:] = gate
        moved = torch.cat([gates + sign * step * torch.eye(11, dtype=torch.float64)[1:, None, None] for sign in (1, -1)])
        slopes = measured.gradient(batch, moved, rule, METRICS[metric])[1][..., 1:]
        expected = METRICS[metric].sign * ((slopes[:10] - slopes[10:]) / (2 * step)).permute(0, 2, 1)
        np.testing.assert_allclose(found, expected.numpy(), atol=near * max(1, float(expected.abs().max())), rtol=1e-3)
        np.testing.assert_allclose(found, found.transpose(1, 0, 2), atol=near)  # a Hessian is symmetric
        assert np.abs(found).max() > 1e-2


def test_a_planted_and_has_the_curvature_of_its_formula() -> None:
    """The MLP says E(a + b) - E(a - b) of two votes a and b, E(z) = gelu(z) + gelu(-z), so at open gates
    H = A / E(2) (E''(2) + E''(0)), by differences of the formula in numpy."""
    one = wired("and")
    parts, some = nodes(Model.load(one.hf, tokenizer=one.tokenizer)), one.task.examples(one.tokenizer, 24, seed=3)
    rule = parts.fallback("zero")

    def even(z: float) -> float:
        return float(act("gpt2", np.array([z, -z])).sum())

    def bend(z: float) -> float:
        return (even(z + 1e-3) - 2 * even(z) + even(z - 1e-3)) / 1e-6

    row = curvature(parts, some, rule).pair("L0.h1", "L0.h2")
    assert row["score"] == pytest.approx(A / even(2) * (bend(2) + bend(0)), abs=1e-4)
    assert row["low"] > 0 and row["q"] < 0.05
    assert interactions(parts, some, rule, pairs=[("L0.h1", "L0.h2")]).table["score"][0] == pytest.approx(A, abs=1e-5)


def test_the_mean_over_the_square_is_the_interaction() -> None:
    """Gauss-Legendre nodes on the square of two gates, the others open, in float64: H's mean is I, to 1e-4."""
    parts, some = nodes(Model.load(tiny("gpt2", dtype=torch.float64))), examples(2)
    batch, rule = some.batch(), parts.fallback("zero")
    i, j = 1, 7
    nodes_, weights = np.polynomial.legendre.leggauss(6)
    at = [
        (0.5 + 0.5 * x, 0.5 + 0.5 * y, u * v / 4)
        for x, u in zip(nodes_, weights, strict=True)
        for y, v in zip(nodes_, weights, strict=True)
    ]
    mean, step = 0.0, 1e-4
    for x, y, weight in at:
        gates = parts.open(2).double()
        gates[..., 1 + i], gates[..., 1 + j] = x, y
        gates[0, ..., 1 + i] += step
        gates[1, ..., 1 + i] -= step
        slopes = parts.gradient(batch, gates, rule)[1][..., 1 + j]
        mean = mean + weight * ((slopes[0] - slopes[1]) / (2 * step)).numpy()
    pair = [(str(parts.labels[1 + i]), str(parts.labels[1 + j]))]
    exact = interactions(parts, some, rule, pairs=pair)
    assert exact.table["score"][0] == pytest.approx(float(np.mean(mean)), abs=1e-4)


def test_agreement_with_exact_is_reported() -> None:
    """A tiny random model, whose parts change little each: second order ranks pairs as exact does."""
    parts, some = nodes(Model.load(tiny("gpt2", dtype=torch.float64))), examples(16)
    rule = parts.fallback("resample")
    exact, estimate = interactions(parts, some, rule), curvature(parts, some, rule)
    fit = agreement(estimate, exact)
    assert fit.n == 45 and fit.spearman is not None and fit.spearman > 0.5 and "Spearman" in str(fit)
    assert agreement(exact, exact).spearman == pytest.approx(1) and fit.to_record()["n"] == 45
    known = {frozenset(pair) for pair in combinations(exact.parts, 2)}
    assert {frozenset(pair) for pair in estimate.table.select("a", "b").iter_rows()} == known


def test_some_rows() -> None:
    parts, some = nodes(Model.load(tiny("llama"))), examples(5)
    rule = parts.fallback("resample")
    whole, few = curvature(parts, some, rule, batch_size=2), curvature(parts, some, rule, rows=["L1.h0", "L0.mlp"])
    assert len(few) == 9 + 8
    for row in few.table.iter_rows(named=True):
        assert {row["a"], row["b"]} & {"L1.h0", "L0.mlp"}
        assert row["score"] == pytest.approx(whole.pair(row["a"], row["b"])["score"], abs=1e-5)


def test_what_has_no_curvature_is_refused() -> None:
    model = Model.load(tiny("gpt2"))
    parts, some = nodes(model), examples(3)
    with pytest.raises(MetricError, match="kl has no slope"):
        curvature(parts, some, parts.fallback("zero"), metric="kl")
    arrows = edges(model)
    with pytest.raises(GateError, match="not of Edges"):
        curvature(arrows, some, arrows.fallback("zero"))
    before = [parameter.requires_grad for parameter in model.hf.parameters()]
    neurons = gated(model, ["L1.mlp.n*"])
    assert len(curvature(neurons, some, neurons.fallback("zero"), rows=["L1.mlp.n3"])) == neurons.counted[-1]
    assert [parameter.requires_grad for parameter in model.hf.parameters()] == before


def test_frozen_routing_is_frozen_for_second_derivatives_too() -> None:
    """Rows against central differences of slopes whose router is held at the model's own run; float32: a step of .02, to 1e-3."""
    model, some = Model.load(tiny("mixtral")), examples(3)
    free, frozen = (nodes(model, routing=how) for how in ("free", "frozen"))
    rule, batch = frozen.fallback("resample"), some.batch()
    found = hessian(frozen, some, rule, rows=[0, 4])
    for row, part in ((0, 0), (1, 4)):
        gates = torch.cat([frozen.open(), frozen.open()])
        gates[:, ..., frozen.counted[part]] = torch.tensor([1.02, 0.98])[:, None, None]
        up, down = frozen.gradient(batch, gates, rule)[1]
        expected = (up - down)[:, list(frozen.counted)].T / 0.04
        np.testing.assert_allclose(found[row], expected, atol=1e-3)
    assert np.abs(found - hessian(free, some, rule, rows=[0, 4])).max() > 1e-3
