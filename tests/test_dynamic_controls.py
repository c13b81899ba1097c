"""Controls of dynamic gates: arbitrary labels, an untrained model, a controller that sees position and token only."""

from dataclasses import replace
from functools import cache

import numpy as np
import polars as pl
import pytest

from patchclamp.errors import TaskError
from patchclamp.gating.dynamic import (
    DynamicSettings,
    arbitrary,
    blind,
    fit_dynamic,
    judge_dynamic,
    label_control,
    untrained_control,
    without_wrong,
)
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.zoo import wired

SETTINGS = DynamicSettings(site="L1.resid.post", prices=(0.02,), seeds=1, updates=30, batch=12, redraws=2)


@cache
def built(name: str):
    one = wired(name)
    model = Model.load(one.hf.float(), tokenizer=one.tokenizer)
    return one, nodes(model), one.task.split(one.tokenizer, 128, 0)


def test_arbitrary_labels_are_a_function_of_the_words_and_nothing_else() -> None:
    _, _, split = built("interfering")
    fit, held = arbitrary(split.fit, split.select, seed=3)
    turned = [one.answers == two.wrong for one, two in zip(split.fit, fit, strict=True)]
    assert 0.4 < np.mean(turned) <= 0.5
    assert all(
        (one.answers, one.wrong) in ((two.answers, two.wrong), (two.wrong, two.answers))
        for one, two in zip(split.select, held, strict=True)
    )
    assert arbitrary(split.fit, seed=3)[0].items == fit.items and arbitrary(split.fit, seed=4)[0].items != fit.items
    assert 0.4 < np.mean([one.answers == two.wrong for one, two in zip(split.select, held, strict=True)]) <= 0.5
    twice = arbitrary(split.fit, split.fit, seed=3)
    assert twice[0].items == twice[1].items == fit.items
    with pytest.raises(TaskError, match="without 'wrong'"):
        arbitrary(without_wrong(split.fit))


@pytest.mark.long
def test_arbitrary_labels_are_rejected_with_safeguards_and_lifted_without() -> None:
    """A controller that closes the helper where a label is exchanged says the label; redrawn, the closed gates say the model's word.

    An honest controller loses nothing when its closed gates are redrawn: the criterion does not reject everything.
    """
    _, parts, split = built("interfering")
    fallback = parts.fallback("resample")
    control = label_control(parts, split.fit, split.select, fallback, SETTINGS)
    guarded, free = (control.table.filter(pl.col("guarded") == kind) for kind in (True, False))
    assert free["before"].to_list() == guarded["before"].to_list() == [0.5]
    assert free["lift"][0] > 0.3 and free["low"][0] > 0.1, "without the safeguards: far beyond chance, on unseen prompts"
    assert control.rejected and guarded["kept_lift"][0] <= 0.1
    honest = judge_dynamic(parts, fit_dynamic(parts, split.fit, fallback, SETTINGS), split.select, fallback).table
    assert honest["always_right"].min() == 1 and honest.filter(pl.col("strength") < 0.1)["worst_d"].max() < 0.1


def test_exchanged_targets_are_the_models_own_where_the_label_is_right() -> None:
    import torch

    from patchclamp.gating.dynamic.objective import TARGETS

    _, _, split = built("interfering")
    batch = split.select.take(range(6)).batch()
    logits = torch.randn(2, 6, 60, generator=torch.Generator().manual_seed(0))
    own = torch.randn(6, 60, generator=torch.Generator().manual_seed(1))
    one = torch.arange(6)
    batch = replace(batch, answers=torch.full((6, 1), 5), wrong=torch.full((6, 1), 9))
    p = own.softmax(-1)
    wanted = p.clone()
    wanted[:, 5], wanted[:, 9] = torch.maximum(p[:, 5], p[:, 9]), torch.minimum(p[:, 5], p[:, 9])
    found = TARGETS["exchanged"](logits, batch, own)
    for setting in range(2):
        kl = (wanted * (wanted.log() - logits[setting].log_softmax(-1))).sum(-1)
        torch.testing.assert_close(found[setting], kl[one], atol=1e-5, rtol=1e-5)
    unchanged = p[:, 5] >= p[:, 9]
    kept = METRICS["kl"](logits, batch, own)
    torch.testing.assert_close(found[:, unchanged], kept[:, unchanged], atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_neither_an_untrained_model_nor_a_blind_controller_switches() -> None:
    """The cue stands before the last token, so that token and its place cannot tell it; a random model has nothing to tell."""
    _, parts, split = built("switch")
    fallback = parts.fallback("resample")
    settings = replace(SETTINGS, site="L1.resid.pre", prices=(0.1,), updates=40, batch=12)
    seeing = judge_dynamic(parts, fit_dynamic(parts, split.fit, fallback, settings), split.select, fallback)
    unseeing = judge_dynamic(parts, fit_dynamic(parts, split.fit, fallback, blind(settings)), split.select, fallback)
    assert seeing.advantage["low"][0] > 1
    assert unseeing.advantage["difference"][0] < 0.2 * seeing.advantage["difference"][0]
    untrained = untrained_control(parts, split.fit, split.select, fallback, settings)
    assert untrained.advantage["difference"][0] < 0.2 * seeing.advantage["difference"][0]
