"""The trainer: the same numbers as a loop of the tests' own; cut off and begun again, the same weights."""

import json
import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from patchclamp.errors import NumericsError, TrainingError
from patchclamp.models.model import Model
from patchclamp.training import Rows, Training, estimate, held_out, log_spaced, next_token, train


@dataclass(frozen=True)
class Repeats:
    """Random tokens said twice."""

    name: str = "repeats"
    half: int = 6
    seed: int = 0

    def rows(self, step: int, count: int) -> Rows:
        draw = torch.Generator().manual_seed(hash((self.seed, step)) % 2**63)
        first = torch.randint(1, 20, (count, self.half), generator=draw)
        weights = torch.ones(count, 2 * self.half)
        return Rows(torch.cat([first, first], 1), weights)


def small(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=20,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.1,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Model.load(GPT2LMHeadModel(config).eval())


def test_updates_are_those_of_a_loop_of_the_tests_own(tmp_path):
    """AdamW without decay, a constant rate, no dropout: weights equal to 1e-6."""
    ours, theirs = still_small(), still_small().hf
    run = train(ours, Repeats(), Training(5, batch=8, schedule="constant", clip=None), tmp_path)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(5):
        tokens = Repeats().rows(step, 8).tokens
        loss = theirs(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert run.curve("loss")["value"].to_list() == pytest.approx(losses, abs=1e-6)
    for a, b in zip(ours.hf.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def still_small() -> Model:
    """Without dropout."""
    model = small()
    for module in model.hf.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@dataclass(frozen=True)
class Uneven:
    """Repeats of which the predictions count differently, some rows not at all."""

    name: str = "uneven"

    def rows(self, step: int, count: int) -> Rows:
        plain = Repeats().rows(step, count)
        weights = torch.rand(plain.tokens.shape, generator=torch.Generator().manual_seed(step + 9))
        weights[::3] = 0
        return Rows(plain.tokens, weights)


def test_the_interval_of_a_held_out_loss_draws_rows_with_their_weights() -> None:
    """Rows of unlike weight, every third of none, scored one by one; drawn anew by a loop of the test's own. Ends of two bootstraps of 1000
    and 4000 draws lie within a tenth of the interval's width; the mean is the whole batch's, to 1e-6."""
    model, rows = still_small(), Uneven().rows(-1, 32)
    found = held_out(Uneven(), 32, batch=5, interval=True)(model, 0)
    assert list(found) == ["held-out loss", "held-out loss low", "held-out loss high"]
    assert held_out(Uneven(), 32, batch=5)(model, 0) == {"held-out loss": found["held-out loss"]}
    with torch.no_grad():
        logp = model.hf(input_ids=rows.tokens).logits.log_softmax(-1)
    lost = -logp[:, :-1].gather(-1, rows.tokens[:, 1:, None])[..., 0] * rows.weights[:, 1:]
    sums, sizes = lost.sum(1).double().numpy(), rows.weights[:, 1:].sum(1).double().numpy()
    asked = np.flatnonzero(sizes)
    assert len(asked) == 21 and found["held-out loss"] == pytest.approx(sums.sum() / sizes.sum(), abs=1e-6)
    draws = np.random.default_rng(1).choice(asked, (4000, len(asked)))
    low, high = np.percentile(sums[draws].sum(1) / sizes[draws].sum(1), [2.5, 97.5])
    assert abs(found["held-out loss low"] - low) < 0.1 * (high - low) > abs(found["held-out loss high"] - high)


@pytest.mark.parametrize("pieces", [2, 3, 8])
def test_accumulation_is_the_whole_batch(pieces, tmp_path):
    """In pieces of unlike weight (one of them of none): 1e-6, for sums run in another order. SGD, whose steps are linear in gradients."""
    plan = Training(4, batch=8, optimizer="sgd", rate=0.1, schedule="constant")
    whole = train(still_small(), Uneven(), plan, tmp_path / "whole")
    parts = train(still_small(), Uneven(), replace(plan, accumulate=pieces), tmp_path / "parts")
    for a, b in zip(whole.model.hf.parameters(), parts.model.hf.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert parts.curve("loss")["value"].to_list() == pytest.approx(whole.curve("loss")["value"].to_list(), abs=1e-6)
    assert parts.curve("gradient")["value"].to_list() == pytest.approx(whole.curve("gradient")["value"].to_list(), abs=1e-6)


def test_sgd_with_momentum_decay_and_clipping_by_hand(tmp_path):
    """v = .9 v + g + decay w, w -= rate v, where g has norm at most .05; decay on matrices only: 1e-6."""
    plan = Training(3, batch=4, optimizer="sgd", rate=0.1, schedule="linear", floor=0.5, clip=0.05, decay=0.01)
    run = train(still_small(), Repeats(), plan, tmp_path)
    model = still_small().hf
    speed = [torch.zeros_like(p) for p in model.parameters()]
    for step, rate in enumerate((0.1, 0.1 * (1 - 1 / 6), 0.1 * (1 - 2 / 6))):
        tokens = Repeats().rows(step, 4).tokens
        found = torch.autograd.grad(model(input_ids=tokens, labels=tokens).loss, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in found]).norm()
        assert run.curve("gradient")["value"][step] == pytest.approx(norm.item(), rel=1e-5)
        assert norm > 0.05
        with torch.no_grad():
            for p, g, v in zip(model.parameters(), found, speed, strict=True):
                v.mul_(0.9).add_(g * 0.05 / norm + (0.01 * p if p.ndim > 1 else 0))
                p.sub_(rate * v)
    for a, b in zip(run.model.hf.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_schedules():
    def rates(**numbers: object) -> list[float]:
        plan = Training(8, rate=1.0, **numbers)
        return [plan.rate_at(step) for step in range(8)]

    assert rates(schedule="constant", warmup=2) == [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert rates(schedule="linear", warmup=4) == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    assert rates(schedule="wsd", warmup=2, cooldown=4, floor=0.2) == pytest.approx([0.5, 1, 1, 1, 1, 0.8, 0.6, 0.4])
    cosine = [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert rates() == pytest.approx(cosine)
    assert log_spaced(1000, 4) == (0, 1, 10, 100, 1000)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"steps": 0}, "steps 0 was asked: give 1 or more"),
        ({"accumulate": 33}, "accumulate 33 was asked: give at most the 32 rows"),
        ({"schedule": "wsd"}, "cooldown 0 was asked: give the steps of the descent"),
        ({"cooldown": 3}, "cooldown 3 was asked: give 0"),
        ({"warmup": 11}, "between 0 and the 10 steps"),
        ({"precision": "int8"}, "precision 'int8' was asked: choose from float32, bfloat16, float16"),
        ({"rate": math.nan}, "rate nan was asked: give above 0"),
        ({"checkpoints": (3, 11)}, "steps between 0 and 10"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(numbers, message):
    with pytest.raises(TrainingError, match=re.escape(message)):
        Training(**{"steps": 10, **numbers})


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_learns_and_goes_on_with_its_scale(precision, tmp_path):
    """Weights stay float32. In float16 a scale that overflows halves, the update is left out, and a cut changes nothing."""
    plan = Training(12, batch=8, precision=precision, checkpoints=(6,), schedule="constant")
    whole = train(still_small(), Repeats(), plan, tmp_path / "whole")
    exact = train(still_small(), Repeats(), replace(plan, precision="float32"), tmp_path / "exact")
    losses = [run.curve("loss")["value"] for run in (whole, exact)]
    assert 0 < abs(losses[0][0] - losses[1][0]) < 0.01  # bfloat16 has 8 bits, on a loss of about 3
    assert all(p.dtype == torch.float32 for p in whole.model.hf.parameters())
    with pytest.raises(Cut):
        train(still_small(), Repeats(), plan, tmp_path / "cut", tick=cut_at(8))
    again = train(still_small(), Repeats(), plan, tmp_path / "cut")
    assert again.metrics.equals(whole.metrics)
    for a, b in zip(whole.model.hf.parameters(), again.model.hf.parameters(), strict=True):
        assert torch.equal(a, b)
    if precision == "float16":
        saved = json.loads((tmp_path / "whole" / "checkpoints" / "step-0000006" / "checkpoint.json").read_text())
        assert saved["scaler"]["scale"] == whole.curve("scale")["value"][5]


class Cut(Exception):
    """A run is cut off."""


def cut_at(step: int):
    def tick(done: int, of: int, numbers: object) -> None:
        if done == step:
            raise Cut

    return tick


def test_an_overflow_leaves_an_update_out(tmp_path):
    """A gradient that float16 cannot hold once it is scaled: the scale halves, the weights stay."""

    def steep(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        return next_token(logits, rows) * 1e4

    before = {name: p.clone() for name, p in small().hf.named_parameters()}
    run = train(small(), Repeats(), Training(1, batch=4, precision="float16"), tmp_path, loss=steep)
    assert run.curve("scale")["value"].to_list() == [2.0**15]
    assert not math.isfinite(run.curve("gradient")["value"][0])
    assert all(torch.equal(p, before[name]) for name, p in run.model.hf.named_parameters())


def test_a_model_is_left_as_it_was_found(tmp_path):
    """Modes of modules, what requires gradients, hooks; no gradients are left; also where the loss breaks off."""
    model = small()
    model.hf.train()
    model.hf.transformer.h[0].eval()
    model.hf.transformer.wte.weight.requires_grad_(False)
    frozen = model.hf.transformer.wte.weight.clone()

    def state() -> list[object]:
        modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.hf.modules()]
        return [modules, [(p.requires_grad, p.grad is None) for p in model.hf.parameters()]]

    before = state()
    estimated = {name: p.clone() for name, p in model.hf.named_parameters()}
    assert estimate(model, Repeats(), Training(10, batch=4, decay=0.1)).seconds > 0
    assert state() == before
    assert all(torch.equal(p, estimated[name]) for name, p in model.hf.named_parameters())
    random = torch.random.get_rng_state()
    train(model, Repeats(), Training(2, batch=4), tmp_path / "a")
    assert state() == before
    assert torch.equal(model.hf.transformer.wte.weight, frozen)
    assert torch.equal(torch.random.get_rng_state(), random)
    with pytest.raises(NumericsError, match="the loss is nan at step 0"):
        train(model, Repeats(), Training(2, batch=4), tmp_path / "b", loss=lambda logits, rows: logits.sum() * math.nan)
    assert state() == before


def doubled(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    return 2 * next_token(logits, rows)


def test_a_folder_of_another_training_is_refused(tmp_path):
    """Weights, numbers, data, loss, clamps, kernel: each tells runs apart, and what differs is named."""
    plan = Training(2, batch=4)
    train(small(), Repeats(), plan, tmp_path)

    def refused(message: str, model: Model | None = None, data=None, plan: Training = plan, **more) -> None:
        with pytest.raises(TrainingError, match=message):
            train(model or small(), data or Repeats(), plan, tmp_path, **more)

    refused("training.rate is 0.001 there, and 0.002 was asked", plan=replace(plan, rate=0.002))
    refused("data is .repeats. there, and .others. was asked", data=Repeats("others"))
    refused("weights is .*not those that the run began with", small(1))
    refused("loss is .*next_token. there", loss=doubled)
    eager = small()
    eager.hf.set_attn_implementation("eager")
    refused('attention is "sdpa" there, and "eager" was asked', eager)
    frozen = small()
    frozen.hf.transformer.wte.weight.requires_grad_(False)
    refused("weights is", frozen)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    with pytest.raises(TrainingError, match="is there already and holds no training"):
        train(small(), Repeats(), plan, tmp_path / "other")


def test_rows_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    tokens, ones = torch.ones(4, 6, dtype=torch.long), torch.ones(4, 6)

    def refused(message: str, tokens: torch.Tensor = tokens, weights: torch.Tensor = ones, batch: int = 4) -> None:
        class Given:
            name = "given"

            def rows(self, step: int, count: int) -> Rows:
                return Rows(tokens, weights)

        with pytest.raises(TrainingError, match=message):
            train(small(), Given(), Training(2, batch=batch), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    refused("the token 20, and .* has tokens 0 to 19", tokens=tokens * 20)
    refused("rows are 17 tokens long, and .* has 16 positions", torch.ones(4, 17, dtype=torch.long), torch.ones(4, 17))
    refused("ask for no prediction", weights=ones * 0)
    refused("5 rows were asked for step 0, and given gave 4", batch=5)
    with pytest.raises(TrainingError, match="padding has a weight"):
        Rows(tokens, ones, torch.zeros(4, 6).bool() | (torch.arange(6) < 3))
    model = small()
    model.hf.requires_grad_(False)
    with pytest.raises(TrainingError, match="no weights that require gradients"):
        train(model, Repeats(), Training(2, batch=4), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_only_the_last_checkpoint_keeps_moments_where_asked(tmp_path):
    run = train(small(), Repeats(), Training(6, batch=4, checkpoints=(2, 4), states="last"), tmp_path)
    assert run.steps == (0, 2, 4, 6)
    kept = [(tmp_path / "checkpoints" / f"step-{step:07d}" / "optimizer.safetensors").is_file() for step in run.steps]
    assert kept == [False, False, False, True]
    again = train(small(), Repeats(), Training(6, batch=4, checkpoints=(2, 4), states="last"), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(run.model.hf.parameters(), again.model.hf.parameters(), strict=True))


def test_a_run_that_was_cut_off_ends_in_the_same_weights(tmp_path):
    whole = train(small(), Repeats(), Training(12, batch=4, save=5), tmp_path / "whole")

    class Cut(Exception):
        pass

    def cut(model: Model, step: int) -> dict[str, float]:
        if step == 8 and not (tmp_path / "again").exists():
            raise Cut
        return {}

    with pytest.raises(Cut):
        train(small(), Repeats(), Training(12, batch=4, save=5, checkpoints=(8,)), tmp_path / "cut", measures=[cut])
    (tmp_path / "again").touch()
    again = train(small(), Repeats(), Training(12, batch=4, save=5, checkpoints=(8,)), tmp_path / "cut", measures=[cut])
    for a, b in zip(whole.model.hf.parameters(), again.model.hf.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.curve("loss").equals(whole.curve("loss"))


def test_a_run_from_a_model_just_trained_goes_on_from_that_model_loaded(tmp_path):
    """Saving writes the model's class into its config, which a model that was never saved lacks."""
    first = train(small(), Repeats(), Training(2, batch=4), tmp_path / "first")
    train(first.model, Repeats(seed=1), Training(2, batch=4), tmp_path / "second")
    loaded = Model.load(tmp_path / "first" / "checkpoints" / "step-0000002")
    again = train(loaded, Repeats(seed=1), Training(2, batch=4), tmp_path / "second")  # is finished: nothing is left to do
    assert again.steps[-1] == 2
