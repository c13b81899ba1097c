"""Counterfactual learning curves: verdicts on curves that are known, and runs that share their seeds and rows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from patchclamp.errors import TrainingError
from patchclamp.models.model import Model
from patchclamp.training import Rows, Training, train
from patchclamp.training.clamps import Ablate, Force, Schedule
from patchclamp.training.counterfactual import Counterfactual, Curve, compared, counterfactual, interval, repeated

STEPS = np.arange(0, 1001, 10)


@dataclass(frozen=True)
class Repeats:
    """Random tokens said twice."""

    seed: int = 0
    half: int = 5

    @property
    def name(self) -> str:
        return f"repeats-{self.seed}"

    def rows(self, step: int, count: int) -> Rows:
        draw = torch.Generator().manual_seed(10_000 * self.seed + 1000 + step)
        first = torch.randint(1, 20, (count, self.half), generator=draw)
        return Rows(torch.cat([first, first], 1), torch.ones(count, 2 * self.half))


def small(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return Model.load(GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval())


def turn(middle: float) -> np.ndarray:
    """From 4 to 1, nine tenths of it within a factor of about 1.6."""
    return 1 + 3 / (1 + np.exp((np.log1p(STEPS) - np.log1p(middle)) / 0.11))


def curves(arms: dict[str, list[np.ndarray]]) -> pl.DataFrame:
    rows = [
        {"arm": arm, "seed": seed, "step": int(step), "value": float(value), "free": float(value)}
        for arm, of_seeds in arms.items() for seed, values in enumerate(of_seeds) for step, value in zip(STEPS, values, strict=True)
    ]  # fmt: skip
    return pl.DataFrame(rows)


MIDDLES = [300, 330, 360, 280, 400]


def test_verdicts_on_curves_that_are_known():
    """An arm whose middles are k times the unclamped ones has the factor k (to 3 %: curves are seen every ten steps)."""
    found = compared(curves({
        "unclamped": [turn(m) for m in MIDDLES],
        "sooner": [turn(m / 2) for m in MIDDLES],
        "slower": [turn(m * 1.6) for m in MIDDLES],
        "same": [turn(m * f) for m, f in zip(MIDDLES, (0.95, 1.05, 1.02, 0.98, 1.0), strict=True)],
        "stuck": [np.full(len(STEPS), 4.0)] * 5,
        "some": [turn(m * 1.6) for m in MIDDLES[:3]] + [np.full(len(STEPS), 4.0)] * 2,
        "at-once": [np.full(len(STEPS), 1.0)] * 5,
    }), 1000, resamples=20)  # fmt: skip
    arms = {row["arm"]: row for row in found.arms.rows(named=True)}
    assert {name: row["verdict"] for name, row in arms.items()} == {
        "sooner": "earlier", "slower": "later", "same": "no difference", "stuck": "never", "some": "later", "at-once": "earlier",
    }  # fmt: skip
    assert arms["sooner"]["factor"] == pytest.approx(0.5, rel=0.03) and arms["slower"]["factor"] == pytest.approx(1.6, rel=0.03)
    assert all(row["low"] <= row["factor"] <= row["high"] for row in arms.values())
    assert (arms["stuck"]["never"], arms["some"]["never"], arms["slower"]["never"]) == (5, 2, 0)
    steps = found.table.filter(arm="unclamped")["step"].to_list()
    assert steps == pytest.approx(MIDDLES, rel=0.02)
    assert found.table.filter(arm="at-once")["step"].null_count() == 5  # low from the start: no change of its own
    assert found.verdict("sooner") == "earlier"
    with pytest.raises(TrainingError, match="there is no arm"):
        found.verdict("other")


def test_nothing_is_said_where_the_unclamped_runs_do_not_change():
    flat = np.full(len(STEPS), 4.0)
    found = compared(curves({"unclamped": [turn(300), turn(300), flat], "arm": [turn(100)] * 3}), 1000, resamples=20)
    assert found.verdict("arm") == "too few" and found.arms["factor"][0] is None


def test_the_interval_is_that_of_all_samples_with_replacement():
    """Of two values a quarter of samples is each twice: quantiles of (a, (a + b) / 2, (a + b) / 2, b)."""
    assert interval(np.array([0.0, 1.0]), 0.5) == pytest.approx(tuple(np.quantile([0, 0.5, 0.5, 1], [0.25, 0.75])))
    low, high = interval(np.arange(9.0))
    assert 0 < low < 4 < high < 8


def test_repeated_tokens_are_those_that_an_induction_head_predicts():
    tokens = [[4, 6, 7, 4, 6, 7, 4, 5, 4, 5, 6]]
    expected = [0.0] * 11
    for i in range(1, 11):
        before = [k for k in range(i - 1) if tokens[0][k] == tokens[0][i - 1]]
        expected[i] = float(bool(before) and tokens[0][before[-1] + 1] == tokens[0][i])
    rows = Rows(torch.tensor(tokens), torch.ones(1, 11))
    assert repeated(rows)[0].tolist() == expected and sum(expected) == 4


def test_arms_share_seeds_and_rows_and_a_second_call_goes_on(tmp_path: Path):
    numbers = Training(16, batch=4, rate=0.003, evaluate=2, checkpoints=(0,))
    arms = {"late": [Ablate("L0.h*", schedule=Schedule(start=9))], "forced": [Force("L0.h0.pattern", "previous")]}
    seen: list[tuple[str, int, int, int]] = []

    def told(*told: object) -> None:
        seen.append(told)

    found = counterfactual(small, Repeats, numbers, arms, tmp_path / "runs", seeds=(3, 4), rows=8, told=told)
    assert seen[-1] == ("forced", 4, 6, 6) and len(found.table) == 6
    plain = train(small(3), Repeats(3), Training(16, batch=4, rate=0.003, evaluate=2, checkpoints=(0,), seed=3), tmp_path / "plain",
                  measures=[Curve(Repeats(3).rows(-1, 8), ())])  # fmt: skip
    unclamped = found.curves.filter(arm="unclamped", seed=3)
    assert unclamped["value"].to_list() == plain.curve("held_out")["value"].to_list()
    late = found.curves.filter(arm="late", seed=3)
    assert late["value"][:5].to_list() == unclamped["value"][:5].to_list()  # steps 0 to 8 are the unclamped run's
    assert late["value"][5] != unclamped["value"][5]
    assert late["free"][:5].to_list() == unclamped["free"][:5].to_list()
    forced = found.curves.filter(arm="forced", seed=3)
    assert forced["value"][0] != forced["free"][0] == unclamped["value"][0]  # the same weights, with and without the clamp
    assert found.verdict("late") == "too few"
    again = counterfactual(small, Repeats, numbers, arms, tmp_path / "runs", seeds=(3, 4), rows=8)
    loaded = Counterfactual.load(tmp_path / "runs")
    for one in (again, loaded):
        assert one.table.equals(found.table) and one.arms.equals(found.arms) and one.curves.equals(found.curves)
    assert loaded.about["seeds"] == [3, 4] and "previous" in loaded.about["clamps"]["forced"][0]


@pytest.mark.parametrize(
    ("arms", "seeds", "evaluate", "said"),
    [
        ({}, (0,), 1, "at least one arm"),
        ({"a": [Ablate("L0.h0")]}, (), 1, "at least one arm"),
        ({"a": [Ablate("L0.h0")]}, (1, 1), 1, "seeds that differ"),
        ({"../a": [Ablate("L0.h0")]}, (0,), 1, "letters, digits"),
        ({"unclamped": [Ablate("L0.h0")]}, (0,), 1, "other than unclamped"),
        ({"a": []}, (0,), 1, "no clamps"),
        ({"a": [Ablate("L0.h0")]}, (0,), 10, "too few points"),
    ],
)
def test_what_makes_no_comparison_is_refused(arms: dict, seeds: tuple, evaluate: int, said: str, tmp_path: Path):
    with pytest.raises(TrainingError, match=said):
        counterfactual(small, Repeats, Training(16, evaluate=evaluate), arms, tmp_path / "runs", seeds=seeds)
    assert not (tmp_path / "runs").exists()


def test_a_damaged_result_is_named(tmp_path: Path):
    with pytest.raises(TrainingError, match="run it again"):
        Counterfactual.load(tmp_path)
