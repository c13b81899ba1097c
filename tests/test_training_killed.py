"""Runs that are killed, interrupted or damaged, and runs of several processes: the same weights in the end."""

import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import training_run
from patchclamp.errors import TrainingError
from patchclamp.training import Trained, checkpoint, read_metrics
from patchclamp.training.interrupt import Interrupt


def carry_out(*words: object) -> None:
    """What `training_run` is told to do, in processes of its own."""
    command = [sys.executable, training_run.__file__, *" ".join(map(str, words)).split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr


def randomly(seed: int) -> list[int]:
    """Five steps of a run, in order, before its last two states."""
    return sorted(random.Random(seed).sample(range(2, training_run.STEPS - 5), 5))


def same(a: Trained, b: Trained) -> None:
    """Weights bit for bit, every number of the metrics, the same checkpoints with the same files."""
    for (name, one), other in zip(a.model.hf.state_dict().items(), b.model.hf.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert a.metrics.equals(b.metrics)
    assert read_metrics(a.out).equals(read_metrics(b.out))
    assert a.steps == b.steps
    for step in a.steps:
        for name in ("model.safetensors", "optimizer.safetensors"):
            files = [checkpoint.folder_of(run.out, step) / name for run in (a, b)]
            assert files[0].read_bytes() == files[1].read_bytes(), files[1]
    left = [str(path.relative_to(b.out)) for path in b.out.rglob("*") if ".part" in path.name or path.name == "metrics"]
    assert not left


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Trained:
    """The training that nothing disturbs."""
    return training_run.run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def outside(tmp_path_factory) -> Path:
    """Runs of processes of their own: killed five times at random steps and once while it writes; cut off, of two processes."""
    room = tmp_path_factory.mktemp("outside")
    carry_out("kill", room / "killed", *randomly(5), "w20", "and together", room / "two", 2, 14)
    return room


def test_killed_five_times_at_random_steps(whole, outside):
    """kill -9 each time, and once more with half a checkpoint written; what is left is trained here."""
    there = checkpoint.resumable(outside / "killed")
    assert there is not None and 7 <= there < 20
    assert list((outside / "killed" / "checkpoints").glob(".*.part"))
    same(whole, training_run.run(outside / "killed"))


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_other_random_steps(whole, tmp_path, seed):
    carry_out("kill", tmp_path / "run", *randomly(seed))
    same(whole, training_run.run(tmp_path / "run"))


@pytest.mark.long
def test_killed_while_checkpoints_are_written(whole, tmp_path):
    """The first one, ones that are dropped later, ones that stay, and those behind them, one after the other; and the last."""
    carry_out("kill", tmp_path / "run", "w0 w0 w4 w7 w8 w12 w13 w16 w24")
    assert checkpoint.resumable(tmp_path / "run") == 20
    same(whole, training_run.run(tmp_path / "run"))


MOMENTS = [*(pytest.param(name, marks=pytest.mark.long) for name in ("save_file", "write_json")), "drop"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_cut_off_inside_the_writing_of_a_checkpoint(whole, tmp_path, monkeypatch, moment):
    """At any of its parts, here by an exception, which leaves what a kill would leave."""
    own, calls = getattr(checkpoint, moment), []

    class Cut(Exception):
        pass

    def cut(*words, **named):
        calls.append(1)
        if len(calls) == 4:
            raise Cut
        return own(*words, **named)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, moment, cut)
        with pytest.raises(Cut):
            training_run.run(tmp_path / "run")
    same(whole, training_run.run(tmp_path / "run"))


def test_ctrl_c_leaves_the_state_behind_the_last_update(whole, tmp_path):
    """Also between checkpoints: nothing is computed twice."""

    def press(done: int, of: int, numbers: object) -> None:
        if done == 11:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        training_run.run(tmp_path / "run", tick=press)
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint.resumable(tmp_path / "run") == 11
    same(whole, training_run.run(tmp_path / "run"))


def test_in_a_thread_there_are_no_signals_to_take():
    found: list[bool] = []

    def act() -> None:
        with Interrupt() as interrupt:
            found.append(interrupt.asked)

    thread = threading.Thread(target=act)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_second_ctrl_c_does_not_wait():
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.asked
        signal.raise_signal(signal.SIGINT)


def test_a_damaged_checkpoint_is_named(whole, tmp_path):
    """One bit is enough; without that folder the run goes on from the one before."""
    training_run.run(tmp_path / "run")
    weights = checkpoint.folder_of(tmp_path / "run", 24) / "model.safetensors"
    body = bytearray(weights.read_bytes())
    body[-5] ^= 1
    weights.write_bytes(body)
    with pytest.raises(TrainingError, match=r"step-0000024 is damaged \(model.safetensors is not what was written\): delete"):
        training_run.run(tmp_path / "run")
    checkpoint.drop(tmp_path / "run", 24)
    same(whole, training_run.run(tmp_path / "run"))


def test_two_processes_are_one(outside):
    """With a clamp, padded rows of unequal weight and an accumulation of two: each one's share counts what it weighs.

    Two processes train until the first gets Ctrl-C behind step 14, and both stop behind the same update; one goes on alone. 1e-6,
    for sums run in another order.
    """
    assert checkpoint.resumable(outside / "two") == 15
    one = training_run.run(outside / "one", training_run.LINEAR)
    two = training_run.run(outside / "two", training_run.LINEAR)
    for (name, a), b in zip(one.model.hf.named_parameters(), two.model.hf.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)
    losses = [run.curve("loss")["value"].to_list() for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][:15] != losses[1][:15]  # else there were not two
    assert one.curve("tokens").equals(two.curve("tokens"))


@pytest.mark.long
def test_one_process_then_three_then_two(tmp_path):
    """A run that one process began goes on with three, then with two."""
    one = training_run.run(tmp_path / "one", training_run.LINEAR)
    with pytest.raises(SystemExit):
        training_run.run(tmp_path / "more", training_run.LINEAR, tick=lambda done, of, numbers: sys.exit() if done == 9 else None)
    carry_out("together", tmp_path / "more", 3, 15, "and together", tmp_path / "more", 2)
    more = training_run.run(tmp_path / "more", training_run.LINEAR)  # nothing is left: it loads what there is
    assert more.steps == one.steps
    for a, b in zip(one.model.hf.parameters(), more.model.hf.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
