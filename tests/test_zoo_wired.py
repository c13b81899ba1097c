"""Hand-wired models: a plain transformers forward pass, with this file's own hooks, against the closed forms."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from patchclamp.errors import ModelError
from patchclamp.zoo import wired, wired_names
from patchclamp.zoo._wired import FAMILIES, Wired

ROLES = {"facilitating", "interfering", "irrelevant"}
CASES = [(name, family) for family in FAMILIES for name in wired_names()]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def model(request: pytest.FixtureRequest) -> Wired:
    return wired(*request.param)


@contextmanager
def hooked(model: Wired, gates: Mapping[str, float], fallback: Mapping[str, Tensor], kept: dict[str, Tensor]) -> Iterator[None]:
    """Gates on the input of each attention output projection, split in 4 heads, and on each MLP's output."""
    handles = []

    def mix(label: str, value: Tensor) -> Tensor:
        kept[label] = value.detach().clone()
        closed = fallback.get(label, torch.zeros_like(value))
        return closed + gates.get(label, 1.0) * (value - closed)

    def heads(layer: int):
        def hook(_module: object, args: tuple[Tensor]) -> tuple[Tensor]:
            parts = args[0].chunk(4, -1)
            return (torch.cat([mix(f"L{layer}.h{h}", part) for h, part in enumerate(parts)], -1),)

        return hook

    blocks = model.hf.transformer.h if model.family == "gpt2" else model.hf.model.layers
    for i, block in enumerate(blocks):
        projection = block.attn.c_proj if model.family == "gpt2" else block.self_attn.o_proj
        handles.append(projection.register_forward_pre_hook(heads(i)))
        handles.append(block.mlp.register_forward_hook(lambda _m, _a, out, i=i: mix(f"L{i}.mlp", out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward(model: Wired, tokens: Tensor, gates: Mapping[str, float] | None = None, fallback: Mapping[str, Tensor] | None = None):
    """Logits at the last position, and every part's value."""
    kept: dict[str, Tensor] = {}
    with torch.no_grad(), hooked(model, gates or {}, fallback or {}, kept):
        return model.hf(tokens).logits[:, -1], kept


def metric(logits: Tensor, batch) -> Tensor:
    return (logits.gather(1, batch.answers) - logits.gather(1, batch.wrong))[:, 0]


def near(family: str, truth: float) -> float:
    """1e-5 in GPT-2, whose float64 is float64 throughout; 1e-5 relative in Llama, whose norms compute in float32."""
    return 1e-5 * (max(1.0, abs(truth)) if family == "llama" else 1.0)


def test_effects_equal_the_closed_form(model: Wired) -> None:
    batch = model.task.examples(model.tokenizer, 16, seed=3).batch()
    opened = metric(forward(model, batch.tokens)[0], batch)
    assert (opened - model.truth.open).abs().max() < near(model.family, model.truth.open)
    _, corrupt = forward(model, batch.corrupt)
    truth = model.truth
    by_example = {kind: [truth.effects_on(one.pair.clean, kind) for one in batch.examples] for kind in ("resample", "zero")}
    alone = [
        (frozenset([part]), {kind: torch.tensor([known[part] for known in by_example[kind]]) for kind in by_example})
        for part in truth.roles
    ]
    for labels, effects in [*alone, *truth.joint.items()]:
        for kind, values in (("resample", corrupt), ("zero", {})):
            effect = opened - metric(forward(model, batch.tokens, dict.fromkeys(labels, 0.0), values)[0], batch)
            known = torch.as_tensor(effects[kind], dtype=torch.float64)
            assert (effect - known).abs().max() < near(model.family, float(known.abs().max())), (sorted(labels), kind)


def test_logits_equal_the_closed_form_at_any_gates(model: Wired) -> None:
    batch = model.task.examples(model.tokenizer, 3, seed=4).batch()
    _, corrupt = forward(model, batch.corrupt)
    rng = np.random.default_rng(0)
    for _ in range(3):
        gates = {label: float(gate) for label, gate in zip(model.truth.roles, rng.random(10), strict=True)}
        for kind, values in (("resample", corrupt), ("zero", {})):
            logits, _ = forward(model, batch.tokens, gates, values)
            for row, example in enumerate(batch.examples):
                known = model.logits(example.clean, gates, example.corrupt if kind == "resample" else None)[-1]
                assert np.abs(logits[row].numpy() - known).max() < near(model.family, 6.5)


def test_every_part_has_a_role_and_effects_agree_with_it(model: Wired) -> None:
    truth = model.truth
    assert set(truth.roles.values()) <= ROLES
    assert set(truth.roles) == set(truth.effects["resample"]) == set(truth.effects["zero"])
    assert [label for label in truth.roles if label.endswith("mlp")] == ["L0.mlp", "L1.mlp"]
    assert sum(role == "irrelevant" for role in truth.roles.values()) >= 6
    substitutes = frozenset().union(*truth.alternatives)
    for label, role in truth.roles.items():
        for effects in truth.effects.values():
            if role == "irrelevant":
                assert effects[label] == 0.0
            elif label in substitutes:
                assert abs(effects[label]) < 1e-4
            else:
                assert (effects[label] > 1) if role == "facilitating" else (effects[label] < -1)
    for alternatives in truth.alternatives:
        assert truth.joint[alternatives]["resample"] > 5


def test_kinds_of_prompt_have_effects_of_their_own() -> None:
    truth = wired("switch").truth
    assert truth.cue("so look-apple then") == "look" and truth.cue("so listen-apple then") == "listen"
    for kind, average in truth.effects.items():
        for part, effect in average.items():
            assert effect == pytest.approx(np.mean([effects[kind][part] for effects in truth.by_cue.values()]))
    assert truth.by_cue["look"]["zero"]["L1.h1"] > 6 and truth.by_cue["look"]["zero"]["L1.h2"] == 0
    assert truth.by_cue["listen"]["zero"]["L1.h1"] == 0 and truth.by_cue["listen"]["zero"]["L1.h2"] > 6


def test_idle_heads_are_busy_and_write_nothing(model: Wired) -> None:
    """A head that is multiplied by zero has exactly no effect, and yet attends and moves values."""
    batch = model.task.examples(model.tokenizer, 8, seed=5).batch()
    opened, values = forward(model, batch.tokens)
    idle = [label for label, role in model.truth.roles.items() if role == "irrelevant" and ".h" in label]
    exact = [label for label in idle if torch.equal(forward(model, batch.tokens, {label: 0.0})[0], opened)]
    assert len(exact) >= 4
    assert any(values[label].abs().max() > 0 for label in idle)


def test_the_open_circuit_says_the_answer_and_the_closed_one_does_not(model: Wired) -> None:
    batch = model.task.examples(model.tokenizer, 24, seed=6).batch()
    hurts = {label: 0.0 for label, role in model.truth.roles.items() if role == "interfering"}
    helps = {label: 0.0 for label, role in model.truth.roles.items() if role == "facilitating"}
    opened = forward(model, batch.tokens, hurts)[0].softmax(-1).gather(1, batch.answers)
    closed = forward(model, batch.tokens, {**hurts, **helps})[0].softmax(-1).gather(1, batch.answers)
    assert opened.min() > 0.96
    assert closed.max() < 0.05


def test_task_is_balanced_and_splits(model: Wired) -> None:
    examples = model.task.examples(model.tokenizer, 240, seed=0)
    assert len({example.clean for example in examples}) >= 120
    assert examples.majority < 0.09
    assert not examples.dropped.keys() - {"drawn before"}
    assert [len(part) for part in model.task.split(model.tokenizer, 240)] == [120, 60, 60]
    if examples[0].pair.mirrors:  # in both directions
        cleans = {example.clean for example in examples}
        assert sum(example.corrupt in cleans for example in examples) == len(examples)


def test_single_precision_and_left_padding_do_not_matter(model: Wired) -> None:
    examples = model.task.examples(model.tokenizer, 8, seed=7)
    batch = examples.batch()
    single = wired(model.name, model.family).hf.float()
    tokens = torch.nn.functional.pad(batch.tokens, (3, 0), value=examples.pad)
    mask = torch.nn.functional.pad(batch.mask, (3, 0), value=False)
    places = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = single(tokens, attention_mask=mask.long(), position_ids=places).logits[:, -1]
    assert (metric(logits, batch) - model.truth.open).abs().max() < 0.02


def test_llama_shares_key_value_heads() -> None:
    config = wired("induction", "llama").hf.config
    assert config.num_key_value_heads == 2 and config.num_attention_heads == 4


def test_tokenizer_round_trips(model: Wired) -> None:
    text = model.task.examples(model.tokenizer, 1)[0].pair.clean
    ids = model.tokenizer(text)["input_ids"]
    assert ids[0] == model.tokenizer.bos_token_id
    assert model.tokenizer.decode(ids[1:]) == text


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ModelError, match="no hand-wired model 'xor'"):
        wired("xor")
    with pytest.raises(ModelError, match="family 'bert'"):
        wired("and", "bert")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_of_two_tasks_has_its_own_truth(family: str) -> None:
    """Effects of both tasks against the hooks of this file; half of each one's parts are the other's too."""
    one = wired("shared", family)
    assert list(one.tasks) == list(one.truths) == ["see", "hear"] and one.tasks["see"] is one.task
    used = {name: {part for part, role in truth.roles.items() if role == "facilitating"} for name, truth in one.truths.items()}
    assert used["see"] & used["hear"] == {"L0.mlp", "L1.mlp"} and len(used["see"]) == len(used["hear"]) == 4
    for name, task in one.tasks.items():
        batch = task.examples(one.tokenizer, 8, seed=2).batch()
        opened, (_, corrupt) = metric(forward(one, batch.tokens)[0], batch), forward(one, batch.corrupt)
        for part in one.truths[name].roles:
            for kind, values in (("resample", corrupt), ("zero", {})):
                effect = opened - metric(forward(one, batch.tokens, {part: 0.0}, values)[0], batch)
                known = one.truths[name].effects[kind][part]
                assert (effect - known).abs().max() < near(family, known), (name, part, kind)


def test_parts_with_a_common_input_are_correlated_and_do_not_act_on_each_other() -> None:
    one = wired("common")
    batch = one.task.examples(one.tokenizer, 200, seed=1).batch()
    _, values = forward(one, batch.tokens)
    loud = {part: values[part][:, -1].double() for part in ("L1.h1", "L1.h2")}
    sizes = torch.stack([value.norm(dim=-1) for value in loud.values()])
    assert 0.3 < float(torch.corrcoef(sizes)[0, 1]) < 0.7
    _, closed = forward(one, batch.tokens, {"L1.h1": 0.0})
    assert torch.equal(closed["L1.h2"], values["L1.h2"])
    for part, upstream in (("L1.h1", "L0.h1"), ("L1.h2", "L0.h2")):  # each hears its own side's private word
        _, closed = forward(one, batch.tokens, {upstream: 0.0})
        assert not torch.allclose(closed[part], values[part], atol=1e-3)
