"""Redrawing closed gates: what a controller says must hold whatever stands between its gates and open ones."""

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.gating.dynamic.objective import TARGETS, DynamicSettings
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks._batch import Batch


def redrawn(shape: tuple[int, ...], count: int, draws: torch.Generator) -> list[Float[Tensor, "1 #example 1 every"]]:
    """How far closed gates are moved towards open, r of g + (1 - g) r: 0 (as they are), `count` - 1 random draws, and 1 (open).

    A random draw moves a share of the parts, itself drawn from [0, 1], each by an amount from [0, 1], half of them all the way: by
    turns the same parts in all examples of the batch, where an adversary has most to choose from, and every example its own
    parts. At r = 1 the model is itself: a claim that gates must be shut for something to come out never survives it, and one
    that gates must be open always does.

    Args:
        shape: [example, every].
        count: draws beside the first; with 0 closed gates stay closed.
        draws: where from.
    """
    examples, every = shape
    found = [torch.zeros(1, 1, 1, every)]
    for number in range(count - 1):
        alike = 1 if number % 2 == 0 else examples
        share = torch.rand(1, alike, 1, 1, generator=draws)
        moved = torch.rand(1, alike, 1, every, generator=draws) < share
        amount = 2 * torch.rand(1, alike, 1, every, generator=draws)
        found.append(moved * amount.clamp(max=1))
    return found + [torch.ones(1, 1, 1, every)] * (count > 0)


def worst_redraw(
    parts: Parts,
    batch: Batch,
    gates: Float[Tensor, "fit example #position every"],
    fallback: Fallback,
    settings: DynamicSettings,
    draws: torch.Generator,
) -> tuple[Float[Tensor, "fit example"], Float[Tensor, "fit example #position every"], Float[Tensor, "fit #example 1 every"]]:
    """For each fit, D and its slopes under that redraw whose mean over the batch is worst; and what the slopes shrink by, 1 - r.

    Cost: per fit one forward and one backward pass, and one forward pass per candidate where there are several.
    """
    metric = TARGETS[settings.target]
    candidates = [one.to(gates.device) for one in redrawn((gates.shape[1], gates.shape[3]), settings.redraws, draws)]
    chosen = candidates[0].expand(len(gates), gates.shape[1], 1, -1)
    if len(candidates) > 1:
        each = torch.cat([gates + (1 - gates) * one for one in candidates])
        values = parts.measure(batch, each, fallback, metric).mean(1).unflatten(0, (len(candidates), -1))
        every = torch.stack([one.expand(1, gates.shape[1], 1, -1)[0] for one in candidates])
        chosen = every[values.argmax(0)]
    value, slope = parts.gradient(batch, gates + (1 - gates) * chosen, fallback, metric)
    return value, slope if slope.dim() == 4 else slope[:, :, None], 1 - chosen
