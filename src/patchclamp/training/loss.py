"""Losses of one update."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from patchclamp.training.data import Rows

Loss = Callable[[Float[Tensor, "row position token"], Rows], Float[Tensor, ""]]


def next_token(logits: Float[Tensor, "row position token"], rows: Rows) -> Float[Tensor, ""]:
    """Weighted sum of -log p(token | those before it), in nats, over the sum of weights of these rows."""
    losses = cross_entropy(logits[:, :-1].float().transpose(1, 2), rows.tokens[:, 1:], reduction="none")
    weights = rows.weights[:, 1:].to(losses)
    return (losses * weights).sum() / weights.sum()
