"""Which tensors learn and when, windows of a deficit, learning rates and z-loss, against closed forms and small runs by hand."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
import torch

import cases
from patchclamp.errors import MeasureError, TrainingError
from patchclamp.models.model import Model
from patchclamp.training import Rows, Training, next_token, train
from patchclamp.training.clamps import Ablate, Freeze, Schedule
from patchclamp.training.counterfactual import Counterfactual, counterfactual
from patchclamp.training.stability import LOG_Z, SCORE, ZLoss, growing, sweep_rates
from patchclamp.training.tensors import freezing, learning, optimizer_bytes, spared
from patchclamp.training.update import Update
from patchclamp.training.windows import lasting, windows
from patchclamp.units.condition import chosen, condition

PLAN = Training(4, batch=4, rate=1e-2, schedule="constant", decay=0.1, checkpoints=(4,), evaluate=4)


@dataclass(frozen=True)
class Repeating:
    """Rows whose tokens go up by one: easy to learn."""

    name: str = "up by one"

    def rows(self, step: int, count: int) -> Rows:
        draw = torch.Generator().manual_seed(1000 + step)
        start = torch.randint(3, 40, (count, 1), generator=draw)
        return Rows(start + torch.arange(8), torch.ones(count, 8))


def fresh(family: str = "llama", seed: int = 0) -> Model:
    return Model.load(cases.tiny(family, seed=seed))


# --- which tensors


def test_chosen_tensors_alone_learn_and_the_optimizer_keeps_theirs_alone(tmp_path: Path):
    model = fresh()
    names = chosen(condition(model), 3)
    before = {name: one.detach().clone() for name, one in model.hf.named_parameters()}
    with learning(model, names):
        promised = optimizer_bytes(model, PLAN)
        train(model, Repeating(), PLAN, tmp_path / "run")
    moved = {name for name, one in model.hf.named_parameters() if not torch.equal(one.detach(), before[name])}
    assert moved == {*names} and all(one.requires_grad for one in model.hf.parameters())
    assert promised < optimizer_bytes(model, PLAN)


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, optimizer="sgd"), replace(PLAN, optimizer="sgd", betas=(0.0, 0.0))])
def test_bytes_are_what_the_optimizer_holds(plan: Training):
    model = fresh("gpt2")
    with learning(model, ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"]):
        update = Update(model, Repeating(), plan, [], next_token)
        update(0)
        held = [value for state in update.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        assert optimizer_bytes(model, plan) == sum(value.numel() * value.element_size() for value in held)


def test_layers_that_stood_still_are_frozen_in_the_next_stretch(tmp_path: Path):
    """A pilot by hand: layer 0 moves until step 10, layer 1 until step 20."""
    pilot = {0: fresh("gpt2"), 10: fresh("gpt2"), 20: fresh("gpt2")}
    with torch.no_grad():
        for step in (10, 20):
            pilot[step].anatomy.layers[0].down.weight += 0.1
        pilot[20].anatomy.layers[1].down.weight += 0.1
    found = freezing(pilot, 0.5)
    assert [repr(one) for one in found] == [
        repr(Freeze(("L1.block",), Schedule(10, 20))),
        repr(Freeze(("L0.block",), Schedule(20))),
    ]
    model = fresh("gpt2")
    sizes = [sum(p.numel() for p in layer.block.parameters()) for layer in model.anatomy.layers]
    share = spared(model, found, replace(PLAN, steps=40))
    assert share == pytest.approx((10 * sizes[1] + 20 * sizes[0]) / 40 / sum(p.numel() for p in model.hf.parameters()))
    assert freezing(pilot, 0.4) == () and spared(model, (), PLAN) == 0
    held = (Freeze("L1.block", Schedule(0, 2)),)
    weight = model.anatomy.layers[1].down.weight
    kept = [weight.detach().clone()]
    train(model, Repeating(), PLAN, tmp_path / "run", clamps=held, tick=lambda *_: kept.append(weight.detach().clone()))
    assert [torch.equal(one, two) for one, two in pairwise(kept)] == [True, True, False, False]


def test_refusals_of_tensors():
    model = fresh("gpt2")
    with pytest.raises(TrainingError, match="no tensor of that name"), learning(model, ["nothing"]):
        pass
    with pytest.raises(TrainingError, match="no tensors were given"), learning(model, []):
        pass
    with pytest.raises(TrainingError, match="at least two"):
        freezing({0: model}, 0.5)
    with pytest.raises(MeasureError, match="0 to 1"):
        freezing({0: model, 1: fresh("gpt2", 1)}, 1.5)


# --- windows


def test_windows_act_in_their_updates_and_nowhere_else():
    model, rows = cases.model_of("gpt2"), Repeating().rows(0, 2)
    arms = windows(lambda schedule: Ablate("L0.h1", schedule=schedule), (6, 0, 3), 2, steps=10)
    acts = {arm: [step for step in range(10) if clamp.edits(model, step, rows)] for arm, (clamp,) in arms.items()}
    assert acts == {"from-0000000": [0, 1], "from-0000003": [3, 4], "from-0000006": [6, 7]}
    for onsets, length, steps in (((), 2, 10), ((1, 1), 2, 10), ((-1,), 2, 10), ((1,), 0, 10)):
        with pytest.raises(TrainingError, match="windows of"):
            windows(lambda schedule: Ablate("L0.h1", schedule=schedule), onsets, length, steps)
    with pytest.raises(TrainingError, match="recover"):
        windows(lambda schedule: Ablate("L0.h1", schedule=schedule), (8,), 2, 10)


def test_what_lasts_is_the_difference_of_ends():
    """From curves made up: two seeds, their differences +1 and +3, and an arm without one of the seeds' unclamped run."""
    ends = {("unclamped", 0): 1.0, ("unclamped", 1): 2.0, ("early", 0): 2.0, ("early", 1): 5.0, ("late", 1): 2.5}
    table = pl.DataFrame([{"arm": arm, "seed": seed, "free": end} for (arm, seed), end in ends.items()])
    found = lasting(Counterfactual(table, pl.DataFrame(), pl.DataFrame(), {}))
    # Of two seeds there are four resamples, 1, 2, 2 and 3: their 2.5 % point lies .075 of the way from 1 to 2.
    assert found.row(0) == ("early", 2, 3.5, 2.0, pytest.approx(1.075), pytest.approx(2.925))
    assert found.row(1) == ("late", 1, 2.5, 0.5, None, None)
    with pytest.raises(TrainingError, match="no unclamped run"):
        lasting(
            Counterfactual(table.filter((pl.col("seed") == 1) | (pl.col("arm") == "early")), pl.DataFrame(), pl.DataFrame(), {})
        )


@pytest.mark.long  # phase changes with intervals of six curves
def test_a_late_deficit_costs_what_the_runs_by_hand_say(tmp_path: Path):
    """Ends of runs made by `train` alone; an ablation of a head that writes nothing and cannot learn costs exactly nothing."""

    def build(seed: int) -> Model:
        model = fresh("gpt2", seed)
        with torch.no_grad():
            model.anatomy.layers[0].output.weight[:8] = 0  # what head 0 writes
        return model

    plan = replace(PLAN, steps=16, evaluate=2, checkpoints=(16,))
    mute = Freeze("L0.h0")
    arms = {
        **{f"whole-{n}": c for n, c in windows(lambda s: Ablate("L0.mlp", schedule=s), (0, 8), 6, 16).items()},
        "mute": (Ablate("L0.h0", schedule=Schedule(2, 8)),),
    }
    found = lasting(counterfactual(build, lambda seed: Repeating(), plan, arms, tmp_path, seeds=(0, 1), always=(mute,), rows=16))
    assert found["arm"].to_list() == ["whole-from-0000000", "whole-from-0000008", "mute"] and found["seeds"].to_list() == [
        2,
        2,
        2,
    ]
    assert tuple(found.row(2)[3:]) == (0.0, 0.0, 0.0)
    rows, ends = Repeating().rows(-1, 16), {}
    for arm, clamps in (("free", []), ("held", [Ablate("L0.mlp", schedule=Schedule(8, 14))])):
        for seed in (0, 1):
            model = build(seed)
            train(model, Repeating(), replace(plan, seed=seed), tmp_path / f"own-{arm}-{seed}", clamps=[mute, *clamps])
            ends[arm, seed] = float(next_token(model.run(rows.tokens), rows))
    own = [ends["held", seed] - ends["free", seed] for seed in (0, 1)]
    mean = sum(own) / 2
    edges = [mean + 0.925 * (edge - mean) for edge in (min(own), max(own))]  # as above
    late = found.row(1, named=True)
    assert late["difference"] == pytest.approx(mean, abs=1e-6) and late["difference"] > 1e-3
    assert [late["low"], late["high"]] == pytest.approx(edges, abs=1e-6)


# --- learning rates


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_z_loss_is_its_formula_and_splits_into_pieces(dtype: torch.dtype):
    rows = replace(Repeating().rows(0, 3), weights=torch.rand(3, 8, generator=torch.Generator().manual_seed(0)))
    logits = torch.randn(3, 8, 50, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 3
    total = over = 0.0
    for i in range(3):
        for j in range(1, 8):
            z = sum(math.exp(float(x)) for x in logits[i, j - 1])
            loss = math.log(z) - float(logits[i, j - 1, rows.tokens[i, j]]) + 0.3 * math.log(z) ** 2
            total += float(rows.weights[i, j]) * loss
            over += float(rows.weights[i, j])
    whole = float(ZLoss(0.3)(logits, rows))
    assert whole == pytest.approx(total / over, rel=1e-6)
    pieces = rows.split(2)
    parts = [float(ZLoss(0.3)(some, piece)) * piece.weight for some, piece in zip(logits.tensor_split(2), pieces, strict=True)]
    assert sum(parts) / rows.weight == pytest.approx(whole, rel=1e-5)
    assert float(ZLoss(0.0)(logits, rows)) == float(next_token(logits, rows)) and repr(ZLoss(0.3)) == "ZLoss(coefficient=0.3)"
    with pytest.raises(TrainingError, match="z-loss"):
        ZLoss(-1.0)


def test_z_loss_makes_the_normaliser_small(tmp_path: Path):
    """Twenty updates with it and without."""
    ends: list[float] = []
    for coefficient in (0.0, 0.1):
        model = fresh()
        measure = growing(Repeating(), rows=8)
        train(model, Repeating(), replace(PLAN, steps=20, decay=0.0), tmp_path / str(coefficient), loss=ZLoss(coefficient))
        ends.append(abs(measure(model, 20)[LOG_Z]))
    assert ends[1] < 0.75 * ends[0]


def test_the_largest_score_is_that_of_attention(tmp_path: Path):
    """Of queries and keys by hand; and no norm of queries and keys lets it pass what unit vectors with their gains allow."""
    model, rows = cases.model_of("llama"), Repeating().rows(-1, 8)
    sites = model.record(rows.tokens, ["L*.q", "L*.k"])
    largest = torch.full((8,), -math.inf)
    for number in range(2):
        q, k = (next(v for s, v in sites.items() if s.kind == kind and s.layer == number) for kind in ("q", "k"))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) / 8**0.5
        largest = torch.maximum(largest, scores.masked_fill(~torch.ones(8, 8).tril().bool(), -math.inf).amax((1, 2, 3)))
    assert growing(Repeating(), rows=8)(model, 0)[SCORE] == pytest.approx(float(largest.mean()), rel=1e-5)


def test_a_sweep_is_runs_by_hand_and_a_broken_one_counts_as_no_learning(tmp_path: Path):
    def build() -> Model:
        return fresh("gpt2")

    plan, rates = replace(PLAN, optimizer="sgd", clip=None, steps=12, evaluate=4), (1e-2, 1e0, 1e2, 1e4)
    found = sweep_rates(build, Repeating(), plan, rates, tmp_path / "sweep", rows=16)
    rows, own = Repeating().rows(-1, 16), build()
    initial = float(next_token(own.run(rows.tokens), rows))
    train(own, Repeating(), replace(plan, rate=1e-2), tmp_path / "own")
    losses = found.table["loss"].to_list()
    assert losses[0] == pytest.approx(float(next_token(own.run(rows.tokens), rows)), rel=1e-6)
    assert found.initial == pytest.approx(initial, rel=1e-6) and losses[0] < initial
    assert math.isinf(losses[-1]) or losses[-1] > initial
    capped = [min(loss, initial) for loss in losses]
    assert found.sensitivity == pytest.approx(sum(capped) / 4 - min(capped))
    again = sweep_rates(build, Repeating(), plan, rates, tmp_path / "sweep", rows=16)
    whole = found.table["step"] == 12
    assert again.table.filter(whole).equals(found.table.filter(whole)) and isinstance(again.table, pl.DataFrame)
    with pytest.raises(TrainingError, match="at least 3"):
        sweep_rates(build, Repeating(), plan, (1e-2, 1e-1), tmp_path / "few")


def test_a_sweep_trains_with_the_loss_that_is_given_and_reports_that_of_the_next_token(tmp_path: Path):
    """With a z-loss so strong that training by it ends elsewhere; beside a run by hand."""
    plan, loss = replace(PLAN, steps=6, evaluate=6, checkpoints=(6,)), ZLoss(1.0)
    found = sweep_rates(fresh, Repeating(), plan, (1e-3, 3e-3, 9e-3), tmp_path / "sweep", loss=loss, rows=16)
    rows, ends = Repeating().rows(-1, 16), list[float]()
    for given in (loss, next_token):
        own = fresh()
        train(own, Repeating(), replace(plan, rate=9e-3), tmp_path / f"own-{len(ends)}", loss=given)
        ends.append(float(next_token(own.run(rows.tokens), rows)))
    assert found.table["loss"][2] == pytest.approx(ends[0], rel=1e-6) and abs(ends[1] - ends[0]) > 0.01
