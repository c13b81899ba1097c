"""Edges: what one part writes, as one other part reads it, with a gate each.

A destination d (queries, keys or values of a head, an MLP, the logits) reads, with gates g_s on the edges from its sources s,

    stream + sum over s of (1 - g_s) * (fallback_s - value_s)

and everything else of the run is as the model computes it. `stream` and `value_s`, what s adds to the residual stream, are those
of this very run. So one closed edge is path patching with everything else frozen, and many closed edges are the circuit of the
others: what is behind a destination is always computed anew (Goldowsky-Dill et al. 2304.05969, Conmy et al. 2304.14997).
"""

from collections.abc import Sequence
from copy import copy
from functools import cached_property

from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.metrics import Metric
from patchclamp.models.editing import Edits
from patchclamp.models.memory import budget
from patchclamp.models.model import Model
from patchclamp.models.standing import Start
from patchclamp.parts.edge_checks import require_ends, require_fit
from patchclamp.parts.edge_ends import at_positions, comes_before, destinations_of, sources_of
from patchclamp.parts.edge_gates import Known, Readers, closed, readers_of
from patchclamp.parts.edge_gradient import gradient, multipliers, slopes
from patchclamp.parts.edge_reading import Desk, reading
from patchclamp.parts.edge_replay import Replay, replay
from patchclamp.parts.edge_sources import Sources, place_of
from patchclamp.parts.fallbacks import Fallback, Values, expand_to_rows
from patchclamp.parts.labelled import Labelled
from patchclamp.parts.rules import plain_rule
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


class Edges(Labelled[Edge]):
    """`Parts` on edges; make with `edges`. Every edge is counted, those from the embedding too: all closed is the corrupt run."""

    noun = "edges"

    def __init__(self, model: Model, labels: Sequence[Edge], memory: int | None = None):
        self.model = model
        self.memory = budget(model.device) if memory is None else memory
        self.replays = True
        """Whether settings start where they first differ from the model itself."""
        self.added: Float[Tensor, "row position width"] | None = None
        """What is added to the embeddings in every run that `record` and `slopes` make."""
        self.labels: tuple[Edge, ...] = tuple(labels)
        self.counted: tuple[int, ...] = tuple(range(len(self.labels)))
        require_ends(self.labels)

    def __repr__(self) -> str:
        return f"Edges({self.model.name!r}: {len(self.labels)} edges into {len(set(edge.target for edge in self.labels))} destinations)"

    @cached_property
    def sources(self) -> Sources:
        """What the edges lead from, as it is recorded."""
        places = {place_of(self.model.anatomy, edge.source.at(None)) for edge in self.labels}
        return Sources(self.model, tuple(sorted(places)), self.memory // 4)

    @cached_property
    def readers(self) -> tuple[Readers, ...]:
        """What the edges lead to, by the place of the stream."""
        return readers_of(self.labels, self.sources)

    def on(self, model: Model) -> "Edges":
        """The same edges of another model of the same anatomy."""
        return Edges(model, self.labels, self.memory)

    def under(self, added: Float[Tensor, "row position width"]) -> "Edges":
        """The same edges of runs in which `added` is added to the embeddings of a batch; for `record` and `slopes`."""
        other = copy(self)
        other.added = added
        return other

    def record(self, batch: Batch) -> Values:
        """What sources write when the batch runs, by place. One forward pass."""
        return self.sources.record(batch, self.added)

    def fallback(self, kind: str, fit: Examples | None = None) -> Fallback:
        """The rule called `kind`: resample, mean or optimal (learned on `fit`), zero; of what sources write.

        Raises:
            GateError: no such rule, or mean or optimal without a fit set.
        """
        return plain_rule(self, self.sources.places, kind, fit)

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
        require_fit(self, gates, batch)
        return self.compiled(gates, batch, Known(self.sources, {}, fallback.at(batch)), Start())

    def compiled(
        self, gates: Float[Tensor, "setting #example #position part"], batch: Batch, known: Known, start: Start
    ) -> Edits:
        """`edits` for runs from a start, whose settings are in its order."""
        if not gates.requires_grad and bool((gates == 1).all()):
            return {}
        rows = expand_to_rows(gates, batch) if gates.shape[1] > 1 else gates
        desk = Desk(self.model.anatomy, len(batch.tokens), self.memory // 2, columns=batch.columns)
        return reading(desk, closed(self.readers, known, rows, start, batch.columns))

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
        batch = batch.to(self.model.device)
        require_fit(self, gates, batch)
        return self.replay(batch, fallback, metric, gates).measure(gates)

    def replay(
        self,
        batch: Batch,
        fallback: Fallback,
        metric: Metric | None = None,
        first: Float[Tensor, "setting _ _ part"] | None = None,
    ) -> Replay:
        """The model's own run of a batch, kept for many calls of `measure` on it: ACDC, greedy steps.

        Args:
            batch: the prompts.
            fallback: what closed gates pass.
            metric: by default the batch's.
            first: gates that will be measured, where these are all: the run is kept where that pays for them.

        Weights must not change while it is used. Cost: one forward pass, and the fallback's.
        """
        return replay(self, batch, fallback, metric, first)

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
        return gradient(self, batch, gates, fallback, metric)

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
        return slopes(self, batch, first, second, metric)

    def multipliers(
        self, batch: Batch, apart: Float[Tensor, "row position width"], fallback: Fallback, metric: Metric
    ) -> tuple[Float[Tensor, "run example"], Float[Tensor, "example part"], Float[Tensor, " row"]]:
        """For each edge s>d, sum of <value_s - fallback_s, M_d>: M_d takes a difference in what d reads to one in the metric.

        `slopes`, with multipliers of the difference to another run of the model (`models.differences`) in place of derivatives:
        a norm's is a closed form, too (`NormSlope.between`), so all edges cost the same matrix product per layer.

        Args:
            batch: the prompts.
            apart: what the embeddings of the other run have less.
            fallback: what sources write where edges are closed.
            metric: linear in the logits.

        Returns:
            The metric in this run and in the other; each edge's score; and what the embeddings' difference makes, by row.

        Cost: one forward and one backward pass over twice the rows, and the fallback's.
        """
        return multipliers(self, batch, apart, fallback, metric)
