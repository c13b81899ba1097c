"""Editing: what an edit is, what it may see, and how edits at sites become visitors at places."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from patchclamp.errors import GateError, SiteError
from patchclamp.models.anatomy import Anatomy
from patchclamp.sites import KINDS, Site

Columns = Callable[[int | str], Bool[Tensor, "row position"]]
"""Which columns a position or named span covers."""
Phase = Literal["prompt", "generation"]


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
    positions: Int[Tensor, "row position"]
    phase: Phase = "prompt"
    step: int = 0
    settings: int = 1


@runtime_checkable
class Edit(Protocol):
    """(value, seen) -> value, of the same shape. The value is never changed in place."""

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor: ...


Edits = Mapping[Site, Edit | Iterable[Edit]]
"""Edits by site; several at one site run in order. A site with an index or position edits that slice only."""


@dataclass(frozen=True)
class During:
    """An edit that acts in one phase of a generation only."""

    edit: Edit
    phase: Phase

    @property
    def reads(self) -> tuple[Site, ...]:
        """What the edit wants to see."""
        return tuple(getattr(self.edit, "reads", ()))

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        return self.edit(value, seen) if seen.phase == self.phase else value


@dataclass(frozen=True)
class Stretch:
    """Columns that one call runs when keys and values are cached: the prompt, or one new token.

    Edits are given one stretch at a time, also where a call runs several (no cache) or holds several (keys and values under a
    cache), so that what an edit does never depends on whether there is a cache.
    """

    start: int
    stop: int
    phase: Phase
    step: int


@dataclass
class Pass:
    """What is running now: grows from step to step of a generation, stays otherwise."""

    mask: Bool[Tensor, "row position"]
    """Of every column there is."""
    positions: Int[Tensor, "row position"]
    columns: Columns | None = None
    """Of the prompt."""
    settings: int = 1
    stretches: tuple[Stretch, ...] = ()
    """Empty: all columns are one stretch of prompt."""
    ran: int = 0
    """How many columns ran in earlier calls."""
    unembedded: Int[Tensor, " column"] | None = None
    """The columns that logits are computed for; None: all of them."""
    values: dict[Stretch, dict[Site, Tensor]] = field(default_factory=dict[Stretch, dict[Site, Tensor]])

    def live(self, place: Site) -> tuple[Stretch, ...]:
        """The stretches that a value at `place` holds: what runs now; of keys and values, everything so far."""
        if not self.stretches:
            return (Stretch(0, self.mask.shape[1], "prompt", 0),)
        return tuple(s for s in self.stretches if place.kind in ("k", "v") or s.start >= self.ran)

    def seen(self, site: Site, stretch: Stretch) -> Seen:
        """What an edit at `site` may see of one stretch."""
        mask, positions = self.shown(site, stretch, self.mask), self.shown(site, stretch, self.positions)
        values = MappingProxyType(self.values.setdefault(stretch, {}))
        return Seen(site, values, mask, positions, stretch.phase, stretch.step, self.settings)

    def shown(self, site: Site, stretch: Stretch, columns: Tensor) -> Tensor:
        """What a value at `site` has of [row, position]: one stretch's columns; of logits, those that are computed."""
        columns = columns[:, stretch.start : stretch.stop]
        return columns[:, self.unembedded] if site.kind == "logits" and self.unembedded is not None else columns

    def at(self, site: Site, stretch: Stretch) -> Bool[Tensor, "row position"]:
        """The columns of the site's position or named span, for every row that runs."""
        position = site.position
        assert position is not None
        mask = self.mask[:, stretch.start : stretch.stop]
        if isinstance(position, str) and position in ("prompt", "generation"):
            found = mask if stretch.phase == position else torch.zeros_like(mask)
        elif self.columns is None:
            raise SiteError(f"the position @{position} needs a batch of prompts whose positions are known")
        elif stretch.phase == "generation":  # what a prompt's position names is behind us
            found = torch.zeros_like(mask)
        else:
            found = self.columns(position).to(mask.device)[:, stretch.start : stretch.stop]
            found = found.repeat(self.settings, 1) if len(found) != len(mask) else found
        return found[:, self.unembedded] if site.kind == "logits" and self.unembedded is not None else found


def visitors(anatomy: Anatomy, edits: Edits, now: Pass) -> dict[Site, Callable[[Tensor], Tensor]]:
    """Visitors at whole-layer places that carry out `edits`, in forward order, and keep what edits want to see.

    Raises:
        SiteError: the model has no such site, or it cannot be written.
        GateError: an edit wants to see a site that comes after it.
    """
    at_place: dict[Site, list[tuple[Site, Edit]]] = {}
    wanted: set[Site] = set()
    for site, given in edits.items():
        anatomy.require(site)
        if not KINDS[site.kind].writable:
            raise SiteError(f"{site} can be read but not written: edit {replace(site, kind='z')} instead")
        for edit in [given] if isinstance(given, Edit) else list(given):
            at_place.setdefault(site.place, []).append((site, edit))
            for read in getattr(edit, "reads", ()):
                if not read.place.key < site.place.key:
                    raise GateError(f"an edit at {site} wants to see {read}, which is computed after it")
                wanted.add(read.place)
    made: dict[Site, Callable[[Tensor], Tensor]] = {}
    for place in sorted(set(at_place) | wanted):
        anatomy.require(place)
        made[place] = partial(_visit, place, tuple(at_place.get(place, ())), now, place in wanted)
    return made


def _visit(place: Site, edits: tuple[tuple[Site, Edit], ...], now: Pass, keep: bool, value: Tensor) -> Tensor:
    """Carry out a place's edits, in order, on each stretch of the value; keep what it is then, if an edit wants to see it."""
    live = now.live(place)
    parts = [value] if len(live) == 1 else [_cut(place, value, stretch, now) for stretch in live]
    edited: list[Tensor] = []
    for stretch, before in zip(live, parts, strict=True):
        after = before
        for site, edit in edits:
            after = apply(site, edit, after, now, stretch)
        if keep:
            now.values.setdefault(stretch, {})[place] = after
        edited.append(after)
    if all(after is before for after, before in zip(edited, parts, strict=True)):
        return value
    return edited[0] if len(live) == 1 else _joined(place, value, edited)


def _cut(place: Site, value: Tensor, stretch: Stretch, now: Pass) -> Tensor:
    """One stretch of a value; its queries see the keys up to its own last column."""
    first = 0 if place.kind in ("k", "v") else now.ran
    if place.kind in ("scores", "pattern"):
        return value[:, :, stretch.start - first : stretch.stop - first, : stretch.stop]
    return value[:, stretch.start - first : stretch.stop - first]


def _joined(place: Site, value: Tensor, parts: list[Tensor]) -> Tensor:
    if place.kind not in ("scores", "pattern"):
        return torch.cat(parts, 1)
    rows: list[Tensor] = []
    for part in parts:
        start = sum(row.shape[2] for row in rows)
        ahead = value[:, :, start : start + part.shape[2], part.shape[3] :]
        rows.append(torch.cat([part, ahead], 3))
    return torch.cat(rows, 2)


HEAD_AXIS = {"q": 2, "k": 2, "v": 2, "z": 2, "head": 2, "scores": 1, "pattern": 1, "neuron": 2, "expert": 2, "router": 2}


def apply(site: Site, edit: Edit, value: Tensor, now: Pass, stretch: Stretch) -> Tensor:
    """The value (of one stretch) with `edit` carried out on the slice that `site` names."""
    seen = now.seen(site, stretch)
    part = value if site.index is None else value.select(HEAD_AXIS[site.kind], site.index)
    edited = _same_shape(site, part, edit(part, seen))
    if edited is part:
        return value
    if site.position is not None:
        where = now.at(site, stretch)
        if site.kind in ("scores", "pattern") and site.index is None:
            where = where[:, None]  # queries of every head
        edited = torch.where(where.reshape(where.shape + (1,) * (part.dim() - where.dim())), edited, part)
    if site.index is None:
        return edited
    axis = HEAD_AXIS[site.kind]
    before = value.narrow(axis, 0, site.index)
    after = value.narrow(axis, site.index + 1, value.shape[axis] - site.index - 1)
    return torch.cat([before, edited.unsqueeze(axis), after], axis)


def _same_shape(site: Site, before: Tensor, after: Tensor) -> Tensor:
    if before.shape != after.shape:
        shapes = f"{tuple(before.shape)} to {tuple(after.shape)}"
        raise GateError(f"the edit at {site} changed the shape {shapes}: an edit must keep it")
    return after
