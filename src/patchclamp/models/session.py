"""Sessions: the one place where hooks are put on a model and taken off again.

A session visits places (whole-layer sites): each visitor gets the value that the model computes there and returns it, or
another. Everything that reads or edits a model goes through it. Hooks act in the thread that opened the session only, and
leave with it, also after an exception.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from patchclamp.errors import FamilyError
from patchclamp.models.anatomy import Anatomy, Layer
from patchclamp.models.attention import Visits, module_tap, tapped
from patchclamp.models.routing import RouterTap, spread_weights
from patchclamp.models.scope import OPEN, eager, recomputed_alike
from patchclamp.sites import Site

Visitor = Callable[[Tensor], Tensor]
TAPPED = ("q", "k", "v", "scores", "pattern")


def first(output: Any) -> Tensor:
    """The tensor of a module's output, which is a tensor in most families and a tuple in some."""
    return output[0] if isinstance(output, tuple) else output


def refill(output: Any, value: Tensor) -> Any:
    """`output` with its tensor replaced."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


class Session:
    """Visitors at places of one model, for as long as the session is open."""

    def __init__(self, anatomy: Anatomy, visitors: Mapping[Site, Visitor]) -> None:
        self.anatomy = anatomy
        self.visitors = dict(sorted(visitors.items(), key=lambda item: item[0].key))
        self.opened = False
        self.handles: list[Any] = []
        self.surrounded: set[int] = set()
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
                stack.enter_context(tapped(watched))
            for place, visitor in self.visitors.items():
                if place.kind not in TAPPED:
                    self._install(place, visitor)
            if not self.anatomy.family.interface:
                for layer in self.anatomy.layers:
                    if id(layer.attention) in watched:
                        self._around(layer.attention, lambda hidden, key=id(layer.attention): module_tap(key, hidden.shape[0]))
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

    def before(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        """Visit a module's (first) input."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self not in OPEN.get():
                return None
            if args:
                value = change(args[0])
                return None if value is args[0] else ((value, *args[1:]), kwargs)
            value = change(kwargs["hidden_states"])
            return None if value is kwargs["hidden_states"] else (args, kwargs | {"hidden_states": value})

        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        """Visit a module's (first) output."""

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self not in OPEN.get():
                return None
            old = first(output)
            value = change(old)
            return None if value is old else refill(output, value)

        self.handles.append(module.register_forward_hook(hook))

    def _around(self, module: nn.Module, mode: Callable[[Tensor], Any]) -> None:
        """Run a module's forward inside a function mode, made from its (first) input; of nested sessions the innermost's."""
        entered: list[Any] = []
        self.surrounded.add(id(module))

        def innermost() -> bool:
            around = [session for session in OPEN.get() if id(module) in session.surrounded]
            return bool(around) and around[-1] is self

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if innermost():
                entered.append(mode(args[0] if args else kwargs["hidden_states"]))
                entered[-1].__enter__()

        def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if entered and innermost():
                entered.pop().__exit__(None, None, None)

        self.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        self.handles.append(module.register_forward_hook(leave, always_call=True))

    def _install(self, place: Site, visit: Visitor) -> None:
        anatomy = self.anatomy
        if place.layer is None:
            _install_global(self, place, visit)
            return
        layer, kind = anatomy.layers[place.layer], place.kind
        if kind in ("resid.pre", "resid.post"):
            (self.before if kind == "resid.pre" else self.after)(layer.block, visit)
        elif kind == "z":
            _install_z(self, layer.output, anatomy.sizes[place.layer].heads, visit)
        elif kind == "attn":
            self.after(layer.attn, visit)
        elif kind == "mlp":
            self.after(layer.mlp, self._mlp_output(visit))
        elif kind == "attn.write":
            _install_write(self, layer.attn, layer.attn_post, layer.scale, visit)
        elif kind == "mlp.write":
            _install_write(self, layer.mlp, layer.mlp_post, layer.scale, self._mlp_output(visit))
        elif kind == "resid.mid":
            _install_middle(self, layer, visit)
        elif kind == "neuron" and layer.down is not None:
            self.before(layer.down, self._unflattened(visit) if anatomy.family.flat_mlp else visit)
        elif kind == "router" and layer.router is not None:
            self._around(layer.router, lambda _, change=self._unflattened(visit): RouterTap(change))
        elif kind == "expert" and layer.router is not None:
            _install_experts(self, layer.router, self._unflattened(visit))
        else:
            raise FamilyError(f"{anatomy.family.name}: nothing is known about reading {place}")

    def _mlp_output(self, visit: Visitor) -> Visitor:
        """Undo what is special about a family's MLP output: flattened positions, or a tensor that the block adds into."""
        if self.anatomy.family.flat_mlp:
            return self._unflattened(visit)
        if self.anatomy.family.mlp_mutated:
            return lambda value: visit(value.clone()).clone()
        return visit

    def _unflattened(self, visit: Visitor) -> Visitor:
        """Visit [row x position, ...] as [row, position, ...], by the shape that the model's first block saw."""
        if "shape" not in self.stash:
            self.stash["shape"] = ()
            self.before(self.anatomy.layers[0].block, self._keep_shape)

        def change(value: Tensor) -> Tensor:
            seen = value.unflatten(0, self.stash["shape"])
            edited = visit(seen)
            return value if edited is seen else edited.flatten(0, 1)

        return change

    def _keep_shape(self, value: Tensor) -> Tensor:
        self.stash["shape"] = tuple(value.shape[:2])
        return value


def _install_global(session: Session, place: Site, visit: Visitor) -> None:
    anatomy = session.anatomy
    if place.kind == "embed":
        session.before(anatomy.layers[0].block, visit)
    elif place.kind == "final":
        session.after(anatomy.norm, visit)
    else:

        def logits(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if session in OPEN.get():
                output.logits = visit(output.logits)

        session.handles.append(anatomy.hf.register_forward_hook(logits))


def _install_z(session: Session, output: nn.Module, heads: int, visit: Visitor) -> None:
    def change(value: Tensor) -> Tensor:
        seen = value.unflatten(-1, (heads, -1))
        edited = visit(seen)
        return value if edited is seen else edited.flatten(-2)

    session.before(output, change)


def _install_write(session: Session, module: nn.Module, post: nn.Module | None, scale: float, visit: Visitor) -> None:
    """What a module adds to the residual stream: after its post-norm, times the block's multiplier."""
    if scale == 1.0:
        session.after(post or module, visit)
        return

    def change(value: Tensor) -> Tensor:
        write = value * scale
        edited = visit(write)
        return value if edited is write else value + (edited - write) / scale

    session.after(post or module, change)


def _install_middle(session: Session, layer: Layer, visit: Visitor) -> None:
    """Residual stream after attention = before it + what attention writes; a change is put into what attention writes."""

    def keep(value: Tensor) -> Tensor:
        session.stash[layer.first] = value
        return value

    def change(write: Tensor) -> Tensor:
        middle = session.stash[layer.first] + write
        edited = visit(middle)
        return write if edited is middle else write + (edited - middle)

    assert layer.first is not None  # blocks with a middle have it: `dissect` has checked
    session.before(layer.first, keep)  # behind what any session does to the block's input
    _install_write(session, layer.attn, layer.attn_post, layer.scale, change)


def _install_experts(session: Session, router: nn.Module, visit: Visitor) -> None:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if session not in OPEN.get():
            return None
        logits, weights, chosen = output
        spread = spread_weights(logits, weights, chosen)
        edited = visit(spread)
        return None if edited is spread else (logits, edited.gather(-1, chosen).to(weights.dtype), chosen)

    session.handles.append(router.register_forward_hook(hook))
