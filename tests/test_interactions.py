"""Interactions and what is read off them, against closed forms, hooks of the tests' own, and by hand."""

from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from cases import tiny
from patchclamp.dependence import (
    Closings,
    Dependence,
    changed_roles,
    close_pairs,
    conditional_roles,
    interaction_table,
    interactions,
    named,
    relations,
)
from patchclamp.errors import GateError, NumericsError, PatchclampError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Nodes, edges, nodes, tied
from patchclamp.scores import Scores
from patchclamp.tasks import Examples
from patchclamp.zoo import wired, wired_names
from patchclamp.zoo._wired import Wired
from test_frozen_norm import by_hand
from test_parts import examples


@cache
def built(name: str, family: str = "gpt2") -> tuple[Wired, Nodes, Examples]:
    one = wired(name, family)
    return one, nodes(Model.load(one.hf, tokenizer=one.tokenizer)), one.task.examples(one.tokenizer, 24, seed=3)


@cache
def closings(name: str, family: str, fallback: str, frozen_norm: bool = False) -> Closings:
    one, parts, some = built(name, family)
    rule = parts.fallback(fallback, fit=one.task.examples(one.tokenizer, 48, seed=4))
    return close_pairs(parts, some, rule, frozen_norm=frozen_norm)


def closed_form(one: Wired, some: Examples, fallback: str, example: int) -> np.ndarray:
    """I of every pair, from the plain numpy forward pass of the wiring."""
    item = some[example]
    right, wrong = item.answers[0][0], item.wrong[0][0]

    def benefit(*shut: str) -> float:
        logits = one.logits(item.clean, dict.fromkeys(shut, 0.0), item.corrupt if fallback == "resample" else None)[-1]
        return float(logits[right] - logits[wrong])

    labels = one.wiring.labels
    alone = {label: benefit(label) for label in labels}
    return np.array([benefit() - alone[i] - alone[j] + benefit(i, j) for i, j in combinations(labels, 2)])


RELATIONS = {
    "redundant": ("L0.h1", "L1.h2", "OR", "redundancy"),
    "or": ("L0.h0", "L0.h3", "OR", "redundancy"),
    "backup": ("L0.h1", "L1.h2", "OR", "redundancy"),  # that it is a backup shows in what it writes: test_self_repair
    "and": ("L0.h1", "L0.h2", "AND", ""),
    "induction": ("L0.h1", "L1.h2", "AND", ""),
    "suppressor": ("L0.h1", "L1.h3", "OR", "suppression"),
    "interfering": ("L0.h1", "L1.h3", "none", ""),
}


CASES = [
    pytest.param(name, family, marks=() if family == "gpt2" and name in RELATIONS else pytest.mark.long)
    for family in ("gpt2", "llama")
    for name in wired_names()
]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_interactions_are_the_closed_form(name: str, family: str) -> None:
    """To 1e-5; in Llama relative to the logits (A = 6.5 and 8), for its norms compute in float32: 1e-4. Frozen or not: wired norms
    divide by one number up to 1e-7."""
    one, _, some = built(name, family)
    near = 1e-5 if family == "gpt2" else 1e-4
    for fallback, frozen in (("resample", False), ("zero", True)):
        truth = closed_form(one, some, fallback, 5)
        assert np.abs(closings(name, family, fallback, frozen).interaction[:, 5] - truth).max() < near, fallback


def first(name: str) -> str:
    """A corrupt prompt of another word closes an AND for this word and opens one for the other: in a logit difference the two
    add up to no interaction. So an AND is looked at under means."""
    return "mean" if name in ("and", "induction") else "resample"


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", list(RELATIONS))
def test_planted_relations_are_recovered_by_name_and_sign(name: str, family: str) -> None:
    a, b, word, relation = RELATIONS[name]
    table = relations(closings(name, family, first(name)), closings(name, family, "zero"))
    row = table.pair(a, b)
    assert (row["word"], row["relation"]) == (word, relation)
    sign = {"AND": 1, "OR": -1, "none": 0}[word]
    for column in ("score", "other"):
        assert np.sign(np.round(row[column], 3)) == sign
        if sign:
            low, high = (row[f"{end}" if column == "score" else f"other_{end}"] for end in ("low", "high"))
            assert min(sign * low, sign * high) > 1
    working = {label for label, role in built(name, family)[0].truth.roles.items() if role != "irrelevant"}
    for row in table.table.iter_rows(named=True):  # parts that do nothing are in no relation
        if not {row["a"], row["b"]} <= working:
            assert (row["word"], row["relation"]) == ("none", ""), row
    assert named(table, word).height >= 1


def test_what_reads_a_redundant_pair_needs_it() -> None:
    """The MLP that reads the votes: either head and it are no AND (the other head still votes), closing both heads silences it."""
    table = relations(closings("redundant", "gpt2", "resample"), closings("redundant", "gpt2", "zero"))
    assert table.pair("L0.h1", "L1.mlp")["word"] == "none"
    both = relations(closings("and", "gpt2", "mean"), closings("and", "gpt2", "zero"))
    assert both.pair("L0.h1", "L1.mlp")["word"] == "AND"


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_neox", "mistral"])
def test_pairs_are_runs_with_hooks_of_the_tests_own(name: str, frozen: bool) -> None:
    """All pairs, against every setting run alone and in full."""
    parts, some = nodes(Model.load(tiny(name))), examples(6, lengths=(7, 5))
    batch, rule = some.batch(), parts.fallback("resample")
    found = close_pairs(parts, some, rule, frozen_norm=frozen, batch_size=4)
    labels = [parts.labels[number] for number in parts.counted]
    chosen = [[], *([label] for label in labels), *map(list, combinations(labels, 2))]
    gates = torch.cat([parts.without(sites) for sites in chosen])
    with torch.no_grad():
        alone = [parts.model.target_logits(batch, parts.edits(one[None], rule, batch)) for one in gates]
    logits = by_hand(parts, batch, gates, rule) if frozen else torch.cat(alone)
    truth, n = METRICS["logit_diff"](logits, batch).numpy(), len(labels)
    index = {pair: row for row, pair in enumerate(combinations(range(n), 2))}
    expected = [truth[0] - truth[1 + i] - truth[1 + j] + truth[1 + n + index[i, j]] for i, j in found.pairs]
    np.testing.assert_allclose(found.interaction, expected, atol=2e-5)  # of four numbers, each to 1e-5 or better
    assert np.abs(found.interaction).max() > 0.01


def test_a_held_norm_leaves_no_interaction_between_parts_that_only_add_up() -> None:
    """Heads and MLP of the last block in a parallel model (gpt_neox) meet in nothing but the final norm."""
    parts, some = nodes(Model.load(tiny("gpt_neox"))), examples(6)
    pairs = [("L1.h0", "L1.h2"), ("L1.h1", "L1.mlp")]
    rule = parts.fallback("resample")
    free, frozen = (interactions(parts, some, rule, pairs=pairs, frozen_norm=held) for held in (False, True))
    assert (free.table["score"].abs() > 1e-3).all() and (frozen.table["score"].abs() < 1e-5).all()
    assert (free.about["norm"], frozen.about["norm"]) == ("free", "frozen")


def test_the_norm_can_be_held_under_tied_parts() -> None:
    """A group of one site is that site."""
    model, some = Model.load(tiny("gpt_neox")), examples(4)
    plain, groups = nodes(model), tied(model, ["L1.h0", "L1.h2"])
    found = [close_pairs(parts, some, parts.fallback("resample"), pairs=[("L1.h0", "L1.h2")], frozen_norm=True)
             for parts in (plain, groups)]  # fmt: skip
    np.testing.assert_allclose(found[0].interaction, found[1].interaction, atol=1e-6)
    np.testing.assert_allclose(found[0].together, found[1].together, atol=1e-6)


def test_intervals_are_those_of_scores() -> None:
    """What a table of pairs says of its samples is what a table of parts says of the same samples."""
    found = closings("suppressor", "gpt2", "resample")
    draw = np.random.default_rng(0).normal(size=(10, 24))
    pairs = list(found.pairs[:10])
    table = Dependence.from_samples(found.parts, pairs, draw, {}, found.groups, seed=3).table
    scores = Scores.from_samples(found.parts, draw, {}, found.groups, seed=3).table
    for name in ("score", "low", "high", "p", "q"):
        assert table[name].equals(scores[name]), name
    with pytest.raises(NumericsError, match="on example 2"):
        Dependence.from_samples(found.parts, pairs, np.where(np.arange(24) == 2, np.nan, draw), {})
    alone = Dependence.from_samples(found.parts, pairs, draw[:, :1], {}).table
    assert alone["q"].null_count() == 10 and alone["low"].null_count() == 10


def test_metrics_that_are_less_when_better_are_turned() -> None:
    _, parts, some = built("and")
    rule = parts.fallback("zero")
    table = interactions(parts, some, rule, metric="nll", pairs=[("L0.h1", "L0.h2")])
    assert table.table["score"][0] > 0 and table.table["effect_a"][0] > 0


def made(effects: list[float], both: float, groups: int = 20, noise: float = 0.0) -> Closings:
    """Two parts whose effects scatter a little over 20 examples."""
    labels = tuple(nodes(Model.load(tiny("gpt2"))).labels[1:3])
    draw = np.random.default_rng(0)
    opened = 5 + draw.normal(size=groups)
    scatter = 0.001 * draw.normal(size=(3, groups))
    alone = opened - np.array(effects)[:, None] - scatter[:2]
    names = tuple(str(number) for number in range(groups))
    about = {"metric": "logit_diff", "fallback": "mean", "n": groups}
    return Closings(labels, ((0, 1),), opened, alone, opened[None] - both - scatter[2:], names, noise, about)


def second(closings: Closings) -> Closings:
    return Closings(**{**vars(closings), "about": {**closings.about, "fallback": "zero"}})


@pytest.mark.parametrize(
    ("effects", "both", "word", "relation"),
    [
        ([2.0, 2.0], 2.0, "AND", ""),
        ([1.0, 1.0], 4.0, "OR", ""),
        ([0.0, 0.0], 3.0, "OR", "redundancy"),
        ([1.0, 2.0], 3.0, "none", ""),
        ([3.0, -2.0], 3.0, "OR", "suppression"),
        ([3.0, -2.0], 1.0, "none", ""),
    ],
)
def test_definitions_on_numbers_by_hand(effects: list[float], both: float, word: str, relation: str) -> None:
    one = made(effects, both)
    row = relations(one, second(one)).table.row(0, named=True)
    assert (row["word"], row["relation"]) == (word, relation)
    assert row["score"] == pytest.approx(sum(effects) - both, abs=0.01)


def test_a_sign_must_hold_under_both_fallbacks_and_over_enough_groups() -> None:
    and_, or_ = made([2.0, 2.0], 2.0), second(made([1.0, 1.0], 4.0))
    assert relations(and_, or_).table["word"][0] == "undecided"
    few = made([2.0, 2.0], 2.0, groups=4)  # the smallest p of four groups is 1/8
    assert relations(few, second(few)).table["word"][0] == "undecided"
    loud = made([2.0, 2.0], 2.0, noise=3.0)
    assert relations(loud, second(loud)).table["word"][0] == "undecided"
    with pytest.raises(PatchclampError, match="a relation needs two"):
        relations(and_, and_)
    with pytest.raises(PatchclampError, match="the same pairs"):
        relations(closings("and", "gpt2", "resample"), or_)
    with pytest.raises(PatchclampError, match="1 table was given: give two"):
        relations(and_, second(and_), repair=[interaction_table(and_)])


def test_conditional_roles_and_which_change() -> None:
    """Closing the speaker makes the suppressor idle; closing one of two redundant heads makes the other work."""
    table = conditional_roles(closings("suppressor", "gpt2", "resample"))
    assert table.directed
    row = table.pair("L0.h1", "L1.h3")
    assert (row["open_role"], row["role"], row["changes"]) == ("interfering", "nothing", True)
    assert row["score"] == pytest.approx(0, abs=1e-5) and row["open"] == pytest.approx(-10, abs=1e-4)
    redundant = conditional_roles(closings("redundant", "gpt2", "zero"))
    for a, b in (("L0.h1", "L1.h2"), ("L1.h2", "L0.h1")):
        row = redundant.pair(a, b)
        assert row["role"] == "facilitating" and row["changes"], row
    large = changed_roles(redundant, at_least=0.01)  # wired norms couple everything by 1e-7
    assert set(map(tuple, large.select("a", "b").rows())) == {
        ("L0.h1", "L1.h2"), ("L1.h2", "L0.h1"),
    }  # fmt: skip
    found = closings("suppressor", "gpt2", "resample")
    index = {(str(found.parts[i]), str(found.parts[j])): row for row, (i, j) in enumerate(found.pairs)}
    pair = index["L0.h1", "L1.h3"]
    assert table.pair("L1.h3", "L0.h1")["score"] == pytest.approx((found.alone[found.second[pair]] - found.both[pair]).mean())


def test_pairs_may_be_named_and_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, parts, some = built("and")
    rule = parts.fallback("zero")
    one = interactions(parts, some, rule, pairs=[("L0.h2", "L0.h1"), ("L0.h1", "L0.h2")])
    assert one.table.select("a", "b").rows() == [("L0.h1", "L0.h2")]
    every = interaction_table(closings("and", "gpt2", "zero")).pair("L0.h1", "L0.h2")
    assert one.table["score"][0] == pytest.approx(every["score"], abs=1e-6)
    assert one.about["n"] == 24 and one.about["fallback"] == "zero"
    assert Dependence.load(one.save(tmp_path / "pairs.parquet")).table.equals(one.table)
    with pytest.raises(GateError, match=r"L9\.h9 is not among the 10 parts"):
        interactions(parts, some, rule, pairs=[("L0.h1", "L9.h9")])
    with pytest.raises(GateError, match="given twice"):
        interactions(parts, some, rule, pairs=[("L0.h1", "L0.h1")])
    monkeypatch.setattr("patchclamp.dependence.closings.MOST", 9)
    with pytest.raises(PatchclampError, match="all pairs of 10 parts are 45: use screen"):
        interactions(parts, some, rule)
    with pytest.raises(GateError, match="not under Edges"):
        arrows = edges(parts.model)
        close_pairs(arrows, some, arrows.fallback("zero"), pairs=[], frozen_norm=True)


def test_pairs_of_edges() -> None:
    """What is measured knows nothing of kinds of parts."""
    _, parts, some = built("and")
    arrows = edges(parts.model)
    rule = arrows.fallback("zero")
    table = interactions(
        arrows, some.take(range(14)), rule, pairs=[("L0.h1>L1.mlp", "L0.h2>L1.mlp"), ("L0.h0>L1.mlp", "L0.h2>L1.mlp")]
    )
    assert table.pair("L0.h1>L1.mlp", "L0.h2>L1.mlp")["score"] == pytest.approx(6.5, abs=1e-4)
    assert table.pair("L0.h0>L1.mlp", "L0.h2>L1.mlp")["score"] == pytest.approx(0, abs=1e-4)


def test_records_are_plain() -> None:
    record = closings("and", "gpt2", "zero").to_record()
    assert record["pairs"].height == 45 and record["both"].shape == (45, 24) and isinstance(record["pairs"], pl.DataFrame)
