"""Greedy search and learned masks: against loops written out here, and on wired models whose circuit is known."""

from functools import cache

import numpy as np
import pytest
import torch

from patchclamp.discover import MaskSettings, greedy, probe, prune
from patchclamp.errors import MetricError, PatchclampError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Edges, Nodes, edges, nodes
from patchclamp.parts.concrete import draw, logits_of, open_probability, settled
from patchclamp.tasks import Examples
from patchclamp.zoo import wired

DIFF = METRICS["logit_diff"]


@cache
def setting(name: str, kind: str = "nodes") -> tuple[Nodes | Edges, Examples]:
    model = wired(name)
    made = {"nodes": nodes, "edges": edges}[kind](Model.load(model.hf, tokenizer=model.tokenizer))
    return made, model.task.examples(model.tokenizer, 8, seed=3)


@pytest.mark.parametrize(
    ("name", "way"), [("interfering", "grow"), ("interfering", "shrink"), ("redundant", "grow"), ("and", "shrink")]
)
def test_greedy_is_the_loop(name: str, way: str):
    parts, some = setting(name)
    fallback, batch = parts.fallback("resample"), some.batch()

    def benefit(members: set[object]) -> float:
        return float(parts.measure(batch, parts.only([part for part in parts.labels if part in members]), fallback, DIFF).mean())

    every = {parts.labels[number] for number in parts.counted}
    top, bottom = benefit(every), benefit(set())
    members, order = (set(), []) if way == "grow" else (set(every), [])
    while True:
        now = (benefit(members) - bottom) / (top - bottom)
        if way == "grow" and now >= 0.9:
            break
        tries = {
            part: (benefit(members ^ {part}) - bottom) / (top - bottom)
            for part in (every - members if way == "grow" else members)
        }
        best = max(sorted(tries), key=lambda part: round(tries[part], 6))
        if not tries or (way == "shrink" and tries[best] < 0.9):
            break
        members ^= {best}
        order.append(round(tries[best], 5))
    found = greedy(parts, some, fallback, faithfulness=0.9, way=way)
    # float32: parts that do nothing tie, and which of them goes first is rounding's
    assert found.steps["faithfulness"].to_list() == pytest.approx(order, abs=1e-4)
    assert {str(part) for part in found.circuit} == {str(part) for part in members} or name == "redundant"
    assert len(found.circuit) == len(members)
    assert found.settings >= len(order)


def test_growing_takes_one_of_two_that_can_replace_each_other_and_shrinking_keeps_both_of_an_and():
    parts, some = setting("redundant")
    grown = greedy(parts, some, parts.fallback("resample"), faithfulness=0.95)
    assert len(grown.circuit.sites & {parts.labels[i] for i in parts.counted if str(parts.labels[i]) in ("L0.h1", "L1.h2")}) == 1
    both, some = setting("and")
    shrunk = greedy(both, some, both.fallback("resample"), faithfulness=0.95, way="shrink")
    assert {str(part) for part in shrunk.circuit} == {"L0.h1", "L0.h2", "L1.mlp"}
    few = greedy(both, some, both.fallback("resample"), among=[part for part in both.labels if part.kind == "mlp"], most=1)
    assert few.steps.height == 1 and few.settings == 2


def test_greedy_refuses_what_makes_no_sense():
    parts, some = setting("and")
    with pytest.raises(PatchclampError, match="above 0"):
        greedy(parts, some, parts.fallback("resample"), faithfulness=0.0)
    with pytest.raises(PatchclampError, match="embed is not among"):
        greedy(parts, some, parts.fallback("resample"), among=[parts.labels[0]])
    items = tuple(type(item)(**{**vars(item), "corrupt": item.clean}) for item in some)
    still = type(some)(items, some.tokenizer, "still")
    with pytest.raises(MetricError, match="no behaviour"):
        greedy(parts, still, parts.fallback("resample"))
    with pytest.raises(MetricError, match="no behaviour"):
        prune(parts, still, parts.fallback("resample"), 0.5)


@pytest.mark.long
def test_a_mask_at_a_wanted_sparsity_is_the_planted_circuit():
    """Of the wired model's edges exactly three carry anything: a mask that closes all but about five keeps them."""
    parts, some = setting("induction", "edges")
    wanted = 1 - 5 / len(parts.labels)
    found = prune(parts, some, parts.fallback("resample"), wanted, objective="logit_diff",
                  settings=MaskSettings(updates=70, rate=0.3, batch=4))  # fmt: skip
    assert {"embed>L0.kv1.v", "L0.h1>L1.kv2.k", "L1.h2>logits"} <= {str(edge) for edge in found.circuit}
    assert abs(found.realised - wanted) < 0.06 and found.multipliers is not None and found.multipliers[0] > 0
    assert found.sparsity[0] == pytest.approx(0.05) and found.sparsity[-1] > found.sparsity[0] + 0.5
    rule = parts.fallback("resample")
    kept = parts.measure(some.batch(), parts.only(list(found.circuit)), rule, DIFF).mean()
    whole = parts.measure(some.batch(), parts.open(), rule, DIFF).mean()
    assert float(kept / whole) == pytest.approx(1, abs=1e-3)
    top = found.scores.table.sort("score", descending=True)["site"].to_list()[:3]
    assert set(top) == {"embed>L0.kv1.v", "L0.h1>L1.kv2.k", "L1.h2>logits"}


def test_a_price_closes_what_is_not_worth_it():
    parts, some = setting("induction")
    settings = MaskSettings(updates=40, rate=0.3, batch=4)
    cheap = probe(parts, some, parts.fallback("resample"), 0.5, settings=settings)
    assert {str(part) for part in cheap.circuit} == {"L0.h1", "L1.h2"} and cheap.multipliers is None
    dear = [probe(parts, some, parts.fallback("resample"), 1e4, settings=settings) for _ in range(2)]
    assert len(dear[0].circuit) == 0
    np.testing.assert_array_equal(dear[0].scores.values(), dear[1].scores.values())  # same seed, same mask
    with pytest.raises(PatchclampError, match="price"):
        probe(parts, some, parts.fallback("resample"), 0.0)
    with pytest.raises(PatchclampError, match="sparsity"):
        prune(parts, some, parts.fallback("resample"), 1.0)


def test_gates_are_drawn_as_their_probability_says():
    """A million draws of one gate: how often it is open, what its slope is, and where test-time gates lie."""
    logits = torch.tensor([[-1.0, 0.3, 2.0]], dtype=torch.float64)
    uniform = torch.from_numpy(np.random.default_rng(0).uniform(1e-6, 1 - 1e-6, (1, 200_000, 3)))
    gate, slope = draw(logits, uniform)
    # standard error of a share is at most .0011
    torch.testing.assert_close((gate > 0).double().mean(1), open_probability(logits), atol=0.005, rtol=0)
    step = 1e-5
    up, down = (draw(logits + sign * step, uniform)[0] for sign in (1, -1))
    torch.testing.assert_close((up - down).mean(1) / (2 * step), slope.mean(1), atol=1e-4, rtol=0)
    assert settled(torch.tensor([-9.0, 9.0])).tolist() == [0, 1]
    assert float(open_probability(torch.tensor([logits_of(0.95)]))) == pytest.approx(0.95)
