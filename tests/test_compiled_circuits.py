"""Circuits of compiled programs: exact effects, ACDC and gradient methods on edges, against truths that use none of them."""

from functools import cache

import numpy as np
import pytest

from patchclamp.discover import acdc, rank_auroc
from patchclamp.errors import MetricError
from patchclamp.methods import attribute
from patchclamp.models.model import Model
from patchclamp.parts import Edges, edges
from patchclamp.zoo.compiled import Compiled, build

NOTHING = 1e-6  # float64 on logits of 10: dead edges are 0 or what softmax leaks, e^-50
N = 8
HARD = [("reverse", "zero"), ("hist", "resample"), ("hist", "zero"), ("sort_unique", "resample"), ("sort_unique", "zero")]
EASY = [("reverse", "resample"), ("xproportion", "resample"), ("xproportion", "zero")]
LONG = [pytest.param(name, kind, marks=pytest.mark.long) for name, kind in (
    ("pair_balance", "resample"), ("pair_balance", "zero"), ("shuffle_dyck", "zero"))]  # fmt: skip
ALSO = [pytest.param(name, kind, marks=pytest.mark.long) for name in ("rotate", "palindrome", "duplicates", "often")
        for kind in ("resample", "zero")]  # fmt: skip


@cache
def made(name: str) -> tuple[Compiled, Edges]:
    one = build(name)
    return one, edges(Model.load(one.hf, tokenizer=one.tokenizer))


def scored(name: str, kind: str, method: str) -> tuple[dict[str, float], float]:
    """The absolute mean score of each edge (what is less than a leak is 0), and how well they rank the live ones."""
    one, parts = made(name)
    scores = attribute(parts, one.task.examples(one.tokenizer, N), parts.fallback(kind), method)
    values = np.where(np.abs(scores.values()) < NOTHING, 0.0, np.abs(scores.values()))
    live = getattr(one.truth, kind)
    return dict(zip(map(str, scores.sites), values, strict=True)), rank_auroc(
        values, [str(site) in live for site in scores.sites]
    )


@pytest.mark.parametrize(("name", "kind"), [*HARD, *EASY, *LONG, *ALSO])
def test_exact_effects_are_those_of_the_live_edges(name: str, kind: str) -> None:
    """Edge by edge through the model's hooks, against the arrays: the same set, so AUROC 1 (circuits of Miller et al. among them)."""
    one = made(name)[0]
    values, area = scored(name, kind, "exact")
    assert set(values) == set(one.truth.edges)
    assert {edge for edge, value in values.items() if value} == getattr(one.truth, kind)
    assert area == 1.0


@pytest.mark.parametrize(("name", "kind"), [*HARD, *EASY, *LONG])
def test_acdc_leaves_the_live_edges_in_two_orders(name: str, kind: str) -> None:
    one, parts = made(name)
    orders = [("backward", 0), ("random", 1)]
    found = acdc(parts, one.task.examples(one.tokenizer, N), parts.fallback(kind), 1e-6, objective="l2", orders=orders)
    assert [set(map(str, circuit.sites)) for circuit in found.orders] == [getattr(one.truth, kind)] * 2
    assert found.stability == 1.0


@pytest.mark.parametrize(("name", "kind"), HARD)
def test_gradients_along_the_line_of_gates_beat_the_gradient(name: str, kind: str) -> None:
    """Where queries, keys and steps are saturated the slope is 0 and ranks nothing; the mean over the line finds them."""
    gradient, integrated = (scored(name, kind, method)[1] for method in ("gradient", "integrated"))
    assert gradient <= PUBLISHED[name, kind] + 0.06 and integrated >= gradient + 0.05


PUBLISHED = {
    ("reverse", "zero"): 0.848, ("hist", "resample"): 0.625, ("hist", "zero"): 0.667, ("sort_unique", "resample"): 0.750,
    ("sort_unique", "zero"): 0.800,
}  # fmt: skip
"""Edge attribution patching on Tracr's own models of these programs, by rank AUROC."""


def test_the_slope_of_a_divergence_at_the_clean_run_is_refused() -> None:
    one, parts = made("hist")
    with pytest.raises(MetricError, match="kl"):
        attribute(parts, one.task.examples(one.tokenizer, N), parts.fallback("zero"), "gradient", metric="kl")
