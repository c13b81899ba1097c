"""The gradient engine: slopes against finite differences, with and without recomputation, folded and one by one, in little memory."""

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cases import CONFIGS, tiny
from patchclamp.errors import MetricError
from patchclamp.methods import gradient, integrated
from patchclamp.metrics import METRICS, Metric
from patchclamp.models.model import Model
from patchclamp.parts import Gated, gated, nodes
from patchclamp.tasks._batch import Batch
from test_parts import examples

DIFF, NLL, KL = METRICS["logit_diff"], METRICS["nll"], METRICS["kl"]
FAMILIES = ("gpt2", "llama", "gemma2", "gpt_neox", "mixtral", "falcon", "bloom", "granite", "gemma3")
"""Learned positions, grouped queries, post-norms and windows, parallel blocks, experts, blocks that add in place, alibi, scaled
residuals, a model inside a model."""


def deep(name: str, layers: int = 5, dtype: torch.dtype = torch.float64) -> Model:
    """A tiny model of more blocks, so that some can be kept and others not."""
    size: dict[str, Any] = {key: layers for key in ("n_layer", "num_hidden_layers") if key in CONFIGS[name]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, name, CONFIGS[name] | size)
        return Model.load(tiny(name, dtype=dtype))


def drawn(parts: Gated, settings: int, batch: Batch | None = None, by_example: bool = False, by_position: bool = False) -> Tensor:
    shape = (settings, len(batch) if batch and by_example else 1, batch.tokens.shape[1] if batch and by_position else 1)
    return torch.rand(*shape, len(parts.labels), generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def tight(parts: Gated, memory: int) -> Gated:
    """The same parts, and so little memory."""
    other = copy.copy(parts)
    other.memory = memory
    return other


class Blocks:
    """The rows of each block's runs for a gradient, by block."""

    def __init__(self, model: Model, patch: pytest.MonkeyPatch) -> None:
        self.rows: list[list[int]] = [[] for _ in range(model.layers)]
        for number, layer in enumerate(model.anatomy.layers):
            patch.setattr(layer.attention, "forward", self._counting(number, layer.attention.forward))

    def _counting(self, number: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self.rows[number].append(len(args[0] if args else kwargs["hidden_states"]))
            return own(*args, **kwargs)

        return forward

    @property
    def runs(self) -> list[int]:
        return [len(each) for each in self.rows]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Gated:
    """In float32, which every family computes in; prompts of several lengths are padded."""
    return nodes(deep(request.param, 3, torch.float32))


@pytest.fixture(params=[name for name in FAMILIES if name != "mixtral"])  # whose experts do not multiply in float64
def fine(request: pytest.FixtureRequest) -> Gated:
    """In float64, but for norms and softmax in most; prompts of one length: padding there needs float32."""
    return nodes(deep(request.param, 3))


def test_open_slopes_are_finite_differences(fine: Gated) -> None:
    """The shortcut at gates of exactly 1, part by part, against runs in which the gate is a little less and a little more."""
    batch, fallback = examples(3).batch(), fine.fallback("resample")
    gates, exact = fine.open().double(), fine.model.family.name == "gpt2"
    size = 1e-5 if exact else 3e-3  # central differences: rounding (1e-16 or 1e-7) / step, and the square of the step
    rtol, atol = (1e-7, 1e-9) if exact else (1e-3, 1e-3)
    step = size * torch.eye(len(fine.labels), dtype=torch.float64)[:, None, None]
    for metric in (DIFF, NLL):
        values, found = fine.gradient(batch, gates, fallback, metric)
        up, down = (fine.measure(batch, gates + sign * step, fallback, metric) for sign in (1, -1))
        torch.testing.assert_close(values, fine.measure(batch, gates, fallback, metric), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[0], (up - down).T / (2 * size), rtol=rtol, atol=atol)


def test_open_slopes_are_those_of_mixed_gates(family: Gated) -> None:
    """Where one setting's gates are open and another's are not, all are mixed: lerp at 1 gives the same slopes."""
    batch, fallback = examples(3, lengths=(7, 5)).batch(), family.fallback("resample")
    alone = family.gradient(batch, family.open().double(), fallback)
    among = family.gradient(batch, torch.cat([family.open().double(), drawn(family, 1)]), fallback)
    # families that route or normalise in float32 round otherwise in company
    torch.testing.assert_close(alone[0], among[0][:1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone[1], among[1][:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spread", ["shared", "by example", "by position"])
def test_recomputed_slopes_are_the_same(family: Gated, spread: str) -> None:
    batch, fallback = examples(3, lengths=(7, 5)).batch(), family.fallback("resample")
    gates = drawn(family, 3, batch, by_example=spread == "by example", by_position=spread == "by position")
    one_by_one = [family.gradient(batch, gates[k : k + 1], fallback) for k in range(3)]
    kept = [torch.cat([pair[at] for pair in one_by_one]) for at in (0, 1)]
    family.gradient(batch, gates, fallback)  # shows what one setting takes
    with pytest.MonkeyPatch.context() as patch:
        blocks = Blocks(family.model, patch)
        folded = family.gradient(batch, gates, fallback)
        assert blocks.runs == [1] * family.model.layers, "the settings were not folded, or blocks ran twice"
    with pytest.MonkeyPatch.context() as patch:
        blocks = Blocks(family.model, patch)
        again = tight(family, 1).gradient(batch, gates, fallback)
        assert blocks.runs == [3, *[6] * (family.model.layers - 1)], "nothing was recomputed"
    for found in (folded, again):
        torch.testing.assert_close(found[0], kept[0], rtol=1e-5, atol=1e-6)  # float32 norms and routers in some families
        torch.testing.assert_close(found[1], kept[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "sites", [("L*.h*.q", "L*.kv*.k", "L*.kv*.v"), ("L*.pattern",), ("L*.scores",), ("L*.resid.mid", "L*.mlp")]
)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_other_sites_recomputed(name: str, sites: tuple[str, ...]) -> None:
    """Places that are visited by the attention tap, and those that one hook leaves for another."""
    parts = gated(deep(name, 3), sites)
    batch, fallback = examples(3).batch(), parts.fallback("resample")
    gates = torch.cat([drawn(parts, 1), parts.open().double()])
    values, found = parts.gradient(batch, gates, fallback)
    again = tight(parts, 1).gradient(batch, gates, fallback)
    for one, two in zip((values, found), again, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)  # llama's norms compute in float32
    assert bool(found.isfinite().all()) and bool((found != 0).any())
    step = 1e-4 * torch.eye(len(parts.labels), dtype=torch.float64)[:, None, None]
    up, down = (parts.measure(batch, gates[:1] + sign * step, fallback) for sign in (1, -1))
    rtol, atol = (1e-5, 1e-7) if name == "gpt2" else (5e-3, 5e-3)  # rounding in float32 / step
    torch.testing.assert_close(found[0], (up - down).T / 2e-4, rtol=rtol, atol=atol)


@pytest.mark.parametrize("memory", [1 << 30, 1], ids=["kept", "recomputed"])
def test_frozen_routing_is_that_of_the_models_own_run(memory: int) -> None:
    parts = nodes(deep("mixtral", 3, torch.float32), memory=memory, routing="frozen")
    batch, fallback = examples(3, lengths=(7, 5)).batch(), parts.fallback("resample")
    gates = torch.cat([parts.open(), drawn(parts, 2).float()])
    values, found = parts.gradient(batch, gates, fallback)
    torch.testing.assert_close(values, parts.measure(batch, gates, fallback), rtol=1e-4, atol=1e-5)  # float32
    step = 1e-2 * torch.eye(len(parts.labels))[:, None, None]
    for number, gate in enumerate(gates):
        up, down = (parts.measure(batch, gate[None] + sign * step, fallback) for sign in (1, -1))
        # with experts chosen once for all the metric is smooth: rounding / step, and the square of the step
        torch.testing.assert_close(found[number], (up - down).T / 2e-2, rtol=1e-2, atol=3e-3)


# --- what a pass computes and leaves


@pytest.mark.parametrize("metric", [DIFF, NLL], ids=["answers alone", "vocabulary"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_cost_in_plain_forward_passes(name: str, metric: Metric) -> None:
    """Multiply-adds of matrix products, counted by torch: attribution at most 3.2 F, integrated at most 2.2 m + 3 F.

    The vocabulary is small, so that leaving out logits spares next to nothing.
    """
    model = deep(name, 6, torch.float32)
    parts, made = nodes(model), examples(8, lengths=(12,))
    fallback = parts.fallback("resample")
    gradient.samples(parts, made.batch(), fallback, metric, 0)  # proofs are made once per model

    def flops(call: Callable[[Batch], object]) -> int:
        batch = made.batch()  # a fallback's values are kept by batch
        with FlopCounterMode(display=False) as count, torch.no_grad():
            call(batch)
        return count.get_total_flops()

    plain = flops(lambda batch: model.hf(input_ids=batch.tokens, attention_mask=batch.mask.long(), use_cache=False))
    assert 2 * plain < flops(lambda batch: gradient.samples(parts, batch, fallback, metric, 0)) <= 3.2 * plain
    taken = [flops(lambda batch, m=m: integrated.samples(parts, batch, fallback, metric, 0, steps=m)) for m in (8, 16)]
    assert taken[0] <= (2.2 * 8 + 3) * plain and taken[1] <= (2.2 * 16 + 3) * plain
    assert taken[1] - taken[0] <= 2.2 * 8 * plain


def test_nothing_below_the_first_gate_is_run_for_every_setting() -> None:
    """Gates in late blocks: earlier ones run once for all settings, for the model's own run, and have no backward pass."""
    parts = gated(deep("gpt2", 6), ["L4.h*.z", "L5.mlp"])
    batch, fallback = examples(3).batch(), parts.fallback("resample")
    gates = drawn(parts, 6)
    fallback.at(batch)
    values, found = parts.gradient(batch, gates, fallback)
    with pytest.MonkeyPatch.context() as patch:
        blocks = Blocks(parts.model, patch)
        parts.gradient(batch, gates, fallback)
        assert [sum(rows) for rows in blocks.rows] == [0] * 4 + [18] * 2
    step = 1e-4 * torch.eye(len(parts.labels), dtype=torch.float64)[:, None, None]
    for number, gate in enumerate(gates):
        up, down = (parts.measure(batch, gate[None] + sign * step, fallback) for sign in (1, -1))
        torch.testing.assert_close(found[number], (up - down).T / 2e-4, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(values, parts.measure(batch, gates, fallback), rtol=0, atol=1e-11)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # in peft
def test_weights_that_want_gradients_are_left_as_they_were() -> None:
    peft = pytest.importorskip("peft")
    hf = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model = Model.load(hf)
    wanted = {name: weight.requires_grad for name, weight in model.hf.named_parameters()}
    assert {True, False} == set(wanted.values())
    parts = nodes(model)
    batch, fallback = examples(3).batch(), parts.fallback("resample")
    plain, again = (one.gradient(batch, parts.open(), fallback)[1] for one in (parts, tight(parts, 1)))
    torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-6)  # float32
    assert wanted == {name: weight.requires_grad for name, weight in model.hf.named_parameters()}
    assert all(weight.grad is None for weight in model.hf.parameters())


def test_train_mode_is_put_back_and_dropout_is_off_in_recomputation() -> None:
    model = deep("gpt2", 3)
    parts = nodes(model)
    batch, fallback = examples(3).batch(), parts.fallback("resample")
    plain = parts.gradient(batch, drawn(parts, 1), fallback)[1]
    model.hf.train()
    assert model.hf.transformer.h[0].mlp.dropout.p > 0
    for one in (parts, tight(parts, 1)):
        torch.testing.assert_close(one.gradient(batch, drawn(parts, 1), fallback)[1], plain, rtol=0, atol=1e-12)  # float64
    assert all(module.training for module in model.hf.modules())


def test_threads_take_slopes_of_one_model_at_once() -> None:
    """Weights are frozen by the first and thawed by the last; blocks that one thread computes again, another does not."""
    model = deep("gpt2", 3)
    model.hf.requires_grad_(True)
    all_parts = [nodes(model), tight(nodes(model), 1), gated(model, ["L*.resid.post"]), tight(gated(model, ["L*.pattern"]), 1)]
    batch = examples(3).batch()
    gates = [drawn(parts, 2) for parts in all_parts]
    rules = [parts.fallback("resample") for parts in all_parts]
    alone = [parts.gradient(batch, gate, rule)[1] for parts, gate, rule in zip(all_parts, gates, rules, strict=True)]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            found = all_parts[number].gradient(batch, gates[number], rules[number])[1]
            if not torch.allclose(found, alone[number], rtol=0, atol=1e-11):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(all_parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(weight.requires_grad and weight.grad is None for weight in model.hf.parameters())
    assert all("forward" not in vars(layer.block) for layer in model.anatomy.layers)


def test_nothing_outlives_a_pass() -> None:
    parts = nodes(deep("gpt2", 3))
    batch, fallback = examples(3).batch(), parts.fallback("resample")

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), Tensor) for one in gc.get_objects())

    parts.gradient(batch, drawn(parts, 3), fallback)
    before = tensors()
    for one in (parts, tight(parts, 1)):
        for _ in range(3):
            one.gradient(batch, drawn(parts, 3), fallback)
    assert tensors() <= before


def test_slopes_of_half_precision_are_summed_in_float32() -> None:
    """bfloat16 has 8 bits: a sum over 300 positions in it loses what float32 keeps."""
    parts = nodes(Model.load(tiny("gpt2", dtype=torch.bfloat16)))
    batch = examples(2).batch()
    _, found = parts.gradient(batch, parts.open(), parts.fallback("resample"))
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


def test_a_slope_that_is_zero_by_definition_is_refused_with_advice() -> None:
    parts = nodes(deep("gpt2", 2))
    batch, fallback = examples(2).batch(), parts.fallback("resample")
    with pytest.raises(MetricError, match=r"use logit_diff, or a method that goes some way .integrated"):
        gradient.samples(parts, batch, fallback, KL, 0)
    found = integrated.samples(parts, batch, fallback, KL, 0, steps=64)
    ends = parts.measure(batch, torch.cat([parts.open(), parts.closed()]), fallback, KL)
    # the midpoint rule's error falls with the square of the steps: 64 of them leave 1e-3 of the whole
    torch.testing.assert_close(found.sum(0).double(), KL.sign * (ends[0] - ends[1]), rtol=5e-3, atol=1e-4)
