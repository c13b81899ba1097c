"""Contrastive gating: what one behaviour needs and another does not, in wired models of two kinds of prompt, with its controls."""

from dataclasses import replace
from functools import cache

import numpy as np
import polars as pl
import pytest
import torch

from patchclamp.errors import GateError
from patchclamp.gating import Behaviour, Contrast, Stage, contrast, gating_settings
from patchclamp.gating.contrast import CONTRAST, MIXED, REVERSE, SELF, bounded
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.store.codec import decode, encode
from patchclamp.tasks import load_task
from patchclamp.zoo import wired

FEW = gating_settings("default", seeds=2, batch=8, free=Stage(14, 1.0, 0.2), pressed=Stage(20, 0.8, 0.2))


@cache
def built():
    """The wired model of two tasks that share half of their parts: seeing (L0.h1, L1.h1) and hearing (L0.h2, L1.h2)."""
    one = wired("shared")
    model = Model.load(one.hf.float(), tokenizer=one.tokenizer)
    splits = {name: task.split(one.tokenizer, 72, 0) for name, task in one.tasks.items()}
    return nodes(model), {name: Behaviour(split.fit, split.select) for name, split in splits.items()}


@cache
def found(controls: bool = False) -> Contrast:
    parts, tasks = built()
    settings = FEW if controls else replace(FEW, seeds=1)
    return contrast(parts, tasks["see"], tasks["hear"], parts.fallback("resample"), settings, controls=controls)


@pytest.mark.parametrize("controls", [False, pytest.param(True, marks=pytest.mark.long)])
def test_what_hearing_needs_and_seeing_does_not_is_isolated(controls: bool) -> None:
    """Of the two heads in series either suffices to close hearing; whichever a seed closes, it closes nothing that seeing needs."""
    result = found(controls)
    table = {row["site"]: row for row in result.parts.iter_rows(named=True)}
    for tail, heads, others in (
        ("", ("L0.h2", "L1.h2"), ("L0.h1", "L1.h1")),
        ("_reverse", ("L0.h1", "L1.h1"), ("L0.h2", "L1.h2")),
    ):
        assert sum(table[head][f"isolated{tail}"] for head in heads) >= 1
        assert all(table[site][f"isolated{tail}"] == 0 for site in table if site not in heads)
        needed = {*others, "L0.mlp", "L1.mlp"}
        assert all(table[site][f"kept{tail}"] == 1 for site in needed)
        assert all(table[site][f"kept{tail}"] == 0 for site in table if site not in needed)
    for direction in (CONTRAST, REVERSE):
        assert result.separates(direction, "open") == result.separates(direction, "few") == 1
    rows = result.evaluation.filter(pl.col("direction") == CONTRAST)
    assert (rows["low_a"] > 0.95).all() and (rows["high_b"] < 0.05).all()
    rows = result.evaluation.filter(pl.col("direction") == REVERSE)
    assert (rows["high_a"] < 0.05).all() and (rows["low_b"] > 0.95).all()


@pytest.mark.long
def test_each_formats_own_pathway_is_isolated() -> None:
    """The same maps, told by an instruction or shown by three examples: what brings the rule differs, what applies it is shared.

    Judged on prompts that no gate was fitted to. Of an examples' pathway in series any part suffices to close it.
    """
    one = wired("formats")
    model = Model.load(one.hf.float(), tokenizer=one.tokenizer)
    splits = {name: task.split(one.tokenizer, 72, 0) for name, task in one.tasks.items()}
    told, shown = (Behaviour(splits[name].fit, splits[name].select) for name in ("instruction", "examples"))
    parts = nodes(model)
    result = contrast(parts, told, shown, parts.fallback("resample"), replace(FEW, seeds=1), controls=False)
    table = {row["site"]: row for row in result.parts.iter_rows(named=True)}
    own = {"": ({"L1.h1"}, {"L0.h1", "L0.mlp", "L1.h2"}), "_reverse": ({"L0.h1", "L0.mlp", "L1.h2"}, {"L1.h1"})}
    for tail, (kept, lost) in own.items():
        assert {site for site, row in table.items() if row[f"kept{tail}"] == 1} == kept | {"L1.mlp"}
        closed = {site for site, row in table.items() if row[f"isolated{tail}"] == 1}
        assert closed and closed <= lost
    shares = result.evaluation.select("direction", "side", "share_a", "share_b", "low_a", "low_b", "high_a", "high_b").to_dicts()
    for row in shares:
        high, low = ("a", "b") if row["direction"] == CONTRAST else ("b", "a")
        assert row[f"low_{high}"] > 0.95
        if row["direction"] == CONTRAST and row["side"] == "open":
            # the one part that it need close, L0.h1, takes the rule away and puts no other in: half of what all closed takes
            assert abs(row["share_b"] - 0.5) < 0.05
        else:
            assert row[f"high_{low}"] < 0.05


@pytest.mark.long
def test_controls_separate_nothing() -> None:
    result = found(controls=True)
    assert result.masks.keys() == {CONTRAST, REVERSE, SELF, MIXED} and not result.warnings
    for control in (SELF, MIXED):
        assert result.separates(control, "open") == result.separates(control, "few") == 0
    itself = result.evaluation.filter((pl.col("direction") == SELF) & (pl.col("side") == "open"))
    assert (itself["closed"] == 0).all()  # nothing pulls against the pressure to open


def test_parts_alone_are_the_wired_truth() -> None:
    """Closing one of a task's four parts alone takes all of it under resample: twice its logit difference of the whole."""
    table = {row["site"]: row for row in found().parts.iter_rows(named=True)}
    for site, a, b in (
        ("L0.h1", 1, 0),
        ("L1.h1", 1, 0),
        ("L0.h2", 0, 1),
        ("L1.h2", 0, 1),
        ("L0.mlp", 1, 1),
        ("L1.mlp", 1, 1),
        ("L0.h0", 0, 0),
    ):
        assert table[site]["alone_a"] == pytest.approx(a, abs=1e-3) and table[site]["alone_b"] == pytest.approx(b, abs=1e-3)


def test_the_loss_is_the_one_written_down() -> None:
    """Value by hand from both NLLs; slope by finite differences (float32 model: step .02, agreement to 2e-3)."""
    parts, tasks = built()
    fallback, loss = parts.fallback("resample"), bounded(0.5, 2.0)
    pair = (tasks["see"].fit.take(range(6)).batch(), tasks["hear"].fit.take(range(6)).batch())
    logits = torch.from_numpy(np.random.default_rng(1).normal(0, 1, (3, len(parts.counted))))

    def by_hand(logits: torch.Tensor) -> torch.Tensor:
        gates = parts.open(len(logits))
        gates[:, 0, 0, list(parts.counted)] = logits.sigmoid().float()
        keep, lose = (parts.measure(batch, gates, fallback, METRICS["nll"]).double() for batch in pair)
        return keep.mean(1) - 2 * lose.clamp(max=0.5).mean(1)

    value, slope = loss.slope(parts, pair, logits, fallback)
    assert torch.allclose(value, by_hand(logits), atol=1e-5)
    step = 0.02 * torch.eye(logits.shape[1]).double()
    for row in range(3):
        moved = (by_hand(logits[row] + step) - by_hand(logits[row] - step)) / 0.04
        assert torch.allclose(slope[row], moved, atol=5e-3), (slope[row], moved)
    with pytest.raises(GateError, match="must be positive"):
        contrast(parts, tasks["see"], tasks["hear"], fallback, FEW, ceiling=0.0)


def test_results_are_kept_without_loss() -> None:
    result = found()
    again = decode(encode(result))
    assert again.evaluation.equals(result.evaluation) and again.parts.equals(result.parts)
    assert set(result.to_record()["logits"]) == {CONTRAST, REVERSE}


@pytest.mark.long
def test_names_without_pronouns_and_back() -> None:
    """Two tasks of the shipped model: on held-out prompts each can be kept while the other is lost; mixed up, they cannot.

    (Pronouns without agreement separate, too; agreement without pronouns does not, in two seeds of two.)
    """
    model = Model.load("zoo/small")
    tasks = {}
    for name in ("ioi", "gendered_pronoun"):
        split = load_task(name).split(model.tokenizer, 128, 0)
        tasks[name] = Behaviour(split.fit, split.select)
    parts = nodes(model)
    result = contrast(
        parts, tasks["ioi"], tasks["gendered_pronoun"], parts.fallback("resample"), gating_settings("default", seeds=2)
    )
    assert max(result.separates(CONTRAST, side) for side in ("open", "few")) > 0
    assert max(result.separates(REVERSE, side) for side in ("open", "few")) > 0
    for control in (SELF, MIXED):
        assert all(result.separates(control, side) == 0 for side in ("open", "few"))
