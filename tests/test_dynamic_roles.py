"""The whole question of dynamic gates in one call, and whole families of inputs held out; on stories260k as a long test."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import polars as pl
import pytest

from patchclamp.errors import TaskError
from patchclamp.gating.dynamic import DynamicSettings, dynamic_roles, families_held_out, label_control
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.tasks import load_task
from patchclamp.zoo import wired

SETTINGS = DynamicSettings(site="L1.resid.pre", prices=(0.1,), seeds=1, updates=36, batch=12, redraws=1)


@cache
def switch():
    one = wired("switch")
    model = Model.load(one.hf.float(), tokenizer=one.tokenizer)
    return one, nodes(model), one.task.split(one.tokenizer, 96, 0)


def test_a_whole_family_held_out_is_not_what_the_others_teach() -> None:
    """Gates that never saw a "look" prompt close what only those need: neither moving nor static gates say anything there."""
    one, parts, split = switch()
    few = replace(SETTINGS, updates=40)
    cue = lambda example: one.truth.cue(example.pair.clean)  # noqa: E731
    table = families_held_out(parts, split.fit, parts.fallback("resample"), few, family=cue, most=1)
    (row,) = table.iter_rows(named=True)
    assert row["family"] in ("look", "listen") and row["fitted"] + row["n"] == len(split.fit)
    assert row["d"] > 1 and row["difference"] < 0.5 * row["static_d"]
    with pytest.raises(TaskError, match="all of one"):
        families_held_out(parts, split.fit, parts.fallback("resample"), few, family=lambda _: "one")


@pytest.mark.long
def test_the_whole_question_in_words() -> None:
    one, parts, split = switch()
    named = {"cue": lambda example: one.truth.cue(example.pair.clean)}
    found = dynamic_roles(parts, split.fit, split.select, split.confirm, parts.fallback("resample"), SETTINGS, named=named)
    controls = dict(found.controls.group_by("kind").agg(pl.col("difference").max()).iter_rows())
    assert controls["model"] > 1 > 5 * max(controls["untrained"], controls["position and token"])
    assert found.labels is not None and found.labels.rejected
    told = found.sentences()
    assert told[0].startswith("At 2.0 open gates a token") and "rejected" in told[3]
    assert any(text.startswith("L1.h1 switches") and "'look'" in text for text in told)
    assert any(text.startswith("L1.mlp is open always") for text in told) and len(told) == 7


@pytest.mark.long
def test_arbitrary_labels_on_stories260k(shared: Path) -> None:
    """A rank-4 controller says a random direction of the stream; redrawn closed gates, and the model's own target, take that away."""
    model = Model.load(str(shared / "models/stories260k-llama"))
    task = load_task(str(shared / "data/story-behaviours/stories260k-pronoun.jsonl"))
    split = task.split(model.tokenizer, None, 0)
    parts = nodes(model)
    settings = DynamicSettings(site="L2.resid.post", prices=(0.01,), seeds=2, updates=60, batch=12, redraws=3)
    control = label_control(parts, split.fit, split.select, parts.fallback("resample"), settings)
    free, guarded = (control.table.filter(pl.col("guarded") == kind) for kind in (False, True))
    assert (free["low"] > 0).all() and free["lift"].mean() > 0.15, "without the safeguards, labels are lifted on unseen prompts"  # type: ignore[operator]
    assert (guarded["low"] < 0).all() and guarded["lift"].mean() < free["lift"].mean(), "with them, no seed's interval leaves 0"  # type: ignore[operator]
    assert control.rejected
