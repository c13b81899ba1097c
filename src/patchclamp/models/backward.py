"""Rules for the backward pass: what flows back through norms, activations, products and softmax. The forward pass stays as it is.

A rule stands in for a module's forward function, or visits a place, and gives back the very value that was computed there with
another way back. So it acts wherever the model's own modules are called, in every family that has the thing, and each rule says
in which layers it was put in: one that should have been and was not is an error, not a plain gradient under another name.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from patchclamp.errors import FamilyError
from patchclamp.models.anatomy import Anatomy, Layer
from patchclamp.models.attention import rests
from patchclamp.models.backward_steps import (
    Cut,
    Drop,
    Hold,
    Linked,
    Temper,
    Weigh,
    held_output,
    scaled_input,
    through_norm,
    through_ratio,
)
from patchclamp.models.editing import Edit, Edits
from patchclamp.models.held import HOLDER
from patchclamp.models.norms import EPSILONS
from patchclamp.models.probe import probe_tokens
from patchclamp.models.scope import still, unobserved
from patchclamp.models.stand_ins import RULED, StandIn, replaceable
from patchclamp.sites import Site

ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
OWN_ACTIVATIONS = ("BloomGelu",)
"""Classes of activations that model files have to themselves."""


@dataclass(frozen=True)
class Rules:
    """What the backward pass does otherwise than autograd.

    Args:
        norm: what a norm divides by is held (its own number, as a constant), the mean that LayerNorm takes off is not.
        ratio: an activation f passes back f(z) / z (identity rule).
        gate: in a gated MLP, act(gate) * up, act(gate) is held: the MLP is linear in up. Elsewhere nothing.
        product: what flows back into both factors of a gated MLP is multiplied by this (1/2: each gets its half).
        pattern: attention weights are held.
        temperature: softmax passes back s * (g - <g, s>) with s = softmax(scores / temperature).
        queries: what flows back into queries is multiplied by this; keys and values alike.
        dropped: the layer through whose attention and MLP nothing flows back (its stream passes).
    """

    norm: bool = False
    ratio: bool = False
    gate: bool = False
    product: float = 1.0
    pattern: bool = False
    temperature: float = 1.0
    queries: float = 1.0
    keys: float = 1.0
    values: float = 1.0
    dropped: int | None = None


@dataclass(frozen=True, eq=False)
class Ruled:
    """Rules put in force: edits to run before and behind all others, and where each rule was put in so far.

    Args:
        first: edits that come before any other at their place.
        last: edits that come behind.
        wanted: by rule, where it has to be put in.
        found: by rule, where it was.
    """

    first: Edits
    last: Edits
    wanted: Mapping[str, frozenset[str]]
    found: Mapping[str, set[str]]

    def around(self, edits: Edits) -> Edits:
        """All edits of a pass."""
        joined: dict[Site, list[Edit]] = {}
        for some in (self.first, edits, self.last):
            for site, given in some.items():
                joined.setdefault(site, []).extend([given] if isinstance(given, Edit) else given)
        return dict(joined)

    def fired(self) -> dict[str, list[str]]:
        """By rule, where it was put in: `L0`, `L1.ln_2`, ..., `final`.

        Raises:
            FamilyError: a rule was not put in somewhere where it should have been.
        """
        for rule, places in self.wanted.items():
            if missing := sorted(places - self.found[rule]):
                raise FamilyError(
                    f"the rule for {rule} was not put in at {', '.join(missing)}: this model computes it in some other way there"
                )
        return {rule: sorted(places, key=_by_number) for rule, places in self.found.items()}


def _by_number(place: str) -> tuple[bool, int, str]:
    layer = place.partition(".")[0][1:]
    return (not layer.isdigit(), int(layer) if layer.isdigit() else 0, place)


@contextmanager
def ruled(anatomy: Anatomy, rules: Rules) -> Generator[Ruled]:
    """While open, in this thread, backward passes through the model follow `rules`. Forward values are the same bit for bit.

    The edits of `Ruled` (for attention and dropped layers) must run with the pass: `edits = ruled.around(edits)`.

    Raises:
        FamilyError: the model lacks what a rule is about, or keeps it where no rule reaches.
    """
    found: dict[str, set[str]] = {}
    made = list(_modules(anatomy, rules))
    first, last, places = _edits(anatomy, rules, found)
    wanted: dict[str, set[str]] = {}
    for rule, place, _, _ in made:
        wanted.setdefault(rule, set()).add(place)
    for rule, place in places:
        wanted.setdefault(rule, set()).add(place)
    found.update({rule: set() for rule in wanted})
    instead: dict[int, StandIn] = {}
    for rule, place, module, function in made:
        instead[id(module)] = partial(_counted, found[rule], place, function, instead.get(id(module)))
    with ExitStack() as stack:
        for module in {id(module): module for _, _, module, _ in made}.values():
            stack.enter_context(HOLDER.hold(("stand in", id(module)), partial(replaceable, module)))
        stack.callback(RULED.reset, RULED.set({**RULED.get(), **instead}))
        yield Ruled(first, last, {rule: frozenset(places) for rule, places in wanted.items()}, found)


def _counted(
    found: set[str], place: str, function: StandIn, below: StandIn | None, own: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    found.add(place)
    return function(own if below is None else partial(below, own), *args, **kwargs)


# --- which modules


def _modules(anatomy: Anatomy, rules: Rules) -> Iterator[tuple[str, str, nn.Module, StandIn]]:
    """(rule, place, module, what stands in for it)."""
    if rules.norm:
        for place, norm in norms_of(anatomy):
            yield "norms", place, norm, partial(through_norm, norm)
    if not (rules.ratio or rules.gate or rules.product != 1):
        return
    gated = gated_mlps(anatomy)
    for number, layer in enumerate(anatomy.layers):
        place = f"L{number}"
        if rules.ratio or rules.gate:
            for name, module in activations_of(anatomy, number):
                if rules.gate and gated[number]:
                    yield "gates", name, module, held_output
                elif rules.ratio:
                    yield "activations", name, module, through_ratio
        if rules.product != 1 and gated[number]:
            yield "products", place, _with_products(layer), partial(scaled_input, rules.product)


def norms_of(anatomy: Anatomy) -> list[tuple[str, nn.Module]]:
    """Every norm by name (`L0.ln_1`): those of blocks, of queries and keys too where there are such, and the final one.

    Raises:
        FamilyError: something calls itself a norm and does not say what it adds under the root.
    """
    named = [
        (f"L{number}.{name}", module)
        for number, layer in enumerate(anatomy.layers)
        for name, module in layer.block.named_modules()
    ]
    found: list[tuple[str, nn.Module]] = []
    for name, module in [*named, ("final", anatomy.norm)]:
        if list(module.children()):
            continue
        if any(isinstance(getattr(module, epsilon, None), float) for epsilon in EPSILONS):
            found.append((name, module))
        elif type(module).__name__.endswith("Norm"):
            raise FamilyError(f"{name} is a {type(module).__name__}, a kind of norm that the rule for norms knows nothing of")
    return found


def activations_of(anatomy: Anatomy, number: int) -> list[tuple[str, nn.Module]]:
    """The modules that compute the activation of a layer's MLP, by name.

    Raises:
        FamilyError: there is none: the model computes it in its own code (gpt_oss, in its experts).
    """
    found = [
        (f"L{number}.{name}", module)
        for name, module in anatomy.layers[number].block.named_modules()
        if (type(module).__module__ in ACTIVATIONS or type(module).__name__ in OWN_ACTIVATIONS)
        and not isinstance(module, nn.Softmax | nn.MultiheadAttention)
    ]
    if not found:
        raise FamilyError(
            f"a rule for activations was asked for, and the MLP of layer {number} ({anatomy.family.name}) has no module for its own: "
            "take a method without such a rule (gradient, gim, segments)"
        )
    return found


_GATED: "WeakKeyDictionary[nn.Module, tuple[bool, ...]]" = WeakKeyDictionary()


def gated_mlps(anatomy: Anatomy) -> tuple[bool, ...]:
    """By layer, whether its MLP multiplies its activation with something: seen in a run of a few tokens, once per model."""
    if anatomy.hf not in _GATED:
        _GATED[anatomy.hf] = _see_gated(anatomy)
    return _GATED[anatomy.hf]


def _see_gated(anatomy: Anatomy) -> tuple[bool, ...]:
    """An MLP is gated where its down projection reads something else than what the activation gives."""
    acted: dict[int, Tensor] = {}
    read: dict[int, Tensor] = {}
    instead: dict[nn.Module, StandIn] = {}
    for number, layer in enumerate(anatomy.layers):
        if layer.down is None or layer.router is not None:
            continue
        for _, module in activations_of(anatomy, number):
            instead[module] = partial(_see, acted, number, False)
        instead[layer.down] = partial(_see, read, number, True)
    with ExitStack() as stack:
        for module in instead:
            stack.enter_context(HOLDER.hold(("stand in", id(module)), partial(replaceable, module)))
        stack.callback(RULED.reset, RULED.set({id(module): one for module, one in instead.items()}))
        stack.enter_context(unobserved())
        stack.enter_context(still(anatomy.hf))
        stack.enter_context(torch.no_grad())
        tokens = probe_tokens(anatomy)
        anatomy.hf(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    return tuple(
        not torch.equal(acted[number], read[number]) if number in acted and number in read else _experts(layer) is not None
        for number, layer in enumerate(anatomy.layers)
    )


def _see(kept: dict[int, Tensor], number: int, reads: bool, own: Callable[..., Any], value: Tensor, *args: Any) -> Any:
    output = own(value, *args)
    kept[number] = value if reads else output
    return output


def _experts(layer: Layer) -> nn.Module | None:
    found = getattr(layer.mlp, "experts", None)
    return found if isinstance(found, nn.Module) else None


def _with_products(layer: Layer) -> nn.Module:
    """The module whose input flows into both factors and nowhere else."""
    return _experts(layer) or layer.mlp


# --- which edits


def _edits(anatomy: Anatomy, rules: Rules, found: Mapping[str, set[str]]) -> tuple[Edits, Edits, list[tuple[str, str]]]:
    """Edits before and behind all others, and (rule, place) for each of them.

    What lies between softmax's input and its output comes right around softmax: behind gates on scores, before gates on patterns.
    """
    first: dict[Site, Edit] = {}
    last: dict[Site, Edit] = {}
    places: list[tuple[str, str]] = []
    for number, layer in enumerate(anatomy.layers):
        place = f"L{number}"
        if rules.pattern:
            first[Site("pattern", number)] = Hold(partial(_put_in, found, "patterns", place))
            places.append(("patterns", place))
        elif rules.temperature != 1:
            linked = Linked(partial(_put_in, found, "softmax", place), rules.temperature, rests(layer.attention))
            last[Site("scores", number)], first[Site("pattern", number)] = Cut(linked), Temper(linked)
            places.append(("softmax", place))
        for name, slot, factor in (("queries", "q", rules.queries), ("keys", "k", rules.keys), ("values", "v", rules.values)):
            if factor != 1:
                last[Site(slot, number)] = Weigh(partial(_put_in, found, name, place), factor)
                places.append((name, place))
        if rules.dropped == number:
            last[Site("resid.post", number)] = Drop(partial(_put_in, found, "dropped layers", place), Site("resid.pre", number))
            places.append(("dropped layers", place))
    return first, last, places


def _put_in(found: Mapping[str, set[str]], rule: str, place: str) -> None:
    found[rule].add(place)
