"""Losses of one update, and a measure of the loss on rows that are set aside."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from patchclamp.errors import TrainingError
from patchclamp.scores.statistics import bootstrap
from patchclamp.training.data import Data, Rows

if TYPE_CHECKING:
    from patchclamp.models.model import Model

RESAMPLES = 1000
"""Of held-out rows, for an interval."""
Loss = Callable[[Float[Tensor, "row position token"], Rows], Float[Tensor, ""]]
"""An average over rows, weighted by the sums of their weights: so the batch's is that of its pieces."""


def next_token(logits: Float[Tensor, "row position token"], rows: Rows) -> Float[Tensor, ""]:
    """Weighted sum of -log p(token | those before it), in nats, over the sum of weights of these rows."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = cross_entropy(wide[:, :-1].transpose(1, 2), rows.tokens[:, 1:], reduction="none")
    weights = rows.weights[:, 1:].to(losses)
    return (losses * weights).sum() / weights.sum()


def held_out(
    data: Data, rows: int = 64, batch: int = 32, loss: Loss = next_token, name: str = "held-out loss", interval: bool = False
) -> Callable[["Model", int], Mapping[str, float]]:
    """A measure: the loss on rows that are never trained on (those of step -1).

    Args:
        data: the training's.
        rows: how many.
        batch: at most so many at once.
        loss: of the logits and the rows.
        name: in the metrics.
        interval: give `NAME low` and `NAME high`, too, at every step: the 95 % percentile interval of the loss over rows, drawn
            anew 1000 times by the same seed, each with the weight that it has.

    Cost: one forward pass over the rows.
    """
    from patchclamp.training.forward import logits_of

    if rows < 1 or batch < 1:
        raise TrainingError(f"{rows} rows set aside, {batch} at once, were asked: give 1 or more of each")
    kept = data.rows(-1, rows)

    def measure(model: "Model", step: int) -> Mapping[str, float]:
        total, by_row = 0.0, list[tuple[float, float]]()
        with torch.no_grad():
            for piece in kept.split(-(-len(kept.tokens) // batch)):
                if weight := piece.weight:
                    here = piece.to(model.device)
                    logits = logits_of(model, here)
                    total += weight * float(loss(logits, here))
                    by_row += _by_row(logits, here, loss) if interval else ()
        found = {name: total / kept.weight}
        if len(by_row) > 1:
            sums, weights = np.array(by_row).T
            low, high = bootstrap(sums[None], weights, RESAMPLES, 0)
            found |= {f"{name} low": float(low[0]), f"{name} high": float(high[0])}
        return found

    return measure


def _by_row(logits: Float[Tensor, "row position token"], rows: Rows, loss: Loss) -> list[tuple[float, float]]:
    """Of each row that asks for something: its loss times its weight, and its weight."""
    ones = [(logits[i : i + 1], rows.at(torch.tensor([i], device=rows.tokens.device))) for i in range(len(rows.tokens))]
    return [(one.weight * float(loss(own, one)), one.weight) for own, one in ones if one.weight]
