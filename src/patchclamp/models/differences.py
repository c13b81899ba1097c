"""Differences passed back instead of derivatives: two runs side by side, and for every step what makes of its input's difference its
output's (DeepLIFT's rescale rule; of products each factor's Shapley value).

The rows of a pass are two halves: the run, and the reference it is compared with. Every step's multiplier m gives, exactly,

    output - output' = sum over inputs of m * (input - input'),

so that what flows back adds up to the difference of the metric at every cut through the network. Linear steps have the multiplier
that autograd gives them. Functions of one number: (f(z) - f(z')) / (z - z'). Products: each factor's share is the mean of the two
orders of changing them, (b + b') / 2 for a. Softmax and LayerNorm are sums, products and functions of one number, one after the other.
A step of another kind is an error, by name: nothing is passed back in some other way in silence.
"""

import re
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from patchclamp.errors import FamilyError
from patchclamp.models.anatomy import Anatomy
from patchclamp.models.backward import activations_of
from patchclamp.models.held import HOLDER
from patchclamp.models.scope import eager
from patchclamp.models.stand_ins import RULED, StandIn, replaceable

Back = Callable[[Tensor], tuple[Tensor | None, ...]]
"""From what flows back into the first half of a value to what flows back into the first halves of its inputs."""
LINEAR = frozenset(
    re.findall(
        r"\w+",
        """
        get set add radd iadd sub rsub isub neg view reshape view_as reshape_as transpose permute movedim swapaxes t contiguous clone cat
        stack split chunk unbind unflatten flatten getitem to float double type type_as mean sum expand expand_as repeat
        repeat_interleave masked_fill where unsqueeze squeeze dropout linear addmm lerp narrow select index_select roll flip detach
        requires_grad size dim numel is_floating_point is_complex stride element_size setitem copy len format repr hash
        broadcast_to tile take_along_dim gather index_copy new_zeros new_empty zeros_like ones_like empty_like full_like is_contiguous
        isfinite isnan gt lt ge le eq ne
        """,
    )
)
"""Steps that are linear in what they are given (or look at it alone): autograd's multiplier is exact."""
PRODUCTS = frozenset(("mul", "rmul", "matmul", "rmatmul", "bmm", "multiply"))
QUOTIENTS = frozenset(("truediv", "div", "true_divide"))
ELEMENTWISE = frozenset(
    ("pow", "square", "rsqrt", "sqrt", "reciprocal", "tanh", "sigmoid", "silu", "gelu", "relu", "exp", "erf", "abs", "clamp")
)


class _Pull(torch.autograd.Function):
    """A value whose way back is given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, back: Back, *inputs: Tensor) -> Tensor:
        ctx.back, ctx.shapes = back, [(one.shape, one.dtype) for one in inputs]
        return value.clone()  # some blocks add into it

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.back(slopes[0].chunk(2)[0])
        whole = [
            None if one is None else torch.cat([one, torch.zeros_like(one)]).to(dtype).reshape(shape)
            for one, (shape, dtype) in zip(found, ctx.shapes, strict=True)
        ]
        return None, None, *whole


def _pull(value: Tensor, back: Back, *inputs: Tensor) -> Tensor:
    return _Pull.apply(value.detach(), back, *inputs)  # type: ignore[no-any-return,no-untyped-call]


def rescaled(function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """A function of one number, taken of each; passes back (f(z) - f(z')) / (z - z'), at equal numbers the derivative."""
    given = value.detach()
    out = function(given)
    (one, two), (first, second) = given.chunk(2), out.chunk(2)
    apart = one - two
    with torch.enable_grad():
        middle = ((one + two) / 2).requires_grad_()
        (slope,) = torch.autograd.grad(function(middle).sum(), middle)
    near = apart.abs() <= (1e-7 if given.dtype == torch.float64 else 1e-4) * (1 + one.abs())
    ratio = torch.where(near, slope, (first - second) / torch.where(near, torch.ones_like(apart), apart))
    return _pull(out, lambda back: (back * ratio,), value)


def multiplied(product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
    """A product of two values that both change: each factor's multiplier is the mean of the other's two values."""
    one, two = left.detach(), right.detach()
    rows = max(len(one), len(two))
    if one.dim() != two.dim() or len(one) != len(two) or rows % 2:
        raise FamilyError(f"a product of {tuple(one.shape)} and {tuple(two.shape)}: the two runs do not stand side by side there")
    middle = [value.unflatten(0, (2, -1)).mean(0) for value in (one, two)]

    def back(slope: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            leaves = [value.requires_grad_() for value in middle]  # a product's slopes at the middle are these means
            return torch.autograd.grad(product(*leaves), leaves, slope)

    return _pull(product(one, two), back, left, right)


def softened(function: Callable[[Tensor], Tensor], scores: Tensor) -> Tensor:
    """softmax over the last axis: exp of each, the sum, its reciprocal, and the product."""
    out, (one, two) = function(scores.detach()), scores.detach().double().chunk(2)
    top = torch.maximum(one, two).amax(-1, keepdim=True)
    (first, second) = ((value - top).exp() for value in (one, two))
    apart = one - two
    masked = torch.isneginf(one) | torch.isneginf(two)
    near = (apart.abs() < 1e-7) | masked
    ratio = torch.where(near, (first + second) / 2, (first - second) / torch.where(near, torch.ones_like(apart), apart))
    ratio = ratio.masked_fill(masked, 0)
    totals = first.sum(-1, keepdim=True), second.sum(-1, keepdim=True)

    def back(slope: Tensor) -> tuple[Tensor | None, ...]:
        shared = (slope.double() * (first + second) / 2).sum(-1, keepdim=True) / (totals[0] * totals[1])
        return ((slope.double() * (1 / totals[0] + 1 / totals[1]) / 2 - shared) * ratio,)

    return _pull(out, back, scores)


def normed(function: Callable[[Tensor], Tensor], value: Tensor, width: int, gain: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis: the mean off, the mean square, the reciprocal root, the product."""
    out = function(value.detach())
    one, two = ((half - half.mean(-1, keepdim=True)) for half in value.detach().chunk(2))
    (first, second) = ((half.square().mean(-1, keepdim=True) + eps).rsqrt() for half in (one, two))
    root = -((first * second) ** 2) / (first + second)  # difference of reciprocal roots by difference of mean squares

    def back(slope: Tensor) -> tuple[Tensor | None, ...]:
        slope = slope if gain is None else slope * gain
        middle = slope * (first + second) / 2
        middle = middle + (slope * (one + two) / 2).sum(-1, keepdim=True) * root * (one + two) / width
        return (middle - middle.mean(-1, keepdim=True),)

    return _pull(out, back, value)


class Differences(TorchFunctionMode):
    """While open, every step on values that gates can change passes back multipliers of differences."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = False

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        live = [one for one in _tensors((*args, *kwargs.values())) if one.requires_grad and one.is_floating_point()]
        name = str(getattr(func, "__name__", func)).strip("_")
        if self.inside or not live or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        self.inside = True
        try:
            return self._step(name, func, live, args, kwargs)
        finally:
            self.inside = False

    def _step(self, name: str, func: Any, live: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in LINEAR:
            return func(*args, **kwargs)
        if name == "softmax":
            return softened(lambda value: func(value, *args[1:], **kwargs), args[0])
        if name == "layer_norm":
            gain, eps = _given(args, kwargs, 2, "weight", None), _given(args, kwargs, 4, "eps", 1e-5)
            return normed(lambda value: func(value, *args[1:], **kwargs), args[0], args[0].shape[-1], gain, eps)
        if len(live) == 1 and (name in PRODUCTS or (name in QUOTIENTS and live[0] is args[0])):
            return func(*args, **kwargs)
        if name in PRODUCTS:
            return multiplied(lambda a, b: func(a, b, **kwargs), args[0], args[1])
        if name == "baddbmm" and not args[0].requires_grad:  # what is added is a constant: bias by position, mask
            return args[0] * kwargs.get("beta", 1) + kwargs.get("alpha", 1) * self._product(args, kwargs)
        if name in ELEMENTWISE and len(live) == 1 and live[0] is args[0]:
            return rescaled(lambda value: func(value, *args[1:], **kwargs), args[0])
        raise FamilyError(
            f"differences cannot be passed back through {name} of {len(live)} values that change: this model computes it"
        )

    def _product(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        left: Tensor = _given(args, kwargs, 1, "batch1", None)
        right: Tensor = _given(args, kwargs, 2, "batch2", None)
        return multiplied(torch.bmm, left, right) if left.requires_grad and right.requires_grad else torch.bmm(left, right)

    def whole(self, own: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        """An activation's module as one function, whatever it is made of."""
        if self.inside or not value.requires_grad or not torch.is_grad_enabled():
            return own(value)
        self.inside = True
        try:
            return rescaled(own, value)
        finally:
            self.inside = False


def _given(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str, otherwise: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, otherwise)


def _tensors(given: Any) -> Generator[Tensor]:
    for one in given:
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, list | tuple):
            yield from _tensors(one)


@contextmanager
def differences(anatomy: Anatomy) -> Generator[None]:
    """While open, in this thread, passes whose rows are two halves (a run, its reference) pass back differences, not derivatives.

    Attention is eager for the time, and each MLP's activation is one function of one number.

    Raises:
        FamilyError: a mixture of experts (the halves' tokens go different ways), or a step that there is no multiplier for.
    """
    if any(layer.router is not None for layer in anatomy.layers):
        raise FamilyError(
            f"{anatomy.family.name} is a mixture of experts, whose routes differ between the two runs: no differences"
        )
    mode = Differences()
    acts = {module for number in range(len(anatomy.layers)) for _, module in activations_of(anatomy, number)}
    instead: dict[int, StandIn] = {id(module): mode.whole for module in acts}
    with ExitStack() as stack:
        stack.enter_context(eager(anatomy))
        for module in acts:
            stack.enter_context(HOLDER.hold(("stand in", id(module)), partial(replaceable, module)))
        stack.callback(RULED.reset, RULED.set({**RULED.get(), **instead}))
        stack.enter_context(mode)
        yield
