"""Slopes of a metric in the gates of edges, at any setting of the gates."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.metrics import Metric, metric_named
from patchclamp.parts.edge_checks import require_alone, require_fit, require_plain, require_positions
from patchclamp.parts.edge_differences import difference_slopes
from patchclamp.parts.edge_slopes import open_slopes
from patchclamp.parts.edge_watch import Asked
from patchclamp.parts.fallbacks import Fallback, Values
from patchclamp.parts.slopes import frozen
from patchclamp.tasks._batch import Batch

if TYPE_CHECKING:
    from patchclamp.parts.edges import Edges


def gradient(
    parts: "Edges",
    batch: Batch,
    gates: Float[Tensor, "setting #example #position part"],
    fallback: Fallback,
    metric: Metric | None = None,
) -> tuple[Float[Tensor, "setting example"], Float[Tensor, "setting example *position part"]]:
    """See `Edges.gradient`: settings that are the model itself in closed form, all at once; others one after the other."""
    batch, metric = batch.to(parts.model.device), metric or metric_named(batch.metric)
    require_fit(parts, gates, batch)
    require_alone()
    require_plain(parts.added)
    plain = [bool((one == 1).all()) for one in gates]
    values: list[Tensor] = []
    found: list[Tensor] = []
    with frozen(parts.model):
        spread = gates.shape[2] > 1
        opened = open_slopes(_asked(parts), batch, None, fallback.at(batch), metric, spread) if any(plain) else None
        reference = parts.model.target_logits(batch).detach()[0] if metric.reference and not all(plain) else None
        for number, one in enumerate(plain):
            if one and opened is not None:
                value, slope = opened
            else:
                value, slope = _autograd(parts, batch, gates[number : number + 1], fallback, metric, reference)
            values.append(value.detach())
            found.append(slope)
    return torch.stack(values), torch.stack(found)


def _autograd(
    parts: "Edges",
    batch: Batch,
    gates: Float[Tensor, "1 #example #position part"],
    fallback: Fallback,
    metric: Metric,
    reference: Tensor | None,
) -> tuple[Float[Tensor, " example"], Float[Tensor, "example *position part"]]:
    """One setting: one forward and one backward pass, in which every destination reads a stream of its own."""
    leaf = gates.detach().expand(-1, len(batch), -1, -1).clone().requires_grad_()
    with torch.enable_grad():
        logits = parts.model.target_logits(batch, parts.edits(leaf, fallback, batch))
        value = metric(logits, batch, reference)[0]
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value, slope[0] if gates.shape[2] > 1 else slope[0].squeeze(1)


def slopes(
    parts: "Edges", batch: Batch, first: Values | None, second: Values, metric: Metric | None = None
) -> tuple[Float[Tensor, " example"], Float[Tensor, "example part"]]:
    """See `Edges.slopes`."""
    batch, metric = batch.to(parts.model.device), metric or metric_named(batch.metric)
    require_alone()
    require_positions(parts.labels, batch)
    with frozen(parts.model):
        return open_slopes(_asked(parts), batch, first, second, metric, spread=False)


def multipliers(
    parts: "Edges", batch: Batch, apart: Float[Tensor, "row position width"], fallback: Fallback, metric: Metric
) -> tuple[Float[Tensor, "run example"], Float[Tensor, "example part"], Float[Tensor, " row"]]:
    """See `Edges.multipliers`."""
    batch = batch.to(parts.model.device)
    require_alone()
    require_positions(parts.labels, batch)
    with frozen(parts.model):
        return difference_slopes(_asked(parts), batch, apart, fallback.at(batch), metric)


def _asked(parts: "Edges") -> Asked:
    return Asked(parts.sources, parts.readers, len(parts.labels), parts.memory, parts.added)
