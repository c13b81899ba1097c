"""Gated sites: parts of any kind, each with a gate on what its site holds. Everything that measures goes through here."""

import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.edits import Add
from patchclamp.errors import GateError, SiteError
from patchclamp.metrics import Metric, metric_named
from patchclamp.models.editing import Edits
from patchclamp.models.model import Model
from patchclamp.models.recording import Recorder
from patchclamp.models.replay import reference, trimmed, why_plain
from patchclamp.models.standing import Start, why_whole_vocabulary
from patchclamp.parts.compiling import acts_on, mix
from patchclamp.parts.fallbacks import FALLBACKS, Fallback, Resample, Values, Zero, expand_to_rows, learn_mean
from patchclamp.parts.slopes import slopes
from patchclamp.sites import KINDS, Site, select
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

MEMORY = 1 << 30
"""Bytes that the activations of one folded pass may take."""
CACHE = 24 << 20
"""Bytes that the widest activation of one folded pass may take on a CPU: more settings at once run slower, out of its cache."""


def gated(model: Model, sites: Sequence[Site | str], positions: Sequence[int | str] = (), memory: int = MEMORY) -> "Gated":
    """Any writable sites as parts, each with a gate: `gated(model, ["L*.resid.post", "L3.h*.q"], positions=["subject", -1])`.

    Args:
        model: the model.
        sites: sites or patterns. `L3.h*.q`, `L*.mlp` or `L2.mlp.n*` are a part each; a whole-layer site is one part.
        positions: a part per position or named span instead of one for all positions.
        memory: bytes that one folded pass may take.

    Raises:
        SiteError: a pattern that fits nothing, or a site that cannot be written.
    """
    wanted = [str(site) for site in sites]
    chosen = select(wanted, [*model.sites, *_units_of(model, wanted)])
    for site in chosen:
        if not KINDS[acts_on(site).kind].writable:
            raise SiteError(f"{site} can be read but not written, so it can have no gate")
    each = [site.at(position) for site in chosen for position in positions] if positions else chosen
    return Gated(model, each, memory)


def _units_of(model: Model, patterns: Sequence[str]) -> list[Site]:
    """Single neurons and experts, which no list of sites names, where a pattern asks for any."""
    found: list[Site] = []
    for kind, mark in (("neuron", ".n"), ("expert", ".e")):
        if any(f"mlp{mark}" in pattern for pattern in patterns):
            for layer, sizes in enumerate(model.anatomy.sizes):
                count = (sizes.neurons if kind == "neuron" else sizes.experts) or 0
                found += [] if model.anatomy.why_not(Site(kind, layer)) else [Site(kind, layer, one) for one in range(count)]
    return found


class Gated:
    """`Parts` on any writable sites; make with `gated` or `nodes`."""

    def __init__(self, model: Model, labels: Sequence[Site], memory: int = MEMORY):
        self.model, self.memory = model, memory
        self.most: int | None = None
        """How many settings run at once at most, since memory ran out."""
        self.added: Float[Tensor, "row position width"] | None = None
        """What is added to the embeddings in every run."""
        self.labels: tuple[Site, ...] = tuple(labels)
        self.counted: tuple[int, ...] = tuple(number for number, site in enumerate(self.labels) if site.kind != "embed")
        """All but the embedding."""
        self.by_place: dict[Site, list[int]] = {}
        for number, site in enumerate(self.labels):
            self.by_place.setdefault(acts_on(site), []).append(number)

    @cached_property
    def index(self) -> dict[Site, int]:
        """Where each label's gate is."""
        return {site: number for number, site in enumerate(self.labels)}

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

    def open(self, settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates of 1."""
        return torch.ones(settings, 1, 1, len(self.labels), device=self.model.device)

    def closed(self, settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates of 0, the embedding open."""
        gates = self.open(settings)
        gates[..., list(self.counted)] = 0
        return gates

    def only(self, sites: Sequence[Site], settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates open for `sites` (and the embedding), closed for the rest: a circuit."""
        gates = self.closed(settings)
        for site in sites:
            gates[..., self._find(site)] = 1
        return gates

    def without(self, sites: Sequence[Site], settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates closed for `sites`, open for the rest."""
        gates = self.open(settings)
        for site in sites:
            gates[..., self._find(site)] = 0
        return gates

    def _check(self, gates: Tensor, batch: Batch | None) -> None:
        if gates.dim() != 4 or gates.shape[-1] != len(self.labels):
            raise GateError(
                f"gates are [setting, example, position, part] with {len(self.labels)} parts, not {tuple(gates.shape)}"
            )
        if batch is not None and gates.shape[1] not in (1, len(batch)):
            raise GateError(f"gates for {gates.shape[1]} examples were given, and the batch has {len(batch)}")
        if batch is not None and gates.shape[2] not in (1, batch.tokens.shape[1]):
            raise GateError(f"gates for {gates.shape[2]} columns were given, and the batch has {batch.tokens.shape[1]}")

    def _find(self, site: Site) -> int:
        if site not in self.index:
            raise GateError(
                f"{site} is not among the {len(self.labels)} parts ({self.labels[min(1, len(self.labels) - 1)]}, ... {self.labels[-1]})"
            )
        return self.index[site]

    def record(self, batch: Batch) -> Values:
        """What the places hold when the batch runs."""
        batch = batch.to(self.model.device)
        recorder = Recorder(self.model.anatomy, self.places)
        with torch.no_grad(), recorder.session().open():
            self.model.forward(batch, columns=torch.zeros(1, dtype=torch.long, device=self.model.device))
        return dict(recorder.kept)

    def fallback(self, kind: str, fit: Examples | None = None) -> Fallback:
        """The rule called `kind`: resample, mean (learned on `fit`), zero.

        Raises:
            GateError: no such rule, or mean without a fit set.
        """
        if kind == "zero":
            return Zero(self.places, self.model.device)
        if kind == "resample":
            return Resample(self.record)
        if kind.partition(":")[0] == "mean":
            if fit is None or len(fit) == 0:
                raise GateError("the fallback 'mean' is learned: give the fit set, fit=")
            return learn_mean(self.record, fit, by=kind.partition(":")[2] or None)
        raise GateError(f"there is no fallback {kind!r}: choose from {', '.join(FALLBACKS)} (mean:position, mean:span, mean:all)")

    def edits(
        self, gates: Float[Tensor, "setting #example #position part"], fallback: Fallback, batch: Batch | None = None
    ) -> Edits:
        """Gates as one `Mix` per place; places whose gates are all 1 get none (unless the gates want gradients).

        Raises:
            GateError: shapes that do not fit, or a fallback that has no value without a batch.
        """
        self._check(gates, batch)
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
            mine = rows[: start.settings_at(place, len(gates))][..., self.by_place[place]]
            if mine.requires_grad or bool((mine != 1).any()):
                moved[place] = mine
        if not moved:
            return {}
        values = fallback.at(batch)
        sites = {place: [self.labels[number] for number in self.by_place[place]] for place in moved}
        sizes = self.model.anatomy.sizes
        return {place: mix(place, sites[place], mine, values[place], batch, start.column, sizes) for place, mine in moved.items()}

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
        batch, metric = batch.to(self.model.device), metric or metric_named(batch.metric)
        self._check(gates, batch)
        with torch.no_grad():
            firsts, columns = self._firsts(gates, fallback, batch)
            out, moved = dict[int, Tensor](), [number for number, first in enumerate(firsts) if first is not None]
            base: Edits = {} if self.added is None else {Site("embed"): Add(self.added)}
            itself = self.model.target_logits(batch, base) if metric.reference or len(moved) < len(gates) else None
            plain = itself[0] if metric.reference and itself is not None else None
            if itself is not None:
                out = dict.fromkeys(set(range(len(gates))) - set(moved), metric(itself, batch, plain)[0])
            start, asked = self._start(batch, metric, [firsts[number] or 0 for number in moved], [columns[n] for n in moved])
            for column in sorted({columns[number] for number in moved}) if start.prefix else [0]:
                together = [number for number in moved if not start.prefix or columns[number] == column]
                together.sort(key=lambda number: firsts[number] or 0)
                while together:
                    chunk = together[: self.fold(batch, column=column)]
                    here = start.rising(column, [firsts[number] or 0 for number in chunk])
                    edits = self.compiled(gates[chunk], fallback, batch, here)
                    edits = edits if here.given else {**base, **edits}
                    try:
                        logits = self.model.target_logits(batch, edits, len(chunk), here)
                    except RuntimeError as error:
                        self._shrink(error, len(chunk))
                        continue
                    out |= zip(chunk, metric(logits, asked, plain), strict=True)
                    together = together[len(chunk) :]
        return torch.stack([out[number] for number in range(len(gates))])

    def _shrink(self, error: RuntimeError, settings: int) -> None:
        """Where memory ran out with several settings at once, go on with half as many, and say so."""
        if settings == 1 or not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise error
        self.most = settings // 2
        warnings.warn(f"memory ran out with {settings} settings at once: going on with {settings // 2}", stacklevel=3)
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _firsts(self, gates: Tensor, fallback: Fallback, batch: Batch) -> tuple[list[int | None], list[int]]:
        """By setting, the first block (None: all gates are open) and the first column at which it differs from the model."""
        blocks = torch.tensor([self._first_block(site) for site in self.labels])
        since, last = fallback.since(batch), int(batch.target_position.min())
        starts = {site.position: since for site in self.labels}
        for position in set(starts) - {None}:
            assert position is not None
            covered = batch.columns(position).any(0)
            starts[position] = max(since, int(covered.int().argmax())) if bool(covered.any()) else last
        at = torch.tensor([starts[site.position] for site in self.labels])
        closed = (gates != 1).flatten(1, 2).any(1).cpu()
        never = self.model.layers + 1
        first = torch.where(closed, blocks, never).amin(1).tolist()
        column = torch.where(closed, at, batch.tokens.shape[1]).amin(1).clamp(max=last).tolist()
        short = batch.tokens.shape[1]  # keys and values of few columns cost more than they spare
        return [None if one == never else one for one in first], [0 if 4 * one < short else one for one in column]

    def _first_block(self, site: Site) -> int:
        place = acts_on(site)
        if place.layer is None:
            return 0 if place.kind == "embed" else self.model.layers
        return place.layer + (place.kind == "resid.post")

    def _start(self, batch: Batch, metric: Metric, firsts: list[int], columns: list[int]) -> tuple[Start, Batch]:
        """Where runs may start, with what the model's own run holds there; and the batch, its tokens numbered as in the logits."""
        asked, start = batch, Start()
        if len(firsts) < 2 or not (any(firsts) or any(columns)) or why_plain(self.model):
            return start, asked
        given = self.added is not None
        with self.model.editing({} if self.added is None else {Site("embed"): Add(self.added)}, batch):
            start = reference(self.model, batch, inputs=given or any(firsts), prefix=any(columns))
        start = replace(start, given=given)
        if not any(site.kind in ("neuron", "router", "expert") for site in self.labels):
            start = trimmed(self.model, start, batch.target_position.unique())
        if metric.answers_alone(batch) and Site("logits") not in self.by_place and not why_whole_vocabulary(self.model.anatomy):
            tokens, asked = batch.numbered()
            start = replace(start, tokens=tokens)
        return start, asked

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
