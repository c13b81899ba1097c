"""Roles: hand-wired truth, held-out judgement, nulls, redundancy, the toggle check."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from patchclamp.gating import GatingSettings, Roles, Stage, fit, gating_settings, judge, roles, toggle
from patchclamp.gating.judge import calls
from patchclamp.gating.nulls import reinitialised, twin_of
from patchclamp.gating.table import COLUMNS
from patchclamp.gating.toggle import ORDERS
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.store.codec import decode, encode
from patchclamp.tasks import load_task
from patchclamp.tasks._split import Split
from patchclamp.zoo import wired, wired_names

SMALL = gating_settings("default", seeds=3, batch=12, null_batch=12, null_seeds=1, refits=6)
QUICK = replace(SMALL, seeds=1, refits=0, free=Stage(3, 1.0, 0.1), pressed=Stage(3, 0.7, 0.1), settle=False)
CASES = [("gpt2", name) for name in wired_names()] + [("llama", "redundant"), ("llama", "interfering")]


@cache
def built(family: str, name: str):
    """A wired model in single precision, and its sets of prompts."""
    one = wired(name, family)
    model = Model.load(one.hf.float(), tokenizer=one.tokenizer)
    return one.truth, model, one.task.split(one.tokenizer, 96, 0)


@cache
def found(name: str) -> Roles:
    _, model, split = built("gpt2", name)
    parts = nodes(model)
    return roles(parts, split.fit, split.select, parts.fallback("resample"), SMALL)


def called(result: Roles, site: str) -> dict:
    return result.table.row(by_predicate=pl.col("site") == site, named=True)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_known_roles_are_found_in_every_seed(family: str, name: str) -> None:
    truth, model, split = built(family, name)
    parts = nodes(model)
    gated = fit(parts, split.fit, parts.fallback("resample"), SMALL)
    said = calls(gated)
    either = frozenset().union(*truth.alternatives)
    for number, site in enumerate(gated.labels):
        if str(site) not in either:
            assert getattr(said, truth.roles[str(site)])[:, number].all(), (
                site,
                gated.gate_plus[:, number],
                gated.gate_minus[:, number],
            )
    for alternatives in truth.alternatives:  # of a redundant pair or an OR, exactly one is kept
        places = [number for number, site in enumerate(gated.labels) if str(site) in alternatives]
        assert (said.facilitating[:, places].sum(1) == 1).all()
        assert said.irrelevant[:, places].sum() == 3


@pytest.mark.long
def test_roles_stand_on_a_model_with_a_helper_and_an_opponent() -> None:
    result = found("interfering")
    truth = built("gpt2", "interfering")[0]
    assert dict(zip(result.table["site"], result.table["role"], strict=True)) == truth.roles
    helper, opponent = called(result, "L0.h1"), called(result, "L1.h3")
    assert helper["held_out"] and helper["beats_null"] and helper["agrees"] and helper["every_seed"] == "facilitating"
    assert opponent["interference"] > 0.9 and opponent["worth"] > 0.02 > -0.02 > opponent["gated_exact"]
    assert called(result, "L0.mlp")["note"].startswith("irrelevant while the others are open")
    assert set(result.table.columns) >= set(COLUMNS)
    assert (result.table["gate_plus_low"] <= result.table["gate_plus"]).all()


@pytest.mark.parametrize(("name", "pair"), [("redundant", ("L0.h1", "L1.h2")), ("or", ("L0.h0", "L0.h3"))])
def test_parts_that_stand_in_for_each_other_are_redundant(name: str, pair: tuple[str, str]) -> None:
    result = found(name)
    kept = {site for site in pair if "facilitating" in called(result, site)["any_seed"]}
    assert kept
    for site in kept:
        assert called(result, site)["gated_exact"] == pytest.approx(0, abs=1e-3)
    if len(kept) == 2:
        for site, other in (pair, pair[::-1]):
            row = called(result, site)
            assert row["role"] == "redundant" and row["redundant_with"] == other and other in row["note"]
    # what reads the pair is no part of it
    reader = called(result, "L1.mlp")
    assert reader["role"] == "facilitating" and not reader["redundant_with"]
    assert called(result, "L0.h2")["role"] == "irrelevant"


def test_worth_and_exact_are_what_closing_by_hand_gives() -> None:
    _, model, split = built("gpt2", "interfering")
    parts, held = nodes(model), split.select.take(range(16))
    fallback = parts.fallback("resample")
    gated = fit(parts, split.fit, fallback, replace(SMALL, seeds=1))
    evidence = judge(parts, gated, held, fallback)

    def benefit(gates: np.ndarray, part: int, value: float) -> float:
        every = parts.open()
        every[0, 0, 0, 1:] = torch.from_numpy(gates).float()
        every[0, 0, 0, 1 + part] = value
        return float(parts.measure(held.batch(), every, fallback, METRICS["log_probability"]).mean())

    ones = np.ones(len(gated.labels))
    helper, opponent = (next(i for i, site in enumerate(gated.labels) if str(site) == name) for name in ("L0.h1", "L1.h3"))
    plus, minus = gated.gate_plus[0], gated.gate_minus[0]
    assert evidence.facilitating.worth[0, helper] == pytest.approx(
        benefit(minus, helper, minus[helper]) - benefit(minus, helper, 0), abs=1e-5
    )
    assert evidence.interfering.worth[0, opponent] == pytest.approx(
        benefit(plus, opponent, plus[opponent]) - benefit(plus, opponent, 1), abs=1e-5
    )
    assert evidence.exact.values()[helper] == pytest.approx(benefit(ones, helper, 1) - benefit(ones, helper, 0), abs=1e-5)
    assert evidence.facilitating.worth[0, opponent] == 0


def test_a_role_needs_every_safeguard() -> None:
    _, model, split = built("gpt2", "interfering")
    parts = nodes(model)
    fallback = parts.fallback("resample")
    without = roles(parts, split.fit, split.select, fallback, replace(SMALL, seeds=1, null_seeds=0, refits=0))
    assert called(without, "L0.h1")["role"] == "undecided" and "no null was fitted" in called(without, "L0.h1")["note"]
    assert without.nulls == () and "no null was fitted" in without.warnings[0]
    few = roles(parts, split.fit, split.select.take(range(3)), fallback, replace(SMALL, seeds=1, refits=0))
    assert "undecided" in called(few, "L0.h1")["role"] and "clearly, is needed" in called(few, "L0.h1")["note"]


def test_zero_is_marked_off_distribution_and_plain_text_has_one_null() -> None:
    _, model, split = built("gpt2", "induction")
    parts = nodes(model)
    result = roles(parts, split.fit.take(range(12)), split.select.take(range(8)), parts.fallback("zero"), QUICK)
    assert result.about["off_distribution"] and "off-distribution" in result.warnings[-1]
    texts = load_task([{"text": example.pair.clean} for example in split.fit][:12]).examples(model.tokenizer)
    result = roles(parts, texts, texts, parts.fallback("mean", texts), QUICK)
    assert [null.name for null in result.nulls] == [
        "re-initialised weights"
    ] and "no null of shuffled answers" in result.warnings[0]


def test_toggles_begin_open_and_end_closed() -> None:
    _, model, split = built("gpt2", "interfering")
    parts = nodes(model)
    fallback = parts.fallback("resample")
    result = found("interfering")
    frame, held = result.toggles, split.select
    ends = parts.measure(held.batch(), torch.cat([parts.open(), parts.closed()]), fallback, METRICS["log_probability"]).mean(1)
    for order in ORDERS:
        curve = frame.filter(pl.col("order") == order)
        assert curve["k"].to_list() == list(range(11))
        assert curve["value"][0] == pytest.approx(float(ends[0]), abs=1e-5)
        assert curve["value"][-1] == pytest.approx(float(ends[1]), abs=1e-5)
    step = {order: frame.filter((pl.col("order") == order) & (pl.col("k") <= 1))["value"].diff()[1] for order in ORDERS}
    assert step["facilitation"] < -1 and abs(step["irrelevance"]) < 1e-4 and step["interference"] > 0.05
    assert len(toggle(parts, result.gated, held, fallback, points=4)) == 3 * 4


def test_reinitialised_weights_are_drawn_at_the_scale_of_the_old() -> None:
    model = built("llama", "interfering")[1]
    before = {name: weight.clone() for name, weight in model.hf.state_dict().items()}
    twin = reinitialised(model, 0)
    drawn = twin.hf.state_dict()
    for name, weight in model.hf.state_dict().items():
        assert torch.equal(weight, before[name])
        assert float(weight.std()) == pytest.approx(float(drawn[name].std()), rel=0.2, abs=1e-6)
        assert weight.std() < 1e-6 or not torch.equal(weight, drawn[name])
    again = reinitialised(model, 0).hf.state_dict()
    assert all(torch.equal(again[name], drawn[name]) for name in drawn)
    assert twin.tokenizer is model.tokenizer and twin.anatomy.hf is not model.anatomy.hf


def test_a_nulls_logits_are_no_wider_than_the_models() -> None:
    """Hand-wired weights drawn anew give logits thousands wide, in which one part is worth hundreds of nats."""
    _, model, split = built("gpt2", "or")
    batch, wild = split.fit.batch(), reinitialised(model, 0)
    widths = [model.target_logits(batch)[0].detach().std(-1).mean() for model in (model, wild)]
    twin, shrunk = twin_of(model, split.fit, 0)
    assert shrunk == pytest.approx(float(widths[1] / widths[0]), rel=1e-4) and shrunk > 100
    assert torch.allclose(twin.target_logits(batch)[0] * shrunk, wild.target_logits(batch)[0], rtol=1e-3, atol=1e-1)
    assert torch.equal(twin.hf.transformer.wte.weight, wild.hf.transformer.wte.weight)
    assert any("times as wide as the model's" in warning for warning in found("or").warnings)
    for null in found("or").nulls:
        assert null.bar_facilitating < 20  # 441 nats before
    _, shrunk = twin_of(wild, split.fit, 1)
    assert shrunk < 2


def test_results_are_kept_without_loss() -> None:
    result = found("interfering")
    again = decode(encode(result))
    assert again.table.equals(result.table) and again.gated.settings == result.gated.settings and again.nulls == result.nulls
    assert set(decode(encode(result.to_record()))) == set(result.to_record())
    assert set(result.about["seconds"]) == {"fit", "judge", "nulls", "lambda", "substitutes", "toggle"}


def pronouns(shared: Path) -> tuple[Model, Split]:
    model = Model.load(shared / "models/stories260k-llama")
    task = load_task(shared / "data/story-behaviours/stories260k-pronoun.jsonl")
    return model, task.split(model.tokenizer, None, 0)


def test_one_sided_pronouns_are_read_in_both_directions(shared: Path) -> None:
    model, split = pronouns(shared)
    parts = nodes(model)
    girls = split.fit.take(i for i, example in enumerate(split.fit) if example.pair.answer == (" She",))
    gated = fit(parts, girls, parts.fallback("resample"), QUICK)
    assert gated.about["mirrored"] and "have the same answer: every pair was also read" in gated.warnings[0]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["shuffled answers", "re-initialised weights"])
def test_nulls_get_no_roles(shared: Path, kind: str) -> None:
    """Data in which there is nothing to find, judged with nulls of their own beside them."""
    from patchclamp.gating.nulls import on_reinitialised

    model, split = pronouns(shared)
    parts = nodes(model)
    fit_on, select, fallback = split.fit, split.select, parts.fallback("resample")
    if kind == "shuffled answers":
        fit_on, select = fit_on.shuffled_answers(50), select.shuffled_answers(70)
    else:
        parts, fallback = on_reinitialised(parts, fit_on, fallback, 50)
    result = roles(parts, fit_on, select, fallback, GatingSettings(seed=100, refits=0))
    raw = calls(result.gated)
    assert (raw.facilitating | raw.interfering).any(0).mean() > 0.3  # what gates alone would say in some seed
    assert result.table["role"].is_in(["facilitating", "interfering"]).mean() <= 0.05
