"""Data: rows of tokens as a function of the step, so that order survives a restart by itself."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.tasks._batch import Batch


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one update, and how much the prediction of each token counts.

    Args:
        tokens: ids; rows that are shorter are padded, on the right or on the left.
        weights: by predicted token: weights[i, j] is what the loss of predicting tokens[i, j] from those before it counts.
            The first column is never predicted. Padding has weight 0.
        mask: real tokens; None: all of them.
        labels: numbers of each row that measures and clamps may want (its class, its rule); never seen by the model.

    Raises:
        TrainingError: shapes that do not fit each other, or padding that would be predicted.
    """

    tokens: Int[Tensor, "row position"]
    weights: Float[Tensor, "row position"]
    mask: Bool[Tensor, "row position"] | None = None
    labels: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.tokens.shape[1] < 2:
            raise TrainingError(f"rows of shape {tuple(self.tokens.shape)} ask for no prediction: give at least two tokens a row")
        if self.weights.shape != self.tokens.shape or (self.mask is not None and self.mask.shape != self.tokens.shape):
            raise TrainingError(f"tokens are {tuple(self.tokens.shape)}: weights and mask must be of the same shape")
        if self.mask is not None and not bool(self.mask.any(1).all()):
            raise TrainingError("a row has no real token: leave it out")
        if self.mask is not None and bool(self.weights[~self.mask].any()):
            raise TrainingError(
                "padding has a weight other than 0, but there is nothing to predict: multiply weights by the mask"
            )

    @property
    def real(self) -> Bool[Tensor, "row position"]:
        """Real tokens."""
        return torch.ones_like(self.tokens, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def weight(self) -> float:
        """Sum of weights of what is predicted."""
        return float(self.weights[:, 1:].sum(dtype=torch.float64))

    @property
    def batch(self) -> Batch:
        """The rows as what models' edits look at: positions counted from each row's first real token, `end` its last one."""
        mask, none = self.real, torch.zeros(0, dtype=torch.long, device=self.tokens.device)
        count = self.tokens.shape[1]
        last = count - 1 - mask.flip(1).long().argmax(1)
        return Batch(
            tokens=self.tokens, mask=mask, corrupt=None, target_row=none, target_position=none, answers=none[:, None], wrong=None,
            example=torch.arange(len(mask)), sign=torch.ones(len(mask)), spans={"end": torch.stack([last, last + 1], 1)}, examples=(),
        )  # fmt: skip

    def split(self, parts: int) -> "list[Rows]":
        """The same rows in so many pieces of nearly one size (fewer, where there are fewer rows)."""
        return [self.at(piece) for piece in torch.arange(len(self.tokens)).tensor_split(parts) if len(piece)]

    def at(self, rows: Int[Tensor, " chosen"]) -> "Rows":
        """Some of the rows."""
        labels = None if self.labels is None else {name: value[rows] for name, value in self.labels.items()}
        return Rows(self.tokens[rows], self.weights[rows], None if self.mask is None else self.mask[rows], labels)

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows on another device (themselves, where they are there already)."""
        if self.tokens.device == torch.device(device):
            return self
        labels = None if self.labels is None else {name: value.to(device) for name, value in self.labels.items()}
        mask = None if self.mask is None else self.mask.to(device)
        return Rows(self.tokens.to(device), self.weights.to(device), mask, labels)


@runtime_checkable
class Data(Protocol):
    """What is trained on: a pure function of the step. The same step gives the same rows, in any process."""

    @property
    def name(self) -> str:
        """Says everything that the rows depend on: settings, seed, a digest of tensors or texts. It is part of a run's identity."""
        ...

    def rows(self, step: int, count: int) -> Rows:
        """The rows of one update.

        Args:
            step: 0 is the first update; negative steps are set aside for evaluation and are never trained on.
            count: how many rows.
        """
        ...


def tensors_digest(tensors: Mapping[str, Tensor | None]) -> str:
    """SHA-256 (hex) of named tensors with their dtypes and shapes; for the name of data, and of the weights that a run begins with."""
    state = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        if value is not None:
            state.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            body: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            state.update(body)
    return state.hexdigest()
