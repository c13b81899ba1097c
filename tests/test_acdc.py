"""ACDC: equal to a loop that closes one part after the other, in fewer runs; on wired models the planted circuit."""

from functools import cache

import pytest
import torch

from cases import tiny
from patchclamp.discover import acdc
from patchclamp.discover.order import reach_of, stage, traversal
from patchclamp.errors import MetricError, PatchclampError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Fallback, Parts, edges, nodes
from patchclamp.sites import Edge
from patchclamp.tasks import Examples, load_task
from patchclamp.zoo import wired
from test_parts import examples


@cache
def model_of(name: str) -> Model:
    return Model.load(tiny(name, dtype=torch.float64))


def naive(
    parts: Parts, some: Examples, fallback: Fallback, metric: str, tau: float, turns: list[int]
) -> tuple[set[int], list[float]]:
    """The published loop: every part in turn, a run of its own each, nothing spared."""
    batch, chosen = some.batch(), METRICS[metric]

    def loss(closed: set[int]) -> float:
        gates = torch.ones(1, 1, 1, len(parts.labels))
        for number in closed:
            gates[..., number] = 0
        return -chosen.sign * float(parts.measure(batch, gates, fallback, chosen).mean())

    closed, grown, now = set[int](), list[float](), loss(set())
    for part in turns:
        new = loss(closed | {part})
        grown.append(new - now)
        if new - now < tau:
            closed.add(part)
            now = new
    return closed, grown


@pytest.mark.parametrize(
    ("name", "kind", "metric", "tau"),
    [("gpt2", "edges", "kl", 3e-4), ("llama", "edges", "logit_diff", 2e-3), ("gpt2", "nodes", "l2", 1.0)],
)
def test_the_circuit_is_that_of_one_after_the_other(name: str, kind: str, metric: str, tau: float):
    """In float64, where no decision is near enough to the threshold for rounding to turn it."""
    parts: Parts = {"edges": edges, "nodes": nodes}[kind](model_of(name))
    some = examples(2)
    fallback = parts.fallback("resample")
    orders = {"gpt2": [("random", 3)], "llama": [("backward", 0)]}[name] if kind == "edges" else [("backward", 0), ("random", 3)]
    found = acdc(parts, some, fallback, tau, objective=metric, orders=orders)
    assert found.closest > 1e-9
    for order, circuit in zip(orders, found.orders, strict=True):
        turns = list(traversal(parts, *order))
        closed, grown = naive(parts, some, fallback, metric, tau, turns)
        assert {str(part) for part in circuit} == {str(parts.labels[turn]) for turn in turns if turn not in closed}
        assert 0 < len(circuit) < len(turns)
        rows = found.trace.filter(found.trace["order"] == circuit.about["order"])
        assert rows["site"].to_list() == [str(parts.labels[turn]) for turn in turns]
        for mine, theirs in zip(rows["growth"], grown, strict=True):
            # what is cut off was not run: the loop finds that it costs nothing
            assert theirs == pytest.approx(0.0 if mine is None else mine, abs=1e-10)
    removed = found.trace["removed"].sum()
    assert removed == len(orders) * len(parts.counted) - sum(map(len, found.orders))


def test_one_at_a_time_and_a_good_guess_throw_nothing_away():
    parts, some = nodes(model_of("gpt2")), examples(2)
    fallback, orders = parts.fallback("resample"), [("backward", 0)]
    plain = acdc(parts, some, fallback, 6e-4, orders=orders)
    single = acdc(parts, some, fallback, 6e-4, orders=orders, most=1)
    known = acdc(parts, some, fallback, 6e-4, orders=orders, expected=single.circuit)
    left = {part for part in parts.labels if part.kind != "embed"} - single.circuit.sites
    wrong = acdc(parts, some, fallback, 6e-4, orders=orders, expected=left)
    assert plain.circuit == single.circuit == known.circuit == wrong.circuit
    assert 0 < len(plain.circuit) < len(parts.counted)
    assert single.thrown == known.thrown == 0 and plain.thrown > 0 and wrong.thrown > 0
    assert single.settings == single.trace["growth"].count() == plain.settings - plain.thrown
    assert known.stability is None


def test_the_wired_circuit_is_what_is_left_and_what_is_cut_off_is_not_run():
    model = wired("induction")
    parts = edges(Model.load(model.hf, tokenizer=model.tokenizer))
    some = model.task.examples(model.tokenizer, 3, seed=1)
    found = acdc(parts, some, parts.fallback("resample"), objective="logit_diff", orders=[("backward", 0), ("random", 1)])
    planted = {"embed>L0.kv1.v", "L0.h1>L1.kv2.k", "embed>L1.kv2.v", "embed>L1.h2.q", "L1.h2>logits"}
    # the word asked about is the same in both prompts of a pair: its query carries nothing that changes
    assert {str(edge) for edge in found.circuit} == planted - {"embed>L1.h2.q", "embed>L1.kv2.v"}
    assert found.stability == 1.0 and found.common == found.ever == found.circuit
    assert found.unit == "logits" and found.threshold == pytest.approx(0.01 * (found.ends[1] - found.ends[0]))
    cut = found.trace.filter(found.trace["how"] == "cut off")
    assert bool(cut["removed"].all()) and cut.height > 0.6 * found.trace.height
    assert found.loss[0] == pytest.approx(found.ends[0], abs=1e-5)
    assert "Jaccard 1.00 between 2 orders" in str(found)
    # one batch: what ran is counted block by block; each order visits 110 edges of 2 layers
    assert found.naive == 2 * 110 * 2 and found.blocks is not None and found.blocks < 0.3 * found.naive


def test_traversal_goes_backwards_and_holds_every_part_once():
    parts = edges(model_of("llama"))
    for order in ("backward", "ascending", "random"):
        turns = traversal(parts, order, 1)
        assert sorted(turns) == list(parts.counted)
        stages = [stage(parts.labels[turn]) for turn in turns]
        assert stages == sorted(stages, reverse=True)
    assert traversal(parts, "random", 1) != traversal(parts, "random", 2)
    assert traversal(parts, "random", 1) == traversal(parts, "random", 1)
    assert stage(Edge.parse("embed>L0.h0.q")) < stage(Edge.parse("L0.h1>L0.mlp")) < stage(Edge.parse("L0.mlp>L1.kv0.k"))


def test_reach_is_known_only_where_every_edge_is_gated():
    model = model_of("llama")
    every = edges(model)
    reach = reach_of(every)
    assert reach is not None
    # a key/value head is read by both heads of its group
    number = every.labels.index(Edge.parse("embed>L1.kv1.k"))
    behind = {str(every.labels[leave]) for leave in reach.leaves[number] or ()}
    assert behind == {"L1.h2>L1.mlp", "L1.h3>L1.mlp", "L1.h2>logits", "L1.h3>logits"}
    assert reach.leaves[every.labels.index(Edge.parse("L1.h2>logits"))] is None
    assert reach_of(edges(model, destinations=["logits"])) is None and reach_of(nodes(model)) is None


def test_what_cannot_be_asked_is_refused():
    parts, some = nodes(model_of("gpt2")), examples(2)
    fallback = parts.fallback("resample")
    with pytest.raises(PatchclampError, match="above 0"):
        acdc(parts, some, fallback, 0.0)
    with pytest.raises(PatchclampError, match="no order 'sideways'"):
        acdc(parts, some, fallback, 0.1, orders=[("sideways", 0)])
    with pytest.raises(PatchclampError, match="at least one"):
        acdc(parts, some, fallback, 0.1, orders=[])
    items = tuple(type(item)(**{**vars(item), "corrupt": item.clean}) for item in some)
    still = type(some)(items, some.tokenizer, "still")
    for objective in ("kl", "logit_diff"):
        with pytest.raises(MetricError, match=r"nothing to keep|no behaviour"):
            acdc(parts, still, fallback, objective=objective)
        with pytest.raises(MetricError, match=r"nothing to keep|no behaviour"):
            acdc(parts, still, fallback, 0.1, objective=objective)


@pytest.mark.long
def test_the_shipped_model_for_a_fifth_of_the_blocks_of_one_run_per_edge():
    """All 1519 edges in two orders. Blocks that ran are counted, those of runs that were thrown away among them."""
    model = Model.load("zoo/small")
    parts = edges(model)
    split = load_task("gendered_pronoun").split(model.tokenizer, 16, seed=0)
    fallback = parts.fallback("resample")
    found = acdc(parts, split.select, fallback, orders=[("backward", 0), ("random", 0)])
    assert found.naive == 2 * 1519 * 4
    assert found.blocks is not None and found.blocks <= found.naive / 5
    assert all(0 < len(circuit) < 1519 / 10 for circuit in found.orders)
    removed = found.trace.filter(found.trace["removed"])["growth"].drop_nulls()
    assert (removed < found.threshold).all() and found.loss[0] < 0.5 * found.ends[1]
    # what is left keeps a good part of the behaviour on pairs that chose nothing, which as many random edges do not
    gates = torch.cat(
        [parts.open(), parts.closed(), parts.only(list(found.circuit)), parts.only(parts.labels[:: 1519 // len(found.circuit)])]
    )
    opened, closed, kept, random = parts.measure(split.confirm.batch(), gates, fallback).mean(1).tolist()
    assert (kept - closed) / (opened - closed) > 0.3 > abs(random - closed) / (opened - closed)
