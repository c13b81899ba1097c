"""What must hold of edges, gates on them and prompts before anything runs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.models.scope import OPEN
from patchclamp.parts.edge_gates import KEYS
from patchclamp.sites import Edge
from patchclamp.tasks._batch import Batch

if TYPE_CHECKING:
    from patchclamp.parts.edges import Edges


def require_ends(labels: Sequence[Edge]) -> None:
    """Raise `GateError` for an edge between two positions into what reads a position of its own alone."""
    for edge in labels:
        here, there = edge.source.position, edge.target.position
        if edge.target.kind not in KEYS and here != there and None not in (here, there):
            raise GateError(f"{edge}: only keys and values are read at other positions than they are written at")


def require_fit(parts: "Edges", gates: Tensor, batch: Batch) -> None:
    """Raise `GateError` where gates do not fit the edges, or the batch."""
    parts.require_shape(gates, batch)
    require_positions(parts.labels, batch)


def require_positions(labels: Sequence[Edge], batch: Batch) -> None:
    """Raise where positions are not those of the batch: `TaskError` for a span that it does not name.

    Raises:
        GateError: positions by number, and prompts of unequal lengths, in which a number is another word in each.
    """
    asked = {site.position for edge in labels for site in (edge.source, edge.target)} - {None}
    lengths = batch.mask.sum(1)
    if any(isinstance(one, int) for one in asked) and int(lengths.min()) != int(lengths.max()):
        raise GateError(
            f"positions by number are other words in prompts of {int(lengths.min())} to {int(lengths.max())} tokens: name "
            'spans of the task (positions=["subject", "end"])'
        )
    for one in asked:
        if one is not None:
            batch.columns(one)


def require_plain(added: Tensor | None) -> None:
    """Raise `GateError` where something is added to the embeddings."""
    if added is not None:
        raise GateError("something is added to the embeddings here: gates are measured on parts without it")


def require_alone() -> None:
    """Raise `GateError` where other edits are on."""
    if OPEN.get():
        raise GateError("other edits are on, and what destinations read would not follow them: measure edges outside of them")
