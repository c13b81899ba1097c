"""Dynamic and contrastive gates as steps of a study: what is planted comes out by name, is kept, shown, and runs live."""

import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from fake_record import fake_record
from patchclamp.errors import BaselineError, PatchclampError, StoreError
from patchclamp.gating import PRESETS, Stage, gating_settings
from patchclamp.gating.dynamic import Controller, DynamicSettings
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import benefits, nodes
from patchclamp.report import render
from patchclamp.sites import Site
from patchclamp.store import Run, load_record, load_step
from patchclamp.study import Plan, Study, cost, gates, map, open_run
from patchclamp.tasks import load_task
from patchclamp.zoo import wired
from patchclamp.zoo._designs import CONCEPTS
from patchclamp.zoo._wired import Wired

FEW = DynamicSettings(prices=(0.1,), seeds=1, updates=2, batch=8, redraws=0)
"""Enough to go through every step; what comes out means nothing."""


def dynamic(folder: Path, settings: DynamicSettings, monkeypatch: pytest.MonkeyPatch, n: int = 64) -> tuple[Wired, Model, Study]:
    """A head for prompts of one kind, another for those of the other."""
    monkeypatch.setattr(gates, "BUDGET", settings)
    model = wired("switch")
    loaded = Model.load(model.hf.float(), tokenizer=model.tokenizer)
    plan = Plan(n=n, dynamic="example", sight="L1.resid.pre")
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


def test_how_a_model_is_loaded_is_not_said_beside_a_run(cli, tmp_path: Path):
    with Run.open(tmp_path / "run", {"name": "run"}, digest="run" * 8, task="ioi", model="m") as run:
        run.save(fake_record())
    code, _, err = cli("generate", "run", "Mary and John", "--dtype", "float32")
    assert code == 2 and "--dtype was given beside a run folder" in err


@pytest.mark.long
def test_what_switches_is_said_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On 128 prompts: of 64, arbitrary labels are judged on 16, of which two are more than the margin of .1."""
    settings = DynamicSettings(prices=(0.1,), seeds=1, updates=36, batch=12, redraws=1)
    model, _, study = dynamic(tmp_path / "run", settings, monkeypatch, n=128)
    found = study.record.dynamics
    kinds = [effects["resample"] for effects in model.truth.by_cue.values()]
    planted = {part for part in model.truth.roles if min(kind[part] for kind in kinds) < 1e-6 < max(kind[part] for kind in kinds)}
    assert found is not None and planted and set(found.about["switching"]) == planted == set(found.gates["site"])
    assert found.about["labels_rejected"] is True and 'id="switching"' in render(study.record)


@pytest.mark.long
def test_the_command_tells_what_prompt_and_generation_need(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two words are answered: one head copies the first of them (on the prompt), another the second (behind what was generated)."""
    monkeypatch.setattr(gates, "BUDGET", DynamicSettings(prices=(0.1,), seeds=1, updates=40, batch=12, redraws=1))
    one = wired("phases")
    one.hf.float().save_pretrained(tmp_path / "phases")
    one.tokenizer.save_pretrained(tmp_path / "phases")
    with (tmp_path / "two.jsonl").open("w") as file:
        for example in one.tasks["prompt"].examples(one.tokenizer, 128, seed=0):
            clean, corrupt, (answer,) = example.pair.clean, str(example.pair.corrupt), example.pair.answer
            word = re.findall(r"note-(\w+)", clean)[0]
            other = next(name for name in CONCEPTS if name not in (word, answer))
            pair = {"clean": clean, "corrupt": corrupt.replace(f"note-{word}", f"note-{other}"), "answer": f"{answer} {word}"}
            file.write(json.dumps(pair) + "\n")
    asked = ("gate", "phases", "two.jsonl", "--dynamic", "phase", "--metric", "log_probability", "--n", 128, "--no-nulls")
    code, out, err = cli(*asked, "--out", "run")
    assert code == 0, err
    found = load_record(tmp_path / "run").dynamics
    assert found is not None and set(found.about["switching"]) == {"L1.h1", "L1.h2"}
    assert "open on 'prompt'" in out and "open on 'generation'" in out
    code, _, err = cli("gate", "phases", "ioi", "--dynamic", "phase")
    assert code == 2, err


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


@pytest.mark.long
def test_the_command_learns_sets_and_tells_several_that_suffice(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = gating_settings("default", seeds=2, batch=8, free=Stage(6, 1.0, 0.2), pressed=Stage(8, 0.8, 0.2), refits=0)
    monkeypatch.setitem(PRESETS, "default", small)
    code, out, err = cli("gate", "zoo/small", "ioi", "--n", 32, "--keep", 2, "--solutions", "--no-nulls", "--out", "run")
    assert code == 0, err
    assert (
        "Sets that alone keep so much" in out and "exactly k" in out and "mean of 20" in out and "distinct sets keep 85%" in out
    )
    record = load_record(tmp_path / "run")
    assert record.sets is not None and record.alternatives is not None
    (row,) = record.sets.table.filter(pl.col("method") == "exactly k").iter_rows(named=True)
    assert row["size"] == len(row["kept"].split()) == 2
    # what it keeps, by gates of this test's own
    model = Model.load("zoo/small")
    parts, split = nodes(model), load_task("ioi").split(model.tokenizer, 32, seed=0)
    gates = torch.cat([parts.open(), parts.closed(), parts.only([Site.parse(site) for site in row["kept"].split()])])
    whole, none, kept = benefits(parts, split.confirm, gates, parts.fallback("resample"), METRICS["logit_diff"]).double().mean(1)
    assert row["share"] == pytest.approx(float((kept - none) / (whole - none)), abs=1e-4)
    assert record.sets.table.filter(pl.col("method") == "exact effect")["size"].to_list() == [2]
    assert record.alternatives.table["seeds"].sum() == 2 and set(record.alternatives.core) <= set(record.alternatives.union)
    code, _, err = cli("gate", "zoo/small", "ioi", "--keep", 2, "--dry-run")
    assert code == 2 and "learning sets is not counted" in err
    code, _, err = cli("gate", "zoo/small", "ioi", "--n", 32, "--keep", 40)
    assert code == 2 and "give sizes from 0 to 36" in err
    code, _, err = cli("gate", "zoo/small", "ioi", "--price", 0)
    assert code == 2 and "prices above 0" in err


def test_what_is_lost_must_be_there_and_means_are_of_both_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A task that the model cannot do has nothing to lose; means that gates pass are learned on prompts of both."""
    model = Model.load("zoo/small")
    pairs = [item.pair for item in load_task("agreement").examples(model.tokenizer, 48, 0)]
    turned = [{"clean": one.clean, "corrupt": one.corrupt, "answer": one.wrong[0], "wrong": one.answer[0]} for one in pairs]
    (tmp_path / "turned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    with pytest.raises(BaselineError, match="'turned'"):
        map(model, "ioi", Plan(n=32, contrast=str(tmp_path / "turned.jsonl")), do=("contrast",))
    seen: list[Any] = []

    def found(parts: Any, a: Any, b: Any, rule: Any, *_: Any, **__: Any) -> Any:
        seen.append((parts, a, b, rule))
        raise PatchclampError("seen")

    monkeypatch.setattr(gates, "contrast", found)
    with pytest.raises(PatchclampError, match="seen"):
        map(model, "ioi", Plan(n=32, contrast="agreement", fallback="mean:all"), do=("contrast",))
    parts, a, b, rule = seen[0]
    of_a, of_b = (parts.fallback("mean:all", fit=one.fit) for one in (a, b))
    tokens = [sum(len(item.clean) + len(item.corrupt or ()) for item in one.fit) for one in (a, b)]
    place = Site.parse("L0.mlp.write")
    wanted = (tokens[0] * of_a.total[place] + tokens[1] * of_b.total[place]) / sum(tokens)
    torch.testing.assert_close(rule.total[place], wanted, atol=1e-5, rtol=1e-5)
