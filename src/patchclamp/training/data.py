"""Data: rows of tokens as a function of the step, so that order survives a restart by itself."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.errors import TrainingError


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one update, and how much the prediction of each token counts.

    Args:
        tokens: ids; rows that are shorter are padded on the right, where causal attention never looks back from.
        weights: by predicted token: weights[i, j] is what the loss of predicting tokens[i, j] from those before it counts.
            The first column is never predicted. Padding has weight 0.
        mask: real tokens; None: all of them.
        labels: numbers of each row that measures and clamps may want (its class, its rule); never seen by the model.
    """

    tokens: Int[Tensor, "row position"]
    weights: Float[Tensor, "row position"]
    mask: Bool[Tensor, "row position"] | None = None
    labels: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.tokens.shape[1] < 2 or not bool((self.weights[:, 1:] != 0).any()):
            raise TrainingError(
                f"rows of shape {tuple(self.tokens.shape)} ask for no prediction: give at least two tokens a row and a weight "
                "above 0 behind the first"
            )

    @property
    def real(self) -> Bool[Tensor, "row position"]:
        """Real tokens."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask

    def split(self, parts: int) -> "list[Rows]":
        """The same rows in so many pieces of nearly one size."""
        return [self.at(piece) for piece in torch.arange(len(self.tokens)).tensor_split(parts) if len(piece)]

    def at(self, rows: Int[Tensor, " chosen"]) -> "Rows":
        """Some of the rows."""
        labels = None if self.labels is None else {name: value[rows] for name, value in self.labels.items()}
        return Rows(self.tokens[rows], self.weights[rows], None if self.mask is None else self.mask[rows], labels)


@runtime_checkable
class Data(Protocol):
    """What is trained on: a pure function of the step. The same step gives the same rows, in any process."""

    name: str

    def rows(self, step: int, count: int) -> Rows:
        """The rows of one update.

        Args:
            step: 0 is the first update; negative steps are set aside for evaluation and are never trained on.
            count: how many rows.
        """
        ...
