"""Stand-ins: what a thread computes in a module's place, or its own forward function with another backward pass."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn

from patchclamp.models.held import Undo

StandIn = Callable[..., Any]  # of a module's own forward and what it is called with
STANDING: ContextVar[Mapping[int, StandIn]] = ContextVar("patchclamp_standing", default=MappingProxyType({}))
"""By id of a module: what this thread computes in its place."""
RULED: ContextVar[Mapping[int, StandIn]] = ContextVar("patchclamp_ruled", default=MappingProxyType({}))
"""By id of a module: its own forward function with another backward pass (`models.backward`), whatever else stands in for it."""


@contextmanager
def themselves() -> Generator[None]:
    """While open, in this thread, modules compute what they do by themselves, whatever stands in for them in a run."""
    token = STANDING.set(MappingProxyType({}))
    try:
        yield
    finally:
        STANDING.reset(token)


def replaceable(module: nn.Module) -> Undo:
    """Let threads put something in the module's place."""
    own, shadowed = module.forward, "forward" in vars(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        stand_in, rule = STANDING.get().get(id(module)), RULED.get().get(id(module))
        call = own if rule is None else partial(rule, own)
        return call(*args, **kwargs) if stand_in is None else stand_in(call, *args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]

    def undo() -> None:
        if shadowed:
            module.forward = own  # type: ignore[method-assign]
        else:
            del module.forward

    return undo
