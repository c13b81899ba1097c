"""Clamp: what holds a part of the model while it learns."""

from typing import Protocol, runtime_checkable

from patchclamp.models.editing import Edits
from patchclamp.models.model import Model
from patchclamp.training.data import Rows


@runtime_checkable
class Clamp(Protocol):
    """An intervention during training: edits inside the autograd graph, changes of gradients, changes of weights.

    A class that inherits from this one needs only the methods that it uses: the others do nothing. Its repr must tell every
    number that its effect depends on, for it enters the run's identity.
    """

    def edits(self, model: Model, step: int, rows: Rows) -> Edits:
        """What is edited in the forward pass of this step; empty: nothing is hooked."""
        return {}

    def gradients(self, model: Model, step: int) -> None:
        """Change the weights' gradients in place, behind the backward pass and before clipping and the update."""

    def updated(self, model: Model, steps: int) -> None:
        """Change the weights in place, behind `steps` updates (0: before the first) and before they are measured or kept."""
