"""What parts with labels have in common: gates that are open, closed, and open or closed for some of them."""

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.models.model import Model
from patchclamp.sites import Edge, Site
from patchclamp.tasks._batch import Batch

Label = TypeVar("Label", Site, Edge)


class Labelled(Generic[Label]):
    """Gates by label. Whoever inherits sets `model`, `labels` and `counted`."""

    noun: ClassVar[str] = "parts"
    """What errors call them."""
    model: Model
    labels: tuple[Label, ...]
    """Every gate's part, in forward order."""
    counted: tuple[int, ...]
    """All but the embedding's own gate."""

    @cached_property
    def index(self) -> dict[Label, int]:
        """Where each label's gate is."""
        return {label: number for number, label in enumerate(self.labels)}

    def open(self, settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates of 1: the model itself."""
        return torch.ones(settings, 1, 1, len(self.labels), device=self.model.device)

    def closed(self, settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates of 0, the embedding's own open."""
        gates = self.open(settings)
        gates[..., list(self.counted)] = 0
        return gates

    def only(self, sites: Sequence[Label], settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates open for `sites` (and the embedding), closed for the rest: a circuit."""
        gates = self.closed(settings)
        gates[..., [self._find(label) for label in sites]] = 1
        return gates

    def without(self, sites: Sequence[Label], settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates closed for `sites`, open for the rest."""
        gates = self.open(settings)
        gates[..., [self._find(label) for label in sites]] = 0
        return gates

    def _find(self, label: Label) -> int:
        if label not in self.index:
            shown = f"{self.labels[min(1, len(self.labels) - 1)]}, ... {self.labels[-1]}"
            raise GateError(f"{label} is not among the {len(self.labels)} {self.noun} ({shown})")
        return self.index[label]

    def require_shape(self, gates: Tensor, batch: Batch | None = None) -> None:
        """Raise `GateError` where gates are not [setting, example, position, part] of these parts, and of a batch's prompts."""
        if gates.dim() != 4 or gates.shape[-1] != len(self.labels):
            raise GateError(
                f"gates are [setting, example, position, part] with {len(self.labels)} {self.noun}, not {tuple(gates.shape)}"
            )
        if batch is None:
            return
        for axis, have, name in ((1, len(batch), "examples"), (2, batch.tokens.shape[1], "columns")):
            if gates.shape[axis] not in (1, have):
                raise GateError(f"gates for {gates.shape[axis]} {name} were given, and the batch has {have}")
