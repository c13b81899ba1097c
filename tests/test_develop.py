"""Development: checkpoints wherever they lie, when effects form, measures and maps at each, a page of it."""

import importlib
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from huggingface_hub.errors import HTTPError

from patchclamp.develop import Checkpoint, checkpoints, follow, lives, load_development
from patchclamp.errors import ModelError, StoreError, TrainingError
from patchclamp.models.model import Model
from patchclamp.report.development import write_development
from patchclamp.report.strips import film_strip, learning_curve, slider
from patchclamp.store import load_record, runs
from patchclamp.study import Plan
from patchclamp.study import map as map_task
from patchclamp.units import MEASURES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints on the straight line from noise to zoo/small: nothing, half of it, all of it."""
    place = tmp_path_factory.mktemp("training") / "checkpoints"
    model = Model.load("zoo/small")
    whole = {name: value.clone() for name, value in model.hf.state_dict().items()}
    torch.manual_seed(0)
    noise = {name: torch.randn_like(value) * 0.02 for name, value in whole.items()}
    for step, share in ((0, 0.0), (500, 0.6), (4000, 1.0)):
        model.hf.load_state_dict({name: torch.lerp(noise[name], value, share) for name, value in whole.items()})
        model.hf.save_pretrained(place / f"step-{step:07d}")
        model.tokenizer.save_pretrained(place / f"step-{step:07d}")
    return place.parent


def test_checkpoints_of_a_run_of_folders_and_of_the_hub(tmp_path, monkeypatch):
    for name in ("checkpoint-500", "step1000-tokens4B", "20", "notes", ".step-7.part"):
        (tmp_path / name).mkdir()
        if name != "notes":
            (tmp_path / name / "config.json").write_text("{}")
    assert [one.step for one in checkpoints(tmp_path)] == [20, 500, 1000]
    assert [one.step for one in checkpoints(tmp_path, steps=[500])] == [500]
    refs = SimpleNamespace(
        branches=[SimpleNamespace(name="main"), SimpleNamespace(name="step1000"), SimpleNamespace(name="step8")], tags=[]
    )
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_refs", lambda self, name: refs)
    assert checkpoints("someone/model") == (
        Checkpoint(8, "someone/model", "step8"),
        Checkpoint(1000, "someone/model", "step1000"),
    )
    assert checkpoints("someone/model", revisions=["step3"]) == (Checkpoint(3, "someone/model", "step3"),)


def test_few_checkpoints_are_spread_in_the_logarithm(tmp_path):
    for step in (0, 1, 2, 4, 8, 16, 32, 64, 128):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "config.json").write_text("{}")
    assert [one.step for one in checkpoints(tmp_path, count=3)] == [0, 8, 128]  # log 1, log 129 / 2 = log 11.4, log 129
    assert len(checkpoints(tmp_path, count=100)) == 9


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("empty", {}, "holds no checkpoints"),
        ("there", {"steps": [3]}, "no checkpoint at step 3: it has 20"),
        ("there", {"revisions": ["step3"]}, "has no revisions"),
        ("there", {"count": 1}, "at least 2"),
        ("twice", {}, "two checkpoints of step 20"),
        ("a/b", {"revisions": ["main"]}, "does not say its step"),
    ],
)
def test_what_cannot_be_found_is_told(tmp_path, source, options, words):
    for name in ("empty", "there/20", "twice/20", "twice/step-20"):
        (tmp_path / name).mkdir(parents=True)
        if name != "empty":
            (tmp_path / name / "config.json").write_text("{}")
    place = source if "/" in source else tmp_path / source
    with pytest.raises(TrainingError, match=words):
        checkpoints(place, **options)


def test_a_hub_that_does_not_answer_is_told(monkeypatch):
    for error in (OSError, HTTPError):

        def nothing(self: object, name: str, error: type[Exception] = error) -> None:
            raise error("no route")

        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_refs", nothing)
        with pytest.raises(ModelError, match="give a folder, or revisions by name"):
            checkpoints("someone/model")


def test_when_effects_form_and_whether_they_stay():
    """By hand: a part that forms at 20 and stays; one that is lost; one that turns; one that never is clear."""
    steps = (0, 10, 20, 30)
    parts = {
        "L0.h0": ([0.0, 0.1, 2.0, 3.0], [1.0, 0.5, 0.01, 0.01]),
        "L0.h1": ([0.0, 2.0, 0.5, 0.0], [1.0, 0.01, 0.2, 0.9]),
        "L0.h2": ([-1.0, -1.0, 0.0, 1.0], [0.01, 0.01, 0.7, 0.02]),
        "L0.h3": ([0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.5, None]),
    }
    rows = [
        {"task": "t", "step": step, "site": site, "exact": effects[i], "exact_q": q[i]}
        for i, step in enumerate(steps)
        for site, (effects, q) in parts.items()
    ]
    found = {row["site"]: row for row in lives(pl.DataFrame(rows)).to_dicts()}
    assert {site: row["word"] for site, row in found.items()} == {
        "L0.h0": "stays",
        "L0.h1": "lost",
        "L0.h2": "turns",
        "L0.h3": "never",
    }
    assert (found["L0.h0"]["before"], found["L0.h0"]["formed"], found["L0.h0"]["final"]) == (10, 20, 3.0)
    assert found["L0.h0"]["half"] == 20 and found["L0.h1"]["half"] is None and found["L0.h2"]["half"] == 30
    assert (found["L0.h1"]["first"], found["L0.h1"]["lost"], found["L0.h1"]["peak_step"]) == (10, 10, 10)
    assert (found["L0.h2"]["before"], found["L0.h2"]["formed"], found["L0.h2"]["turned"]) == (20, 30, True)
    assert found["L0.h3"]["formed"] is None and found["L0.h3"]["first"] is None


WRITTEN = [
    {"step": 0, "name": "loss", "value": 4.0},
    {"step": 1, "name": "loss", "value": 3.0},
    {"step": 1, "name": "held-out loss", "value": 3.5},
    {"step": 1, "name": "held-out loss low", "value": 3.25},
    {"step": 1, "name": "held-out loss high", "value": 3.75},
]


def test_a_training_is_followed_kept_and_shown(folder, tmp_path):
    """Effects at the last checkpoint are those of a map of that model by itself; a second time nothing is computed."""
    called: list[int] = []

    def counted(model: Model) -> pl.DataFrame:
        called.append(1)
        return MEASURES["heads"](model, None)

    def run() -> tuple[object, Path]:
        return follow(
            checkpoints(folder), tmp_path / "dev", tasks=["induction"], measures={"heads": counted},
            plan=Plan(n=32, force=True, min_accuracy=0.0), metrics=pl.DataFrame(WRITTEN),
        )  # fmt: skip

    found, place = run()
    assert found.steps == (0, 500, 4000) and len(called) == 3
    (info,) = [one for one in runs(tmp_path) if one.folder == place]
    assert (info.status, info.task) == ("finished", "development") and info.headline.startswith(
        "3 checkpoints, step 0 to 4000: induction, heads; "
    )
    with pytest.raises(StoreError, match="holds a development, which is no map"):
        load_record(place)
    again, _ = run()
    assert len(called) == 3 and again.maps.equals(found.maps)
    alone = map_task(Model.load("zoo/small"), "induction", Plan(n=32, force=True, min_accuracy=0.0), do=("verify",)).scores
    last = found.maps.filter(pl.col("step") == 4000)
    assert last["site"].to_list() == alone.filter(pl.col("kind") != "embed")["site"].to_list()
    assert last["exact"].to_list() == pytest.approx(alone.filter(pl.col("kind") != "embed")["exact"].to_list(), abs=1e-5)
    assert found.lives.filter(pl.col("word") == "stays").height > 0
    assert set(found.curves["measure"]) == {"heads", "training"}
    told = found.curves.filter(measure="training").select("step", "name", "value", "low", "high").rows()
    assert sorted(told, key=str) == [
        (0, "loss", 4.0, None, None),
        (1, "held-out loss", 3.5, 3.25, 3.75),
        (1, "loss", 3.0, None, None),
    ]
    assert load_development(place).lives.equals(found.lives)
    page = write_development(place).read_text()
    assert "When each effect formed" in page and '"slider-0"' in page and "step 4\u202f000" in page
    for chart in (
        film_strip(found.maps),
        slider(found.maps),
        learning_curve({"loss": found.curves.filter(pl.col("name") == "loss")}),
    ):
        chart.to_dict(validate=True)


def test_another_question_in_the_same_folder_is_refused(folder, tmp_path):
    @cache
    def one() -> pl.DataFrame:
        return pl.DataFrame({"name": ["size"], "part": [""], "value": [1.0]})

    follow(checkpoints(folder), tmp_path / "dev", measures={"one": lambda model: one()})
    with pytest.raises(StoreError, match="holds another run"):
        follow(checkpoints(folder, steps=[0, 4000]), tmp_path / "dev", measures={"one": lambda model: one()})
    with pytest.raises(TrainingError, match="nothing is asked"):
        follow(checkpoints(folder), tmp_path / "none")
    with pytest.raises(TrainingError, match="at least 2"):
        follow(checkpoints(folder, steps=[0]), tmp_path / "none", measures={"one": lambda model: one()})
    assert not (tmp_path / "none").exists()


def test_the_command(cli, folder, tmp_path):
    code, out, err = cli("develop", folder, "--measure", "heads", "--at", "0,4000", "--out", tmp_path / "dev", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert told["steps"] == [0, 4000] and Path(told["report"]).is_file()
    assert cli("develop", folder, "--measure", "list")[1].count("heads") >= 1
    for wrong, words in (
        (("--measure", "nothing"), "there is no measure 'nothing'"),
        (("--at", "x", "--measure", "heads"), "is not a list of steps"),
        (("--at", "3", "--measure", "heads"), "no checkpoint at step 3"),
        ((), "nothing is asked"),
        (("--task", "nowhere"), "nowhere"),
    ):
        code, out, err = cli("develop", folder, "--out", tmp_path / "wrong", *wrong)
        assert code == 2 and words in err.replace("\n", " ") and not (tmp_path / "wrong").exists()


@pytest.mark.long
def test_a_map_that_failed_is_tried_again_and_told_anew(folder, tmp_path, monkeypatch):
    """What was kept without it is not taken for the whole."""
    module = importlib.import_module("patchclamp.develop.follow")

    own, calls = module._mapped, []

    def failing(*given: object) -> list[tuple[str, int, object, str, str]]:
        calls.append(1)
        rows = own(*given)
        if len(calls) > 1:
            return rows
        return [(row[0], 500, None, "", "out of memory") if row[1] == 500 else row for row in rows]

    monkeypatch.setattr(module, "_mapped", failing)
    options = {"tasks": ["induction"], "plan": Plan(n=16, force=True, min_accuracy=0.0)}
    first, place = follow(checkpoints(folder), tmp_path / "dev", **options)
    assert first.baselines["error"].to_list() == ["", "out of memory", ""]
    assert load_development(place).baselines.equals(first.baselines)
    assert [one.status for one in runs(place)] == ["unfinished"]
    second, _ = follow(checkpoints(folder), tmp_path / "dev", **options)
    assert second.baselines["error"].to_list() == ["", "", ""] and set(second.maps["step"]) == {0, 500, 4000}
    assert load_development(place).maps.equals(second.maps)
    assert [one.status for one in runs(place)] == ["finished"]
