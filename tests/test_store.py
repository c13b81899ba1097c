"""Runs on disk: what is kept comes back, what is killed resumes, what fails leaves nothing, what is damaged is named."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from fake_record import fake_record
from patchclamp.circuit import Circuit
from patchclamp.errors import StoreError
from patchclamp.scores import Scores
from patchclamp.sites import Edge, Site
from patchclamp.store import Run, digest, load_plan, load_record, runs, weights_hash
from patchclamp.store.codec import Encoded, decode, dumps, encode
from patchclamp.store.manifest import Manifest

PLAN = {"metric": "logit_diff", "seed": 0}
SRC = Path(__file__).resolve().parent.parent / "src"


def opened(folder: Path, plan: dict[str, Any] = PLAN, **options: Any) -> Run:
    return Run.open(folder, plan, digest=digest("m", "t", plan, {}), task="ioi", model="zoo/small", **options)


def refuse() -> dict[str, Any]:
    raise AssertionError("this step was finished and must not be computed again")


# --- what may be kept


RESULT: dict[str, Any] = {
    "numbers": [1, 0.1 + 0.2, float("inf"), -0.0, True, None, np.float32(0.1), np.int64(3)],
    "pair": ("a", (1, 2)),
    "set": frozenset({Site("head", 1, 2), Site("mlp", 0)}),
    "odd keys": {1: "one", "$frame": "not one", ("a", 2): {}},
    "frame": pl.DataFrame({"a": [1, None], "b": ["x", "</script>"]}),
    "array": np.arange(6, dtype=np.float64).reshape(2, 3).T,
    "scalar array": np.array(2.5),
    "tensor": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
    "nested": [{"tensor": torch.zeros(2, 0, dtype=torch.int64)}],
    "circuit": Circuit(["L9.h6"], {"k": 1}),
    "edge": Edge.parse("L2.mlp>L9.h6.q"),
    "scores": Scores.of([Site("mlp", 0)], [1.0], {"n": 3}),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.generic):
        a = a.item()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, pl.DataFrame):
        return a.equals(b) and a.schema == b.schema
    if isinstance(a, Scores):
        return a.about == b.about and a.table.equals(b.table)
    return a == b or repr(a) == repr(b) == "nan"


def test_every_kind_of_value_comes_back(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        first = run.step("all", lambda: RESULT)
        assert same(RESULT, first)
    with opened(tmp_path / "run") as run:
        assert same(RESULT, run.step("all", refuse))
    kinds = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert kinds == {".json", ".parquet", ".safetensors"}


@pytest.mark.parametrize(
    "bad", [object(), print, Path("x"), np.array(["text"])], ids=["object", "function", "path", "text array"]
)
def test_what_cannot_be_kept_is_refused_by_place(bad: object, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"at a\.0 cannot be kept"), opened(tmp_path / "run") as run:
        run.step("bad", lambda: {"a": [bad]})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["os:system", "patchclamp.files:sha256", "patchclamp.nowhere:Circuit", "patchclampx:Y", "x"])
def test_a_file_cannot_name_code_to_run(name: str) -> None:
    with pytest.raises(StoreError, match="not a result of this version"):
        decode(Encoded({"$type": name}))


def test_sections_are_read_by_the_names_that_earlier_runs_gave_them():
    """Runs on disk name a section by the file that held it then: store.record."""
    record = fake_record()
    for name in ("relations", "dynamics", "contrast", "sets", "alternatives", "localisation"):
        section = getattr(record, name)
        encoded, kind = encode(section), type(section)
        assert encoded.tree["$type"] == f"patchclamp.store.sections:{kind.__name__}"
        encoded.tree["$type"] = f"patchclamp.store.record:{kind.__name__}"
        assert type(decode(encoded)) is kind


# --- resuming


def test_steps_are_computed_once_and_told_of(tmp_path: Path) -> None:
    calls: list[int] = []
    told: list[tuple[str, str]] = []

    def work(x: int, *, y: int) -> dict[str, float]:
        calls.append(x)
        return {"sum": x + y}

    for _ in range(2):
        with opened(tmp_path / "run", watch=lambda name, event, seconds: told.append((name, event))) as run:
            assert run.step("add", work, 1, y=2) == {"sum": 3}
            assert list(run.seconds) == ["add"]
    assert calls == [1] and told == [("add", "begin"), ("add", "done"), ("add", "kept")]
    assert load_plan(tmp_path / "run") == PLAN
    assert Run.unsaved().step("add", work, 1, y=2) == {"sum": 3}


KILLED = """
import os, signal, sys
import numpy as np
sys.path.insert(0, {src!r})
from patchclamp.store import Run, digest
plan = {{"metric": "logit_diff", "seed": 0}}
run = Run.open({folder!r}, plan, digest=digest("m", "t", plan, {{}}), task="ioi", model="zoo/small")
run.step("one", lambda: {{"x": np.random.default_rng(0).normal(size=3)}})
def stuck():
    print("in", flush=True)
    signal.pause()
run.step("two", stuck)
"""


def start_and_wait(folder: Path) -> "subprocess.Popen[str]":
    program = KILLED.format(src=str(SRC), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    return process


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes_at_its_last_step(tmp_path: Path, how: signal.Signals) -> None:
    folder = tmp_path / "run"
    process = start_and_wait(folder)
    with process:
        assert runs(tmp_path)[0].status == "running"
        with pytest.raises(StoreError, match=f"being written by process {process.pid}"):
            opened(folder)
        process.send_signal(how)
    assert process.returncode == -how
    (folder / "steps" / ".two.json.1.part").write_text("half")
    assert runs(tmp_path)[0].status == "unfinished"
    with opened(folder) as run:  # the dead process's lock is free
        np.testing.assert_array_equal(run.step("one", refuse)["x"], np.random.default_rng(0).normal(size=3))
        assert run.step("two", lambda: {"y": 1}) == {"y": 1}
    assert not list(folder.rglob("*.part")) and not (folder / ".lock").exists()


def test_ctrl_c_keeps_finished_steps(tmp_path: Path) -> None:
    def pressed() -> dict[str, int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "a") as run:
        run.step("one", lambda: {"x": 1})
        run.step("two", pressed)
    with opened(tmp_path / "a") as run:
        assert run.step("one", refuse) == {"x": 1}
    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "b" / "c") as run:
        run.step("one", pressed)
    assert not (tmp_path / "b").exists()  # nothing was finished: nothing to keep


def test_pieces_of_a_step_are_kept_until_it_is_done(tmp_path: Path) -> None:
    """Cut off between two pieces: the first is not computed again, and the step counts their time; then nothing of them is left."""
    calls: list[str] = []

    def half(name: str) -> dict[str, float]:
        calls.append(name)
        time.sleep(0.05)
        return {"x": float(np.random.default_rng(len(name)).normal())}

    def whole(run: Run, cut: bool) -> dict[str, float]:
        one = run.piece("two", "a", half, "one")
        if cut:
            raise KeyboardInterrupt
        return {"sum": one["x"] + run.piece("two", "b", half, "three")["x"]}

    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), opened(folder) as run:
        run.step("two", whole, run, True)
    assert runs(tmp_path)[0].status == "unfinished" and not Manifest.read(folder).done
    with pytest.raises(StoreError, match=r"not finished \(0 steps are\)"):
        load_record(folder)
    with opened(folder) as run:
        assert not run.seconds
        found = run.step("two", whole, run, False)
        assert calls == ["one", "three"] and run.seconds["two"] >= 0.1
    assert found == {"sum": sum(float(np.random.default_rng(size).normal()) for size in (3, 5))}
    assert list(Manifest.read(folder).steps) == ["two"] and [path.name for path in (folder / "steps").iterdir()] == ["two.json"]
    assert Run.unsaved().step("two", whole, Run.unsaved(), False) == found


def test_a_failed_command_takes_its_pieces_away(tmp_path: Path) -> None:
    """Those of an earlier session stay, as long as their step is not done."""

    def broken(run: Run, name: str) -> dict[str, int]:
        run.piece("two", name, lambda: {"x": 1})
        return fail()

    with opened(tmp_path / "run") as run:
        run.step("one", lambda: {"x": 1})
    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "run") as run:
        run.piece("two", "a", lambda: {"x": 1})
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="boom"), opened(tmp_path / "run") as run:
        run.step("two", broken, run, "b")
    assert list(Manifest.read(tmp_path / "run").steps) == ["one", "two.a"]
    with pytest.raises(ValueError, match="boom"), opened(tmp_path / "run") as run:
        run.step("two", lambda: {"x": run.piece("two", "a", refuse)["x"]})
        run.step("three", fail)
    assert list(Manifest.read(tmp_path / "run").steps) == ["one"]
    assert sorted(path.name for path in (tmp_path / "run/steps").iterdir()) == ["one.json"]


# --- failing


def fail() -> dict[str, int]:
    raise ValueError("boom")


def test_a_failed_command_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "new" / "run", tmp_path / "mine"):
        with pytest.raises(ValueError, match="boom"), opened(folder) as run:
            run.step("one", lambda: {"x": np.zeros(2)})
            (folder / "report.html").write_text("half")
            run.step("two", fail)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_a_failed_command_leaves_an_older_run_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with opened(folder) as run:
        run.step("one", lambda: {"x": 1})
        run.save(fake_record())
    (folder / "report.html").write_text("old")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="boom"), opened(folder) as run:
        run.step("one", refuse)
        run.step("new", lambda: {"x": np.zeros(2)})
        run.step("bad", fail)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_failing_after_saving_anew_keeps_a_run_that_reads(tmp_path: Path) -> None:
    from dataclasses import replace

    with opened(tmp_path / "run") as run:
        run.save(fake_record())
    with pytest.raises(ValueError, match="boom"), opened(tmp_path / "run") as run:
        run.save(replace(fake_record(), headline="written anew"))
        raise ValueError("boom")
    assert load_record(tmp_path / "run").headline == "written anew"


def test_what_cannot_be_written_is_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for folder, message in (("file/run", "cannot be written"), ("file", "cannot be written"), ("full", "thesis.tex")):
        with pytest.raises(StoreError, match=message):
            opened(tmp_path / folder)
    with pytest.raises(StoreError, match=r"cannot be written .*--out"):
        opened(Path("/proc/patchclamp/run"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "thesis.tex"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        opened(tmp_path / "run")


def test_another_question_is_refused_and_named(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        run.step("one", lambda: {})
    with pytest.raises(StoreError, match=r"seed 0 there, 1 here"):
        opened(tmp_path / "run", {**PLAN, "seed": 1})
    with pytest.raises(StoreError, match="with other weights, task or methods"):
        Run.open(tmp_path / "run", PLAN, digest="0" * 64, task="ioi", model="zoo/small")


# --- damage


def flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(bytes(body))


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with opened(folder) as run:
        run.step("one", lambda: {"x": np.zeros(2), "t": pl.DataFrame({"a": [1]})})
        run.save(fake_record())
    names = [path for path in folder.rglob("*") if path.is_file()]
    assert len(names) == 32, names
    for path in names:
        intact = path.read_bytes()
        flip(path)
        with pytest.raises(StoreError, match=f"{path.name} is damaged") as caught, opened(folder) as run:
            run.step("one", refuse)
            load_record(folder)
        assert "elete" in str(caught.value)
        path.write_bytes(intact)
    with opened(folder) as run:
        run.step("one", refuse)


def test_a_deleted_file_is_computed_anew(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        run.step("one", lambda: {"x": np.ones(2)})
    (tmp_path / "run/steps/one.safetensors").unlink()
    (tmp_path / "run/plan.json").unlink()
    with opened(tmp_path / "run") as run:
        assert run.step("one", lambda: {"x": np.ones(2)})["x"].tolist() == [1, 1]
    assert load_plan(tmp_path / "run") == PLAN


def test_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        run.step("one", lambda: {})
    with pytest.raises(StoreError, match=r"not finished \(1 steps are\)"):
        load_record(tmp_path / "run")
    with pytest.raises(StoreError, match="is not a run"):
        load_record(tmp_path)


# --- records and lists of runs


def test_a_record_comes_back(tmp_path: Path) -> None:
    record = fake_record("</script>")
    with opened(tmp_path / "run") as run:
        run.save(record)
    again = load_record(tmp_path / "run")
    assert dumps(encode(again).tree) == dumps(encode(record).tree)
    assert again.scores.equals(record.scores) and again.circuit == record.circuit
    assert again.patterns is not None and record.patterns is not None
    np.testing.assert_array_equal(again.patterns.weights, record.patterns.weights)
    assert pl.read_parquet(tmp_path / "run" / "scores.parquet").equals(record.scores)
    assert (tmp_path / "run" / "tensors.safetensors").is_file()


def test_a_record_without_its_columns_is_refused() -> None:
    from dataclasses import replace

    with pytest.raises(StoreError, match=r"curve need the columns .*: faithfulness, low, high, completeness not there"):
        replace(fake_record(), curve=pl.DataFrame({"k": [1]}))


def test_runs(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as run:
        run.save(fake_record())
    time.sleep(1.01)  # dates are kept to the second
    with opened(tmp_path / "b") as run:
        run.step("one", lambda: {})
    (tmp_path / "c").mkdir()
    (tmp_path / "c/manifest.json").write_text("{}")
    found = runs(tmp_path)
    assert [(info.name, info.status) for info in found] == [("b", "unfinished"), ("a", "finished"), ("c", "damaged")]
    assert found[1].headline == fake_record().headline and found[1].task == "ioi"
    assert [info.name for info in runs(tmp_path / "a")] == ["a"] and runs(tmp_path / "nowhere") == []


def test_default_folder_is_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Run.open(None, PLAN, digest="ab" * 32, task="ioi", model="m") as run:
        run.step("one", lambda: {})
    assert (tmp_path / "runs" / "abababababab" / "plan.json").is_file()


# --- identity


def test_digest_is_of_the_question_alone() -> None:
    base = digest("m", "t", {"a": 1, "b": (1, 2)}, {"exact": 1})
    assert base == digest("m", "t", {"b": [1, 2], "a": 1}, {"exact": 1}) and len(base) == 64
    others = [
        digest("n", "t", {"a": 1, "b": (1, 2)}, {"exact": 1}),
        digest("m", "u", {"a": 1, "b": (1, 2)}, {"exact": 1}),
        digest("m", "t", {"a": 2, "b": (1, 2)}, {"exact": 1}),
        digest("m", "t", {"a": 1, "b": (1, 2)}, {"exact": 2}),
    ]
    assert len({base, *others}) == 5
    with pytest.raises(StoreError, match="it holds a object"):
        digest("m", "t", {"a": object()}, {})


def test_weights_hash_sees_weights_and_counts_tied_ones_once() -> None:
    table = torch.arange(6.0).reshape(2, 3)
    base = weights_hash({"embed": table, "head": table.T})
    assert base == weights_hash({"head": table.clone().T, "embed": table.clone()})
    assert weights_hash({"a": table, "b": table}) == weights_hash({"a": table})
    changed = table.clone()
    changed[0, 0] += 1e-6
    others = [weights_hash({"embed": changed, "head": changed.T}), weights_hash({"embed": table.double(), "head": table.T}),
              weights_hash({"embed": table, "head": table.T}, {"n_head": 2})]  # fmt: skip
    assert len({base, *others}) == 4
    assert weights_hash({"a": table}, {"n_head": 2, "_name_or_path": "x"}) == weights_hash({"a": table}, {"n_head": 2})
    weights_hash({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.tensor(3.0)})


def test_weights_hash_is_cached_by_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHCLAMP_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1")
    first = weights_hash({"a": torch.ones(2)}, files=[file])
    assert first == weights_hash({"a": torch.ones(2)})
    assert weights_hash({"a": torch.zeros(2)}, files=[file]) == first  # read from the cache: the weights were not looked at
    file.write_bytes(b"22")
    assert weights_hash({"a": torch.zeros(2)}, files=[file]) != first


def test_what_differs_between_questions_is_named_however_deep(tmp_path: Path) -> None:
    def asked(chat: bool) -> dict[str, object]:
        return {"n": 8, "source": {"model": "m", "asked": {"options": None, "columns": None, "chat": chat}}}

    Run.open(tmp_path / "run", asked(False), digest="a" * 64, task="t", model="m").close()
    with pytest.raises(StoreError, match=r"\(source\.asked\.chat False there, True here\)"):
        Run.open(tmp_path / "run", asked(True), digest="b" * 64, task="t", model="m")
