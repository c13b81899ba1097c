"""Differences passed back to the gates of edges: what closing an edge makes of the metric by multipliers in place of slopes.

score(s>d) = sum over rows and positions of <value_s - fallback_s, M_d>, M_d what takes a difference in what d reads to one in the
metric: `models.differences` from the metric to what d makes of what it reads, and from there through d's linear map and norm in closed
form. Two runs stand side by side in the rows of one pass.
"""

from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.edits import Add
from patchclamp.metrics import Metric
from patchclamp.models.differences import differences
from patchclamp.models.scope import still
from patchclamp.parts.edge_blocks import detached
from patchclamp.parts.edge_maps import Maps, maps_of
from patchclamp.parts.edge_products import OwnRun
from patchclamp.parts.edge_slopes import at_once, slopes_of
from patchclamp.parts.edge_watch import Asked, Watch
from patchclamp.parts.fallbacks import Values
from patchclamp.parts.pieces import only
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch


def difference_slopes(
    asked: Asked, batch: Batch, apart: Float[Tensor, "row position width"], fallback: Values, metric: Metric
) -> tuple[Float[Tensor, "run example"], Float[Tensor, "example part"], Float[Tensor, " row"]]:
    """See `Edges.multipliers`. Some prompts after others, so that what the backward pass needs stays within memory."""
    model, values, slopes, rises = asked.sources.model, list[Tensor](), list[Tensor](), torch.zeros_like(apart[:, 0, 0])
    maps = maps_of(model)
    for examples in torch.arange(len(batch)).split(max(1, at_once(model, batch, asked.memory) // 2)):
        rows = torch.isin(batch.example.cpu(), examples).nonzero().flatten().to(batch.tokens.device)
        some = only(batch, examples.tolist(), rows)
        other = {site: value[rows] if value.dim() > 1 and len(value) > 1 else value for site, value in fallback.items()}
        run, found, into = _two_runs(asked, maps, some, apart[rows], metric)
        values.append(found)
        slopes.append(slopes_of(asked, maps, run, None, other, some, spread=False))
        rises[rows] = (into * apart[rows]).sum((1, 2)).to(rises)
    return torch.cat(values, -1), torch.cat(slopes), rises


def _two_runs(
    asked: Asked, maps: Maps, batch: Batch, apart: Tensor, metric: Metric
) -> tuple[OwnRun, Float[Tensor, "run example"], Float[Tensor, "row position width"]]:
    """One forward and one backward pass: the run with multipliers, the metric in both runs, the multiplier at the embeddings."""
    model, watch = asked.sources.model, Watch(asked, maps)
    reference = torch.cat([torch.zeros_like(apart), -apart])
    root = torch.zeros_like(reference).requires_grad_()
    with ExitStack() as stack:
        for one in (torch.enable_grad(), still(model.hf), model.editing({Site("embed"): [Add(reference), Add(root)]}, batch)):
            stack.enter_context(one)
        stack.enter_context(watch.open())  # within the edits, so that it sees what they make
        stack.enter_context(differences(model.anatomy))
        logits = model.target_logits(batch, settings=2)
    with torch.enable_grad():  # nothing flows back while the mode is open: its own steps would be seen by it
        values = metric(logits, batch)
    *found, into = torch.autograd.grad(values[0].sum(), [*watch.asked, root])
    halves = {place: value.detach().chunk(2) for place, value in watch.kept.items()}
    slopes, entered = found[: len(watch.order)], found[len(watch.order) :]
    run = OwnRun(
        values[0].detach(),
        {place: own for place, (own, _) in halves.items()},
        {number: detached(call) for number, call in watch.calls.items()},
        {place: slope.chunk(2)[0] for place, slope in zip(watch.order, slopes, strict=True)},
        {name: slope.chunk(2)[0] for name, slope in zip(watch.nodes, entered, strict=True)},
        {place: other for place, (_, other) in halves.items()},
    )
    return run, values.detach(), into.chunk(2)[0]
