"""Sessions: they nest, keep to their thread, end with an exception, and edit again where activations are recomputed."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CONFIGS, tiny
from patchclamp.edits import Add, Mix, Put, Scale, Zero
from patchclamp.errors import GateError
from patchclamp.models.editing import Edits, Seen
from patchclamp.models.model import Model
from patchclamp.sites import Site

TOKENS = torch.tensor([[5, 11, 23, 42, 7, 31, 64], [61, 17, 3, 90, 28, 28, 45]])


def test_nested_edits_compose_outer_first() -> None:
    for name in ("llama", "bloom"):
        model = Model.load(tiny(name))
        chance = torch.Generator().manual_seed(0)
        for kind in ("z", "q", "v", "pattern", "resid.pre", "resid.mid", "mlp.write"):
            site = Site(kind, 0)
            shape = model.record(TOKENS, site)[site].shape
            shift = torch.rand(shape, generator=chance)
            together = model.run(TOKENS, {site: [Add(shift), Scale(0.5)]})
            other_way = model.run(TOKENS, {site: [Scale(0.5), Add(shift)]})
            with model.editing({site: Add(shift)}), model.editing({site: Scale(0.5)}):
                nested = model.run(TOKENS)
            torch.testing.assert_close(nested, together)  # the middle is put back as a difference, which rounds
            assert not torch.allclose(nested, other_way, atol=1e-4)
        assert torch.equal(model.run(TOKENS), Model.load(tiny(name)).run(TOKENS))


def test_what_is_recorded_is_what_outer_edits_left() -> None:
    model = Model.load(tiny("gemma2"))
    with model.editing({Site("head", 0, 1): Zero(), Site("resid.pre", 1): Scale(2.0)}):
        values = model.record(TOKENS, ["L0.h*.write", "L1.resid.mid", "L1.resid.pre", "L1.attn.write", "L0.resid.post"])
    assert not values[Site("write", 0, 1)].any() and bool(values[Site("write", 0, 2)].any())
    torch.testing.assert_close(values[Site("resid.mid", 1)], values[Site("resid.pre", 1)] + values[Site("attn.write", 1)])
    torch.testing.assert_close(values[Site("resid.pre", 1)], 2 * values[Site("resid.post", 0)])


def test_an_outer_recording_sees_the_middle_behind_inner_edits() -> None:
    """The middle is a sum that starts from what the block really reads, whichever session changed that."""
    model = Model.load(tiny("llama"))
    seen: list[Tensor] = []

    def note(value: Tensor, _: Seen, /) -> Tensor:
        seen.append(value)
        return value

    inner: Edits = {Site("resid.pre", 1): Scale(2.0)}
    with model.editing({Site("resid.mid", 1): note}):
        values = model.record(TOKENS, "L1.resid.mid", inner)
    torch.testing.assert_close(seen[0], values[Site("resid.mid", 1)])


# --- threads


def in_thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


@pytest.mark.parametrize("kind", ["resid.pre", "z"])
def test_a_hook_that_another_thread_is_just_removing_does_nothing(kind: str) -> None:
    """PyTorch drops a hook and its note "with keywords" one after the other: in between it is called without keywords."""
    model = Model.load(tiny("gemma2"))
    plain = model.run(TOKENS)

    def without_notes() -> Tensor:
        notes = [
            (module._forward_pre_hooks_with_kwargs, dict(module._forward_pre_hooks_with_kwargs)) for module in model.hf.modules()
        ]
        assert any(kept for _, kept in notes)
        for live, _ in notes:
            live.clear()
        try:
            return model.run(TOKENS)
        finally:
            for live, kept in notes:
                live.update(kept)

    with model.editing({Site(kind, 0): Scale(2.0)}):
        assert torch.equal(in_thread(without_notes), plain)
        assert not torch.allclose(model.run(TOKENS), plain)


@pytest.mark.parametrize("name", ["llama", "gptj", "mixtral"])
def test_another_thread_is_not_edited(name: str) -> None:
    one, two = Model.load(tiny(name)), Model.load(tiny(name, seed=1))
    plain, other = one.run(TOKENS), two.run(TOKENS)
    sites = (Site("pattern", 0), Site("z", 1), Site("mlp", 0), *([Site("router", 0)] if name == "mixtral" else []))
    edits: Edits = {site: Zero() for site in sites}
    with one.editing(edits):
        assert torch.equal(in_thread(lambda: one.run(TOKENS)), plain)
        assert torch.equal(in_thread(lambda: two.run(TOKENS)), other)
        assert torch.equal(in_thread(lambda: one.hf(input_ids=TOKENS).logits), plain)
        edited = one.run(TOKENS)
    assert not torch.allclose(edited, plain, atol=1e-3)
    assert torch.equal(in_thread(lambda: one.run(TOKENS, edits)), edited)


def test_sessions_of_two_threads_overlap() -> None:
    """One opens first and closes first: the other still reads patterns, and eager attention ends with the last."""
    model = Model.load(tiny("llama", "sdpa"))
    expected = model.record(TOKENS, "L0.pattern")[Site("pattern", 0)]
    opened, closed = threading.Event(), threading.Event()

    def outer() -> None:
        with model.editing({Site("pattern", 1): Zero()}):
            opened.set()
            closed.wait(10)

    thread = threading.Thread(target=outer)
    thread.start()
    opened.wait(10)
    seen: list[Tensor] = []

    def note(value: Tensor, _: Seen, /) -> Tensor:
        seen.append(value)
        return value

    with model.editing({Site("pattern", 0): note}):
        closed.set()
        thread.join()
        model.run(TOKENS)
    assert torch.equal(seen[0], expected)
    assert model.hf.config._attn_implementation == "sdpa"


def test_many_threads_at_once() -> None:
    models = [Model.load(tiny(name)) for name in ("llama", "gpt2", "bloom", "llama")]
    edits: list[Edits] = [{Site("pattern", 0, head): Scale(0.5), Site("z", 1, head): Zero()} for head in range(4)]
    alone = [model.run(TOKENS, edit) for model, edit in zip(models, edits, strict=True)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(8):
            if not torch.equal(models[i].run(TOKENS, edits[i]), alone[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- activation checkpointing


def slopes(model: Model, checkpointing: bool, kinds: tuple[str, ...], backward_inside: bool = True) -> tuple[list[Tensor], int]:
    """Gradients of gates and of a weight, in train mode; how often edits were called."""
    calls = 0

    class Count:
        def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
            nonlocal calls
            calls += 1
            return value

    gates = {kind: torch.full((1,), 0.6, requires_grad=True) for kind in kinds}
    edits: dict[Site, Any] = {
        Site(kind, layer): [Mix(gates[kind], torch.zeros(1)), Count()] for kind in kinds for layer in range(model.layers)
    }
    hf = model.hf.train()
    hf.zero_grad()
    if checkpointing:
        hf.activation_checkpointing_enable()
    functions = [getattr(m, "_gradient_checkpointing_func", None) for m in hf.modules()]
    with model.editing(edits, TOKENS):
        logits = hf(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), use_cache=False).logits
        loss = logits.log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None]).sum()
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert [getattr(m, "_gradient_checkpointing_func", None) for m in hf.modules()] == functions
    weight = model.anatomy.layers[0].output.weight
    assert isinstance(weight, Tensor) and weight.grad is not None
    grads = [*(gate.grad for gate in gates.values()), weight.grad.clone()]
    assert all(grad is not None for grad in grads)
    return [grad for grad in grads if grad is not None], calls


def without_dropout(hf: Any) -> Any:
    for module in hf.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "hidden_dropout", "attn_dropout", "resid_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return hf


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "mixtral", "bloom", "gptj", "falcon"])
def test_checkpointing_recomputes_with_the_same_edits(name: str) -> None:
    assert name in CONFIGS
    kinds: tuple[str, ...] = ("z", "v", "pattern", "mlp", "attn.write")
    kinds += () if name in ("gptj", "falcon") else ("resid.mid",)
    kinds += ("router",) if name == "mixtral" else ()
    plain, once = slopes(Model.load(without_dropout(tiny(name))), False, kinds)
    again, twice = slopes(Model.load(without_dropout(tiny(name))), True, kinds)
    assert twice > once, "nothing was recomputed"
    for one, two in zip(plain, again, strict=True):
        torch.testing.assert_close(one, two)
        assert one.abs().max() > 0


def test_backward_after_the_edits_have_ended_is_refused() -> None:
    model = Model.load(tiny("llama"))
    slopes(model, False, ("z",), backward_inside=False)  # nothing is recomputed: fine
    with pytest.raises(GateError, match="run backward inside `editing`"):
        slopes(model, True, ("z",), backward_inside=False)


def test_backward_twice_recomputes_twice() -> None:
    model = Model.load(tiny("llama"))
    model.hf.train().activation_checkpointing_enable()
    gate = torch.full((1,), 0.6, requires_grad=True)
    with model.editing({Site("z", 0): Mix(gate, torch.zeros(1)), Site("resid.mid", 1): Scale(0.5)}):
        loss = model.hf(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1)[:, -1, 3].sum()
        (once,) = torch.autograd.grad(loss, gate, retain_graph=True)
        (again,) = torch.autograd.grad(loss, gate)
    assert torch.equal(once, again) and once != 0


def test_backward_in_another_thread_recomputes_with_the_edits() -> None:
    """As autograd does on an accelerator."""
    found = []
    for threaded in (False, True):
        model = Model.load(tiny("llama"))
        model.hf.train().activation_checkpointing_enable()
        gate = torch.full((1,), 0.6, requires_grad=True)
        with model.editing({Site("z", 0): Mix(gate, torch.zeros(1)), Site("pattern", 1): Scale(0.5)}):
            loss = model.hf(input_ids=TOKENS, use_cache=False).logits.log_softmax(-1)[:, -1, 3].sum()
            in_thread(loss.backward) if threaded else loss.backward()
        assert gate.grad is not None
        found.append(gate.grad)
    torch.testing.assert_close(*found)


def test_gradients_through_model_forward_leave_checkpointing_alone() -> None:
    found = []
    for checkpointing in (False, True):
        model = Model.load(tiny("llama"))
        model.hf.train()
        if checkpointing:
            model.hf.activation_checkpointing_enable()
        gate = torch.full((1,), 0.3, requires_grad=True)
        logits = model.forward(model.batch(TOKENS), {Site("z", 0): Mix(gate, torch.zeros(1))})
        found += torch.autograd.grad(logits[:, -1, 3].sum(), gate)
        assert model.hf.training
    assert torch.equal(*found)


# --- edits at the logits of chosen columns


def test_logits_are_edited_at_the_columns_that_are_computed() -> None:
    model = Model.load(tiny("llama"))
    batch = model.batch(TOKENS)
    shift = torch.randn(97, generator=torch.Generator().manual_seed(0))
    edits: Edits = {Site.parse("logits@-1"): Add(shift), Site.parse("logits@2"): Put(torch.zeros(1))}
    whole = model.run(batch, edits)
    some = model.forward(batch, edits, columns=torch.tensor([2, 4, 6]))
    torch.testing.assert_close(some, whole[:, [2, 4, 6]])
    assert not whole[:, 2].any()
    torch.testing.assert_close(whole[:, 6], model.run(batch)[:, 6] + shift)
