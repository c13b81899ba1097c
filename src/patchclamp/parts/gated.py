"""Gated sites: parts of any kind, each with a gate on what its site holds. Everything that measures goes through here."""

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.edits import Add
from patchclamp.errors import GateError, SiteError
from patchclamp.metrics import Metric, metric_named
from patchclamp.models.editing import Edits
from patchclamp.models.memory import budget
from patchclamp.models.model import Model
from patchclamp.models.norms import scale_of
from patchclamp.models.recording import Recorder
from patchclamp.models.standing import Start
from patchclamp.parts.compiling import acts_on, check_distinct, mix
from patchclamp.parts.fallbacks import Fallback, Values, expand_to_rows
from patchclamp.parts.labelled import Labelled
from patchclamp.parts.limits import CACHE
from patchclamp.parts.measuring import measured
from patchclamp.parts.rules import rule
from patchclamp.parts.slopes import slopes
from patchclamp.sites import KINDS, Site, select
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

Routing = Literal["free", "frozen"]


def gated(
    model: Model,
    sites: Sequence[Site | str],
    positions: Sequence[int | str] = (),
    memory: int | None = None,
    routing: Routing = "free",
) -> "Gated":
    """Any writable sites as parts, each with a gate: `gated(model, ["L*.resid.post", "L3.h*.q"], positions=["subject", -1])`.

    Args:
        model: the model.
        sites: sites or patterns. `L3.h*.q`, `L*.mlp` or `L2.mlp.n*` are a part each; a whole-layer site is one part. Each may name
            its own position (`L9.h*@S2`). Gates of nested parts (`L9.z`, `L9.h6`, `L9.h6@-1`) multiply.
        positions: a part per position or named span instead of one for all positions.
        memory: bytes that one folded pass may take; by default a share of what is free (`models.memory`).
        routing: of a mixture of experts: "free", or "frozen" to what it is in the model's own run of the same prompts.

    Raises:
        SiteError: a pattern that fits nothing, or a site that cannot be written.
        GateError: two names of one thing (`L9.h6`, `L9.h6.z`); frozen routing with gates on the router, or without a router.
    """
    wanted = [str(site).partition("@") for site in sites]
    known = [*model.sites, *_units_of(model, [body for body, _, _ in wanted])]
    chosen: dict[int | str | None, set[Site]] = {}
    for body, _, where in wanted:
        position = Site.parse(f"embed@{where}").position if where else None
        chosen.setdefault(position, set()).update(select(body, known))
    each: set[Site] = set()
    for position, found in chosen.items():
        for site in found:
            if not KINDS[acts_on(site).kind].writable:
                raise SiteError(f"{site} can be read but not written, so it can have no gate")
            each.update(site.at(one) for one in ([position] if position is not None else positions or [None]))
    return Gated(model, sorted(each), memory, routing)


def _units_of(model: Model, patterns: Sequence[str]) -> list[Site]:
    """Single neurons and experts, which no list of sites names, where a pattern asks for any."""
    found: list[Site] = []
    for kind, mark in (("neuron", ".n"), ("expert", ".e")):
        if any(f"mlp{mark}" in pattern for pattern in patterns):
            for layer, sizes in enumerate(model.anatomy.sizes):
                count = (sizes.neurons if kind == "neuron" else sizes.experts) or 0
                found += [] if model.anatomy.why_not(Site(kind, layer)) else [Site(kind, layer, one) for one in range(count)]
    return found


def _check_frozen(model: Model, labels: Sequence[Site]) -> None:
    if all(layer.router is None for layer in model.anatomy.layers):
        raise GateError(f"frozen routing was asked for, and {model.name} ({model.family.name}) has no router: leave it out")
    if any(site.kind == "router" for site in labels):
        raise GateError("routing cannot be frozen while routers have gates: choose one of the two")


class Gated(Labelled[Site]):
    """`Parts` on any writable sites; make with `gated` or `nodes`."""

    def __init__(self, model: Model, labels: Sequence[Site], memory: int | None = None, routing: Routing = "free"):
        if routing == "frozen":
            _check_frozen(model, labels)
        self.model, self.routing = model, routing
        self.norm: Routing = "free"
        """Whether the final norm divides by what it would, or ("frozen") by what it divides by in the model's own run."""
        self.memory = budget(model.device) if memory is None else memory
        """Bytes that one folded pass may take."""
        self.most: int | None = None
        """How many settings run at once at most, since memory ran out."""
        self.added: Float[Tensor, "row position width"] | None = None
        """What is added to the embeddings in every run."""
        self.labels = tuple(labels)
        self.counted = tuple(number for number, site in enumerate(self.labels) if site.kind != "embed")
        self.by_place: dict[Site, list[int]] = {}
        for number, site in enumerate(self.labels):
            self.by_place.setdefault(acts_on(site), []).append(number)
        for place, numbers in self.by_place.items():
            check_distinct(place, [self.labels[number] for number in numbers])

    @cached_property
    def places(self) -> tuple[Site, ...]:
        """Whole-layer sites on which the gates act, in forward order."""
        return tuple(sorted(self.by_place))

    def __repr__(self) -> str:
        return f"Gated({self.model.name!r}: {len(self.counted)} parts, {self.labels[0]} to {self.labels[-1]})"

    def on(self, model: Model) -> "Gated":
        """The same parts of another model of the same anatomy."""
        other = copy(self)
        other.model = model
        return other

    def under(self, added: Float[Tensor, "row position width"]) -> "Gated":
        """The same parts of runs in which `added` is added to the embeddings of a batch: noise, a direction.

        Raises:
            GateError: the embedding has a gate.
        """
        if Site("embed") in self.by_place:
            raise GateError("the embedding has a gate here, so nothing can be added to it: leave it out of the parts")
        other = copy(self)
        other.added = added
        return other

    def frozen_norm(self) -> "Gated":
        """The same parts of runs in which the final norm's scale is held: parts add up behind it.

        `measure` and `gradient` then give what the metric is where the norm before the unembedding divides, at every row and
        position, by what it divides by in the model's own run (a LayerNorm still takes off the mean).

        Raises:
            FamilyError: the final norm is neither a LayerNorm nor an RMS norm.
        """
        scale_of(self.model.anatomy.norm, self.model.width)
        other = copy(self)
        other.norm = "frozen"
        return other

    def base(self) -> Edits:
        """What is on in every run."""
        return {} if self.added is None else {Site("embed"): Add(self.added)}

    def record(self, batch: Batch) -> Values:
        """What the places hold when the batch runs."""
        batch = batch.to(self.model.device)
        recorder = Recorder(self.model.anatomy, self.places)
        with torch.no_grad(), recorder.session().open():
            self.model.forward(batch, columns=torch.zeros(1, dtype=torch.long, device=self.model.device))
        return dict(recorder.kept)

    def fallback(self, kind: str, fit: Examples | None = None, other: Model | None = None) -> Fallback:
        """The rule called `kind`: resample, mean or optimal (learned on `fit`), zero, or model (the values of `other` on the
        same prompt).

        Raises:
            GateError: no such rule, mean or optimal without a fit set, or another model that is not given or not of this anatomy.
        """
        return rule(self, kind, fit, other)

    def edits(
        self, gates: Float[Tensor, "setting #example #position part"], fallback: Fallback, batch: Batch | None = None
    ) -> Edits:
        """Gates as one `Mix` per place; places whose gates are all 1 get none (unless the gates want gradients).

        Raises:
            GateError: shapes that do not fit, or a fallback that has no value without a batch.
        """
        self.require_shape(gates, batch)
        if self.norm == "frozen":
            raise GateError(
                "edits alone cannot hold the final norm's scale: measure and gradient can; or take the parts without it"
            )
        return self.compiled(gates, fallback, batch, Start())

    def compiled(
        self, gates: Float[Tensor, "setting #example #position part"], fallback: Fallback, batch: Batch | None, start: Start
    ) -> Edits:
        """`edits` for runs from `start` on, whose settings are in its order."""
        if batch is None and (gates.shape[1] > 1 or any(site.position is not None for site in self.labels)):
            raise GateError("gates per example or position need the batch")
        rows = gates if batch is None else expand_to_rows(gates, batch)
        moved: dict[Site, Tensor] = {}
        for place in self.places:
            mine = rows[start.settings_at(place, len(gates))][..., self.by_place[place]]
            if mine.requires_grad or bool((mine != 1).any()):
                moved[place] = mine
        if not moved:
            return {}
        values = fallback.at(batch)
        sites = {place: [self.labels[number] for number in self.by_place[place]] for place in moved}
        sizes, columns = self.model.anatomy.sizes, slice(start.column, start.stop)
        return {place: mix(place, sites[place], mine, values[place], batch, columns, sizes) for place, mine in moved.items()}

    def measure(
        self,
        batch: Batch,
        gates: Float[Tensor, "setting #example #position part"],
        fallback: Fallback,
        metric: Metric | None = None,
    ) -> Float[Tensor, "setting example"]:
        """The metric for each setting and example, in float32 or wider, without gradient.

        Settings are folded into the rows, as many as `memory` allows at once. Each starts at the first block and column at
        which it differs from the model itself (`models.replay`); where the metric asks for a few tokens' logits alone, only
        these are computed.

        Cost: per setting, one forward pass over the batch from there on; one pass for the model itself; what the fallback
        costs (once per batch).
        """
        batch = batch.to(self.model.device)
        self.require_shape(gates, batch)
        return measured(self, batch, gates, fallback, metric or metric_named(batch.metric))

    def gradient(
        self,
        batch: Batch,
        gates: Float[Tensor, "setting #example #position part"],
        fallback: Fallback,
        metric: Metric | None = None,
    ) -> tuple[Float[Tensor, "setting example"], Float[Tensor, "setting example *position part"]]:
        """The metric and its slope in every gate, per example.

        Returns:
            values [setting, example] and slopes [setting, example, part]; where gates differ by position, slopes have that axis
            too. Gates that are shared over examples or positions get each example's own slope, summed over positions.

        Cost: one forward and one backward pass over the batch per setting, from the first column at which the fallback differs
        from the model itself. Only gates require gradients: weights never do.
        """
        return slopes(self, batch, gates, fallback, metric or metric_named(batch.metric))

    def fold(self, batch: Batch, backward: bool = False, column: int = 0) -> int:
        """How many settings run at once: as many as `memory` allows."""
        anatomy, width = self.model.anatomy, self.model.width
        rows, length = batch.tokens.shape
        size = max(size.heads * size.head_width for size in anatomy.sizes)
        neurons = max((size.neurons or 4 * width) for size in anatomy.sizes)
        heads = max(size.heads for size in anatomy.sizes)
        per_layer = 8 * width + 4 * size + 3 * neurons + 3 * heads * length
        per_token = per_layer * (len(anatomy.sizes) if backward else 2)
        vocabulary = int(anatomy.config.vocab_size) * len(batch.target_row) * 3
        most = self.memory // (4 * (rows * (length - column) * per_token + vocabulary))
        if self.model.device.type == "cpu" and not backward:
            most = min(most, CACHE // (4 * rows * (length - column) * neurons))
        return max(1, most if self.most is None or backward else min(most, self.most))
