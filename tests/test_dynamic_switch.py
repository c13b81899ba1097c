"""Dynamic gates on a hand-wired model with a head for each kind of prompt: the condition is found, and judged."""

import random
import re
from collections.abc import Iterator
from functools import cache

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from patchclamp.errors import GateError
from patchclamp.gating.dynamic import (
    Dynamic,
    DynamicSettings,
    Judged,
    best_strength,
    dynamic_roles,
    fit_dynamic,
    inputs_of,
    judge_dynamic,
    probe,
    switching,
)
from patchclamp.gating.dynamic.judge import lower_hull
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.tasks import Pair, Task
from patchclamp.zoo import wired
from patchclamp.zoo._designs import CONCEPTS, A


@cache
def switch():
    one = wired("switch")
    model = Model.load(one.hf.float(), tokenizer=one.tokenizer)
    return one, nodes(model), one.task.split(one.tokenizer, 96, 0)


@pytest.mark.parametrize(
    ("relaxation", "updates"),
    [("sigmoid", 40), pytest.param("relaxed", 40, marks=pytest.mark.long), pytest.param("straight", 60, marks=pytest.mark.long)],
)
def test_the_switching_heads_are_found_on_unseen_prompts(relaxation: str, updates: int) -> None:
    """Of two seeds, that whose objective is lower on the prompts of the fit; straight-through gates take longer."""
    one, parts, split = switch()
    settings = DynamicSettings(
        site="L1.resid.pre",
        prices=(0.1,),
        seeds=2,
        updates=updates,
        batch=12,
        redraws=1,
        relaxation=relaxation,  # type: ignore[arg-type]
    )
    fallback = parts.fallback("resample")
    found = fit_dynamic(parts, split.fit, fallback, settings)
    known = judge_dynamic(parts, found, split.fit, fallback).table
    best = {moves: min(found.pick(moves), key=lambda row: known["d"][row] + 0.1 * known["open"][row]) for moves in (False, True)}
    looks = np.array([one.truth.cue(example.pair.clean) == "look" for example in split.select])
    soft = found.controller(best[True]).soft().driven(parts.model, split.select.batch())[:, 0]
    gate = dict(zip(map(str, found.labels), soft.T.numpy(), strict=True))
    assert roc_auc_score(looks, gate["L1.h1"]) >= 0.99
    assert roc_auc_score(~looks, gate["L1.h2"]) >= 0.99
    assert gate["L1.mlp"].min() > 0.5
    static = found.controller(best[False]).driven(parts.model, split.select.batch())
    kept = {str(site) for site, gate in zip(found.labels, static[0, 0], strict=True) if gate}
    assert kept == {"L1.h1", "L1.h2", "L1.mlp"}, "without looking, both heads are needed"


@cache
def fitted() -> Dynamic:
    _, parts, split = switch()
    settings = DynamicSettings(site="L1.resid.pre", prices=(0.05, 0.3), seeds=2, updates=40, batch=12, redraws=2)
    return fit_dynamic(parts, split.fit, parts.fallback("resample"), settings)


@cache
def judged() -> Judged:
    _, parts, split = switch()
    return judge_dynamic(parts, fitted(), split.select, parts.fallback("resample"))


@pytest.mark.long
def test_moving_gates_explain_more_than_static_ones_with_as_many_open() -> None:
    table, advantage = judged().table.filter(pl.col("strength") < 0.4), judged().advantage
    assert judged().table.height == 12, "static gates are fitted at 3 and 10 times the highest price too"
    assert table.filter(pl.col("moves"))["open"].to_list() == [2.0] * 4
    assert table.filter(~pl.col("moves"))["open"].to_list() == [3.0] * 4
    assert table["d"].max() < 1e-3 and table["worst_d"].max() < 1e-3 and table["right"].min() == 1
    # between all closed and three open, static gates mix: a third of the prompts' D at two of three gates
    third = judged().closed.mean() / 3
    assert advantage["static_d"].to_list() == pytest.approx([third] * 2, rel=1e-3)
    assert advantage["low"].min() > 2 and (advantage["difference"] - advantage["static_d"]).abs().max() < 1e-3


def test_the_static_frontier_is_the_lower_hull() -> None:
    x, y = np.array([0.0, 1.0, 2.0, 3.0, 2.0, 4.0]), np.array([4.0, 3.5, 1.0, 0.9, 2.0, 0.0])
    assert [int(i) for i in lower_hull(x, y)] == [0, 2, 5]
    draws = np.random.default_rng(0)
    for _ in range(20):
        x, y = draws.integers(0, 6, 9).astype(float), draws.random(9)
        hull = lower_hull(x, y)
        inside = np.interp(x, x[hull], y[hull])
        assert (inside <= y + 1e-12).all()
        from scipy.spatial import ConvexHull

        corners = set(ConvexHull(np.stack([x, y], 1)).vertices.tolist())
        assert {(x[i], y[i]) for i in hull} <= {(x[i], y[i]) for i in corners}


def test_what_switches_is_told_by_the_cue_and_stands_when_one_intervenes() -> None:
    one, parts, split = switch()
    named = {"cue": lambda example: one.truth.cue(example.pair.clean)}
    found = switching(
        parts, fitted(), best_strength(judged()), split.fit, split.select, split.confirm, parts.fallback("resample"), named=named
    )
    rows = {row["site"]: row for row in found.table.iter_rows(named=True)}
    roles = {site: row["role"] for site, row in rows.items()}
    assert {site for site, role in roles.items() if role == "switches"} == {"L1.h1", "L1.h2"}
    assert {site for site, role in roles.items() if role == "open"} == {"L1.mlp"}
    assert set(roles.values()) == {"switches", "open", "closed"}
    for site, cue, other in (("L1.h1", "look", "listen"), ("L1.h2", "listen", "look")):
        row = rows[site]
        assert row["auroc"] >= 0.99 and row["verified"] and row["seeds"] == 2
        assert found.probes[site]["cue"] >= 0.99
        assert found.probes[site]["pieces"] >= 0.99, "what words are made of tells it too"
        assert found.probes[site]["words"] > 0.85, "and so do whole words, as far as the fit has seen them"
        assert 0.2 < found.probes[site]["last word"] < 0.8, "the last word is a filler"
        assert all(f"{cue}-" in text for text in row["open_inputs"]) and all(f"{other}-" in text for text in row["closed_inputs"])
        assert row["n_open"] + row["n_closed"] == len(split.confirm)
        log_p = one.truth.by_cue[cue]["resample"][site]  # of the right answer, up to what the normaliser takes
        assert 0.4 * log_p < row["cost_open_low"] <= row["cost_open"] <= log_p and abs(row["cost_closed"]) < 1e-5
    assert any(text.startswith("L1.h1 switches") and "open on" in text for text in found.sentences())
    assert found.gates.shape == (10, len(split.select))


def test_a_probe_names_what_tells_and_says_nothing_of_noise() -> None:
    one, _, split = switch()
    fit, held = inputs_of(split.fit, False), inputs_of(split.select, False)
    look = [np.array(["look-" in name for name in inputs.names]) for inputs in (fit, held)]
    told = probe(fit, look[0], held, look[1])
    assert told.feature == "pieces" and told.auroc >= 0.99 and told.low > 0.9
    assert told.on[0] == "look" and told.off[0] == "listen"
    noise = np.random.default_rng(0)
    blind = probe(fit, noise.random(len(fit)) < 0.5, held, noise.random(len(held)) < 0.5)
    assert blind.low < 0.5 < blind.high or blind.auroc < 0.75
    assert probe(fit, np.ones(len(fit), bool), held, look[1]).feature == ""
    tokens = inputs_of(split.select.take([0, 1]), True)
    assert len(tokens) == sum(len(example.clean) for example in split.select.take([0, 1]))
    assert tokens.values["position"][:3] == ("0", "1", "2") and one.truth.cue(split.select[0].pair.clean)


def test_a_learned_price_meets_the_wanted_number_of_open_gates() -> None:
    _, parts, split = switch()
    settings = DynamicSettings(site="L1.resid.pre", prices=(), target_open=(2.0,), seeds=1, updates=80, batch=12, redraws=0)
    found = fit_dynamic(parts, split.fit, parts.fallback("resample"), settings)
    opened = found.controller(1).soft().driven(parts.model, split.select.batch()).sum(-1).mean()
    assert float(opened) == pytest.approx(2.0, abs=0.3)
    assert found.strength.tolist() == [2.0, 2.0]


def two_words(rng: random.Random, tokenizer: object) -> Iterator[Pair]:
    """The wired prompts of `phases` with both words as the answer, and no wrong one."""
    one = wired("phases")
    for example in one.tasks["prompt"].examples(one.tokenizer, 200, seed=rng.randrange(1000)):
        clean, corrupt = example.pair.clean, str(example.pair.corrupt)
        word = re.findall(r"note-(\w+)", clean)[0]
        other = rng.choice([name for name in CONCEPTS if name not in (word, *example.pair.answer)])
        yield Pair(clean, (f"{example.pair.answer[0]} {word}",), corrupt.replace(f"note-{word}", f"note-{other}"))


@cache
def phased():
    one = wired("phases")
    model = Model.load(one.hf.float(), tokenizer=one.tokenizer)
    task = Task("two-words", "two cues, two words", two_words, metric="log_probability")
    return nodes(model), task.split(one.tokenizer, 96, 0)


def test_a_phase_switch_is_found_with_its_condition() -> None:
    """One head is needed on the prompt only, one on what was generated only, an MLP in both; unseen prompts."""
    parts, split = phased()
    fallback = parts.fallback("resample")
    settings = DynamicSettings(scope="phase", prices=(0.1,), seeds=2, updates=40, batch=12, redraws=1)
    found = fit_dynamic(parts, split.fit, fallback, settings)
    told = switching(parts, found, 0.1, split.fit, split.select, split.confirm, fallback)
    assert told.inputs.values["phase"] == ("prompt", "generation") * len(split.select)
    rows = {row["site"]: row for row in told.table.iter_rows(named=True)}
    assert {site for site, row in rows.items() if row["role"] == "switches"} == {"L1.h1", "L1.h2"}
    assert {site for site, row in rows.items() if row["role"] == "open"} == {"L1.mlp"}
    for site, on, off in (("L1.h1", "prompt", "generation"), ("L1.h2", "generation", "prompt")):
        row = rows[site]
        assert row["feature"] == "phase" and row["auroc"] == 1 and row["on"] == [on] and row["off"] == [off]
        assert row["open_share"] == 0.5 and row["verified"]
        # of the two words one is lost: it falls A logits, and the mean over both words half of that
        assert row["cost_open"] == pytest.approx(A / 2, abs=1e-3) and abs(row["cost_closed"]) < 1e-5
    judged = judge_dynamic(parts, found, split.select, fallback)
    row = judged.advantage.row(0, named=True)
    # static gates need three parts; at two of three gates they mix, a third of the way to all closed
    assert row["open"] == 2 and row["d"] < 1e-3
    assert row["difference"] == pytest.approx(judged.closed.mean() / 3, rel=1e-3)
    assert any(text.startswith("L1.h2 switches") and "open on 'generation'" in text for text in told.sentences())


def test_phases_need_answers_of_several_tokens() -> None:
    _, parts, split = switch()
    settings = DynamicSettings(scope="phase", prices=(0.1,), seeds=1, updates=1, batch=8)
    with pytest.raises(GateError, match="is one token, behind which nothing runs"):
        dynamic_roles(parts, split.fit, split.select, split.confirm, parts.fallback("resample"), settings)
