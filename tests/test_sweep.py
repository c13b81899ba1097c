"""Sweeps: what plans.toml may say, what is done once, kept, tried again and named; the same numbers as a map, in any pieces."""

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path
from threading import Thread
from typing import Any

import polars as pl
import pytest
import torch

from patchclamp.errors import PatchclampError, StoreError, SweepError, TaskError
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.store import Run, load_record
from patchclamp.study import Plan, map, open_run
from patchclamp.sweep import Case, Row, identified, read_plans, read_table, sweep
from patchclamp.sweep.drive import TRIES, Drive, Ended
from patchclamp.sweep.here import Here
from patchclamp.sweep.on_ray import room_for
from patchclamp.sweep.pieces import BATCH, answers, noting
from patchclamp.sweep.place import Place, is_finished, put_in_place
from patchclamp.sweep.worker import Job, Outcome, Worker
from patchclamp.zoo import wired
from saved_model import save

QUICK: dict[str, Any] = {"n": 48, "random_circuits": 10, "nulls": False}
VERIFY, FIND = ("verify",), ("verify", "discover", "trust")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hand-wired model as a folder, with 600 pairs as JSONL beside it."""
    truth = wired("interfering")
    truth.hf.to(torch.float32)
    return save(truth, tmp_path_factory.mktemp("models") / "wired", 600)


def one_word(folder: Path) -> Path:
    """In place of a report."""
    path = Path(folder) / "report.html"
    path.write_text("drawn")
    return path


@pytest.fixture(autouse=True)
def short_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs made in this process get a page of one word, but where `whole_reports` is asked for: drawing takes longer than the rest."""
    if "whole_reports" not in request.fixturenames:
        monkeypatch.setattr("patchclamp.report.write_report", one_word)


@pytest.fixture
def whole_reports() -> None:
    """Let reports be drawn."""


@pytest.fixture
def case(saved: Path) -> Callable[..., Case]:
    def made(seed: int = 0, steps: tuple[str, ...] = VERIFY, task: str = "pairs.jsonl", **plan: Any) -> Case:
        return Case(str(saved), str(saved / task), Plan(**{**QUICK, **plan, "seed": seed}), steps)

    return made


def write(folder: Path, text: str) -> Path:
    path = folder / "plans.toml"
    path.write_text(text)
    return path


# --- plans.toml


def test_axes_are_multiplied_and_single_plans_added(tmp_path: Path):
    found = read_plans(write(tmp_path, """
        [sweep]
        models = ["zoo/small", "org/name"]
        tasks = ["ioi", "greater_than"]
        seeds = [0, 1]
        methods = ["exact", "gradient"]
        checkpoints = ["step1", "step2"]
        steps = ["verify", "gate"]
        n = 64
        faithfulness = 1
        dtype = "float32"
        options = {template = 3}

        [[plan]]
        model = "zoo/small"
        task = "ioi"
        lambda = 0.2

        [[plan]]
        model = "zoo/small"
        task = "ioi"
        pressure = 0.2
    """))  # fmt: skip
    assert len(found) == 2**5 + 1  # the last two are one question
    first = found[0]
    assert (first.model, first.task, first.steps) == ("zoo/small", "ioi", ("verify", "gate"))
    assert first.plan == Plan(n=64, seed=0, method="exact", faithfulness=1.0) and isinstance(first.plan.faithfulness, float)
    assert first.loading == {"dtype": "float32", "revision": "step1"} and first.asked == {"options": {"template": 3}}
    assert [one.loading["revision"] for one in found[:2]] == ["step1", "step2"]  # the last axis runs fastest
    assert len({one.weights for one in found}) == 5
    assert found[-1].plan == Plan(pressure=0.2) and found[-1].steps == Case("a", "b").steps


def test_files_lie_beside_the_plans(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = 'sweep = {model = "wired", task = "wired/pairs.jsonl", fallback = ["mean", "zero"], steps = "verify"}'
    path = write(saved.parent, text)
    monkeypatch.chdir(tmp_path)
    found = read_plans(path)
    assert [one.model for one in found] == [str(saved)] * 2 and {one.task for one in found} == {str(saved / "pairs.jsonl")}
    assert [one.plan.fallback for one in found] == ["mean", "zero"]
    path.unlink()


def test_the_plans_that_the_documents_show(tmp_path: Path):
    root = Path(__file__).resolve().parent.parent
    found = read_plans(root / "examples" / "plans.toml")
    assert len(found) == 7 and {one.model for one in found} == {"zoo/small"}
    for one in found:
        one.check()
    (block,) = re.findall(r"^```toml\n(.*?)^```$", (root / "docs" / "sweeps.md").read_text(), re.M | re.S)
    (tmp_path / "mine.jsonl").touch()
    shown = read_plans(write(tmp_path, block))
    assert len(shown) == 2 * 2 * 3 * 2 + 1 and shown[-1].load_task().options == {"corrupt": "01"}


def test_checkpoints_of_a_folder_are_folders(saved: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step5").symlink_to(saved)
    text = '[sweep]\nmodel = "./run"\ntask = "ioi"\ncheckpoints = ["{}"]'
    (one,) = read_plans(write(tmp_path, text.format("step5")))
    assert one.model == str(tmp_path / "run" / "step5") and one.loading == {}
    with pytest.raises(SweepError, match=r"checkpoint 'step6' .* has no step6/config.json"):
        read_plans(write(tmp_path, text.format("step6")))


@pytest.mark.parametrize(("text", "said"), [
    ("", "asks for nothing"),
    ("[sweep", "is not TOML"),
    ("[swep]", "has 'swep'.*did you mean sweep"),
    ("sweep = 3", r"write a table, \[sweep\]"),
    ("[sweep]\nmodels = ['a']", "names no task: give task"),
    ("[sweep]\nmodels = ['a']\ntasks = []", "task = \\[\\]: give at least one"),
    ("[sweep]\nmodels = ['a']\ntasks = ['b']\nseed = 1\nseeds = [2]", "has 'seed' twice"),
    ("[sweep]\nmodels = ['a']\ntasks = ['b']\nsedes = [2]", r"has 'sedes' \(did you mean seeds\?\)"),
    ("[sweep]\nmodels = ['a']\ntasks = ['b']\nn = '64'", "n = '64': give a whole number"),
    ("[sweep]\nmodels = ['a']\ntasks = ['b']\nnulls = 1", "nulls = 1: give true or false"),
    ("[sweep]\nmodels = ['a']\ntasks = ['b']\nseed = true", "seed = True: give a whole number"),
    ("[sweep]\nmodels = ['a']\ntasks = ['b']\nbudget = 'big'", "choose from default, code, paper"),
    ("[sweep]\nmodels = ['a']\ntasks = ['b']\ndevice_map = 3", "give text or a table"),
    ("[sweep]\nmodels = ['a']\ntasks = ['b']\nmethod = 'guess'", "there is no method 'guess'"),
    ("[sweep]\nmodels = ['a']\ntasks = ['b']\nsteps = ['map']", "choose from gate, attribute, verify"),
    ("[[plan]]\nmodel = 'a'\ntask = 'b'\n[[plan]]\nmodel = 'a'", r"\[\[plan\]\] number 2 names no task"),
])  # fmt: skip
def test_what_plans_may_not_say(tmp_path: Path, text: str, said: str):
    with pytest.raises(PatchclampError, match=said):
        read_plans(write(tmp_path, text))


def test_what_is_missing_is_said_before_anything_runs(saved: Path, tmp_path: Path):
    out = tmp_path / "runs"
    for model, task, said in (
        ("zoo/none", "ioi", "zoo/none"),
        (str(saved), "oi", "did you mean ioi"),
        (str(tmp_path), "ioi", "config"),
    ):
        with pytest.raises(PatchclampError, match=said):
            sweep([Case("zoo/small", "ioi"), Case(model, task)], out)
    for cases, options, said in (
        ([], {}, "no plans"),
        ([Case("zoo/small", "ioi")], {"on": "mars"}, "choose here or ray"),
        ([Case("zoo/small", "ioi")], {"workers": 2}, "--on ray"),
        ([Case("zoo/small", "ioi")], {"shards": 0}, "1 or more"),
    ):
        with pytest.raises(SweepError, match=said):
            sweep(cases, out, **options)
    with pytest.raises(SweepError, match="no loading option 'dtpye'"):
        Case("a", "b", loading={"dtpye": "float32"})
    assert not out.exists()


# --- here


def scores_of(folder: Path | None) -> pl.DataFrame:
    assert folder is not None
    return load_record(folder).scores


@pytest.mark.usefixtures("whole_reports")
def test_a_sweep_is_its_maps(saved: Path, case: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loads: list[str] = []
    load = Model.load.__func__
    monkeypatch.setattr(Model, "load", classmethod(lambda cls, *a, **k: loads.append(str(a[0])) or load(cls, *a, **k)))
    cases = [case(0, FIND), case(1), case(0, min_accuracy=1.0, metric="nll", fallback="zero", n=4000), case(0, VERIFY)]
    told: list[tuple[str, int, int]] = []
    swept = sweep(cases, tmp_path / "runs", progress=lambda row, done, of: told.append((row.state, done, of)))
    assert loads == [str(saved)]  # weights once
    assert [row.state for row in swept.rows] == ["done", "done", "failed", "kept"]  # the last is a part of the first
    assert told == [("done", 1, 4), ("done", 2, 4), ("failed", 3, 4), ("kept", 4, 4)]
    assert "TaskError" in swept.failed[0].error and "600" in swept.failed[0].error
    model, task = Model.load(saved), case().load_task()
    for row in swept.rows[:2]:
        with open_run(tmp_path / f"map{row.case.plan.seed}", model, task, row.case.plan) as run:
            alone = map(model, task, row.case.plan, run, do=row.case.steps)
        assert scores_of(row.folder).equals(alone.scores)
        assert row.headline == alone.record.headline and row.folder is not None and (row.folder / "report.html").is_file()
        assert row.folder.name == row.digest[:12] == alone.record.provenance.digest[:12]
    first = swept.rows[0].found
    assert (
        first["n"] == 12
        and first["accuracy"] == 1
        and first["circuit"]
        and first["faithfulness"]
        and swept.rows[1].found["circuit"] is None
    )
    assert read_table(tmp_path / "runs").equals(swept.table) and swept.table["state"].to_list() == [
        row.state for row in swept.rows
    ]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(
        {row.digest[:12] for row in swept.rows[:2]} | {"sweep.parquet"}
    )
    again = sweep(cases[:2], tmp_path / "runs")
    assert [row.state for row in again.rows] == ["kept", "kept"] and again.rows[0].found == first
    more = sweep([case(1, FIND)], tmp_path / "runs")  # further steps of a finished run are not "kept"
    assert more.rows[0].state == "done" and "second" in scores_of(more.rows[0].folder).columns and more.rows[0].found["circuit"]
    table = tmp_path / "runs" / "sweep.parquet"
    table.write_bytes(table.read_bytes()[:50])
    with pytest.raises(StoreError, match=r"sweep.parquet is damaged"):
        read_table(tmp_path / "runs")
    with pytest.raises(StoreError, match=r"there is no sweep.parquet"):
        read_table(tmp_path)


def test_a_damaged_run_is_named_and_the_others_go_on(case: Callable[..., Case], tmp_path: Path):
    first = sweep([case(0)], tmp_path)
    assert first.rows[0].folder is not None
    (first.rows[0].folder / "manifest.json").write_text("{}")
    swept = sweep([case(0), case(1)], tmp_path)
    assert [row.state for row in swept.rows] == ["failed", "done"] and "manifest.json is damaged" in swept.failed[0].error
    assert [row.state for row in identified([case(0), case(1), case(2)], tmp_path)] == ["failed", "kept", "waiting"]


def test_what_was_interrupted_goes_on(case: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    step, seen = Run.step, list[str]()

    def counted(self: Run, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        known = name in self.seconds
        seen.append(f"{name} {'kept' if known else 'computed'}")
        if len(seen) == 8 and not known:
            raise KeyboardInterrupt
        return step(self, name, function, *args, **kwargs)

    cases = [case(0), case(1), case(2)]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Run, "step", counted)
        sweep(cases, tmp_path)
    table = read_table(tmp_path)
    assert table["state"].to_list() == ["done", "waiting", "waiting"]
    assert not list(tmp_path.glob(".sweep-*"))
    swept = sweep(cases, tmp_path)
    assert [row.state for row in swept.rows] == ["kept", "done", "done"]
    clean = sweep(cases[1:2], tmp_path / "clean")
    assert scores_of(swept.rows[1].folder).equals(scores_of(clean.rows[0].folder))


# --- pieces


@pytest.mark.long
def test_pieces_give_the_same_numbers_bit_for_bit(case: Callable[..., Case], tmp_path: Path):
    asked = case(0, FIND, n=600)  # 150 prompts to confirm on: two whole batches and a part
    whole, out = sweep([asked], tmp_path / "whole").rows[0], tmp_path / "pieces"
    assert [Worker(Place(out)).identify(asked, shards) for shards in (2, 8)] == [(whole.digest, 2), (whole.digest, 3)]
    row = sweep([asked], out, shards=2).rows[0]
    assert row.state == "done" and row.digest == whole.digest
    assert scores_of(row.folder).equals(scores_of(whole.folder))
    assert row.folder is not None and whole.folder is not None
    one, other = load_record(row.folder), load_record(whole.folder)
    assert (one.trust, one.circuit, one.agreement) == (other.trust, other.circuit, other.agreement)
    assert sorted(path.name for path in out.iterdir()) == [row.folder.name, "sweep.parquet"]


@pytest.mark.long
def test_the_map_asks_what_pieces_have_answered(case: Callable[..., Case], tmp_path: Path):
    """Not one exact effect or slope is computed again: the model runs only for what pieces were not asked."""
    asked, place = case(0, FIND, n=600), Place(tmp_path)
    place.open()
    worker = Worker(place)
    digest, pieces = worker.identify(asked, 3)
    model, task = asked.load_model(), asked.load_task()
    known = [answers(model, task, asked, number, pieces) for number in range(pieces)]
    assert not set(known[0]) & set(known[1]) and not set(known[1]) & set(known[2])

    class Watched(dict[str, Any]):
        found = 0

        def __getitem__(self, key: str) -> Any:
            Watched.found += 1
            return super().__getitem__(key)

    union = Watched({key: value for piece in known for key, value in piece.items()})
    worker.finish(asked, digest, union)
    assert Watched.found >= 3 * 5  # confirm and select: two fallbacks, two methods, effects for the circuit, three batches each
    # pieces also noted the noise floor of their own first prompts, which only the first one's map asks for
    unasked = len(union) - Watched.found
    assert unasked == 2 * 2 * (1 + 4 * 5)  # two pieces, two fallbacks; five settings on four prompts, together and one by one
    place.close()


def test_a_small_task_is_not_divided(case: Callable[..., Case], tmp_path: Path):
    assert Worker(Place(tmp_path)).identify(case(0), 4)[1] == 1
    assert BATCH == 64  # the docs say so


def test_parts_made_of_noting_parts_know_nothing(saved: Path, case: Callable[..., Case]):
    model = Model.load(saved)
    fit, _, confirm = case().load_task().split(model.tokenizer, 48, seed=0)
    parts, kept = nodes(model), dict[str, Any]()
    fallback, gates = parts.fallback("resample"), parts.closed()
    noted = noting(parts, kept, note=True)
    value = noted.measure(confirm.batch(), gates, fallback)
    assert torch.equal(value, parts.measure(confirm.batch(), gates, fallback)) and len(kept) == 1
    (key,) = kept
    kept[key] = value + 1
    assert torch.equal(noted.measure(confirm.batch(), gates, fallback), value + 1)
    assert torch.equal(noted.on(model).measure(confirm.batch(), gates, fallback), value)
    assert torch.equal(copy(noted).measure(confirm.batch(), gates, fallback), value) and type(copy(noted)) is type(parts)
    for batch, some, rule in (
        (fit.batch(), gates, fallback), (confirm.batch(), parts.open(), fallback), (confirm.batch(), gates, parts.fallback("zero"))
    ):  # fmt: skip
        assert torch.equal(noted.measure(batch, some, rule), parts.measure(batch, some, rule))
    assert isinstance(noted, type(parts)) and len(kept) == 4


# --- who does what, and what is tried again


class Mortal(Here):
    """A pool in which some jobs kill their worker."""

    def __init__(self, place: Place, dies: Callable[[Job, int], bool]) -> None:
        super().__init__(place)
        self.dies, self.done = dies, list[Job]()

    def next(self) -> Ended | None:
        job = None if self._job is None else self._job[0]
        if job is not None:
            self.done.append(job)
            if self.dies(job, self.done.count(job)):
                self._job, self._held, self.worker = None, None, Worker(self.worker.place)
                return Ended(job, None)
        return super().next()


def driven(cases: Sequence[Case], out: Path, dies: Callable[[Job, int], bool], shards: int = 1) -> tuple[tuple[Row, ...], Mortal]:
    place = Place(out)
    pool = Mortal(place, dies)
    place.open()
    rows = Drive(cases, place, pool, shards, lambda row, done, of: None).run()
    place.close()
    return rows, pool


def test_a_job_whose_worker_dies_is_tried_again(case: Callable[..., Case], tmp_path: Path):
    plain = sweep([case(0)], tmp_path / "plain").rows[0]
    rows, pool = driven([case(0), case(1)], tmp_path / "mortal", lambda job, tried: job.number == 0 and tried < TRIES)
    assert [row.state for row in rows] == ["done", "done"]
    assert scores_of(rows[0].folder).equals(scores_of(plain.folder))
    assert pool.done.count(Job(0, "identify")) == pool.done.count(Job(0, "finish")) == TRIES
    rows, pool = driven([case(0), case(1)], tmp_path / "dead", lambda job, tried: job == Job(0, "finish"))
    assert [row.state for row in rows] == ["failed", "done"] and "WorkerDied: 3 workers died" in rows[0].error
    asked = case(0, ("discover",), n=600)
    rows, pool = driven([asked], tmp_path / "piece", lambda job, tried: job.piece[0] == 1 and job.kind == "piece", shards=3)
    assert rows[0].state == "failed" and Job(0, "finish") not in pool.done


@pytest.mark.long
def test_one_question_under_two_names_is_done_once(saved: Path, case: Callable[..., Case], tmp_path: Path):
    (tmp_path / "twin").symlink_to(saved)
    twin = dataclasses.replace(case(0), model=str(tmp_path / "twin"))
    rows, pool = driven([case(0), twin, case(1)], tmp_path / "runs", lambda job, tried: False)
    assert [row.state for row in rows] == ["done", "kept", "done"] and rows[0].digest == rows[1].digest
    assert [job.number for job in pool.done if job.kind == "finish"] == [0, 2]


def test_workers_keep_the_model_they_hold(tmp_path: Path):
    cases = [Case(model, "ioi", Plan(seed=seed)) for seed in (0, 1) for model in ("a", "b")]
    drive = Drive(cases, Place(tmp_path), Here(Place(tmp_path)), 1, lambda row, done, of: None)
    drive.waiting.extend(Job(number, "identify") for number in range(4))
    assert drive._choose(cases[1].weights) == Job(1, "identify")
    assert drive._choose(cases[1].weights) == Job(3, "identify")
    drive.running.append(Job(2, "identify"))
    drive.waiting.appendleft(Job(1, "identify"))
    drive.waiting.appendleft(Job(0, "identify"))
    assert drive._choose(None) == Job(1, "identify")  # nobody is loading b
    assert drive._choose("c") == Job(0, "identify")
    assert room_for({"CPU": 5.0, "GPU": 3.0}, 2, 1.0) == 2 and room_for({"CPU": 8.0, "GPU": 1.0}, 2, 1.0) == 1
    assert room_for({"CPU": 5.0}, 2, 0.0) == 2 and room_for({"CPU": 5.0}, 1, 1.0) == 0


# --- results from where the folder cannot be seen


def test_files_are_shipped_where_the_folder_is_not_shared(case: Callable[..., Case], tmp_path: Path):
    place, far = Place(tmp_path / "runs"), Worker(Place(tmp_path / "runs", mark="of another host"))
    place.open()
    asked = case(0)
    digest, _ = far.identify(asked, 1)
    files = far.finish(asked, digest, {})
    assert files is not None and list(place.folder.iterdir()) == [place._marked] and ".lock" not in files
    put_in_place(place.run(digest), files)
    assert is_finished(place.run(digest), digest, VERIFY) and not is_finished(place.run(digest), digest, FIND)
    near = Worker(Place(tmp_path / "near"))
    near.place.open()
    assert near.finish(asked, digest, {}) is None
    assert scores_of(place.run(digest)).equals(scores_of(near.place.run(digest)))
    put_in_place(place.run(digest), files)  # over what is there
    with (
        Run.open(place.run(digest), {}, digest=digest, task="", model=""),
        pytest.raises(StoreError, match="is being written by process"),
    ):
        put_in_place(place.run(digest), files)
    assert scores_of(place.run(digest)).equals(scores_of(near.place.run(digest)))
    place.close()
    assert sorted(path.name for path in place.folder.iterdir()) == [digest[:12]]


def test_every_failure_is_an_outcome(case: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    worker = Worker(Place(tmp_path))
    missing = dataclasses.replace(case(0), task="nothing")
    assert worker.take(Job(0, "identify"), missing, 1).error.startswith(f"{TaskError.__name__}: there is no task 'nothing'")

    def broken(self: Case) -> Any:
        raise ZeroDivisionError("of our own")

    monkeypatch.setattr(Case, "load_model", broken)
    outcome: Outcome = Worker(Place(tmp_path)).take(Job(0, "identify"), case(0), 1)
    assert "ZeroDivisionError: of our own (" in outcome.error and "test_sweep.py, line" in outcome.error
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SweepError, match=r"pip install 'patchclamp\[ray\]'"):
        sweep([case(0)], tmp_path / "runs", on="ray")
    assert not (tmp_path / "runs").exists()


# --- from the shell


def test_from_the_shell(cli: Callable[..., tuple[int, str, str]], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = f"[sweep]\nmodel = '{saved}'\ntask = '{saved}/pairs.jsonl'\nn = {{}}\nsteps = 'verify'\n"
    path = write(tmp_path, text.format("[32, 48]"))
    code, out, err = cli("sweep", path, "--list")
    assert code == 0 and "2 plans: 2 waiting" in out and not (tmp_path / "runs").exists(), err
    code, out, err = cli("sweep", path, "--out", "all", "--json")
    assert code == 0, err
    rows = json.loads(out)["plans"]
    assert [row["state"] for row in rows] == ["done", "done"] and "on pairs, seed 0" in err
    code, out, _ = cli("sweep", path, "--out", "all")
    assert code == 0 and "2 plans: 2 kept" in out and rows[0]["folder"] in out
    code, out, _ = cli("runs", "all", "--json")
    assert code == 0 and {Path(row["run"]).name for row in json.loads(out)} == {row["folder"] for row in rows}
    code, out, err = cli("trust", tmp_path / "all" / rows[0]["folder"], "--json")  # a swept run can be asked again
    assert code == 0 and json.loads(out)["trust"]["faithfulness"], err
    code, out, _ = cli("sweep", write(tmp_path, text.format("[48, 4000]")), "--out", "all")
    assert code == 1 and "1 kept, 1 failed" in out and "TaskError" in out
    code, _, err = cli("sweep", write(tmp_path, "[sweep]\nmodles = ['a']"), "--out", "none")
    assert code == 2 and "did you mean models?" in err and not (tmp_path / "none").exists()
    code, _, err = cli("sweep", tmp_path / "nothing.toml")
    assert code == 2 and "no readable file" in err

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Worker, "take", interrupted)
    code, _, err = cli("sweep", write(tmp_path, text.format("64")), "--out", "all")
    assert code == 130 and "run the same command again" in err


# --- on Ray: a real cluster of two nodes besides its head

TASK = """
import os, time
from pathlib import Path
from patchclamp.tasks import load_task

here = Path(__file__).parent
inner = load_task(str(here / "pairs.jsonl"))

def candidates(rng, tokenizer):
    with (here / "log").open("a") as log:
        log.write(f"{os.getpid()}\\n")
    if (here / "slow").exists():
        time.sleep(2)
    yield from inner.candidates(rng, tokenizer)

def task():
    import dataclasses
    return dataclasses.replace(inner, name="slow", candidates=candidates, source=inner.source)
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without processors and two nodes of one each."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = {"object_store_memory": 100 << 20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **options})
    made.test_nodes = [made.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(2)]
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


def log_of(folder: Path) -> list[str]:
    return (folder / "log").read_text().split() if (folder / "log").exists() else []


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # pipes of the cluster's processes, which Ray leaves to be collected
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the same
def test_a_node_is_killed_and_nothing_is_lost(cluster: Any, saved: Path, case: Callable[..., Case], tmp_path: Path):
    (saved / "slow.py").write_text(TASK)
    cases = [case(seed, FIND, task="slow.py") for seed in range(5)]
    here = sweep(cases, tmp_path / "here")
    assert not here.failed
    (saved / "log").unlink()
    (saved / "slow").touch()

    def kill() -> None:
        while len(set(log_of(saved))) < 2:  # both workers are in the middle of a plan
            time.sleep(0.1)
        cluster.remove_node(cluster.test_nodes[0], allow_graceful=False)

    killer = Thread(target=kill, daemon=True)
    killer.start()
    swept = sweep(cases, tmp_path / "ray", on="ray", address=cluster.address)
    killer.join(60)
    (saved / "slow").unlink()
    assert [row.state for row in swept.rows] == ["done"] * 5, [row.error for row in swept.rows]
    assert len(log_of(saved)) > 5  # what the killed node was doing has been begun again
    for one, other in zip(here.rows, swept.rows, strict=True):
        assert one.digest == other.digest and one.found == other.found
        assert scores_of(one.folder).equals(scores_of(other.folder))  # bit for bit
        assert one.folder is not None and other.folder is not None
        assert load_record(one.folder).trust == load_record(other.folder).trust
    assert sorted(path.name for path in (tmp_path / "ray").iterdir()) == sorted(
        [*(row.digest[:12] for row in swept.rows), "sweep.parquet"]
    )
    again = sweep(cases, tmp_path / "ray", on="ray", address=cluster.address)
    assert [row.state for row in again.rows] == ["kept"] * 5


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # as above
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_pieces_and_shipping_on_ray(cluster: Any, case: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = case(0, FIND, n=600)
    here = sweep([asked], tmp_path / "here").rows[0]
    seen: list[int] = []
    monkeypatch.setattr(
        "patchclamp.sweep.drive.put_in_place", lambda folder, files: seen.append(len(files)) or put_in_place(folder, files)
    )
    # workers get a place of another mark, as a host would that has a folder of that name of its own
    monkeypatch.setattr(Place, "__reduce__", lambda self: (Place, (self.folder, "of another host")))
    pieces = sweep(
        [asked, dataclasses.replace(asked, task="greater_than")], tmp_path / "ray", on="ray", address=cluster.address, shards=3
    )
    assert [row.state for row in pieces.rows] == ["done", "failed"] and len(seen) == 4  # three pieces and the run
    assert scores_of(pieces.rows[0].folder).equals(scores_of(here.folder))
    assert pieces.rows[0].found == here.found
    with pytest.raises(SweepError, match="a worker of 4 processors and 0 GPUs was asked for, and the cluster has 2 and 0"):
        sweep([asked], tmp_path / "more", on="ray", address=cluster.address, cpus=4)
    assert not (tmp_path / "more").exists() and os.listdir(tmp_path / "ray")


def test_lists_in_a_plan_are_lists_and_lists_of_lists_are_axes(tmp_path: Path):
    """`keep` is how many parts sets hold: one number or several are one question."""
    file, head = tmp_path / "plans.toml", 'model = "zoo/small"\ntask = "ioi"\n'
    for given, wanted in (("4", [(4,)]), ("[4, 8]", [(4, 8)]), ("[[4], [8]]", [(4,), (8,)])):
        file.write_text(f"[[plan]]\n{head}keep = {given}\n")
        assert [case.plan.keep for case in read_plans(file)] == wanted
    file.write_text(f'[[plan]]\n{head}keep = ["many"]\n')
    with pytest.raises(SweepError, match="give a whole number"):
        read_plans(file)
