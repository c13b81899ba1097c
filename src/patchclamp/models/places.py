"""Places: at which module each kind of whole-layer place is visited, and what its tensor looks like there.

Everything here but the attention tap's places (q, k, v, scores, pattern).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from patchclamp.errors import FamilyError
from patchclamp.models.anatomy import Anatomy, Layer
from patchclamp.models.attention import untouched
from patchclamp.models.routing import RouterTap, spread_weights
from patchclamp.sites import Site

Visitor = Callable[[Tensor], Tensor]


@runtime_checkable
class Hooks(Protocol):
    """What a session offers for visiting modules."""

    anatomy: Anatomy
    stash: dict[Any, Any]

    def before(self, module: nn.Module, change: Visitor) -> None: ...
    def after(self, module: nn.Module, change: Visitor) -> None: ...
    def rewrite(self, module: nn.Module, change: Callable[[Any], Any]) -> None: ...
    def around(self, module: nn.Module, mode: Callable[[Tensor], Any], every: bool = False) -> None: ...


def install(session: Hooks, place: Site, visit: Visitor) -> None:
    """Put the visitor where the place's value is computed."""
    anatomy = session.anatomy
    if place.layer is None:
        if place.kind == "embed":
            session.before(anatomy.layers[0].block, visit)
        elif place.kind == "final":
            session.after(anatomy.norm, visit)
        else:
            session.rewrite(anatomy.hf, partial(_on_logits, visit))
        return
    layer, kind, family = anatomy.layers[place.layer], place.kind, anatomy.family
    if kind in ("mlp", "mlp.write") and family.mlp_mutated:
        visit = partial(_cloned, visit)
    if (kind in ("mlp", "mlp.write", "neuron") and family.flat_mlp) or kind in ("router", "expert"):
        visit = _unflattened(session, visit)
    if kind in ("resid.pre", "resid.post"):
        (session.before if kind == "resid.pre" else session.after)(layer.block, visit)
    elif kind == "z":
        session.before(layer.output, partial(_by_head, visit, anatomy.sizes[place.layer].heads))
    elif kind in ("attn", "mlp"):
        session.after(layer.attn if kind == "attn" else layer.mlp, visit)
    elif kind == "attn.write":
        session.after(layer.attn_post or layer.attn, _scaled(visit, layer.scale))
    elif kind == "mlp.write":
        session.after(layer.mlp_post or layer.mlp, _scaled(visit, layer.scale))
    elif kind == "resid.mid" and layer.first is not None:
        session.before(layer.first, partial(_keep, session, layer))  # behind what any session does to the block's input
        session.after(layer.attn_post or layer.attn, _scaled(partial(_at_middle, visit, session, layer), layer.scale))
    elif kind == "neuron" and layer.down is not None:
        session.before(layer.down, visit)
    elif kind == "router" and layer.router is not None:
        session.around(layer.router, partial(_router_tap, visit), every=True)
    elif kind == "expert" and layer.router is not None:
        session.rewrite(layer.router, partial(_on_weights, visit))
    else:
        raise FamilyError(f"{family.name}: nothing is known about reading {place}")


def on_first(visit: Visitor, output: Any) -> Any:
    """Visit the tensor of a module's output, which is a tensor in most families and the first of a tuple in some."""
    if not isinstance(output, tuple):
        return visit(output)
    value = visit(output[0])
    return output if value is output[0] else (value, *output[1:])


def _on_logits(visit: Visitor, output: Any) -> Any:
    output.logits = visit(output.logits)
    return output


def _on_weights(visit: Visitor, output: Any) -> Any:
    logits, weights, chosen = output
    spread = spread_weights(logits, weights, chosen)
    edited = visit(spread)
    return output if untouched(edited, spread) else (logits, edited.gather(-1, chosen).to(weights.dtype), chosen)


def _router_tap(visit: Visitor, _: Tensor) -> RouterTap:
    return RouterTap(visit)


def _cloned(visit: Visitor, value: Tensor) -> Tensor:
    """Visit a tensor that the block adds into afterwards."""
    return visit(value.clone()).clone()


def _by_head(visit: Visitor, heads: int, value: Tensor) -> Tensor:
    seen = value.unflatten(-1, (heads, -1))
    edited = visit(seen)
    return value if untouched(edited, seen) else edited.flatten(-2)


def _unflattened(session: Hooks, visit: Visitor) -> Visitor:
    """Visit [row x position, ...] as [row, position, ...], by the shape that the model's first block saw."""
    if "shape" not in session.stash:
        session.stash["shape"] = ()
        session.before(session.anatomy.layers[0].block, partial(_keep_shape, session))
    return partial(_with_rows, visit, session)


def _keep_shape(session: Hooks, value: Tensor) -> Tensor:
    session.stash["shape"] = tuple(value.shape[:2])
    return value


def _with_rows(visit: Visitor, session: Hooks, value: Tensor) -> Tensor:
    seen = value.unflatten(0, (-1, session.stash["shape"][1]))  # as many rows as run in this block
    edited = visit(seen)
    return value if untouched(edited, seen) else edited.flatten(0, 1)


def _scaled(visit: Visitor, scale: float) -> Visitor:
    """Visit what a module's output is once the block has multiplied it."""
    return visit if scale == 1.0 else partial(_times, visit, scale)


def _times(visit: Visitor, scale: float, value: Tensor) -> Tensor:
    write = value * scale
    edited = visit(write)
    if untouched(edited, write):
        return value
    # exactly `value` where nothing changed; gradients through `edited` alone
    return value.detach() + (edited - write.detach()) / scale


def _keep(session: Hooks, layer: Layer, value: Tensor) -> Tensor:
    session.stash[layer.first] = value
    return value


def _at_middle(visit: Visitor, session: Hooks, layer: Layer, write: Tensor) -> Tensor:
    """Residual stream after attention = before it + what attention writes; a change is put into what attention writes."""
    before = session.stash[layer.first]
    middle = before + write
    edited = visit(middle)
    if untouched(edited, middle):
        return write
    # exactly `write` where nothing changed; gradients as if the block went on with `edited`
    return write.detach() + (edited - middle.detach()) - (before - before.detach())
