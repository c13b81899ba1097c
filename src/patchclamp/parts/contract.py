"""The contract: what every kind of parts offers, and all that methods know of them."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.metrics import Metric
from patchclamp.models.editing import Edits
from patchclamp.models.model import Model
from patchclamp.parts.fallbacks import Fallback
from patchclamp.scores import Part
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

Gates = Float[Tensor, "setting #example #position part"]
"""One gate per setting, example (or 1 for all), position (or 1 for all) and part."""


@runtime_checkable
class Parts(Protocol):
    """The contract. `labels` are unique, in forward order, and parse back as sites (or, of edges, as edges)."""

    model: Model

    @property
    def labels(self) -> tuple[Part, ...]:
        """Every gate's part; `embed` first, where it is one."""
        ...

    @property
    def counted(self) -> tuple[int, ...]:
        """Indices of the parts that methods score and circuits hold (all but `embed`)."""
        ...

    def on(self, model: Model) -> "Parts":
        """The same parts of another model of the same anatomy."""
        ...

    def open(self, settings: int = 1) -> Gates:
        """Gates of 1: the model itself."""
        ...

    def closed(self, settings: int = 1) -> Gates:
        """Gates of 0 for every counted part."""
        ...

    def only(self, sites: Sequence[Any], settings: int = 1) -> Gates:
        """Gates open for `sites` (and the embedding), closed for the rest: a circuit."""
        ...

    def without(self, sites: Sequence[Any], settings: int = 1) -> Gates:
        """Gates closed for `sites`, open for the rest."""
        ...

    def fallback(self, kind: str, fit: Examples | None = None) -> Fallback:
        """The rule that says what a closed gate passes."""
        ...

    def measure(
        self, batch: Batch, gates: Gates, fallback: Fallback, metric: Metric | None = None
    ) -> Float[Tensor, "setting example"]:
        """The metric for each setting and example, without gradient."""
        ...

    def gradient(
        self, batch: Batch, gates: Gates, fallback: Fallback, metric: Metric | None = None
    ) -> tuple[Float[Tensor, "setting example"], Float[Tensor, "setting example part"]]:
        """The metric and its slope in each gate, per example."""
        ...

    def edits(self, gates: Gates, fallback: Fallback, batch: Batch | None = None) -> Edits:
        """The gates as edits: what run, generate and training use."""
        ...


def sites_of(parts: Parts) -> list[Site]:
    """The counted parts, in order, for what is known of parts at sites alone; raises `GateError` where they are edges."""
    found = [parts.labels[number] for number in parts.counted]
    sites = [part for part in found if isinstance(part, Site)]
    if len(sites) < len(found):
        edge = next(part for part in found if not isinstance(part, Site))
        raise GateError(f"this takes parts that stand at sites (nodes, gated), and {edge} is an edge: attribute scores edges")
    return sites
