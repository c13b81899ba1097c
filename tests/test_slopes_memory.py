"""The gradient engine in little memory: what is kept, what runs again, and what happens when memory runs out all the same."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from patchclamp.models.checkpointing import Room
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.parts.limits import limits_of
from test_parts import examples
from test_slopes import Blocks, deep, drawn, tight


def test_as_many_blocks_are_recomputed_as_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for all, for most, for some, for none: the fewer fit, the more run again, from the first on; slopes never change."""
    parts = nodes(deep("gpt2", 8))
    batch, fallback = examples(3).batch(), parts.fallback("resample")
    rooms: list[Room] = []
    monkeypatch.setattr("patchclamp.parts.slopes.Room", lambda *args: rooms.append(Room(*args)) or rooms[-1])
    plain = parts.gradient(batch, drawn(parts, 1), fallback)
    whole = rooms[-1]
    assert whole.again == 0 and whole.kept > 8 * whole.block * 0.9  # blocks alike
    times = []
    for share in (1.1, 0.8, 0.5, 0.2):
        found = tight(parts, int(share * whole.kept)).gradient(batch, drawn(parts, 1), fallback)
        for one, two in zip(plain, found, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)  # float64, the same operations
        times.append(rooms[-1].again)
        inputs = rooms[-1].again * batch.tokens.numel() * parts.model.width * 8
        assert rooms[-1].kept <= max(share * whole.kept, 2 * whole.block) + inputs
    assert times[0] == 0 < times[1] < times[2] < times[3] < 8


def test_settings_fold_by_what_the_first_kept() -> None:
    parts = nodes(deep("gpt2", 3))
    batch, fallback = examples(2).batch(), parts.fallback("resample")
    gates = drawn(parts, 7)
    with pytest.MonkeyPatch.context() as patch:
        blocks = Blocks(parts.model, patch)
        fallback.at(batch)
        parts.gradient(batch, gates, fallback)
        assert blocks.rows[1] == [2, 12]
    (row,) = limits_of(parts).rows.values()
    few = tight(parts, int(3.5 * 2 * row))
    few.gradient(batch, gates[:1], fallback)
    with pytest.MonkeyPatch.context() as patch:
        blocks = Blocks(parts.model, patch)
        found = few.gradient(batch, gates, fallback)
        assert blocks.rows[1] == [6, 6, 2]
    torch.testing.assert_close(found[1], parts.gradient(batch, gates, fallback)[1], rtol=0, atol=1e-12)  # float64


# --- memory that runs out all the same


class Scarce:
    """Stands in for an allocator: in a gradient, a block with more rows than there is memory for fails, as torch does."""

    def __init__(self, model: Model, patch: pytest.MonkeyPatch, rows: int, error: RuntimeError) -> None:
        own = model.anatomy.layers[1].mlp.forward

        def forward(value: Tensor, *args: Any) -> Any:
            if value.requires_grad and len(value) > rows:
                raise error
            return own(value, *args)

        patch.setattr(model.anatomy.layers[1].mlp, "forward", forward)


ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    ),
)


@pytest.mark.parametrize("error", ERRORS, ids=["accelerator", "cpu"])
def test_memory_that_runs_out_halves_settings_then_recomputes_then_halves_prompts(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = nodes(deep("gpt2", 3))
    batch = examples(5, lengths=(7, 5), answers=2).batch()
    fallback, gates = parts.fallback("resample"), drawn(parts, 4, batch, by_example=True)
    plain = [parts.gradient(batch, gates, fallback) for _ in range(2)][1]
    rows = len(batch.tokens) // len(batch)
    Scarce(parts.model, monkeypatch, 2 * rows, error)
    with pytest.warns(UserWarning) as warned:
        found = parts.gradient(batch, gates, fallback)
    said = [str(one.message) for one in warned]
    assert said == [
        "memory ran out with 4 settings at once: going on with 2",
        "memory ran out with 2 settings at once: going on with 1",
        "memory ran out in a backward pass: going on with every block's activations computed again",
        "memory ran out with 5 prompts at once: going on with 2",
    ]
    for one, two in zip(plain, found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-11)  # float64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = parts.gradient(batch, gates, fallback)  # it is remembered, and not said again
    torch.testing.assert_close(again[1], plain[1], rtol=0, atol=1e-11)


def test_other_errors_and_hopeless_ones_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = nodes(deep("gpt2", 3))
    batch, fallback = examples(2).batch(), parts.fallback("resample")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="something else"):
        Scarce(parts.model, patch, 0, RuntimeError("something else"))
        parts.gradient(batch, drawn(parts, 2), fallback)
    Scarce(parts.model, monkeypatch, 0, ERRORS[0])
    with pytest.warns(UserWarning, match="memory ran out"), pytest.raises(torch.OutOfMemoryError):
        parts.gradient(batch, drawn(parts, 2), fallback)
