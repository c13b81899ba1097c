"""Edges: what one part writes, as one other part reads it, with a gate each.

A destination d (queries, keys or values of a head, an MLP, the logits) reads, with gates g_s on the edges from its sources s,

    stream + sum over s of (1 - g_s) * (fallback_s - value_s)

and everything else of the run is as the model computes it. `stream` and `value_s`, what s adds to the residual stream, are those
of this very run. So one closed edge is path patching with everything else frozen, and many closed edges are the circuit of the
others: what is behind a destination is always computed anew (Goldowsky-Dill et al. 2304.05969, Conmy et al. 2304.14997).
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.metrics import Metric, metric_named
from patchclamp.models.editing import Edits
from patchclamp.models.memory import budget
from patchclamp.models.model import Model
from patchclamp.models.scope import OPEN
from patchclamp.models.standing import Start
from patchclamp.parts.edge_ends import at_positions, comes_before, destinations_of, sources_of
from patchclamp.parts.edge_gates import KEYS, Known, Readers, closed, patterns_of, readers_of
from patchclamp.parts.edge_reading import Desk, reading
from patchclamp.parts.edge_runs import Ground, at_once, first_block, ground_of, measured, replays_pay
from patchclamp.parts.edge_slopes import Asked, open_slopes
from patchclamp.parts.edge_sources import Sources, place_of
from patchclamp.parts.fallbacks import FALLBACKS, Fallback, Resample, Values, Zero, expand_to_rows, learn_mean
from patchclamp.parts.optimal import learn_optimal
from patchclamp.parts.slopes import frozen
from patchclamp.sites import Edge, Site, select
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

SOURCES = ("embed", "L*.h*", "L*.mlp")
DESTINATIONS = ("L*.h*.q", "L*.kv*.k", "L*.kv*.v", "L*.mlp", "logits")


def edges(
    model: Model,
    sources: Sequence[Site | str] = SOURCES,
    destinations: Sequence[Site | str] = DESTINATIONS,
    memory: int | None = None,
    positions: Sequence[int | str] = (),
) -> "Edges":
    """Edges of a model as parts: every source with every destination that comes after it.

    With positions (named spans of the task, or numbers where all prompts have one length), an edge for each:

    - `L0.h3@S2>L2.h1.q@S2`, and into MLPs and logits: what the source writes at the span, as it is read there;
    - `L0.h3@S1>L2.kv1.k@S2`, keys and values: what the source writes at one span, as queries at the other span read it (all
      query heads of the key/value head). So which position a head looks at is an edge, exactly (as PEAP, 2502.04577, estimates).

    Args:
        model: the model.
        sources: sites or patterns among `embed`, heads (`L2.h5`) and MLPs (`L2.mlp`).
        destinations: sites or patterns among queries (`L9.h6.q`), keys and values (`L9.kv2.k`; native under grouped-query
            attention), MLPs (`L9.mlp`) and `logits`.
        memory: bytes that one folded pass may take; by default a share of what is free (`models.memory`).
        positions: a part per position or named span; those of keys and values by both.

    Raises:
        SiteError: a pattern that fits no source, or no destination.
        GateError: no source comes before any destination.
    """
    here = select([str(site) for site in sources], sources_of(model))
    there = select([str(site) for site in destinations], destinations_of(model))
    found = [Edge(source, target) for target in there for source in here if comes_before(model, source, target)]
    if not found:
        raise GateError(
            f"no edge leads from {', '.join(map(str, here))} to {', '.join(map(str, there))}: nothing there comes before it"
        )
    each = [at for edge in found for at in at_positions(edge, positions)] if positions else found
    return Edges(model, sorted(each), memory)


@dataclass(frozen=True, eq=False)
class Replay:
    """Many settings of one batch's edges, on one run of the model itself; make with `Edges.replay`."""

    parts: "Edges"
    ground: Ground
    known: Known

    @property
    def blocks(self) -> int:
        """Blocks that have run so far, each for one setting on the whole batch; the model's own run, too."""
        return self.ground.count.blocks

    def measure(self, gates: Float[Tensor, "setting #example #position part"]) -> Float[Tensor, "setting example"]:
        """As `Edges.measure`."""
        parts, ground = self.parts, self.ground
        parts.require_fit(gates, ground.batch)
        with torch.no_grad():
            patterns = patterns_of(parts.readers, gates, parts.model.layers)

            def edits_of(some: Sequence[int], start: Start) -> Edits:
                return parts.compiled(gates[list(some)], ground.batch, self.known, start)

            return measured(ground, patterns, edits_of, at_once(parts.model, ground.batch, parts.memory // 2))


class Edges:
    """`Parts` on edges; make with `edges`. Every edge is counted, those from the embedding too: all closed is the corrupt run."""

    def __init__(self, model: Model, labels: Sequence[Edge], memory: int | None = None):
        self.model = model
        self.memory = budget(model.device) if memory is None else memory
        self.replays = True
        """Whether settings start where they first differ from the model itself."""
        self.added: Float[Tensor, "row position width"] | None = None
        """What is added to the embeddings in every run that `record` and `slopes` make."""
        self.labels: tuple[Edge, ...] = tuple(labels)
        self.counted: tuple[int, ...] = tuple(range(len(self.labels)))
        for edge in self.labels:
            here, there = edge.source.position, edge.target.position
            if edge.target.kind not in KEYS and here != there and None not in (here, there):
                raise GateError(f"{edge}: only keys and values are read at other positions than they are written at")

    def __repr__(self) -> str:
        return f"Edges({self.model.name!r}: {len(self.labels)} edges into {len(set(edge.target for edge in self.labels))} destinations)"

    @cached_property
    def index(self) -> dict[Edge, int]:
        """Where each label's gate is."""
        return {edge: number for number, edge in enumerate(self.labels)}

    @cached_property
    def _sources(self) -> Sources:
        places = {place_of(self.model.anatomy, edge.source.at(None)) for edge in self.labels}
        return Sources(self.model, tuple(sorted(places)), self.memory // 4)

    @cached_property
    def readers(self) -> tuple[Readers, ...]:
        """What the edges lead to, by the place of the stream."""
        return readers_of(self.labels, self._sources)

    def on(self, model: Model) -> "Edges":
        """The same edges of another model of the same anatomy."""
        return Edges(model, self.labels, self.memory)

    def under(self, added: Float[Tensor, "row position width"]) -> "Edges":
        """The same edges of runs in which `added` is added to the embeddings of a batch; for `record` and `slopes`."""
        other = copy(self)
        other.added = added
        return other

    def open(self, settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates of 1: the model itself."""
        return torch.ones(settings, 1, 1, len(self.labels), device=self.model.device)

    def closed(self, settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates of 0. With all edges of a model among the parts, and resample, this is the corrupt run."""
        return torch.zeros_like(self.open(settings))

    def only(self, sites: Sequence[Edge], settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates open for these edges, closed for the rest: a circuit."""
        gates = self.closed(settings)
        gates[..., [self._find(edge) for edge in sites]] = 1
        return gates

    def without(self, sites: Sequence[Edge], settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates closed for these edges, open for the rest."""
        gates = self.open(settings)
        gates[..., [self._find(edge) for edge in sites]] = 0
        return gates

    def _find(self, edge: Edge) -> int:
        if edge not in self.index:
            raise GateError(f"{edge} is not among the {len(self.labels)} edges ({self.labels[0]}, ... {self.labels[-1]})")
        return self.index[edge]

    def require_fit(self, gates: Tensor, batch: Batch) -> None:
        """Raise `GateError` where gates do not fit the edges, or the batch."""
        if gates.dim() != 4 or gates.shape[-1] != len(self.labels):
            raise GateError(
                f"gates are [setting, example, position, part] with {len(self.labels)} edges, not {tuple(gates.shape)}"
            )
        for axis, have, name in ((1, len(batch), "examples"), (2, batch.tokens.shape[1], "columns")):
            if gates.shape[axis] not in (1, have):
                raise GateError(f"gates for {gates.shape[axis]} {name} were given, and the batch has {have}")
        self.require_positions(batch)

    def require_positions(self, batch: Batch) -> None:
        """Raise where positions are not those of the batch: `TaskError` for a span that it does not name.

        Raises:
            GateError: positions by number, and prompts of unequal lengths, in which a number is another word in each.
        """
        asked = {site.position for edge in self.labels for site in (edge.source, edge.target)} - {None}
        lengths = batch.mask.sum(1)
        if any(isinstance(one, int) for one in asked) and int(lengths.min()) != int(lengths.max()):
            raise GateError(
                f"positions by number are other words in prompts of {int(lengths.min())} to {int(lengths.max())} tokens: name "
                'spans of the task (positions=["subject", "end"])'
            )
        for one in asked:
            if one is not None:
                batch.columns(one)

    def record(self, batch: Batch) -> Values:
        """What sources write when the batch runs, by place. One forward pass."""
        return self._sources.record(batch, self.added)

    def fallback(self, kind: str, fit: Examples | None = None) -> Fallback:
        """The rule called `kind`: resample, mean or optimal (learned on `fit`), zero; of what sources write.

        Raises:
            GateError: no such rule, or mean or optimal without a fit set.
        """
        if kind == "zero":
            return Zero(self._sources.places, self.model.device)
        if kind == "resample":
            return Resample(self.record)
        if kind.partition(":")[0] == "mean":
            if fit is None or len(fit) == 0:
                raise GateError("the fallback 'mean' is learned: give the fit set, fit=")
            return learn_mean(self.record, fit, by=kind.partition(":")[2] or None)
        if kind == "optimal":
            return learn_optimal(self, fit)
        raise GateError(f"there is no fallback {kind!r}: choose from {', '.join(FALLBACKS)} (mean:position, mean:span, mean:all)")

    def edits(
        self, gates: Float[Tensor, "setting #example #position part"], fallback: Fallback, batch: Batch | None = None
    ) -> Edits:
        """Gates as edits for one pass over the batch, `len(gates)` settings side by side in its rows.

        Edits of one call belong to one pass at a time: run them with `model.forward(batch, edits, settings=len(gates))`.

        Raises:
            GateError: shapes that do not fit; or no batch: a new token's keys would need those of its prompt read anew.
        """
        if batch is None:
            raise GateError("gates on edges need the batch that runs, and generated tokens are in none: use nodes to generate")
        self.require_fit(gates, batch)
        return self._edits(gates, fallback, batch)

    def compiled(
        self, gates: Float[Tensor, "setting #example #position part"], batch: Batch, known: Known, start: Start
    ) -> Edits:
        """`edits` for runs from a start, whose settings are in its order."""
        if not gates.requires_grad and bool((gates == 1).all()):
            return {}
        rows = expand_to_rows(gates, batch) if gates.shape[1] > 1 else gates
        desk = Desk(self.model.anatomy, len(batch.tokens), self.memory // 2, columns=batch.columns)
        return reading(desk, closed(self.readers, known, rows, start, batch.columns))

    def _edits(self, gates: Tensor, fallback: Fallback, batch: Batch) -> Edits:
        return self.compiled(gates, batch, Known(self._sources, {}, fallback.at(batch)), Start())

    def _plainly(self) -> None:
        if self.added is not None:
            raise GateError("something is added to the embeddings here: gates are measured on parts without it")

    def _alone(self) -> None:
        if OPEN.get():
            raise GateError("other edits are on, and what destinations read would not follow them: measure edges outside of them")

    def measure(
        self,
        batch: Batch,
        gates: Float[Tensor, "setting #example #position part"],
        fallback: Fallback,
        metric: Metric | None = None,
    ) -> Float[Tensor, "setting example"]:
        """The metric for each setting and example, without gradient.

        Settings start at the block of their first closed edge's destination, and what they share runs once (`edge_runs`).

        Cost: per setting, one forward pass from there on, and for each destination with closed edges (those whose gates are the
        same count once) its layer's norm and projections, or its MLP, once more; one pass for the model itself; what the
        fallback costs.

        Raises:
            GateError: shapes that do not fit, or other edits are on.
        """
        batch, metric = batch.to(self.model.device), metric or metric_named(batch.metric)
        self.require_fit(gates, batch)
        return self.replay(batch, fallback, metric, gates).measure(gates)

    def replay(
        self,
        batch: Batch,
        fallback: Fallback,
        metric: Metric | None = None,
        first: Float[Tensor, "setting _ _ part"] | None = None,
    ) -> "Replay":
        """The model's own run of a batch, kept for many calls of `measure` on it: ACDC, greedy steps.

        Args:
            batch: the prompts.
            fallback: what closed gates pass.
            metric: by default the batch's.
            first: gates that will be measured, where these are all: the run is kept where that pays for them.

        Weights must not change while it is used. Cost: one forward pass, and the fallback's.
        """
        batch, metric = batch.to(self.model.device), metric or metric_named(batch.metric)
        self._alone()
        self._plainly()
        patterns = None if first is None else patterns_of(self.readers, first, self.model.layers)
        pays = self.replays and (patterns is None or replays_pay(patterns))
        own = patterns is None or any(first_block(pattern) is None for pattern in patterns)
        ground = ground_of(self.model, batch, metric, self._sources.sites, self.memory, pays, own)
        return Replay(self, ground, Known(self._sources, ground.kept, fallback.at(batch)))

    def whole(self) -> "Edges":
        """The same edges, whose settings all run from the first block on: what replay is compared with."""
        other = copy(self)
        other.replays = False
        return other

    def gradient(
        self,
        batch: Batch,
        gates: Float[Tensor, "setting #example #position part"],
        fallback: Fallback,
        metric: Metric | None = None,
    ) -> tuple[Float[Tensor, "setting example"], Float[Tensor, "setting example *position part"]]:
        """The metric and its slope in every gate, per example.

        With every gate open, the slope of edge s>d is <value_s - fallback_s, d metric / d what d reads>: edge attribution
        patching (Syed et al. 2310.10348). All edges cost one forward and one backward pass and a matrix product per layer; a
        layer whose norm, or whose maps to queries, keys and values, are of another kind (`edge_maps`) is read once more under
        autograd, backward once per destination. Prompts, and tokens in the products, go through a few at a time.

        Other settings cost one forward and one backward pass each, in which every destination reads a stream of its own.

        Returns:
            values [setting, example] and slopes [setting, example, part]; where gates differ by position, slopes have that axis.
        """
        batch, metric = batch.to(self.model.device), metric or metric_named(batch.metric)
        self.require_fit(gates, batch)
        self._alone()
        self._plainly()
        plain = [bool((one == 1).all()) for one in gates]
        values: list[Tensor] = []
        slopes: list[Tensor] = []
        with frozen(self.model):
            spread = gates.shape[2] > 1
            opened = open_slopes(self._asked(), batch, None, fallback.at(batch), metric, spread) if any(plain) else None
            reference = self.model.target_logits(batch).detach()[0] if metric.reference and not all(plain) else None
            for number, one in enumerate(plain):
                if one and opened is not None:
                    value, slope = opened
                else:
                    leaf = gates[number : number + 1].detach().expand(-1, len(batch), -1, -1).clone().requires_grad_()
                    with torch.enable_grad():
                        logits = self.model.target_logits(batch, self._edits(leaf, fallback, batch))
                        value = metric(logits, batch, reference)[0]
                        (slope,) = torch.autograd.grad(value.sum(), leaf)
                    slope = slope[0] if spread else slope[0].squeeze(1)
                values.append(value.detach())
                slopes.append(slope)
        return torch.stack(values), torch.stack(slopes)

    def _asked(self) -> Asked:
        return Asked(self._sources, self.readers, len(self.labels), self.memory, self.added)

    def slopes(
        self, batch: Batch, first: Values | None, second: Values, metric: Metric | None = None
    ) -> tuple[Float[Tensor, " example"], Float[Tensor, "example part"]]:
        """The metric with every gate open, and for each edge s>d, sum of <first_s - second_s, d metric / d what d reads>.

        What methods along paths are made of: slopes of one run (`under`), differences of others (`record`).

        Args:
            batch: the prompts.
            first: what sources write, by place; None: in this run.
            second: the same, or a fallback's `at(batch)`.
            metric: by default the batch's.

        Cost: that of `gradient` with every gate open, less the fallback's.
        """
        batch, metric = batch.to(self.model.device), metric or metric_named(batch.metric)
        self._alone()
        self.require_positions(batch)
        with frozen(self.model):
            return open_slopes(self._asked(), batch, first, second, metric, spread=False)
