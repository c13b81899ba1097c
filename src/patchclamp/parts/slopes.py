"""The gradient engine: the metric's slope in every gate, from backward passes in which gates alone require gradients."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.edits import Add
from patchclamp.metrics import Metric
from patchclamp.models.editing import Edits
from patchclamp.models.model import Model
from patchclamp.models.replay import reference, why_plain
from patchclamp.models.standing import Start
from patchclamp.parts.fallbacks import Fallback
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

if TYPE_CHECKING:
    from patchclamp.parts.gated import Gated


def slopes(
    parts: "Gated", batch: Batch, gates: Float[Tensor, "setting #example #position part"], fallback: Fallback, metric: Metric
) -> tuple[Float[Tensor, "setting example"], Float[Tensor, "setting example *position part"]]:
    """What `Gated.gradient` gives."""
    batch = batch.to(parts.model.device)
    values: list[Tensor] = []
    found: list[Tensor] = []
    with frozen(parts.model), torch.no_grad():
        base: Edits = {} if parts.added is None else {Site("embed"): Add(parts.added)}
        plain = parts.model.target_logits(batch, base)[0] if metric.reference else None
        start = _behind(parts, batch, fallback)
        for some in gates.split(parts.fold(batch, backward=True)):
            with torch.enable_grad():
                leaf = some.detach().expand(-1, len(batch), -1, -1).clone().requires_grad_()
                edits = {**base, **parts.compiled(leaf, fallback, batch, start)}
                logits = parts.model.target_logits(batch, edits, len(some), start)
                value = metric(logits, batch, plain)
                (slope,) = torch.autograd.grad(value.sum(), leaf)
            values.append(value.detach())
            found.append(slope.squeeze(2) if slope.shape[2] == 1 else slope)
    return torch.cat(values), torch.cat(found)


def _behind(parts: "Gated", batch: Batch, fallback: Fallback) -> Start:
    """The start at the first column at which any gate can make a difference."""
    column = min(fallback.since(batch), int(batch.target_position.min()))
    if 4 * column < batch.tokens.shape[1] or parts.added is not None or why_plain(parts.model):
        return Start()
    return reference(parts.model, batch, inputs=False).rising(column, [])


@contextmanager
def frozen(model: Model) -> Generator[None]:
    """No weight requires a gradient while this is open; what did before does again after it."""
    wanted = [parameter for parameter in model.hf.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
