"""Editing: what an edit is, what it may see, and how edits at sites become visitors at places."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from patchclamp.errors import GateError, SiteError
from patchclamp.models.anatomy import Anatomy
from patchclamp.sites import KINDS, Site

Columns = Callable[[int | str], Bool[Tensor, "row position"]]
"""Which columns a position or named span covers."""


@dataclass(frozen=True)
class Seen:
    """What an edit may see besides the value.

    Attributes:
        site: where the edit stands.
        values: earlier sites of this pass that edits asked for (`reads`), whole layers; read only.
        mask: [row, position], real tokens of what runs now.
        positions: [row, position], each token's position in its prompt (padding: 0).
        phase: "prompt" while the prompt runs, "generation" after it.
        step: tokens generated so far.
        settings: how many gate settings are folded into the rows (rows = settings x examples' rows).
    """

    site: Site
    values: Mapping[Site, Tensor]
    mask: Bool[Tensor, "row position"]
    positions: Tensor
    phase: Literal["prompt", "generation"] = "prompt"
    step: int = 0
    settings: int = 1


@runtime_checkable
class Edit(Protocol):
    """(value, seen) -> value, of the same shape. The value is never changed in place."""

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor: ...


Edits = Mapping[Site, Edit | Iterable[Edit]]
"""Edits by site; several at one site run in order. A site with an index or position edits that slice only."""


@dataclass
class Pass:
    """What is running now: changes from step to step of a generation, stays otherwise."""

    mask: Bool[Tensor, "row position"]
    positions: Int[Tensor, "row position"]
    columns: Columns | None = None
    phase: Literal["prompt", "generation"] = "prompt"
    step: int = 0
    settings: int = 1
    values: dict[Site, Tensor] = field(default_factory=dict[Site, Tensor])

    def seen(self, site: Site) -> Seen:
        """What an edit at `site` may see."""
        return Seen(site, self.values, self.mask, self.positions, self.phase, self.step, self.settings)

    def at(self, position: int | str) -> Bool[Tensor, "row position"]:
        """The columns of a position or named span, for every row that runs."""
        if isinstance(position, str) and position in ("prompt", "generation"):
            return self.mask if self.phase == position else torch.zeros_like(self.mask)
        if self.columns is None:
            raise SiteError(f"the position @{position} needs a batch of prompts whose positions are known")
        if self.phase == "generation":  # what a prompt's position names is behind us
            return torch.zeros_like(self.mask)
        found = self.columns(position)
        return found.repeat(self.settings, 1) if len(found) != len(self.mask) else found


def visitors(anatomy: Anatomy, edits: Edits, now: Pass) -> dict[Site, Callable[[Tensor], Tensor]]:
    """Visitors at whole-layer places that carry out `edits`, in forward order, and keep what edits want to see.

    Raises:
        SiteError: the model has no such site, or it cannot be written.
    """
    at_place: dict[Site, list[tuple[Site, Edit]]] = {}
    wanted: set[Site] = set()
    for site, given in edits.items():
        anatomy.require(site)
        if not KINDS[site.kind].writable:
            raise SiteError(f"{site} can be read but not written: edit {replace(site, kind='z')} instead")
        for edit in [given] if isinstance(given, Edit) else list(given):
            at_place.setdefault(site.place, []).append((site, edit))
            wanted |= {read.place for read in getattr(edit, "reads", ())}
    made: dict[Site, Callable[[Tensor], Tensor]] = {}
    for place in sorted(set(at_place) | wanted):
        anatomy.require(place)
        made[place] = _visitor(place, tuple(at_place.get(place, ())), now, place in wanted)
    return made


def _visitor(place: Site, edits: tuple[tuple[Site, Edit], ...], now: Pass, keep: bool) -> Callable[[Tensor], Tensor]:
    def visit(value: Tensor) -> Tensor:
        for site, edit in edits:
            value = apply(site, edit, value, now)
        if keep:
            now.values[place] = value
        return value

    return visit


HEAD_AXIS = {"q": 2, "k": 2, "v": 2, "z": 2, "head": 2, "scores": 1, "pattern": 1, "neuron": 2, "expert": 2, "router": 2}


def apply(site: Site, edit: Edit, value: Tensor, now: Pass) -> Tensor:
    """The value with `edit` carried out on the slice that `site` names."""
    seen = now.seen(site)
    if site.index is None and site.position is None:
        return _same_shape(site, value, edit(value, seen))
    part = value
    if site.index is not None:
        axis = HEAD_AXIS[site.kind]
        part = value.select(axis, site.index)
    edited = _same_shape(site, part, edit(part, seen))
    if site.position is not None:
        where = now.at(site.position)
        if site.kind in ("scores", "pattern") and site.index is None:
            where = where[:, None]  # queries of every head
        edited = torch.where(where.reshape(where.shape + (1,) * (part.dim() - where.dim())), edited, part)
    if site.index is None:
        return edited
    return torch.cat(
        [value.narrow(axis, 0, site.index), edited.unsqueeze(axis), value.narrow(axis, site.index + 1, value.shape[axis] - site.index - 1)],
        axis,
    )


def _same_shape(site: Site, before: Tensor, after: Tensor) -> Tensor:
    if before.shape != after.shape:
        raise GateError(f"the edit at {site} changed the shape {tuple(before.shape)} to {tuple(after.shape)}: an edit must keep it")
    return after
