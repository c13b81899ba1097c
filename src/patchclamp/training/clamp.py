"""Clamp: what holds a part of the model while it learns."""

from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from typing import Protocol, runtime_checkable

from patchclamp.models.editing import Edit, Edits
from patchclamp.models.model import Model
from patchclamp.sites import Site
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


@contextmanager
def joined(model: Model, edits: Iterable[Edits], rows: Rows) -> Generator[None]:
    """While open, the model computes with the edits of several clamps, each on what those before it made of a value.

    They share one session of hooks wherever that keeps their order: the cost of hooks is that of one clamp.
    """
    with ExitStack() as stack:
        for together in _sessions(edits):
            stack.enter_context(model.editing(together, rows.batch))
        yield


def _sessions(edits: Iterable[Edits]) -> list[dict[Site, list[Edit]]]:
    """Edits in as few mappings as keep, at every place, the order in which they were given."""
    found: list[dict[Site, list[Edit]]] = []
    for one in edits:
        for site, given in one.items():
            last = found[-1] if found else {}
            beside = any(other.place == site.place for other in last if other != site)
            if not found or (site in last and beside):
                found.append({})
            found[-1].setdefault(site, []).extend([given] if isinstance(given, Edit) else given)
    return found
