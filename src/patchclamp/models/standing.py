"""Where runs start: blocks that settings pass by, columns whose keys and values are known, and what nobody will look at."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from patchclamp.models.anatomy import Anatomy
from patchclamp.models.held import HOLDER, Undo
from patchclamp.sites import Site

StandIn = Callable[..., Any]  # of a module's own forward and what it is called with
STANDING: ContextVar[Mapping[int, StandIn]] = ContextVar("patchclamp_standing", default=MappingProxyType({}))
"""By id of a module: what this thread computes in its place."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where the settings of a run start, and what the model's own run holds there.

    Settings stand in the order of their first block. At block l the first `counts[l]` of them run; those that start at l + 1
    join behind it, with what the model's own run gives to block l + 1. So every block runs once for all settings that are
    below it, and none for a setting that has not started.

    Args:
        column: first column that runs.
        counts: by block, and behind the last one: how many settings run there. Empty: all of them everywhere.
        inputs: by block, and behind the last one: [row, position, width], the residual stream there in the model's own run.
        prefix: by block, keys and values [row, kv head, position, width] of every column.
        tuples: by block, how long a tuple it gives; 0 for a tensor.
        wanted: the columns that anything is asked of behind the last block; None: all of them.
        tokens: the tokens whose logits are computed, in this order; None: all of them.
        given: the first block, too, gets what it got in the model's own run (which had an edit there), not the embedding.
    """

    column: int = 0
    counts: tuple[int, ...] = ()
    inputs: tuple[Tensor, ...] = ()
    prefix: tuple[tuple[Tensor, Tensor], ...] = ()
    tuples: tuple[int, ...] = ()
    wanted: Int[Tensor, " column"] | None = None
    tokens: Int[Tensor, " token"] | None = None
    given: bool = False

    def rising(self, column: int, firsts: Sequence[int]) -> "Start":
        """The same for settings whose first blocks are `firsts` (in rising order) and whose first column is `column`."""
        wanted = None if self.wanted is None else self.wanted - column
        if not self.inputs:
            return replace(self, column=column, wanted=wanted)
        counts = tuple(sum(first <= layer for first in firsts) for layer in range(len(self.inputs)))
        return replace(self, column=column, counts=counts, wanted=wanted)

    def settings_at(self, place: Site, settings: int) -> int:
        """How many of the settings run where a place's value is computed."""
        if not self.counts or place.layer is None:
            return settings
        if place.kind == "resid.post":
            return self.counts[place.layer + 1]
        return settings if (place.layer, place.kind) == (0, "resid.pre") else self.counts[place.layer]

    def options(self, settings: int) -> dict[str, Any]:
        """What a forward call of `settings` copies of the rows needs beside its columns."""
        if not self.column:
            return {"use_cache": False}
        from patchclamp.models.prefix import shared_prefix

        # it keeps every column, also of sliding windows: masks do the rest
        cache = shared_prefix([
            (keys[:, :, : self.column], values[:, :, : self.column], max(1, self.counts[layer]) if self.counts else settings)
            for layer, (keys, values) in enumerate(self.prefix)
        ])  # fmt: skip
        return {"use_cache": True, "past_key_values": cache}

    @contextmanager
    def standing(self, anatomy: Anatomy, settings: int) -> Generator[None]:
        """While open, in this thread, the model computes what this start leaves to compute, and nothing else."""
        instead: dict[nn.Module, StandIn] = {}
        if self.counts and (self.given or self.counts[0] < settings):
            instead |= {layer.block: partial(self._block, number, settings) for number, layer in enumerate(anatomy.layers)}
        last = anatomy.layers[-1]
        if self.wanted is not None:
            instead |= dict.fromkeys([last.output] if last.output is last.mlp else [last.output, last.mlp], self._only_wanted)
        if self.tokens is not None:
            instead[anatomy.unembed] = partial(self._only_tokens, anatomy.unembed)
        with ExitStack() as stack:
            for module in instead:
                stack.enter_context(HOLDER.hold(("stand in", id(module)), partial(_replaceable, module)))
            stack.callback(STANDING.reset, STANDING.set({id(module): one for module, one in instead.items()}))
            yield

    def _block(self, number: int, settings: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        running, joining = self.counts[number], self.counts[number + 1] - self.counts[number]
        value: Tensor = args[0] if args else kwargs["hidden_states"]
        rows = len(self.inputs[0])
        if self.given and not number:
            value = _copies(self.inputs[0][:, self.column :], settings)
            args, kwargs = ((value, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": value})
        output: Any = value
        if running:
            cut = partial(_leading, running * rows, settings * rows)
            output = own(*map(cut, args), **{name: cut(given) for name, given in kwargs.items()})
        kept = output[0] if isinstance(output, tuple) else output
        if joining:
            fresh = _copies(self.inputs[number + 1][:, self.column :], joining)
            kept = torch.cat([kept, fresh]) if running else fresh
        if isinstance(output, tuple):
            return (kept, *output[1:])
        return (kept, *[None] * (self.tuples[number] - 1)) if self.tuples[number] and not running else kept

    def _only_wanted(self, own: Callable[..., Any], value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A module that treats every position by itself, run at the wanted columns; zero elsewhere."""
        assert self.wanted is not None
        if value.dim() != 3:
            return own(value, *args, **kwargs)
        some = own(value[:, self.wanted], *args, **kwargs)
        return some.new_zeros(*value.shape[:2], some.shape[-1]).index_copy(1, self.wanted, some)

    def _only_tokens(self, module: Any, _: Callable[..., Any], value: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias[self.tokens]
        return nn.functional.linear(value, module.weight[self.tokens], bias)


def why_whole_vocabulary(anatomy: Anatomy) -> str:
    """Why the logits of some tokens cannot be computed alone, or nothing where they can."""
    unembed = anatomy.unembed
    if type(unembed) is not nn.Linear:
        return f"the unembedding is a {type(unembed).__name__}"
    if "_hf_hook" in vars(unembed):
        return "accelerate moves the unembedding"
    return ""


def why_every_column(anatomy: Anatomy) -> str:
    """Why the last block's MLP and output projection run at every column, or nothing where they need not."""
    if anatomy.family.flat_mlp or anatomy.layers[-1].router is not None:
        return "its MLP sees rows and columns as one"
    return ""


def _copies(value: Tensor, count: int) -> Tensor:
    return value if count == 1 else value.expand(count, *value.shape).flatten(0, 1)


def _leading(rows: int, total: int, given: Any) -> Any:
    """The leading rows of whatever has all rows: a mask, rotary embeddings, position ids, a bias by row and head."""
    if isinstance(given, tuple | list):
        return type(given)(_leading(rows, total, one) for one in given)
    if not isinstance(given, Tensor) or given.dim() < 2 or len(given) < total or len(given) % total:
        return given
    return given[: rows * (len(given) // total)]


def _replaceable(module: nn.Module) -> Undo:
    """Let threads put something in the module's place."""
    own, shadowed = module.forward, "forward" in vars(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        stand_in = STANDING.get().get(id(module))
        return own(*args, **kwargs) if stand_in is None else stand_in(own, *args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]

    def undo() -> None:
        if shadowed:
            module.forward = own  # type: ignore[method-assign]
        else:
            del module.forward

    return undo
