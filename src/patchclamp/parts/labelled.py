"""What parts with labels have in common: gates that are open, closed, and open or closed for some of them."""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.models.model import Model
from patchclamp.sites import Site


class Labelled:
    """Gates by label. Whoever inherits sets `model`, `labels` and `counted`."""

    model: Model
    labels: tuple[Site, ...]
    """Every gate's part, in forward order."""
    counted: tuple[int, ...]
    """All but the embedding."""

    @cached_property
    def index(self) -> dict[Site, int]:
        """Where each label's gate is."""
        return {site: number for number, site in enumerate(self.labels)}

    def open(self, settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates of 1."""
        return torch.ones(settings, 1, 1, len(self.labels), device=self.model.device)

    def closed(self, settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates of 0, the embedding open."""
        gates = self.open(settings)
        gates[..., list(self.counted)] = 0
        return gates

    def only(self, sites: Sequence[Site], settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates open for `sites` (and the embedding), closed for the rest: a circuit."""
        gates = self.closed(settings)
        gates[..., [self._find(site) for site in sites]] = 1
        return gates

    def without(self, sites: Sequence[Site], settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates closed for `sites`, open for the rest."""
        gates = self.open(settings)
        gates[..., [self._find(site) for site in sites]] = 0
        return gates

    def _find(self, site: Site) -> int:
        if site not in self.index:
            shown = f"{self.labels[min(1, len(self.labels) - 1)]}, ... {self.labels[-1]}"
            raise GateError(f"{site} is not among the {len(self.labels)} parts ({shown})")
        return self.index[site]

    def require_shape(self, gates: Tensor) -> None:
        """Raise `GateError` where gates are not [setting, example, position, part] of these parts."""
        if gates.dim() != 4 or gates.shape[-1] != len(self.labels):
            raise GateError(
                f"gates are [setting, example, position, part] with {len(self.labels)} parts, not {tuple(gates.shape)}"
            )
