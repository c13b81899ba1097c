"""Where clamps act: sites by pattern, heads of one layer held by one edit, and the mixture inside the graph."""

from collections.abc import Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from patchclamp.models.editing import HEAD_AXIS
from patchclamp.models.model import Model
from patchclamp.sites import Site

Sites = str | Site | tuple[str | Site, ...]
"""A site, a pattern ("L0.h*.pattern"), or several."""


@dataclass(frozen=True)
class Place:
    """Slices of one whole-layer value that a clamp holds alike.

    Args:
        site: the whole layer, at a position where one was named.
        chosen: numbers of the heads (key/value heads, neurons, experts) that are held; None: all of it.
        of: how many there are.
    """

    site: Site
    chosen: tuple[int, ...] | None = None
    of: int = 0

    def weight(self, strength: float, dims: int, like: Tensor) -> Tensor | float:
        """The strength where the clamp holds and 0 elsewhere, to be broadcast over a value of `dims` axes."""
        if self.chosen is None:
            return strength
        found = torch.zeros(self.of, dtype=like.dtype, device=like.device)
        found[list(self.chosen)] = strength
        return found.reshape(-1, *[1] * (dims - 1 - HEAD_AXIS[self.site.kind]))


def plain(sites: Sites) -> tuple[str, ...]:
    """Sites as text, for a repr that reads back."""
    given: Iterable[str | Site] = [sites] if isinstance(sites, str | Site) else sites
    return tuple(str(site) for site in given)


_KNOWN: "WeakKeyDictionary[Model, dict[tuple[str, ...], tuple[Site, ...]]]" = WeakKeyDictionary()


def find(model: Model, sites: tuple[str, ...]) -> tuple[Site, ...]:
    """The sites that patterns name, looked up once per model.

    Raises:
        SiteError: the model has none, with the reason.
    """
    known = _KNOWN.setdefault(model, {})
    if sites not in known:
        known[sites] = model.find(sites)
    return known[sites]


def places(model: Model, sites: tuple[str, ...]) -> tuple[Place, ...]:
    """The sites, those of one layer and position together, in forward order."""
    chosen: dict[Site, set[int] | None] = {}
    for site in find(model, sites):
        key = site.place.at(site.position)
        before = chosen.setdefault(key, set())
        if site.index is None or before is None:
            chosen[key] = None
        else:
            before.add(site.index)
    found: list[Place] = []
    for key, indices in sorted(chosen.items()):
        of = 0 if indices is None else count(model, key)
        all_of_it = indices is None or len(indices) == of
        found.append(Place(key) if all_of_it else Place(key, tuple(sorted(indices or ())), of))
    return tuple(found)


def count(model: Model, site: Site) -> int:
    """How many heads, key/value heads, neurons or experts a whole-layer value has."""
    sizes = model.anatomy.sizes[site.layer or 0]
    if site.kind in ("neuron", "expert", "router"):
        return int((sizes.neurons if site.kind == "neuron" else sizes.experts) or 0)
    return sizes.kv_heads if site.kind in ("k", "v") else sizes.heads


def toward(value: Tensor, target: Tensor, weight: Tensor | float, kind: str) -> Tensor:
    """value + weight * (target - value), exactly the target at weight 1; of scores, what is masked stays masked.

    The value stays in the graph, with gradient times (1 - weight): what made it has a gradient of 0 where it is held, and
    not none, so that an optimizer treats it alike at every strength.
    """
    target = target.to(value)
    if kind != "scores":
        return torch.lerp(value, target, weight)
    masked = value < torch.finfo(value.dtype).min / 4
    mixed = torch.lerp(value.masked_fill(masked, 0), target.expand_as(value).masked_fill(masked, 0), weight)
    return torch.where(masked, value, mixed)
