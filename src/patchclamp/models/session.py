"""Sessions: the one place where hooks are put on a model and taken off again.

A session visits places (whole-layer sites): each visitor gets the value that the model computes there and returns it, or
another. Everything that reads or edits a model goes through it. Hooks act in the thread that opened the session only, and
leave with it, also after an exception.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from patchclamp.models.anatomy import Anatomy
from patchclamp.models.attention import Visits, module_tap, tapped
from patchclamp.models.places import Visitor, install, on_first
from patchclamp.models.scope import OPEN, eager, recomputed_alike
from patchclamp.sites import Site

TAPPED = ("q", "k", "v", "scores", "pattern")
Call = tuple[tuple[Any, ...], dict[str, Any]]
CALL: ContextVar[Call] = ContextVar("patchclamp_call")
"""What the module was called with whose input this thread is visiting: for who calls a block again, on another stream."""


class Session:
    """Visitors at places of one model, for as long as the session is open."""

    def __init__(self, anatomy: Anatomy, visitors: Mapping[Site, Visitor]) -> None:
        self.anatomy = anatomy
        self.visitors = dict(sorted(visitors.items(), key=lambda item: item[0].key))
        self.opened = False
        self.handles: list[Any] = []
        self.modes: dict[int, Callable[[Tensor], Any]] = {}
        """By id of a module: the function mode that its forward runs in."""
        self.stash: dict[Any, Any] = {}
        """What one hook of a call keeps for a later one."""

    @contextmanager
    def open(self) -> Generator[None, None, None]:
        """Install the hooks; remove them on the way out."""
        with ExitStack() as stack:
            self.opened = True
            token = OPEN.set((*OPEN.get(), self))
            stack.callback(OPEN.reset, token)
            stack.callback(self._remove)
            stack.enter_context(recomputed_alike(self.anatomy.hf))
            watched = self._watched()
            if watched:
                stack.enter_context(eager(self.anatomy))
            wide = next(self.anatomy.hf.parameters()).dtype is torch.float64  # a family's own softmax may make NaN of padding
            if watched or wide:
                stack.enter_context(tapped(watched))
            for place, visitor in self.visitors.items():
                if place.kind not in TAPPED:
                    install(self, place, visitor)
            if not self.anatomy.family.interface:
                for layer in self.anatomy.layers:
                    if id(layer.attention) in watched:
                        self.around(layer.attention, partial(module_tap, id(layer.attention)))
            yield

    def _remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.stash.clear()
        self.opened = False

    def _watched(self) -> dict[int, Visits]:
        """Visits by attention module."""
        watched: dict[int, dict[str, Visitor]] = {}
        for place, visit in self.visitors.items():
            if place.kind in TAPPED and place.layer is not None:
                watched.setdefault(id(self.anatomy.layers[place.layer].attention), {})[place.kind] = visit
        return {**watched}

    def before(self, module: nn.Module, change: Visitor) -> None:
        """Visit a module's (first) input."""
        self.handles.append(module.register_forward_pre_hook(partial(self._on_input, change), with_kwargs=True))

    def after(self, module: nn.Module, change: Visitor) -> None:
        """Visit a module's (first) output."""
        self.rewrite(module, partial(on_first, change))

    def rewrite(self, module: nn.Module, change: Callable[[Any], Any]) -> None:
        """Change a module's whole output, whatever it is."""
        self.handles.append(module.register_forward_hook(partial(self._on_output, change)))

    def around(self, module: nn.Module, mode: Callable[[Tensor], Any], every: bool = False) -> None:
        """Run a module's forward inside a function mode, made from its (first) input.

        Of nested sessions the innermost acts: with its own mode alone, or with `every` one, outermost first.
        """
        self.modes[id(module)] = mode
        entered: list[Any] = []
        self.handles.append(module.register_forward_pre_hook(partial(self._enter, entered, every), with_kwargs=True))
        self.handles.append(module.register_forward_hook(partial(self._leave, entered, every), always_call=True))

    # The hooks are bound methods, not closures: they are made anew for every run.

    # PyTorch adds and removes a hook and its note "with keywords" one after the other: a thread that runs the model in
    # between calls another thread's hook without keywords. That hook has nothing to do there.

    def _on_input(self, change: Visitor, _: nn.Module, args: tuple[Any, ...], *rest: dict[str, Any]) -> Any:
        if self not in OPEN.get():
            return None
        (kwargs,) = rest
        token = CALL.set((args, kwargs))
        try:
            if args:
                value = change(args[0])
                return None if value is args[0] else ((value, *args[1:]), kwargs)
            value = change(kwargs["hidden_states"])
            return None if value is kwargs["hidden_states"] else (args, kwargs | {"hidden_states": value})
        finally:
            CALL.reset(token)

    def _on_output(self, change: Callable[[Any], Any], _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return change(output) if self in OPEN.get() else None

    def _modes_around(self, module: nn.Module, every: bool) -> list[Callable[[Tensor], Any]]:
        sessions = [session for session in OPEN.get() if id(module) in session.modes]
        if not sessions or sessions[-1] is not self:
            return []
        return [session.modes[id(module)] for session in (sessions if every else sessions[-1:])]

    def _enter(self, entered: list[Any], every: bool, module: nn.Module, args: tuple[Any, ...], *rest: dict[str, Any]) -> None:
        for make in self._modes_around(module, every):
            (kwargs,) = rest
            entered.append(make(args[0] if args else kwargs["hidden_states"]))
            entered[-1].__enter__()

    def _leave(self, entered: list[Any], every: bool, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for _ in range(min(len(entered), len(self._modes_around(module, every)))):
            entered.pop().__exit__(None, None, None)
