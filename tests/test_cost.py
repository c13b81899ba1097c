"""The cost model against the work that maps really do: multiplications counted by PyTorch while each step runs."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from patchclamp.errors import PatchclampError, StoreError
from patchclamp.gating import GatingSettings, Stage, roles
from patchclamp.models.model import Model
from patchclamp.models.tree import grow
from patchclamp.parts import nodes
from patchclamp.store import Run
from patchclamp.study import Plan, map, open_run
from patchclamp.study.cost import cost, lines
from patchclamp.study.cost.job import Job
from patchclamp.study.cost.pace import Pace, Rate, calibrated
from patchclamp.study.cost.work import Amount, Engine, runs_of
from patchclamp.tasks import Task, load_task
from patchclamp.zoo import wired

CLOSE = 0.1
"""How far a count may be off: attention's own products are shared out as in the whole run, and a batch stands for its set."""
PLAN = Plan(n=48, random_circuits=20)


@pytest.fixture(scope="module")
def small() -> Model:
    return Model.load("zoo/small")


@pytest.fixture(scope="module")
def ioi() -> Task:
    return load_task("ioi")


def job_of(model: Model, task: Task, plan: Plan, settings: GatingSettings | None = None) -> Job:
    return Job(model, plan, task.split(model.tokenizer, plan.n, seed=plan.seed), nodes(model), settings or plan.gating)


def unit(job: Job) -> float:
    """Multiplications of one prompt of the confirm set in a plain run."""
    batch = next(iter(job.split.confirm.batches(64)))
    job.model.target_logits(batch)  # whatever is done once per model is done
    with FlopCounterMode(display=False) as counter:
        job.model.target_logits(batch)
    return counter.get_total_flops() / len(batch.tokens)


def counted(job: Job, task: Task, do: tuple[str, ...]) -> dict[str, float]:
    """By step of a real map, the passes of one prompt that its multiplications are worth; under "" what no step keeps."""
    found: dict[str, float] = {}
    one, at = unit(job), [0.0]

    def watch(name: str, event: str, seconds: float) -> None:
        now = counter.get_total_flops() / one
        found["" if event == "begin" else name] = found.get("" if event == "begin" else name, 0) + now - at[0]
        at[0] = now

    with FlopCounterMode(display=False) as counter:
        map(job.model, task, job.plan, Run.unsaved(watch), do=do)
    return found


def by_step(job: Job, do: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Expected and at most, forward and backward together."""
    found: dict[str, tuple[float, float]] = {}
    for line in lines(job, do):
        was = found.get(line.step, (0.0, 0.0))
        found[line.step] = (
            was[0] + line.expected.forward + line.expected.backward,
            was[1] + line.most.forward + line.most.backward,
        )
    return found


EVERY = ("attribute", "verify", "discover", "trust")
FOUND = {"shifted", "discover", "trust"}
"""Steps that take more or less by what is found: which parts are largest, how large the circuit is."""


@pytest.mark.parametrize(
    ("task", "changes"),
    [("ioi", {}), ("induction", {"second": "zero", "metric": "kl"}),
     pytest.param("ioi", {"fallback": "mean", "metric": "log_probability"}, marks=pytest.mark.long),
     pytest.param("ioi", {"direction": "denoising"}, marks=pytest.mark.long),
     pytest.param("capitals", {"metric": "nll"}, marks=pytest.mark.long)],
)  # fmt: skip
def test_what_is_predicted_is_what_runs(small: Model, task: str, changes: dict[str, str]):
    job = job_of(small, load_task(task), replace(PLAN, min_accuracy=0.0, **changes))
    predicted, real = by_step(job, EVERY), counted(job, load_task(task), EVERY)
    assert set(real) - {""} == {step for step in predicted if step}
    for step, (expected, most) in predicted.items():
        if step in FOUND:
            assert real[step] <= most * (1 + CLOSE), (step, real[step], expected, most)
            assert real[step] == pytest.approx(expected, rel=0.35), (step, real[step], expected, most)
        elif step not in ("", "prompts", "patterns-all"):
            assert real[step] == pytest.approx(expected, rel=CLOSE), (step, real[step], expected, most)
    assert real[""] == pytest.approx(predicted.get("", (0.0, 0.0))[0], rel=CLOSE, abs=1)
    everything = sum(expected for expected, _ in predicted.values())
    assert sum(real.values()) == pytest.approx(everything, rel=CLOSE)


def test_a_hand_wired_model_too():
    """Another family, short prompts, every size of the curve."""
    truth = wired("induction")
    job = job_of(Model.load(truth.hf, tokenizer=truth.tokenizer), truth.task, PLAN)
    predicted, real = by_step(job, ("verify", "discover")), counted(job, truth.task, ("verify", "discover"))
    for step in ("baseline", "exact", "second", "select-effects", "discover"):
        assert real[step] == pytest.approx(predicted[step][0], rel=CLOSE), (step, real[step], predicted[step])


FEW = GatingSettings(seeds=2, batch=12, free=Stage(3, 1.0, 0.1), pressed=Stage(4, 0.7, 0.1), null_seeds=1, null_batch=8, refits=2)


@pytest.mark.long
def test_learned_gates(small: Model, ioi: Task):
    """Descents that go on to their end: as predicted. All with what depends on what is found: no more than at most."""
    fixed = replace(FEW, window=0, settle=False, null_seeds=0, refits=0)
    for settings in (fixed, FEW):
        job = job_of(small, ioi, PLAN, settings)
        mine = {line.title: line for line in lines(job, ("gate",)) if line.step == "roles"}
        spent, whole = spent_on_roles(job)
        assert set(spent) <= set(mine)
        if settings is fixed:
            for title in ("G", "G+ and G-"):
                assert spent[title] == pytest.approx(both(mine[title].expected), rel=CLOSE)
        assert whole <= sum(both(line.most) for line in mine.values())
        assert whole >= 0.5 * sum(both(line.expected) for line in mine.values())


def spent_on_roles(job: Job) -> tuple[dict[str, float], float]:
    """By what progress says of it, and in all, the passes of one prompt that the multiplications of `roles` are worth."""
    spent: dict[str, float] = {}
    one = unit(job)
    with FlopCounterMode(display=False) as counter:

        def told(title: str, done: int, of: int) -> None:
            spent[title] = spent.get(title, 0.0) + counter.get_total_flops() / one - sum(spent.values())

        roles(job.parts, job.split.fit, job.split.select, job.parts.fallback("resample"), job.settings, progress=told)
    return spent, counter.get_total_flops() / one


def both(amount: Amount) -> float:
    return amount.forward + amount.backward


def test_shares_add_up(small: Model, ioi: Task):
    engine = Engine(nodes(small), ioi.examples(small.tokenizer, 4))
    shares = engine.shares
    assert sum(shares.blocks) + shares.unembed == pytest.approx(1)
    assert all(0 < made < block for made, block in zip(shares.projections, shares.blocks, strict=True))


def test_what_settings_share_is_counted_once():
    """By the tree that the engine grows: as many runs at each block, and as many inputs that are not the model's own."""
    chance = random.Random(0)
    for _ in range(40):
        patterns = [tuple(chance.choice([None, None, 1, 2]) for _ in range(4)) for _ in range(12)]
        patterns = [pattern for pattern in patterns if any(pattern)]
        stages = [(*(stage for what in pattern for stage in (0, what or 0)), 0) for pattern in patterns]
        tree = grow(stages, [next(block for block, what in enumerate(pattern) if what) for pattern in patterns])
        runs, inputs = runs_of(patterns)
        assert runs == [len(level) for level in tree.levels[:-1]]
        assert inputs == [len({read for read in level.reads if read >= 0}) for level in tree.levels[:-1]]


def test_seconds_are_calls_and_prompts():
    pace = Pace(Rate(0.5, 0.1, 1.1, 1.2), Rate(0.0, 0.2, 1.0, 1.0), Rate(1.0, 0.0, 1.5, 2.0))
    about, low, high = pace.seconds(Amount(2.0, 10.0, 1.0, 5.0, 3.0, 7.0))
    assert (about, low, high) == pytest.approx((1.1 * 2 + 1 + 4.5, 2 + 1 + 3, 1.2 * 2 + 1 + 6))


def test_the_calibration_is_of_this_machine(small: Model, ioi: Task):
    """Rates are positive, and what is calibrated takes as long as it says, within what a busy machine allows: a factor 4."""
    import time

    job = job_of(small, ioi, PLAN)
    pace = calibrated(job)
    for rate in (pace.plain, pace.folded, pace.sloped):
        assert rate.call >= 0 and rate.prompt >= 0 and rate.seconds(1.0, 16.0) > 0 and 1 <= rate.mean <= rate.slow
    batch, engine = job.split.confirm.batch(), job.engine
    shape = engine.shape(batch, "resample", job.metric)
    gates = job.parts.open(37)
    for number in range(36):
        gates[number, ..., 1 + number] = 0
    began = time.perf_counter()
    for _ in range(3):
        job.parts.measure(replace(batch), gates, job.parts.fallback("resample"), job.metric)
    took = (time.perf_counter() - began) / 3
    about = pace.seconds(engine.measure(shape, engine.singles(), opened=True))[0]
    assert took / 4 < about < took * 4


@pytest.mark.long
def test_what_is_finished_costs_nothing_and_nothing_is_written(small: Model, ioi: Task, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = cost(small, ioi, PLAN, ("verify", "discover"))
    assert new.state == "new" and not list(tmp_path.iterdir()) and not any(line.kept for line in new.lines)
    assert new.total.low <= new.total.about <= new.total.high
    with open_run(None, small, ioi, PLAN) as run:
        map(small, ioi, PLAN, run, do=("attribute",))
        assert run.folder == Path("runs") / new.folder.name
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    part = cost(small, ioi, PLAN, ("verify", "discover"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    kept = {line.step for line in part.lines if line.kept}
    assert kept >= {"baseline", "exact", "prompts"} and "second" not in kept and part.state == "finished"
    assert part.forward == pytest.approx(sum(line.expected.forward for line in part.lines if not line.kept))
    assert part.forward < new.forward
    with pytest.raises(StoreError, match="another run"):
        cost(small, ioi, replace(PLAN, seed=1), folder=new.folder)
    with pytest.raises(PatchclampError, match="there is no step 'guess'"):
        cost(small, ioi, PLAN, ("guess",))


def test_a_smaller_budget_folds_less(small: Model, ioi: Task):
    """More calls, as many passes, less memory."""
    many, few = (cost(small, ioi, PLAN, ("verify",), memory=memory) for memory in ("1GB", "1MB"))
    exact = [next(line for line in found.lines if line.step == "exact") for found in (many, few)]
    assert exact[0].expected.folded == pytest.approx(exact[1].expected.folded)
    assert exact[0].expected.folded_calls < exact[1].expected.folded_calls and exact[0].memory > exact[1].memory
    assert few.budget == 10**6


Cli = Callable[..., tuple[int, str, str]]


def test_from_the_shell(small: Model, tmp_path: Path, monkeypatch, capsys):
    from patchclamp.cli import common, main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.out, "_width", 200)

    def cli(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["patchclamp", *words])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    code, out, err = cli("map", "zoo/small", "ioi", "--n", "48", "--dry-run", "--memory", "64MiB")
    assert code == 0, err
    assert "About" in out and "forward" in out and "67.1 MB at once" in out and "other lambdas" in out
    code, out, _ = cli("discover", "zoo/small", "ioi", "--n", "48", "--dry-run", "--json")
    body = json.loads(out)
    assert code == 0 and body["state"] == "new" and body["seconds"]["about"] > 0 and body["bytes"] > 0
    assert {line["step"] for line in body["lines"]} == {"baseline", "select-effects", "discover", "prompts"}
    for words, said in (
        (("--memory", "lots"), "'lots' is no amount of memory"),
        (("--memory", "0"), "above 0"),
        (("--n", "3"), "16 or more"),
        (("--fallback", "median"), "no fallback 'median'"),
    ):
        code, _, err = cli("map", "zoo/small", "ioi", "--dry-run", *words)
        assert code == 2 and said in " ".join(err.split()), (words, err)
    code, _, err = cli("map", "zoo/small", "ioi", "--n", "48", "--memory", "lots")
    assert code == 2 and "no amount of memory" in err
    assert not list(tmp_path.iterdir())
