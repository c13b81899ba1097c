"""Where a run starts: blocks that are passed through, and columns whose keys and values are known."""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from patchclamp.models.anatomy import Anatomy
from patchclamp.models.held import HOLDER, Undo

StandIn = Callable[[Tensor], Any]  # from the input that a block is called with to what it would have given
STANDING: ContextVar[Mapping[int, StandIn]] = ContextVar("patchclamp_standing", default=MappingProxyType({}))
"""By id of a block: what this thread computes in its place."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where a run starts, and what the model's own run held there.

    Args:
        column: first column that runs.
        layer: first block that runs.
        inputs: by block, [row, column, width], the residual stream into it at the columns that run; empty where only columns
            are left out.
        prefix: by block, keys and values [row, kv head, column, width] of the columns before.
        tuples: by block, how long a tuple it gives; 0 for a tensor.
    """

    column: int = 0
    layer: int = 0
    inputs: tuple[Tensor, ...] = ()
    prefix: tuple[tuple[Tensor, Tensor], ...] = ()
    tuples: tuple[int, ...] = ()

    def at(self, layer: int) -> "Start":
        """The same columns from another block on."""
        return replace(self, layer=layer)

    def options(self, settings: int) -> dict[str, Any]:
        """What a forward call of `settings` copies of the rows needs beside its columns."""
        if not self.column:
            return {"use_cache": False}
        from transformers import DynamicCache

        cache = DynamicCache()  # without a configuration it keeps every column, also of sliding windows: masks do the rest
        for layer, pair in enumerate(self.prefix):
            keys, values = (kept.expand(settings, *kept.shape).flatten(0, 1) for kept in pair)
            cache.update(keys, values, layer)
        return {"use_cache": True, "past_key_values": cache}

    @contextmanager
    def standing(self, anatomy: Anatomy, settings: int) -> Generator[None]:
        """While open, in this thread, blocks before `layer` are passed through; the last of them gives what goes into `layer`."""
        if not self.layer:
            yield
            return
        blocks = [layer.block for layer in anatomy.layers[: self.layer]]
        given = self.inputs[self.layer]
        value = given.expand(settings, *given.shape).flatten(0, 1)
        stand_ins: dict[int, StandIn] = {
            id(block): partial(_stand_in, value if block is blocks[-1] else None, length)
            for block, length in zip(blocks, self.tuples, strict=False)
        }
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(HOLDER.hold(("stand in", id(block)), partial(_replaceable, block)))
            stack.callback(STANDING.reset, STANDING.set(stand_ins))
            yield


def _stand_in(instead: Tensor | None, length: int, value: Tensor) -> Any:
    value = value if instead is None else instead
    return (value, *[None] * (length - 1)) if length else value


def _replaceable(block: nn.Module) -> Undo:
    """Let threads put something in the block's place."""
    own, shadowed = block.forward, "forward" in vars(block)

    def forward(*args: Any, **kwargs: Any) -> Any:
        stand_in = STANDING.get().get(id(block))
        if stand_in is None:
            return own(*args, **kwargs)
        return stand_in(args[0] if args else kwargs["hidden_states"])

    block.forward = forward  # type: ignore[method-assign]

    def undo() -> None:
        if shadowed:
            block.forward = own  # type: ignore[method-assign]
        else:
            del block.forward

    return undo
