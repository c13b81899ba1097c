"""One attention tap for every family: queries, keys, values, scores and pattern are read and edited in the model's own code.

While a session is open, a function stands under the key "eager" of transformers' attention registry. It delegates to the model
file's own eager attention and intercepts softmax inside that call, so that what is read is what the model computes, bit for
bit, whatever the family does to scores (soft-caps, sinks, windows, position bias). Families that do not go through the
registry are watched inside their attention module instead, where exactly one softmax lies between two matrix products.

The tap does nothing for models that no session of the same thread observes, and it is removed when the last session closes.
"""

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from patchclamp.models.held import HOLDER, Undo

Visit = Callable[[Tensor], Tensor]
Visits = Mapping[str, Visit]
"""What to do at q, k, v ([row, position, head, width]), scores and pattern ([row, head, query, key]) of one layer."""

_SOFTMAX: tuple[Any, ...] = (F.softmax, torch.softmax, Tensor.softmax)
_PRODUCTS: tuple[Any, ...] = (
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    Tensor.bmm,
    torch.baddbmm,
    Tensor.baddbmm,
)
WATCHED: ContextVar[Mapping[int, Visits] | None] = ContextVar("patchclamp_watched", default=None)
"""The visits of this thread, by id of the attention module."""


def untouched(edited: Tensor, seen: Tensor) -> bool:
    """Whether the model may go on with its own tensor. With gradients it must go on with the one that was seen, so that
    what is recorded lies on the way to the logits."""
    return edited is seen and not torch.is_grad_enabled()


def rests(attention: nn.Module) -> bool:
    """Whether something beside the keys takes a share of each row of the pattern: a sink with a score (gpt_oss), a gate (normless)."""
    return any(getattr(attention, name, None) is not None for name in ("sinks", "gate"))


class SoftmaxTap(TorchFunctionMode):
    """Inside one attention call, hands softmax's input (scores) and output (pattern) to the visits."""

    def __init__(self, visits: Visits, keys: int) -> None:
        super().__init__()
        self.visits, self.keys, self.inside = visits, keys, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _SOFTMAX or self.inside:
            return func(*args, **kwargs)
        self.inside = True  # what a visit computes is not attention
        try:
            scores = _in_range(self.real_keys("scores", args[0]), kwargs.get("dtype"))
            return self.real_keys("pattern", func(scores, *args[1:], **kwargs))
        finally:
            self.inside = False

    def real_keys(self, name: str, value: Tensor) -> Tensor:
        """Visit the columns of real keys; a sink, where there is one, is the last column and stays as it is."""
        visit = self.visits.get(name)
        if visit is None:
            return value
        if value.shape[-1] == self.keys:
            return visit(value)
        real = value[..., : self.keys]
        edited = visit(real)
        return value if untouched(edited, real) else torch.cat([edited, value[..., self.keys :]], -1)


def _in_range(scores: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Scores that a softmax in another precision can hold.

    Softmax in float32 makes minus infinity of float64's lowest number, which is what masks, and NaN of a row that is masked
    everywhere: of padding's. Rows with anything to attend to stay the same bit for bit.
    """
    if dtype is not torch.float32 or scores.dtype is not torch.float64:
        return scores
    return scores.clamp(min=torch.finfo(torch.float32).min)


def _heads_last(visits: Visits, name: str, value: Tensor) -> Tensor:
    """Visit [row, head, position, width] as [row, position, head, width]."""
    visit = visits.get(name)
    if visit is None:
        return value
    turned = value.transpose(1, 2)
    edited = visit(turned)
    return value if untouched(edited, turned) else edited.transpose(1, 2)


def _own_attention(module: nn.Module) -> Callable[..., Any]:
    for cls in type(module).__mro__:
        found = getattr(sys.modules[cls.__module__], "eager_attention_forward", None)
        if found is not None:
            return found
    raise RuntimeError(f"{type(module).__name__} has no eager attention of its own to delegate to")


def _tap(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **options: Any) -> Any:
    own = _own_attention(module)
    visits = (WATCHED.get() or {}).get(id(module))
    narrowed = query.dtype is torch.float64  # by softmax, in some families
    if not visits and not narrowed:
        return own(module, query, key, value, mask, *args, **options)
    visits = visits or {}
    query, key, value = (_heads_last(visits, name, x) for name, x in (("q", query), ("k", key), ("v", value)))
    if "scores" not in visits and "pattern" not in visits and not narrowed:
        return own(module, query, key, value, mask, *args, **options)
    with SoftmaxTap(visits, key.shape[2]):
        return own(module, query, key, value, mask, *args, **options)


@contextmanager
def tapped(watched: Mapping[int, Visits]) -> Generator[None, None, None]:
    """While open, in this thread, attention modules (by id) of the registry's families are visited.

    The models must run with eager attention. Nested: outer visits come first, inner ones see what they return.
    """
    token = WATCHED.set(_joined(WATCHED.get() or {}, watched))
    try:
        with HOLDER.hold("eager", _install):
            yield
    finally:
        WATCHED.reset(token)


def _install() -> Undo:
    from transformers import AttentionInterface

    registry: dict[str, Any] = AttentionInterface._global_mapping  # pyright: ignore[reportPrivateUsage]
    before = registry.get("eager")

    def undo() -> None:
        if before is None:
            registry.pop("eager", None)
        else:
            registry["eager"] = before

    registry["eager"] = _tap
    return undo


def _joined(outer: Mapping[int, Visits], inner: Mapping[int, Visits]) -> dict[int, Visits]:
    def chain(one: Visit | None, two: Visit | None) -> Visit:
        if one is None or two is None:
            return one or two or _same
        return lambda value: two(one(value))

    joined: dict[int, Visits] = {}
    for key in {**outer, **inner}:
        a, b = outer.get(key, {}), inner.get(key, {})
        joined[key] = {name: chain(a.get(name), b.get(name)) for name in {**a, **b}}
    return joined


def module_tap(key: int, hidden: Tensor) -> "ModuleTap":
    """The tap for one call of the attention module with this id, inside `tapped`; `hidden` is what it is called with."""
    return ModuleTap((WATCHED.get() or {}).get(key, {}), len(hidden))


class ModuleTap(TorchFunctionMode):
    """Inside one attention module that bypasses the registry: product of q and k, softmax, product of pattern and v."""

    def __init__(self, visits: Visits, rows: int) -> None:
        super().__init__()
        self.visits, self.rows, self.seen, self.inside = visits, rows, 0, False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.inside or not (func in _SOFTMAX or (func in _PRODUCTS and _of_activations(args, kwargs))):
            return func(*args, **kwargs)
        self.inside = True
        try:
            if func in _SOFTMAX:
                scores = _in_range(self.visits.get("scores", _same)(args[0]), kwargs.get("dtype"))
                return self.visits.get("pattern", _same)(func(scores, *args[1:], **kwargs))
            self.seen += 1
            operands, put = _operands(args, kwargs)
            if self.seen == 1:
                query, key = operands
                put(self.visit("q", query), self.visit("k", key.transpose(-1, -2)).transpose(-1, -2))
            elif self.seen == 2:
                put(operands[0], self.visit("v", operands[1]))
            args, kwargs = put.args, put.kwargs
            return func(*args, **kwargs)
        finally:
            self.inside = False

    def visit(self, name: str, value: Tensor) -> Tensor:
        """Visit [row, head, position, width] (or with row and head in one axis) as [row, position, head, width]."""
        if name not in self.visits:
            return value
        if value.dim() == 4:
            return _heads_last(self.visits, name, value)
        return _heads_last(self.visits, name, value.unflatten(0, (self.rows, -1))).flatten(0, 1)


class _Put:
    """The last two tensor operands of a product, to be put back after a visit."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.named = "batch1" in kwargs

    def __call__(self, left: Tensor, right: Tensor) -> None:
        if self.named:
            self.kwargs |= {"batch1": left, "batch2": right}
        else:
            self.args = (*self.args[:-2], left, right)


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Tensor, Tensor], _Put]:
    put = _Put(args, kwargs)
    return ((kwargs["batch1"], kwargs["batch2"]) if put.named else (args[-2], args[-1])), put


def _of_activations(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A product with a weight matrix (2-D) is a projection, not attention."""
    return kwargs.get("batch2", args[-1]).dim() >= 3


def _same(value: Tensor) -> Tensor:
    return value
