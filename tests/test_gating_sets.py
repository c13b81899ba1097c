"""Gates as a finder of sets: hard-concrete gates, exactly k parts against every subset, several solutions and their substitutes."""

from functools import cache
from itertools import combinations

import numpy as np
import polars as pl
import pytest
import torch

from patchclamp.errors import GateError, MetricError
from patchclamp.gating import Solutions, Stage, find_sets, fit, fit_exactly, fit_hard, gating_settings, shares, solutions
from patchclamp.gating.exactly import area
from patchclamp.gating.hard import BETA, GAMMA, ZETA, draw
from patchclamp.gating.sufficiency import nll_of
from patchclamp.methods import attribute
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import gated, nodes
from patchclamp.store.codec import decode, encode
from patchclamp.zoo import wired

FEW = gating_settings("default", seeds=2, batch=12)


@cache
def built(name: str):
    """A wired model in single precision, its parts, its sets of prompts and the rule of corrupt values."""
    one = wired(name)
    model = Model.load(one.hf.float(), tokenizer=one.tokenizer)
    parts = nodes(model)
    return parts, one.task.split(one.tokenizer, 128, 0), parts.fallback("resample")


def masks_of(parts, *sets: str) -> np.ndarray:
    labels = [str(parts.labels[number]) for number in parts.counted]
    return np.array([[label in one.split() for label in labels] for one in sets])


# --- the two objectives


def test_hard_concrete_draws_are_the_published_ones() -> None:
    """A million draws: shares of exactly 0 and above 0 by their closed forms (standard error .0005); slopes by autograd."""
    logits = torch.tensor([[-2.0, -0.5, 0.0, 1.0, 3.0]]).double()
    uniform = torch.rand(1, 200_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    gate, slope = draw(logits, uniform)
    open_probability = (logits[0] - BETA * np.log(-GAMMA / ZETA)).sigmoid()
    assert torch.allclose((gate > 0).double().mean((0, 1)), open_probability, atol=0.004)
    full = 1 - ((np.log((1 - GAMMA) / (ZETA - 1)) * BETA - logits[0]).sigmoid())
    assert torch.allclose((gate == 1).double().mean((0, 1)), full, atol=0.004)
    leaf = logits.clone().requires_grad_()
    soft = torch.sigmoid((uniform[:, :50].log() - (1 - uniform[:, :50]).log() + leaf[:, None]) / BETA)
    torch.clamp(soft * (ZETA - GAMMA) + GAMMA, 0, 1).sum().backward()
    assert torch.allclose(slope[:, :50].sum(1), leaf.grad, atol=1e-9)


def test_area_is_zero_where_exactly_k_gates_are_open() -> None:
    gate = torch.tensor([[0.9, 0.1, 0.6, 0.3]] * 2).double().requires_grad_()
    value, slope = area(gate, [2, 1])
    assert value.tolist() == pytest.approx([0.01 + 0.16 + 0.01 + 0.09, 0.01 + 0.36 + 0.01 + 0.09])
    template = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]]).double()
    (wanted,) = torch.autograd.grad(((gate.sort(1).values - template) ** 2).sum(), gate)
    assert torch.allclose(slope, wanted)
    exact = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).double()
    assert area(exact, [2])[0].item() == 0 and area(exact, [1])[0].item() == 1


# --- exactly k


@pytest.mark.parametrize(
    "name", ["and", *(pytest.param(name, marks=pytest.mark.long) for name in ("redundant", "interfering", "induction", "or"))]
)
def test_the_set_of_k_parts_is_the_best_of_all(name: str) -> None:
    """Every subset of 10 parts of each size on the prompts of the fit; NLL equal to 1e-4 (rounding; ties among idle parts)."""
    parts, split, fallback = built(name)
    examples = split.fit.take(range(12))
    sizes = [0, 3, 10] if name == "and" else list(range(11))
    found = fit_exactly(parts, examples, fallback, sizes, FEW, Stage(40, 0.6, 0.1))
    assert (found.kept.sum(2) == np.array(sizes)[:, None]).all()
    both = examples.mirrored() if all(example.pair.invertible for example in examples) else examples
    for size, kept in zip(found.sizes, found.best, strict=True):
        every = np.array([np.isin(np.arange(10), chosen) for chosen in combinations(range(10), size)])
        nll = nll_of(parts, every, both, fallback)
        assert nll_of(parts, kept[None], both, fallback)[0] == pytest.approx(nll.min(), abs=1e-4), (size, kept)


def test_learned_sets_are_the_best_before_any_swap() -> None:
    parts, split, fallback = built("and")
    found = fit_exactly(parts, split.fit, fallback, [3], FEW, Stage(40, 0.6, 0.1), rounds=0)
    assert (found.best == masks_of(parts, "L0.h1 L0.h2 L1.mlp")).all() and not found.swaps.any()
    again = fit_exactly(parts, split.fit, fallback, [3], FEW, Stage(40, 0.6, 0.1), rounds=0)
    assert (again.gate == found.gate).all()
    with pytest.raises(GateError, match="there are 10: give sizes from 0 to 10"):
        fit_exactly(parts, split.fit, fallback, [11])


# --- hard-concrete gates


def test_a_price_between_what_parts_are_worth_keeps_the_circuit() -> None:
    """Of the AND model three parts are worth several nats each: at .1 nats a gate they stay and nothing else; at 100 nothing."""
    parts, split, fallback = built("and")
    found = fit_hard(parts, split.fit, fallback, [0.1, 100.0], FEW, Stage(50, 0.6, 0.2))
    assert (found.kept[0] == masks_of(parts, "L0.h1 L0.h2 L1.mlp")).all() and not found.kept[1].any()
    assert set(np.unique(found.gate[1])) == {0.0} and (found.open_probability[0][found.kept[0]] > 0.95).all()
    assert found.losses[0].mean(0)[-10:].mean() < found.losses[0].mean(0)[:10].mean()
    both, one = (fit_hard(parts, split.fit, fallback, prices, FEW, Stage(6, 0.3, 0.3)) for prices in ([0.1, 100.0], [0.1]))
    assert np.abs(one.logits[0] - both.logits[0]).max() < 1e-3  # folding changes nothing but rounding
    with pytest.raises(GateError, match="0 or more"):
        fit_hard(parts, split.fit, fallback, [-1.0])


@pytest.mark.long
def test_sets_of_every_method_side_by_side() -> None:
    parts, split, fallback = built("and")
    scores = attribute(parts, split.fit, fallback, "exact")
    order = [site for _, site in sorted(zip(-np.abs(scores.values()), scores.sites, strict=True), key=lambda pair: pair[0])]
    found = find_sets(
        parts, split.fit, split.select, fallback, [2, 3], (0.1,), FEW, orders={"threshold": order}, draws=10
    )  # fmt: skip
    three = {method: found.best(method, 3) for method in ("exactly k", "hard concrete", "threshold", "random")}
    assert three["exactly k"]["kept"] == three["hard concrete"]["kept"] == three["threshold"]["kept"] == "L0.h1 L0.h2 L1.mlp"
    assert three["exactly k"]["share"] == pytest.approx(1, abs=1e-3) and three["exactly k"]["low"] > 0.99
    drawn = found.table.filter((pl.col("method") == "random") & (pl.col("size") == 3))
    assert drawn.height == 10 and drawn["share"].mean() < 0.5
    assert decode(encode(found.to_record()))["table"].equals(found.table)
    with pytest.raises(GateError, match="there is no set of 1 parts or fewer by 'threshold'"):
        found.best("threshold", 1)


# --- shares and solutions


def test_shares_are_ratios_of_means_by_hand() -> None:
    parts, split, fallback = built("interfering")
    masks = masks_of(parts, "L0.h1", "L0.h1 L1.h3", "")
    found = shares(parts, masks, split.select, fallback)
    batch = split.select.batch()
    circuits = [[site for site in parts.labels if str(site) in names] for names in (["L0.h1"], ["L0.h1", "L1.h3"], [])]
    gates = torch.cat([parts.open(), parts.closed(), *map(parts.only, circuits)])
    all_open, none, *wanted = parts.measure(batch, gates, fallback, METRICS["logit_diff"]).double().mean(1).tolist()
    assert found.share.tolist() == pytest.approx([(value - none) / (all_open - none) for value in wanted], abs=1e-4)
    assert found.share[0] > 1.1 and found.share[1] == pytest.approx(1, abs=1e-4) and found.share[2] == pytest.approx(0, abs=1e-4)
    assert (found.low <= found.share + 1e-9).all() and (found.share <= found.high + 1e-9).all()
    one = gated(parts.model, ["L0.h0"])
    with pytest.raises(MetricError, match="no share is defined"):
        shares(one, np.ones((1, 1), dtype=bool), split.select, one.fallback("resample"))


@cache
def several(name: str) -> Solutions:
    parts, split, fallback = built(name)
    learned = fit(parts, split.fit, fallback, gating_settings("default", seeds=8, batch=12))
    return solutions(parts, learned, split.select, split.confirm, fallback)


@pytest.mark.parametrize(
    ("name", "core", "pair"),
    [
        ("redundant", "L1.mlp", ("L0.h1", "L1.h2")),
        pytest.param("or", "L1.mlp", ("L0.h0", "L0.h3"), marks=pytest.mark.long),
        pytest.param("backup", None, ("L0.h1", "L1.h2"), marks=pytest.mark.long),
    ],
)
def test_a_redundant_pair_comes_out_as_alternatives(name: str, core: str | None, pair: tuple[str, str]) -> None:
    found = several(name)
    shared = [core] if core else []
    wanted = {" ".join(sorted([one, *shared])) for one in pair}
    assert set(found.table.filter(pl.col("sufficient"))["kept"]) == wanted and found.distinct == 2
    assert found.core == tuple(shared) and set(found.union) == {*shared, *pair}
    assert found.table["seeds"].sum() == 8 and (found.table["low"] >= 0.9).all()
    (row,) = found.substitutes.iter_rows(named=True)
    assert (row["a"], row["b"]) == pair and row["clear"] and row["swaps"] and row["substitutes"]
    assert abs(row["alone_a"]) < 1e-2 and row["joint"] > 1 and row["low"] > 1
    assert decode(encode(found.to_record()))["table"].equals(found.table)


@pytest.mark.long
def test_where_nothing_stands_in_there_is_one_solution() -> None:
    found = several("and")
    assert found.distinct == found.families == 1 and found.core == found.union == ("L0.h1", "L0.h2", "L1.mlp")
    assert found.substitutes.height == 0


@pytest.mark.long
def test_what_does_not_suffice_is_no_solution() -> None:
    """Gates of a fit on shuffled answers: whatever they keep, it does not keep the behaviour."""
    parts, split, fallback = built("and")
    learned = fit(parts, split.fit.shuffled_answers(3), fallback, gating_settings("default", seeds=2, batch=12))
    found = solutions(parts, learned, split.select, split.confirm, fallback)
    assert found.distinct == 0 and found.core == found.union == () and not found.table["sufficient"].any()
