"""Learning in context: the loss of every token by its place, and how much less it is late than early.

Paper: Olsson et al. 2022, In-context Learning and Induction Heads, https://arxiv.org/abs/2209.11895 (P045).
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from patchclamp.errors import MeasureError
from patchclamp.models.editing import Edits
from patchclamp.models.model import Inputs, Model
from patchclamp.units.table import pieces


def losses(model: Model, inputs: Inputs, edits: Edits | None = None) -> Float[np.ndarray, "example position"]:
    """-log p of every token given those before it, in nats, by its place in its row; NaN at the first, and past the end.

    With edits, those of the edited model.

    Cost: one forward pass.
    """
    n = model.batch(inputs).tokens.shape[1]
    found: list[Tensor] = []
    for batch in pieces(model, inputs, n * int(model.anatomy.config.vocab_size)):
        logits = model.run(batch, edits)[:, :-1].float()
        each = cross_entropy(logits.transpose(1, 2), batch.tokens[:, 1:], reduction="none").double()
        each = torch.nn.functional.pad(each, (1, 0), value=torch.nan)
        known = batch.mask & (batch.mask.long().cumsum(-1) > 1)
        for row, keep in zip(each, known, strict=True):
            own = torch.full((n,), torch.nan, dtype=torch.double)
            own[1 : 1 + int(keep.sum())] = row[keep].cpu()
            found.append(own)
    return torch.stack(found).numpy()


def in_context(
    model: Model, inputs: Inputs, early: int | tuple[int, int] = 50, late: int | tuple[int, int] = 500
) -> Float[np.ndarray, " example"]:
    """In-context-learning score: loss late in the context minus loss early, in nats; below 0: the model uses its context.

    Args:
        model: any.
        inputs: texts or rows.
        early: the token predicted early (the paper's 50th), counted from 0 at the row's first; or a half-open range of them.
        late: the same, late (the paper's 500th).

    Returns:
        One number per row.

    Cost: one forward pass.

    Raises:
        MeasureError: rows are too short, or the first token is asked for, which nothing predicts.
    """
    each = losses(model, inputs)
    bounds = [(at, at + 1) if isinstance(at, int) else at for at in (early, late)]
    means: list[np.ndarray] = []
    for start, stop in bounds:
        asked = each[:, max(start, 0) : stop]
        if not 1 <= start < stop or asked.shape[1] < stop - start or np.isnan(asked).any():
            shortest = int((~np.isnan(each)).sum(1).min()) + 1
            raise MeasureError(
                f"the loss of tokens {start} to {stop - 1} was asked for, and the shortest row has {shortest} tokens, of which the "
                "first is not predicted: give longer rows, or other places (early=, late=)"
            )
        means.append(asked.mean(1))
    return means[1] - means[0]
