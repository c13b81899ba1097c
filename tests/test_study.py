"""The whole map, on hand-wired models where the answer is known; resuming; what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from patchclamp.errors import BaselineError, MetricError, PatchclampError, StoreError, TaskError
from patchclamp.gating import Stage, gating_settings
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.store import load_record
from patchclamp.study import Plan, Study, load, map, open_run
from patchclamp.study.steps import behind_prefixes
from patchclamp.tasks import Task
from patchclamp.tasks._shift import shifted
from patchclamp.zoo import wired
from patchclamp.zoo._wired import Wired

PLAN = Plan(n=96, random_circuits=40)


@pytest.fixture(scope="module")
def truth() -> Wired:
    return wired("induction")


@pytest.fixture(scope="module")
def model(truth: Wired) -> Model:
    return Model.load(truth.hf, tokenizer=truth.tokenizer)


@pytest.fixture(scope="module")
def study(truth: Wired, model: Model, tmp_path_factory: pytest.TempPathFactory, few_gates) -> Study:
    folder = tmp_path_factory.mktemp("runs") / "induction"
    with few_gates(), open_run(folder, model, truth.task, PLAN) as run:
        return map(model, truth.task, PLAN, run)


def test_the_map_is_the_truth(truth: Wired, study: Study):
    roles = dict(zip(study.scores["site"], study.scores["role"], strict=True))
    assert roles == truth.truth.roles
    exact = dict(zip(study.scores["site"], study.scores["exact"], strict=True))
    for site, effect in truth.truth.effects["resample"].items():
        assert exact[site] == pytest.approx(effect, abs=1e-5)
    assert study.circuit is not None
    assert {str(site) for site in study.circuit} == {site for site, role in roles.items() if role == "facilitating"}
    verdicts = {claim.statement: claim.verdict for claim in study.claims}
    assert verdicts["None of the 2 parts can be left out"] == "supported"
    assert verdicts["2 of 10 parts are enough for 85% of the behaviour"] == "supported"
    assert "not supported" not in {verdict for text, verdict in verdicts.items() if "facilitates" in text}


def test_the_record_is_what_was_found(study: Study):
    assert study.folder is not None
    kept = load_record(study.folder)
    assert kept.headline == study.record.headline and kept.scores.equals(study.scores)
    assert load(study.folder).circuit == study.circuit
    assert kept.provenance.task.fit > kept.provenance.task.confirm > 0
    assert set(kept.agreement) >= {"gradient", "integrated", "random", "second fallback"}


def test_a_killed_run_goes_on_with_the_same_numbers(truth: Wired, model: Model, tmp_path: Path, monkeypatch):
    """Killed twice, before gates are learned and behind them; the gates mean nothing after two updates, and must be the same."""

    class Killed(BaseException):
        """Not an Exception: what finished steps have written stays, as after Ctrl-C."""

    two = gating_settings(
        "default", seeds=2, batch=4, free=Stage(2, 1.0, 0.1), pressed=Stage(2, 1.0, 0.1), null_seeds=1, refits=2
    )
    monkeypatch.setattr(Plan, "gating", two)
    plan, folder, seen = replace(PLAN, n=48, random_circuits=10), tmp_path / "run", list[str]()

    def mapped(folder: Path, die_at: str = "") -> Study:
        def watch(name: str, event: str, seconds: float) -> None:
            seen.append(f"{name} {event}")
            if f"{name} {event}" == die_at:
                raise Killed

        seen.clear()
        with open_run(folder, model, truth.task, plan, watch=watch) as run:
            return map(model, truth.task, plan, run)

    for step in ("second", "trust"):
        with pytest.raises(Killed):
            mapped(folder, f"{step} begin")
        assert not (folder / "study.json").exists()
    assert "second done" in seen and "roles done" in seen
    again = mapped(folder)
    assert {"exact kept", "second kept", "roles kept", "trust done"} <= set(seen)
    whole = mapped(tmp_path / "whole")
    assert "kept" not in " ".join(seen)
    assert again.scores.equals(whole.scores) and {"gate", "role", "exact"} <= set(again.scores.columns)
    assert again.record.trust == whole.record.trust


def test_gates_that_are_killed_within_their_step_go_on_behind_the_last_descent(
    truth: Wired, model: Model, tmp_path: Path, monkeypatch
):
    """Killed in each descent in turn: none that was done is made again, and the gates are those of a run that nobody disturbed."""

    class Killed(BaseException):
        """As Ctrl-C."""

    two = gating_settings(
        "default", seeds=2, batch=4, free=Stage(2, 1.0, 0.1), pressed=Stage(2, 1.0, 0.1), null_seeds=1, refits=2
    )
    monkeypatch.setattr(Plan, "gating", two)
    plan, titles = replace(PLAN, n=48), list[str]()

    def mapped(folder: Path, die_in: str = "") -> Study:
        def tell(title: str, done: int, of: int) -> None:
            titles.append(title)
            if title == die_in and done == 1:
                raise Killed

        titles.clear()
        with open_run(folder, model, truth.task, plan) as run:
            return map(model, truth.task, plan, run, do=("gate",), progress=tell)

    whole = mapped(tmp_path / "whole")
    descents = [title for title in dict.fromkeys(titles) if title.rpartition(": ")[2] in ("G", "G+ and G-")]
    assert len(descents) == 6
    for number, title in enumerate(descents):
        with pytest.raises(Killed):
            mapped(tmp_path / "run", title)
        assert not set(descents[: max(number - 1, 0)]) & set(titles), title  # the last one was killed, and is made again
    again = mapped(tmp_path / "run")
    assert not set(descents[:-1]) & set(titles) and descents[-1] in titles
    assert again.scores.equals(whole.scores)
    assert sorted(path.name for path in (tmp_path / "run/steps").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole/steps").iterdir()
    )


def test_a_part_of_a_map_can_be_asked_for(truth: Wired, model: Model):
    some = map(model, truth.task, PLAN, do=("attribute",))
    assert "integrated" in some.scores.columns and "role" not in some.scores.columns and some.circuit is None
    with pytest.raises(PatchclampError, match="gate, attribute, verify, discover, trust"):
        map(model, truth.task, PLAN, do=("guess",))
    found = map(model, truth.task, PLAN, do=("discover",))
    assert found.circuit is not None and found.record.trust is None
    assert f"a circuit of {len(found.circuit)} of its" in found.record.headline and "not judged" in found.record.headline


def test_denoising_and_other_fallbacks(truth: Wired, model: Model):
    plan = replace(PLAN, direction="denoising", second="zero")
    found = map(model, truth.task, plan, do=("verify",))
    exact = dict(zip(found.scores["site"], found.scores["exact"], strict=True))
    for site, role in truth.truth.roles.items():
        assert (role == "facilitating") or abs(exact[site]) < 1e-6
    zeros = dict(zip(found.scores["site"], found.scores["second"], strict=True))
    for site, effect in truth.truth.effects["zero"].items():
        assert zeros[site] == pytest.approx(effect, abs=1e-5)


def test_prompts_move_together(truth: Wired, model: Model):
    some = truth.task.examples(truth.tokenizer, 8, seed=1)
    moved = shifted(some, longest=None, seed=1)
    for before, after in zip(some, moved, strict=True):
        step = len(after.clean) - len(before.clean)
        assert 1 <= step <= 6 and after.corrupt is not None and before.corrupt is not None
        assert after.clean[0] == before.clean[0] == truth.tokenizer.bos_token_id
        assert after.clean[step + 1 :] == before.clean[1:] and after.corrupt[step + 1 :] == before.corrupt[1:]
        assert after.corrupt[: step + 1] == after.clean[: step + 1]
        assert after.spans["end"] == tuple(at + step for at in before.spans["end"])
    with pytest.raises(TaskError, match="cannot be shifted"):
        shifted(some, longest=max(len(item.clean) for item in some))
    parts = nodes(model)
    short = replace(some, items=tuple(item for item in some))
    answer = behind_prefixes(parts, model, short, "resample", parts.fallback("resample"), [parts.labels[1]], "logit_diff", 0)
    assert answer.scores is not None and len(answer.scores) == 1


def test_a_model_that_cannot_do_it_is_not_mapped(truth: Wired):
    broken = wired("induction")
    with torch.no_grad():
        broken.hf.lm_head.weight.copy_(torch.randn_like(broken.hf.lm_head.weight))
    with pytest.raises(BaselineError, match="--min-accuracy"):
        map(Model.load(broken.hf, tokenizer=broken.tokenizer), truth.task, PLAN)


def test_one_answer_is_said(truth: Wired, model: Model):
    def one_sided(rng, tokenizer):
        pairs = truth.task.candidates(rng, tokenizer)
        first = next(iter(truth.task.examples(tokenizer, 1))).pair.answer
        return (pair for pair in pairs if pair.answer == first)

    task = Task("one answer", "a test", one_sided, source="one")
    found = map(model, task, replace(PLAN, n=24), do=("verify",))
    assert any("same answer" in warning for warning in found.record.warnings)


def test_metrics_that_do_not_fit_are_refused(truth: Wired, model: Model):
    with pytest.raises(MetricError, match="there is no metric"):
        map(model, truth.task, replace(PLAN, metric="bleu"))
    with pytest.raises(PatchclampError, match="faithfulness 2"):
        Plan(faithfulness=2.0)


def test_another_question_does_not_take_the_folder(truth: Wired, model: Model, study: Study):
    with pytest.raises(StoreError, match="another run"):
        open_run(study.folder, model, truth.task, replace(PLAN, seed=5))


def test_it_shows_itself(study: Study):
    html = study._repr_html_()
    assert "supported" in html and "<table" in html
    assert str(study) == study.record.headline


def test_confirm_prompts_were_never_seen_before(truth: Wired):
    fit, select, confirm = truth.task.split(truth.tokenizer, PLAN.n, seed=PLAN.seed)
    prompts = [{item for e in part for item in (e.clean, e.corrupt)} for part in (fit, select, confirm)]
    assert not prompts[0] & prompts[1] and not prompts[1] & prompts[2] and not prompts[0] & prompts[2]


def test_nothing_but_the_model_was_left_changed(truth: Wired, study: Study):
    fresh = wired("induction").hf.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in truth.hf.state_dict().items())
    assert study.scores.select(pl.col("exact").is_finite().all()).item() and np.isfinite(study.scores["gate"].to_numpy()).all()
