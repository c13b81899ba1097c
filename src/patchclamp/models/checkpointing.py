"""Activation checkpointing by block: what a backward pass needs is kept, or computed again where memory is short.

A gradient needs what the forward pass made in every block. Where all of it does not fit, the first blocks keep their input
alone, and are run again when the backward pass comes to them: as many of them as must be, for one more forward pass through each.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from patchclamp.models.anatomy import Anatomy
from patchclamp.models.held import HOLDER
from patchclamp.models.scope import remembered
from patchclamp.models.stand_ins import STANDING, StandIn, replaceable
from patchclamp.models.standing import Start


@dataclass(eq=False)
class Room:
    """What one forward pass keeps for its backward pass, and how much it may keep.

    Args:
        bytes: how much may be kept.
        every: whether every block is computed again, whatever there is room for.
        kept: bytes kept so far.
        block: the most that any block kept.
        again: how many blocks are computed again.
    """

    bytes: int | float
    every: bool = False
    kept: int = 0
    block: int = 0
    again: int = 0
    seen: set[int] = field(default_factory=set[int])

    @property
    def needed(self) -> int:
        """What the pass would keep if nothing were computed again, and what its backward pass has in hand at a time."""
        return self.kept + (self.again + 1) * self.block

    def recomputes(self, left: int) -> bool:
        """Whether the next of `left` blocks must be computed again, so that the others can be kept.

        The first block of a pass shows what a block takes: until then none is known.
        """
        return torch.is_grad_enabled() and (self.every or 0 < self.block > (self.bytes - self.kept) / left)

    @contextmanager
    def counted(self, hf: nn.Module) -> Generator[None]:
        """While open, what autograd keeps is counted; weights are there anyway, and what several nodes keep counts once."""
        self.seen |= {weight.untyped_storage().data_ptr() for weight in (*hf.parameters(), *hf.buffers())}
        with saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.kept += storage.nbytes()
        return value.detach()  # the value itself would keep its own graph alive, in a circle


def _unpack(value: Tensor) -> Tensor:
    return value


def checkpointed(start: Start, room: Room) -> Start:
    """The same start, whose blocks keep no more than there is room for.

    The backward pass must run while the sessions of the forward pass and `start.standing` are open.
    """
    return _Checkpointed(**vars(start), room=room)


@dataclass(frozen=True, eq=False)
class _Checkpointed(Start):
    room: Room = field(default_factory=lambda: Room(float("inf")))

    @contextmanager
    def standing(self, anatomy: Anatomy) -> Generator[None]:
        with ExitStack() as stack:
            stack.enter_context(super().standing(anatomy))
            below = STANDING.get()
            blocks = {id(layer.block): number for number, layer in enumerate(anatomy.layers)}
            instead = {name: partial(self._kept, len(blocks) - number, below.get(name)) for name, number in blocks.items()}
            for layer in anatomy.layers:
                stack.enter_context(HOLDER.hold(("stand in", id(layer.block)), partial(replaceable, layer.block)))
            stack.callback(STANDING.reset, STANDING.set({**below, **instead}))
            stack.enter_context(self.room.counted(anatomy.hf))
            yield

    def _kept(self, left: int, below: StandIn | None, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block, kept if there is room for all that are left, and else computed again."""
        call = partial(own, **kwargs) if below is None else partial(below, own, **kwargs)
        if self.room.recomputes(left):
            self.room.again += 1
            return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_alike)
        before = self.room.kept
        output = call(*args)
        self.room.block = max(self.room.block, self.room.kept - before)
        return output


def _alike() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    first, again = remembered()
    return first, _Again(again, STANDING.get())


@dataclass
class _Again(AbstractContextManager[None]):
    """The sessions of a call, and what stood in for modules then; entered where the call is computed again, in any thread."""

    sessions: AbstractContextManager[None]
    standing: Mapping[int, StandIn]
    undo: list[ExitStack] = field(default_factory=list[ExitStack])

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self.sessions)
            stack.callback(STANDING.reset, STANDING.set(self.standing))
            self.undo.append(stack.pop_all())

    def __exit__(self, *error: object) -> None:
        self.undo.pop().close()


def ran_out(error: RuntimeError) -> bool:
    """Whether it says that memory ran out, on an accelerator or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
