"""Clamp: what holds a part of the model while it learns."""

from typing import Protocol, runtime_checkable

from patchclamp.models.editing import Edits
from patchclamp.models.model import Model
from patchclamp.training.data import Rows


@runtime_checkable
class Clamp(Protocol):
    """An intervention during training. Edits act inside the autograd graph; gradients may be changed before the update."""

    def edits(self, model: Model, step: int, rows: Rows) -> Edits:
        """What is edited in the forward pass of this step; empty: nothing is hooked."""
        ...

    def gradients(self, model: Model, step: int) -> None:
        """Change the weights' gradients in place, behind the backward pass and before clipping and the update."""
        ...
