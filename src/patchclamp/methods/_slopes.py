"""What gradient methods stand on: slopes in gates at the model itself, in runs of other embeddings, with other backward passes.

A gate's slope is <value - fallback, d metric / d value>. With a fallback that lies elsewhere, the slope of the same gate is the
gradient along any direction that one likes, for parts of every kind: nodes, neurons, edges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.edits import Add
from patchclamp.errors import GateError, MetricError
from patchclamp.methods._notes import note
from patchclamp.metrics import Metric
from patchclamp.models.backward import Rules, ruled
from patchclamp.models.editing import Edits, Seen
from patchclamp.parts import Fallback, Parts
from patchclamp.parts.fallbacks import Values
from patchclamp.parts.slopes import frozen
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

PLAIN = Rules()


@dataclass(frozen=True, eq=False)
class Given:
    """A fallback whose values are given, for one batch."""

    values: Values
    kind: str = "given"
    off_distribution: bool = True

    def at(self, batch: Batch | None) -> Values:
        """The values, whatever the batch."""
        return self.values

    def since(self, batch: Batch) -> int:
        """0: they may differ from the first column on."""
        return 0


def first_order(metric: Metric, method: str) -> None:
    """Refuse a metric that has no slope at the model's own run, where `method` takes it.

    Raises:
        MetricError: it has its extremum there by definition (KL, any distance to the open run), or it counts.
    """
    if metric.reference:
        raise MetricError(
            f"the gradient of {metric.name} is identically zero at the open run, where it has its minimum, so {method} would call "
            "every part irrelevant: use logit_diff, or a method that goes some way (integrated, inputs, segments), or exact"
        )
    if metric.name == "top1":
        raise MetricError(f"{metric.name} counts, so it has no gradient, and {method} needs one: use logit_diff, or exact")


def slopes(
    parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, rules: Rules = PLAIN, under: Edits | None = None
) -> tuple[Float[Tensor, " example"], Float[Tensor, "example gate"]]:
    """The metric with every gate open, and its slope in every gate. See `slopes_at`."""
    value, slope, _ = slopes_at(parts, batch, fallback, metric, rules, under)
    return value, slope


def slopes_at(
    parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, rules: Rules = PLAIN, under: Edits | None = None,
    sites: Sequence[Site] = (),
) -> tuple[Float[Tensor, " example"], Float[Tensor, "example gate"], dict[Site, Tensor]]:  # fmt: skip
    """The metric with every gate open, its slope in every gate, and in what stands at whole-layer sites.

    Args:
        parts: whose gates.
        batch: on which prompts.
        fallback: what closed gates would pass.
        metric: of what.
        rules: of the backward pass.
        under: edits that come before those of gates: other embeddings.
        sites: where slopes in values are wanted too.

    Cost: one forward and one backward pass.

    Raises:
        MetricError: the metric does not depend on the logits at this run: every slope would be zero.
        FamilyError: a rule that was not put in somewhere.
    """
    batch, model = batch.to(parts.model.device), parts.model
    wide = torch.promote_types(model.dtype, torch.float32)
    leaf = parts.open().to(wide).expand(-1, len(batch), -1, -1).clone().requires_grad_()
    root = torch.zeros(model.width, dtype=model.dtype, device=model.device, requires_grad=True)  # so that there is always a way
    with torch.no_grad():
        plain = model.target_logits(batch)[0] if metric.reference else None
    keeps = {site: Keep() for site in sites}
    with frozen(model), torch.enable_grad(), ruled(model.anatomy, rules) as force:
        mine = joined(joined(under or {}, {Site("embed"): Add(root)}), parts.edits(leaf, fallback, batch))
        logits = model.target_logits(batch, joined(force.around(mine), keeps))
        value = metric(logits, batch, plain)[0]
        if not value.requires_grad:
            raise MetricError(f"{metric.name} has no gradient: use logit_diff, or exact")
        kept = [keeps[site].value for site in sites]
        wanted = [logits, leaf, *kept]
        asked, slope, *found = torch.autograd.grad(value.sum(), wanted, allow_unused=True, materialize_grads=True)
    _check_asked(metric, asked)  # behind a dropped layer nothing flows back: slopes there are zero
    if put_in := force.fired():
        note("rules", put_in)
    return value.detach(), slope[0, :, 0], dict(zip(sites, found, strict=True))


@dataclass(eq=False)
class Keep:
    """An edit that changes nothing and keeps what it sees."""

    value: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        self.value = value
        return value


def _check_asked(metric: Metric, slope: Tensor) -> None:
    """Refuse a metric that asks nothing of the logits: of a distance to the very same logits rounding alone is left."""
    if float(slope.abs().max()) <= 8 * torch.finfo(slope.dtype).eps:
        raise MetricError(
            f"the gradient of {metric.name} is zero at this run on every prompt (it has its extremum there, or is saturated): use "
            "logit_diff, or exact"
        )


def joined(first: Edits, then: Edits) -> Edits:
    """Edits, and behind them others."""
    found: dict[Site, list[Any]] = {}
    for some in (first, then):
        for site, given in some.items():
            found.setdefault(site, []).extend(given if isinstance(given, list | tuple) else [given])
    return dict(found)


def counted_rows(parts: Parts, metric: Metric, slopes: Float[Tensor, "example gate"]) -> Float[Tensor, "part example"]:
    """Slopes of a metric as scores: of its benefit, the counted parts alone."""
    return metric.sign * slopes[:, list(parts.counted)].T


def recorded(parts: Parts, batch: Batch, under: Edits | None = None) -> Values:
    """What stands at the parts' places when the batch runs under some edits. One forward pass."""
    record = getattr(parts, "record", None) or getattr(getattr(parts, "inner", None), "record", None)
    if record is None:
        raise GateError(
            f"this method needs to know what {type(parts).__name__} hold, and they have no `record`: use gradient, exact"
        )
    with parts.model.editing(under or {}, batch):
        return record(batch)


@dataclass(frozen=True, eq=False)
class InputPath:
    """The straight line between the embeddings of the corrupt prompts and those of the clean ones.

    Args:
        whole: clean - corrupt, what the first block reads: [row, position, width].
    """

    whole: Float[Tensor, "row position width"]

    def at(self, share: float) -> Edits:
        """The edit that puts the clean run at `share` of the way: 0 the corrupt prompts', 1 the clean ones'."""
        return {Site("embed"): Add(self.whole, share - 1.0)}


def input_path(parts: Parts, batch: Batch) -> InputPath:
    """The path of a batch. Two forward passes.

    Raises:
        GateError: no corrupt prompts.
    """
    if batch.corrupt is None:
        raise GateError("the input path begins at the corrupt prompts, and this task gives none: use integrated, or segments")
    embed = Site("embed")
    clean, corrupt = (parts.model.record(one, embed)[embed] for one in (batch, batch.swapped()))
    return InputPath(clean - corrupt)


def along(
    parts: Parts, batch: Batch, direction: Mapping[Site, Tensor], metric: Metric, rules: Rules = PLAIN, under: Edits | None = None
) -> Float[Tensor, "example gate"]:
    """<direction, d metric / d value> of every part, in a run under some edits.

    Cost: two forward passes and a backward pass.
    """
    here = recorded(parts, batch, under)
    elsewhere = {place: value - direction[place].to(value) for place, value in here.items()}
    return slopes(parts, batch, Given(elsewhere), metric, rules, under)[1]
