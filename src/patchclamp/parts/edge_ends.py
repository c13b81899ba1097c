"""Ends of edges: what writes to the residual stream, what reads it, and which comes before which."""

from collections.abc import Sequence

from patchclamp.errors import FamilyError
from patchclamp.models.model import Model
from patchclamp.parts.edge_blocks import reads_at
from patchclamp.parts.edge_gates import KEYS
from patchclamp.parts.edge_sources import place_of
from patchclamp.sites import Edge, Site


def at_positions(edge: Edge, positions: Sequence[int | str]) -> list[Edge]:
    """An edge at every position; into keys and values, from every position as every position reads it."""
    both = edge.target.kind in KEYS
    pairs = [(here, there) for here in positions for there in (positions if both else (here,))]
    return [Edge(edge.source.at(here), edge.target.at(there)) for here, there in pairs]


def sources_of(model: Model) -> tuple[Site, ...]:
    """All that writes to the residual stream: the embedding, heads, MLPs."""
    found = [Site("embed")]
    for layer, sizes in enumerate(model.anatomy.sizes):
        found += [Site("head", layer, head) for head in range(sizes.heads)] + [Site("mlp", layer)]
    return tuple(found)


def destinations_of(model: Model) -> tuple[Site, ...]:
    """All that reads the residual stream: queries, keys and values by head, MLPs, the logits.

    Raises:
        FamilyError: two blocks are one module, so that it cannot be said which of them reads.
    """
    if len({id(layer.block) for layer in model.anatomy.layers}) < model.layers:
        raise FamilyError(f"{model.name}: blocks share one module, and edges into it would be edges into each of them")
    kinds = ("q", "k", "v")
    return (*(s for s in model.sites if (s.kind in kinds and s.index is not None) or s.kind == "mlp"), Site("logits"))


def comes_before(model: Model, source: Site, target: Site) -> bool:
    """Whether the stream that `target` reads holds what `source` writes."""
    return place_of(model.anatomy, source).key[:2] < reads_at(model.anatomy, target).key[:2]
