"""Tied parts: groups of sites with one gate each, beside parts of any other kind in the same mixture.

`L9.kv2` is a key/value head: its key and its value under one gate (or, asked for, the query heads that read it). `L9.block` is
what attention and MLP of a block add to the residual stream. The gate of a site is the product of the gates of all parts that
hold it, so that a block and one of its key/value heads, or a layer and a head, may be in one mixture:

    gate(site) = product over parts that hold it of gate(part)
    slope(part) = sum over its sites of slope(site) * product of the other gates that hold the site
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError, SiteError
from patchclamp.metrics import Metric
from patchclamp.models.editing import Edits
from patchclamp.models.model import Model
from patchclamp.parts.fallbacks import Fallback
from patchclamp.parts.gated import Gated, Routing, gated
from patchclamp.parts.labelled import Labelled
from patchclamp.sites import GROUPS, Site, select
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

KeyValue = Literal["keys and values", "heads"]


def tied(
    model: Model,
    sites: Sequence[Site | str],
    positions: Sequence[int | str] = (),
    memory: int | None = None,
    routing: Routing = "free",
    kv: KeyValue = "keys and values",
) -> "Tied":
    """Parts of any kind in one mixture, groups among them: `tied(model, ["L*.block", "L*.kv*", "L0.h*", "L1.mlp.n*"])`.

    Args:
        model: the model.
        sites: sites, groups or patterns. `L*.h*`, `L*.mlp`, `L*.mlp.n*` (neurons), `L*.mlp.e*` (experts) and any writable site are a
            part each; `L*.kv*` (key/value heads) and `L*.block` (whole layers) are groups.
        positions: a part per position or named span instead of one for all positions; sites may also name their own (`L9.h6@S2`).
        memory: bytes that one folded pass may take.
        routing: see `gated`.
        kv: what `L9.kv2` gates: "keys and values", that head's key and value; or "heads", the query heads that read them.

    Raises:
        SiteError: a pattern that fits nothing, or a site that cannot be written.
        GateError: two parts are the same sites.
    """
    groups = {group: members(model, group, kv) for group in groups_of(model)}
    labels: dict[Site, tuple[Site, ...]] = {}
    for wanted in sites:
        body, _, where = str(wanted).partition("@")
        at = Site.parse(f"embed@{where}").position if where else None
        if any(Site.parse(text).kind in GROUPS for text in _readable(body)):
            found = {group: groups[group] for group in select(body, list(groups))}
        else:
            found = {site: (site,) for site in gated(model, [body]).labels}
        for label, held in found.items():
            for position in (at,) if at is not None else positions or (None,):
                labels[label.at(position)] = tuple(one.at(position) for one in held)
    return Tied(model, {label: labels[label] for label in sorted(labels)}, memory, routing)


def _readable(pattern: str) -> list[str]:
    """A pattern as a site that parses, where it is one of a group."""
    text = ".".join(["L0", *pattern.split(".")[1:]]).replace("kv*", "kv0")
    return [text] if text.split(".")[-1] == "block" or text.split(".")[-1].removeprefix("kv").isdigit() else []


def groups_of(model: Model) -> list[Site]:
    """Every group that the model has, in forward order."""
    found = [Site("block", layer) for layer in range(model.layers)]
    for layer, sizes in enumerate(model.anatomy.sizes):
        found += [Site("kv", layer, head) for head in range(sizes.kv_heads)]
    return sorted(found)


def members(model: Model, group: Site, kv: KeyValue = "keys and values") -> tuple[Site, ...]:
    """The sites that a group's gate acts on."""
    if group.kind == "block":
        return Site("attn.write", group.layer), Site("mlp", group.layer)
    if group.kind != "kv" or group.layer is None or group.index is None:
        raise SiteError(f"{group} is no group of sites: groups are a key/value head (L9.kv2) and a whole layer (L9.block)")
    if kv == "keys and values":
        return Site("k", group.layer, group.index), Site("v", group.layer, group.index)
    sizes = model.anatomy.sizes[group.layer]
    each = sizes.heads // sizes.kv_heads
    return tuple(Site("head", group.layer, head) for head in range(group.index * each, (group.index + 1) * each))


def _one_name(site: Site) -> Site:
    """The head of z, the MLP of what it adds: one name for what is gated at the same place."""
    if site.kind == "z" and site.index is not None:
        return replace(site, kind="head")
    return replace(site, kind="mlp") if site.kind == "mlp.write" else site


class Tied(Labelled[Site]):
    """`Parts` whose gates act on one site or several; make with `tied`, or from a mapping of one's own: label -> sites."""

    def __init__(
        self,
        model: Model,
        holds: Mapping[Site, Sequence[Site]],
        memory: int | None = None,
        routing: Routing = "free",
    ):
        if not holds:
            raise GateError("parts were asked for, and no site was named: give sites or groups")
        self.model = model
        self.labels = tuple(holds)
        self.holds: dict[Site, tuple[Site, ...]] = {label: tuple(map(_one_name, sites)) for label, sites in holds.items()}
        same: dict[frozenset[Site], Site] = {}
        for label, sites in self.holds.items():
            twin = same.setdefault(frozenset(sites), label)
            if twin is not label:
                raise GateError(f"{twin} and {label} are gates on the same sites: leave one of them out")
        every = sorted({site for sites in self.holds.values() for site in sites})
        self.inner = Gated(model, every, memory, routing)
        self.counted = tuple(number for number, site in enumerate(self.labels) if site.kind != "embed")

    @property
    def memory(self) -> int:
        """Bytes that one folded pass may take."""
        return self.inner.memory

    @cached_property
    def owners(self) -> tuple[tuple[int, ...], ...]:
        """By site that is gated, the parts that hold it."""
        return tuple(
            tuple(number for number, label in enumerate(self.labels) if site in self.holds[label]) for site in self.inner.labels
        )

    def __repr__(self) -> str:
        return f"Tied({self.model.name!r}: {len(self.counted)} parts on {len(self.inner.labels)} sites)"

    def _with(self, inner: Gated) -> "Tied":
        other = copy(self)
        other.model, other.inner = inner.model, inner
        return other

    def on(self, model: Model) -> "Tied":
        """The same parts of another model of the same anatomy."""
        return self._with(self.inner.on(model))

    def frozen_norm(self) -> "Tied":
        """See `Gated.frozen_norm`."""
        return self._with(self.inner.frozen_norm())

    def fallback(self, kind: str, fit: Examples | None = None, other: Model | None = None) -> Fallback:
        """The rule called `kind`, at the sites of every part. See `Gated.fallback`."""
        return self.inner.fallback(kind, fit, other)

    def spread(self, gates: Float[Tensor, "setting example position part"]) -> Float[Tensor, "setting example position site"]:
        """Gates of parts as gates of the sites that they hold: products."""
        self.require_shape(gates)
        return torch.stack([gates[..., list(owners)].prod(-1) for owners in self.owners], -1)

    def edits(
        self, gates: Float[Tensor, "setting #example #position part"], fallback: Fallback, batch: Batch | None = None
    ) -> Edits:
        """The sites' gates as edits. See `Gated.edits`."""
        return self.inner.edits(self.spread(gates), fallback, batch)

    def fold(self, batch: Batch, backward: bool = False, column: int = 0) -> int:
        """How many settings run at once: as many as `memory` allows."""
        return self.inner.fold(batch, backward, column)

    def measure(
        self,
        batch: Batch,
        gates: Float[Tensor, "setting #example #position part"],
        fallback: Fallback,
        metric: Metric | None = None,
    ) -> Float[Tensor, "setting example"]:
        """The metric for each setting and example, without gradient. Cost: that of `Gated.measure`."""
        return self.inner.measure(batch, self.spread(gates), fallback, metric)

    def gradient(
        self,
        batch: Batch,
        gates: Float[Tensor, "setting #example #position part"],
        fallback: Fallback,
        metric: Metric | None = None,
    ) -> tuple[Float[Tensor, "setting example"], Float[Tensor, "setting example *position part"]]:
        """The metric and its slope in every part's gate, per example. Cost: that of `Gated.gradient`."""
        values, slopes = self.inner.gradient(batch, self.spread(gates), fallback, metric)
        held = gates.to(slopes) if slopes.dim() == 4 else gates[:, :, 0].to(slopes)
        out = slopes.new_zeros(*slopes.shape[:-1], len(self.labels))
        for number, owners in enumerate(self.owners):
            for owner in owners:
                others = [other for other in owners if other != owner]
                out[..., owner] += slopes[..., number] * held[..., others].prod(-1)
        return values, out
