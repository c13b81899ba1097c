"""Learned gates: the fit against a re-implementation, batches, folding, hand-wired roles."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import tiny
from patchclamp.errors import GateError, TaskError
from patchclamp.gating import GatingSettings, Stage, fit, gating_settings
from patchclamp.gating.descent import random_logits
from patchclamp.gating.examples import balanced
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.tasks import Examples, Pair, Task

SHORT = GatingSettings(seeds=2, batch=6, free=Stage(6, 1.0, 0.2), pressed=Stage(6, 0.8, 0.2), window=0, null_seeds=1, refits=2)


class Digits:
    """A tokenizer whose tokens are the numbers themselves."""

    pad_token_id, bos_token_id, eos_token_id, chat_template = 0, None, None, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def task_of(pairs: list[Pair]) -> Task:
    return Task("toy", "for tests", lambda rng, tok: iter(pairs), size=len(pairs), source=repr(pairs))


def pairs_of(n: int, seed: int = 0, mirrors: bool = True, answers: int = 6, corrupt: bool = True) -> list[Pair]:
    draws = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        clean, other = draws.integers(3, 90, (2, 7))
        right, wrong = 10 + draws.choice(max(2, answers), 2, replace=False) if answers > 1 else (10, 11)
        found.append(
            Pair(tuple(clean.tolist()), (int(right),), tuple(other.tolist()) if corrupt else None, (int(wrong),), mirrors=mirrors)
            if corrupt
            else Pair(tuple(clean.tolist()), (int(right),))
        )
    return found


def examples_of(pairs: list[Pair]) -> Examples:
    return task_of(pairs).examples(Digits())


@pytest.fixture(scope="module")
def llama() -> Model:
    return Model.load(tiny("llama"), tokenizer=Digits())


@pytest.fixture(scope="module")
def toy() -> Examples:
    return examples_of(pairs_of(12))


def own_objective(hf, batch, logits: Tensor, lam: float, reduce: str) -> Tensor:
    """The loss, with hooks of its own: lerp towards the corrupt run at the output projection's input and the MLP's output."""
    kept, handles = {}, []
    gates = logits.sigmoid()
    heads, width = 4, 8
    modules = [(i, block.self_attn.o_proj, block.mlp) for i, block in enumerate(hf.model.layers)]
    mode = "record"

    def pre(i):
        def hook(_m, args):
            z = args[0]
            if mode == "record":
                kept["z", i] = z.detach()
                return None
            gate = gates[i * (heads + 1) : i * (heads + 1) + heads].repeat_interleave(width)
            return (kept["z", i] + gate * (z - kept["z", i]),)

        return hook

    def post(i):
        def hook(_m, _a, out):
            if mode == "record":
                kept["mlp", i] = out.detach()
                return None
            return kept["mlp", i] + gates[i * (heads + 1) + heads] * (out - kept["mlp", i])

        return hook

    for i, projection, mlp in modules:
        handles += [projection.register_forward_pre_hook(pre(i)), mlp.register_forward_hook(post(i))]
    try:
        hf(batch.corrupt)
        mode = "gate"
        logp = hf(batch.tokens).logits[:, -1].log_softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    nll = -logp.gather(1, batch.answers)[:, 0].mean()
    clamped = logits.clamp(-4, 4)
    return nll - lam * (clamped.mean() if reduce == "mean" else clamped.sum())


@pytest.mark.parametrize("preset", ["code", "paper"])
def test_fit_is_the_published_one(llama: Model, toy: Examples, preset: str) -> None:
    """Adam by torch, clipping by torch, gradients by torch through hooks: one seed at a time, with the preset's own learning rates,
    lambda, clamp, clipping and objective, over fewer updates."""
    settings = gating_settings(preset, seeds=2, batch=6, free=fewer(preset, "free"), pressed=fewer(preset, "pressed"))
    assert (settings.objective, settings.clip) == {"code": ("mean", 1.0), "paper": ("sum", None)}[preset]
    assert settings.memory == 0.999 and not settings.hold and not settings.settle and not settings.window
    gated = fit(nodes(llama), toy, nodes(llama).fallback("resample"), settings)
    ready = balanced(toy, settings)

    def descend(start: Tensor, lam: float, stage: Stage, batches: Iterator) -> Tensor:
        logits = start.clone().requires_grad_()
        adam = torch.optim.Adam([logits], lr=stage.rate)
        for step, batch in enumerate(islice(batches, stage.updates)):
            adam.param_groups[0]["lr"] = stage.rate + (stage.last_rate - stage.rate) * step / (stage.updates - 1)
            adam.zero_grad()
            own_objective(llama.hf, batch, logits, lam, settings.objective).backward()
            if settings.clip is not None:
                torch.nn.utils.clip_grad_norm_([logits], settings.clip)
            adam.step()
        return logits.detach()

    for seed in range(2):
        start = random_logits(10, [seed], settings)[0].float()
        free = descend(start, 0.0, settings.free, ready.batches(6, 0, 0))
        assert np.abs(gated.gate[seed] - free.sigmoid().numpy()).max() < 1e-3
        for sign, found in ((1, gated.gate_plus), (-1, gated.gate_minus)):
            ends = descend(free, sign * settings.lam, settings.pressed, ready.batches(6, 0, 1))
            assert np.abs(found[seed] - ends.sigmoid().numpy()).max() < 1e-3
        llama.hf.zero_grad(set_to_none=True)
    assert not np.allclose(gated.gate_plus, gated.gate_minus, atol=0.01)


def fewer(preset: str, stage: str) -> Stage:
    """A preset's stage with 8 updates."""
    return replace(getattr(gating_settings(preset), stage), updates=8)


def test_same_seed_same_gates_and_folding_changes_nothing(llama: Model, toy: Examples) -> None:
    parts = nodes(llama)
    fallback = parts.fallback("resample")
    settings = replace(SHORT, window=2, still=0.3, level=0.1, free=Stage(12, 1.0, 0.1), pressed=Stage(12, 1.0, 0.1))
    three = fit(parts, toy, fallback, replace(settings, seeds=3))
    again = fit(parts, toy, fallback, replace(settings, seeds=3))
    assert (three.plus.logits == again.plus.logits).all() and (three.minus.losses[:, :3] == again.minus.losses[:, :3]).all()
    one_at_a_time = fit(nodes(llama, memory=1), toy, fallback, replace(settings, seeds=3))
    two = fit(parts, toy, fallback, settings)
    for other, seeds in ((one_at_a_time, 3), (two, 2)):
        for mine, theirs in zip(three.descents.values(), other.descents.values(), strict=True):
            assert np.abs(mine.logits[:seeds] - theirs.logits[:seeds]).max() < 1e-3
            assert (mine.stopped_at[:seeds] == theirs.stopped_at[:seeds]).all()


def test_a_plateau_stops_each_seed_and_says_so(llama: Model, toy: Examples) -> None:
    parts = nodes(llama)
    settings = replace(SHORT, window=3, still=1.0, level=10.0, free=Stage(20, 1.0, 0.1), pressed=Stage(20, 1.0, 0.1))
    told = []
    gated = fit(parts, toy, parts.fallback("resample"), settings, progress=lambda *step: told.append(step))
    assert gated.free.stopped_at.tolist() == [6, 6] and set(gated.free.reason) == {"plateau"}
    assert gated.free.losses.shape == (2, 6)
    assert told == [("G", i + 1, 20) for i in range(6)] + [("G+ and G-", i + 1, 20) for i in range(6)]
    never = fit(parts, toy, parts.fallback("resample"), SHORT)
    assert set(never.free.reason) == {"budget"} and never.free.stopped_at.tolist() == [6, 6]


def test_pressure_is_in_nats_per_part() -> None:
    assert gating_settings("default").pressure(40) == pytest.approx(8 * 0.1 / 40)
    assert gating_settings("paper").pressure(40) == pytest.approx(0.8)
    assert hash(gating_settings("code")) == hash(gating_settings("code"))
    with pytest.raises(GateError, match="no gating preset 'fast': choose from default, code, paper"):
        gating_settings("fast")
    for changes in ({"lam": 0.0}, {"seeds": 0}, {"free": Stage(0, 1.0, 1.0)}):
        with pytest.raises(GateError):
            replace(SHORT, **changes)


def test_pairs_are_mirrored_and_answers_come_equally_often() -> None:
    both = balanced(examples_of(pairs_of(20, answers=1)), SHORT)
    assert both.mirrored and len(both.examples) == 40 and "100% of 20 prompts" in both.warnings[0]
    for batch in islice(both.batches(8, 0), 10):
        assert sorted(example.answers for example in batch.examples) == [((10,),)] * 4 + [((11,),)] * 4
        keys = {example.key for example in batch.examples}
        assert all(example.mirror().key in keys for example in batch.examples)
    skewed = [
        *pairs_of(15, 1, mirrors=False, answers=1),
        *(replace_answer(pair) for pair in pairs_of(5, 2, mirrors=False, answers=1)),
    ]
    ready = balanced(examples_of(skewed), SHORT)
    assert not ready.mirrored and "75% of 20 prompts" in ready.warnings[0]
    said = [example.answers for batch in islice(ready.batches(10, 0), 10) for example in batch.examples]
    assert said.count(((10,),)) == said.count(((12,),)) == 50
    assert not balanced(examples_of(pairs_of(30)), SHORT).warnings


def replace_answer(pair: Pair) -> Pair:
    return Pair(pair.clean, (12,), pair.corrupt, pair.wrong, mirrors=False)


def test_one_sided_answers_are_refused_unless_forced(llama: Model) -> None:
    one_sided = examples_of(pairs_of(10, mirrors=False, answers=1))
    parts = nodes(llama)
    with pytest.raises(TaskError, match="100% of 10 prompts of 'toy' have the same answer, and pairs cannot be mirrored"):
        fit(parts, one_sided, parts.fallback("resample"), SHORT)
    forced = fit(parts, one_sided, parts.fallback("resample"), replace(SHORT, one_sided=True))
    assert "may only say that answer" in forced.warnings[0]


def test_tasks_without_wrong_answers_and_of_several_tokens(llama: Model) -> None:
    parts = nodes(llama)
    alone = examples_of(pairs_of(8, corrupt=False))
    assert fit(parts, alone, parts.fallback("mean", alone), SHORT).gate.shape == (2, 10)
    several = [Pair(pair.clean, ((20, 21 + i),), pair.corrupt, ((30, 31 + i),)) for i, pair in enumerate(pairs_of(8))]
    assert fit(parts, examples_of(several), parts.fallback("resample"), SHORT).gate.shape == (2, 10)
    texts = [Pair(pair.clean) for pair in pairs_of(8)]
    plain = examples_of(texts)
    gated = fit(parts, plain, parts.fallback("mean", plain), SHORT)
    assert gated.gate.shape == (2, 10) and not gated.about["mirrored"]


def test_the_model_and_what_was_given_are_left_alone(llama: Model, toy: Examples) -> None:
    before = {name: weight.clone() for name, weight in llama.hf.named_parameters()}
    wanted = [weight.requires_grad for weight in llama.hf.parameters()]
    parts = nodes(llama)
    fit(parts, toy, parts.fallback("resample"), SHORT)
    assert all((weight == before[name]).all() for name, weight in llama.hf.named_parameters())
    assert [weight.requires_grad for weight in llama.hf.parameters()] == wanted
    assert all(weight.grad is None for weight in llama.hf.parameters())
