"""Where sessions act: in the thread that opened them, under eager attention, and once more where activations are recomputed."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from patchclamp.errors import GateError
from patchclamp.models.anatomy import Anatomy
from patchclamp.models.attention import WATCHED, Visits
from patchclamp.models.held import HOLDER, Undo


@runtime_checkable
class Opened(Protocol):
    """What is known here of a session."""

    opened: bool
    stash: dict[Any, Any]
    modes: dict[int, Callable[[Tensor], Any]]


OPEN: ContextVar[tuple[Opened, ...]] = ContextVar("patchclamp_sessions", default=())
"""The sessions of this thread, outermost first: an inner one sees what the outer ones have made of a value."""


@contextmanager
def eager(anatomy: Anatomy) -> Generator[None, None, None]:
    """Eager attention for the time of a session: only there do scores and patterns exist."""
    with ExitStack() as stack:
        for config in {id(config): config for config in _configs(anatomy)}.values():
            stack.enter_context(HOLDER.hold(("eager", id(config)), partial(_switch, config)))
        yield


def _switch(config: Any) -> Undo:
    before = config._attn_implementation
    if before != "eager":
        config._attn_implementation = "eager"

    def undo() -> None:
        if before != "eager":
            config._attn_implementation = before

    return undo


def _configs(anatomy: Anatomy) -> Iterator[Any]:
    yield anatomy.config
    for layer in anatomy.layers:
        config = getattr(layer.attention, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            yield config


@contextmanager
def still(hf: Any) -> Generator[None, None, None]:
    """Evaluation mode for the time of a call; train mode is put back."""
    training = [module for module in hf.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def unobserved() -> Generator[None, None, None]:
    """While open, no session of this thread acts: for calling a model's modules on values of one's own."""
    token, watched = OPEN.set(()), WATCHED.set(None)
    try:
        yield
    finally:
        OPEN.reset(token)
        WATCHED.reset(watched)


@contextmanager
def recomputed_alike(hf: nn.Module) -> Generator[None, None, None]:
    """While open, what activation checkpointing computes again in the backward pass is visited as it was the first time.

    Autograd recomputes in threads of its own, where no session is open, and after other calls: each checkpoint therefore
    keeps the sessions of its call, and what they had stashed by then. (Checkpoints are made without re-entrant autograd,
    so that gradients reach gates, which no block has among its inputs.)
    """
    blocks = [
        m for m in hf.modules() if getattr(m, "gradient_checkpointing", False) and hasattr(m, "_gradient_checkpointing_func")
    ]
    before = [block._gradient_checkpointing_func for block in blocks]
    for block in blocks:
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=remembered)  # type: ignore[assignment]
    try:
        yield
    finally:
        for block, function in zip(blocks, before, strict=True):
            block._gradient_checkpointing_func = function


def remembered() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `checkpoint`: what is entered around a call, and around its recomputation, which sees the sessions of the call."""
    return nullcontext(), _AsItWas(OPEN.get(), WATCHED.get(), tuple(dict(session.stash) for session in OPEN.get()))


@dataclass
class _AsItWas(AbstractContextManager[None]):
    """The sessions of one call, with what they had stashed; entered at every backward pass through the call."""

    sessions: tuple[Opened, ...]
    watched: Mapping[int, Visits] | None
    stashes: tuple[dict[Any, Any], ...]
    undo: list[ExitStack] = field(default_factory=list[ExitStack])

    def __enter__(self) -> None:
        if not all(session.opened for session in self.sessions):
            raise GateError(
                "the backward pass recomputes activations, but the edits that were on have ended: run backward inside `editing`"
            )
        stack = ExitStack()
        stack.callback(OPEN.reset, OPEN.set(self.sessions))
        stack.callback(WATCHED.reset, WATCHED.set(self.watched))
        for session, stash in zip(self.sessions, self.stashes, strict=True):
            stack.callback(setattr, session, "stash", session.stash)
            session.stash = dict(stash)
        self.undo.append(stack)

    def __exit__(self, *error: object) -> None:
        self.undo.pop().close()
