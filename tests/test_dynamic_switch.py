"""Dynamic gates on a hand-wired model with a head for each kind of prompt: the condition is found, and judged."""

from functools import cache

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from patchclamp.gating.dynamic import DynamicSettings, fit_dynamic
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.zoo import wired


@cache
def switch():
    one = wired("switch")
    model = Model.load(one.hf.float(), tokenizer=one.tokenizer)
    return one, nodes(model), one.task.split(one.tokenizer, 96, 0)


@pytest.mark.parametrize("relaxation", ["sigmoid", "relaxed", "straight"])
def test_the_switching_heads_are_found_on_unseen_prompts(relaxation: str) -> None:
    one, parts, split = switch()
    fallback = parts.fallback("resample")
    settings = DynamicSettings(
        site="L1.resid.pre",
        prices=(0.1,),
        seeds=1,
        updates=60,
        batch=16,
        redraws=1,
        relaxation=relaxation,  # type: ignore[arg-type]
    )
    found = fit_dynamic(parts, split.fit, fallback, settings)
    looks = np.array([one.truth.cue(example.pair.clean) == "look" for example in split.select])
    soft = found.controller(1).soft().driven(parts.model, split.select.batch())[:, 0]
    gate = dict(zip(map(str, found.labels), soft.T.numpy(), strict=True))
    assert roc_auc_score(looks, gate["L1.h1"]) >= 0.99
    assert roc_auc_score(~looks, gate["L1.h2"]) >= 0.99
    assert gate["L1.mlp"].min() > 0.5
    static = found.controller(0).driven(parts.model, split.select.batch())
    kept = {str(site) for site, gate in zip(found.labels, static[0, 0], strict=True) if gate}
    assert kept == {"L1.h1", "L1.h2", "L1.mlp"}, "without looking, both heads are needed"


def test_a_learned_price_meets_the_wanted_number_of_open_gates() -> None:
    _, parts, split = switch()
    settings = DynamicSettings(site="L1.resid.pre", prices=(), target_open=(2.0,), seeds=1, updates=80, batch=12, redraws=0)
    found = fit_dynamic(parts, split.fit, parts.fallback("resample"), settings)
    opened = found.controller(1).soft().driven(parts.model, split.select.batch()).sum(-1).mean()
    assert float(opened) == pytest.approx(2.0, abs=0.3)
    assert found.strength.tolist() == [2.0, 2.0]
