"""Signatures checked at run time: the checks of jaxtyping's decorator, made once per call.

jaxtyping binds the arguments of every call anew and checks them twice, before the call and again beside what is returned. Beside
models as small as those of the tests that costs more than the models do. Here beartype checks arguments once and what is
returned once, inside one scope of axis names; a function whose signature names no axis needs no scope. And a function that is
defined inside another, anew at each of its calls, takes over the checks that were written for it the first time.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any, get_args, get_type_hints

import jaxtyping

theirs = jaxtyping.jaxtyped
_SCOPE = theirs("context")  # holds nothing: entering pushes a scope of the running thread, leaving drops it


def jaxtyped(fn: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """A function, method or dataclass with its annotations checked at each call; in place of `jaxtyping.jaxtyped`."""
    if fn is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    again = functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(fn):
        made = vars(fn).get("__init__")
        if dataclasses.is_dataclass(fn) and made is not None and not hasattr(made, "checked"):
            setattr(fn, "__init__", again(made))  # noqa: B010 (a name that type checkers keep to themselves)
        return fn
    if isinstance(fn, classmethod | staticmethod):
        return type(fn)(again(fn.__func__))
    if isinstance(fn, property):
        return property(*(one and again(one) for one in (fn.fget, fn.fset, fn.fdel)))
    return _function(fn, typechecker)


def _function(fn: FunctionType, typechecker: Callable[[Any], Any]) -> Any:
    key = (fn.__code__, typechecker, tuple(fn.__annotations__.items()))
    try:
        made = _MADE.get(key)
    except TypeError:  # an annotation that cannot be hashed
        return _first(fn, typechecker)[0]
    if made is not None:  # a function inside a function, defined once more
        return _once_more(fn, *made)
    checked, again = _first(fn, typechecker)
    if again is not None:
        _MADE[key] = again
    return checked


_MADE: dict[Any, tuple[FunctionType, str, bool]] = {}
"""By code and annotations: what checks, where in its defaults what it calls is held, whether it needs a scope."""


def _first(fn: FunctionType, typechecker: Callable[[Any], Any]) -> tuple[Any, tuple[FunctionType, str, bool] | None]:
    """A function checked, and how to check another of the same code: writing and compiling a check takes milliseconds."""
    hints = {name: _resolved(hint, fn.__globals__) for name, hint in fn.__annotations__.items()}
    axes = [axis for hint in hints.values() for axis in _axes(hint)]
    if axes and (inspect.isgeneratorfunction(fn) or any("{" in axis.dim_str for axis in axes)):
        return theirs(fn, typechecker=typechecker), None  # a scope that outlives the call, or sizes that arguments give
    plain = _with_annotations(fn, hints)
    checks = typechecker(plain)
    plain.__annotations__ = fn.__annotations__  # for whoever reads the signature
    held = [name for name, value in (checks.__kwdefaults__ or {}).items() if value is plain]
    made = (checks, held[0], bool(axes)) if len(held) == 1 else None
    return _finished(checks, fn, bool(axes)), made


def _once_more(fn: FunctionType, checks: FunctionType, held: str, scoped: bool) -> Any:
    """The checks of one function around another of the same code."""
    copy = FunctionType(checks.__code__, checks.__globals__, fn.__name__, checks.__defaults__, checks.__closure__)
    functools.update_wrapper(copy, fn)
    copy.__kwdefaults__ = {**(checks.__kwdefaults__ or {}), held: fn}
    return _finished(copy, fn, scoped)


def _finished(checks: Any, fn: FunctionType, scoped: bool) -> Any:
    checked = _scoped(checks) if scoped else checks
    checked.__annotations__, checked.checked = fn.__annotations__, True
    return checked


def _scoped(checks: Callable[..., Any]) -> Any:
    @functools.wraps(checks)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with _SCOPE:
            return checks(*args, **kwargs)

    return call


def _resolved(hint: Any, namespace: dict[str, Any]) -> Any:
    """An annotation without names in quotes; what is not defined yet can be anything, as with jaxtyping."""
    try:
        return get_type_hints(SimpleNamespace(__annotations__={"hint": hint}), namespace, include_extras=True)["hint"]
    except Exception:
        return Any


def _axes(hint: Any) -> Iterator[Any]:
    """The annotations of arrays within one."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        yield hint
    for inner in hint if isinstance(hint, list) else get_args(hint):
        yield from _axes(inner)


def _with_annotations(fn: FunctionType, hints: dict[str, Any]) -> FunctionType:
    """A copy of a function, closure and all, with other annotations."""
    copy = FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    functools.update_wrapper(copy, fn, updated=("__dict__",))
    del copy.__wrapped__
    copy.__kwdefaults__, copy.__annotations__ = fn.__kwdefaults__, hints
    return copy
