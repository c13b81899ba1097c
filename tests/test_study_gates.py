"""Dynamic and contrastive gates as steps of a study: what is planted comes out by name, is kept, shown, and runs live."""

from pathlib import Path

import pytest
import torch

from patchclamp.errors import PatchclampError, StoreError
from patchclamp.gating.dynamic import Controller, DynamicSettings
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.report import render
from patchclamp.store import load_step
from patchclamp.study import Plan, Study, cost, gates, map, open_run
from patchclamp.zoo import wired
from patchclamp.zoo._wired import Wired

FEW = DynamicSettings(prices=(0.1,), seeds=1, updates=2, batch=8, redraws=0)
"""Enough to go through every step; what comes out means nothing."""


def dynamic(folder: Path, settings: DynamicSettings, monkeypatch: pytest.MonkeyPatch) -> tuple[Wired, Model, Study]:
    """A head for prompts of one kind, another for those of the other."""
    monkeypatch.setattr(gates, "BUDGET", settings)
    model = wired("switch")
    loaded = Model.load(model.hf.float(), tokenizer=model.tokenizer)
    plan = Plan(n=64, dynamic="example", sight="L1.resid.pre")
    with open_run(folder, loaded, model.task, plan) as run:
        return model, loaded, map(loaded, model.task, plan, run, do=("dynamic",))


def test_dynamic_gates_are_kept_shown_and_run_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, loaded, study = dynamic(tmp_path / "run", FEW, monkeypatch)
    found = study.record.dynamics
    assert found is not None and found.parts["site"].to_list() == [str(site) for site in nodes(loaded).labels[1:]]
    assert {"model", "position and token", "untrained"} == set(found.controls["kind"])
    text = render(study.record)
    assert "Dynamic gates" in text and found.about["sight"] in text
    controller = load_step(tmp_path / "run", "controller")
    assert isinstance(controller, Controller)
    parts, batch = nodes(loaded), model.task.examples(model.tokenizer, 6, seed=9).batch()
    rule = parts.fallback("zero")
    live = loaded.run(batch, controller.edits(parts, rule, batch))[:, -1]
    gated = loaded.run(batch, parts.edits(controller.gates(parts, batch), rule, batch))[:, -1]
    assert torch.allclose(live, gated, atol=1e-4)  # float32; the same gates, once computed in the pass
    with pytest.raises(StoreError, match="has not done 'nothing'"):
        load_step(tmp_path / "run", "nothing")


def test_generation_under_dynamic_gates_needs_a_run(cli):
    code, _, err = cli("generate", "zoo/small", "Mary and John", "--dynamic")
    assert code == 2 and "name the run" in err


@pytest.mark.long
def test_what_switches_is_said_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = DynamicSettings(prices=(0.1,), seeds=1, updates=36, batch=12, redraws=1)
    model, _, study = dynamic(tmp_path / "run", settings, monkeypatch)
    found = study.record.dynamics
    kinds = [effects["resample"] for effects in model.truth.by_cue.values()]
    planted = {part for part in model.truth.roles if min(kind[part] for kind in kinds) < 1e-6 < max(kind[part] for kind in kinds)}
    assert found is not None and planted and set(found.about["switching"]) == planted == set(found.gates["site"])
    assert found.about["labels_rejected"] is True and 'id="switching"' in render(study.record)


def test_what_was_not_said_is_asked_for(cli):
    model = wired("switch")
    loaded = Model.load(model.hf, tokenizer=model.tokenizer)
    with pytest.raises(PatchclampError, match="what they may hang on"):
        map(loaded, model.task, Plan(n=64), do=("dynamic",))
    with pytest.raises(PatchclampError, match="name a task to be lost"):
        map(loaded, model.task, Plan(n=64), do=("contrast",))
    with pytest.raises(PatchclampError, match="name another task"):
        map(loaded, model.task, Plan(n=64, contrast=model.task.name), do=("contrast",))
    with pytest.raises(PatchclampError, match="say what they may hang on"):
        Plan(sight="L0.resid.pre")
    code, _, err = cli("gate", "zoo/small", "ioi", "--dynamic", "word")
    assert code == 2 and "choose from phase, example, token" in err
    with pytest.raises(PatchclampError, match="not counted"):
        cost.cost(loaded, model.task, Plan(n=64, dynamic="example"), ("dynamic",))


@pytest.mark.long
def test_the_command_contrasts_two_tasks(cli, tmp_path: Path):
    code, out, err = cli("gate", "zoo/small", "ioi", "--n", 32, "--contrast", "agreement", "--out", "run", "--no-nulls")
    assert code == 0, err
    assert "Keep A (ioi) without B (agreement)" in out and "A without A" in out
    code, _, err = cli("gate", "zoo/small", "ioi", "--n", 32, "--contrast", "nonsense")
    assert code == 2 and "nonsense" in err
    code, _, err = cli("map", "zoo/small", "ioi", "--contrast", "agreement")
    assert code == 2 and "No such option" in err
