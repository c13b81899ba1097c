"""Exact effects of edges on one run of the model itself: many settings, many calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.metrics import Metric, metric_named
from patchclamp.models.editing import Edits
from patchclamp.models.standing import Start
from patchclamp.parts.edge_checks import require_alone, require_fit, require_plain
from patchclamp.parts.edge_gates import Known, patterns_of
from patchclamp.parts.edge_runs import Ground, at_once, first_block, ground_of, measured, replays_pay
from patchclamp.parts.fallbacks import Fallback
from patchclamp.tasks._batch import Batch

if TYPE_CHECKING:
    from patchclamp.parts.edges import Edges


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
        require_fit(parts, gates, ground.batch)
        with torch.no_grad():
            patterns = patterns_of(parts.readers, gates, parts.model.layers)

            def edits_of(some: Sequence[int], start: Start) -> Edits:
                return parts.compiled(gates[list(some)], ground.batch, self.known, start)

            return measured(ground, patterns, edits_of, at_once(parts.model, ground.batch, parts.memory // 2))


def replay(
    parts: "Edges",
    batch: Batch,
    fallback: Fallback,
    metric: Metric | None = None,
    first: Float[Tensor, "setting _ _ part"] | None = None,
) -> Replay:
    """See `Edges.replay`."""
    model = parts.model
    batch, metric = batch.to(model.device), metric or metric_named(batch.metric)
    require_alone()
    require_plain(parts.added)
    patterns = None if first is None else patterns_of(parts.readers, first, model.layers)
    pays = parts.replays and (patterns is None or replays_pay(patterns))
    own = patterns is None or any(first_block(pattern) is None for pattern in patterns)
    ground = ground_of(model, batch, metric, parts.sources.sites, parts.memory, pays, own)
    return Replay(parts, ground, Known(parts.sources, ground.kept, fallback.at(batch)))
