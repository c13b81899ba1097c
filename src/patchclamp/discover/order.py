"""Orders: parts from the output to the input, and which of them no longer reach the output."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from patchclamp.discover.pruning import owner
from patchclamp.errors import PatchclampError
from patchclamp.parts import Edges, Parts, edges
from patchclamp.scores import Part
from patchclamp.sites import Edge, Site

LATE = ("mlp", "mlp.write", "neuron", "router", "expert")
"""What acts behind a block's attention."""
ORDERS = ("backward", "ascending", "random")
"""All go from the output to the input; within a stage: last first, first first, or drawn."""


def stage(part: Part) -> tuple[int, int]:
    """Where a part acts: (block, 0 with its attention, 1 with its MLP), and the embedding before, the logits behind everything."""
    site = part.target if isinstance(part, Edge) else part
    if site.layer is None:
        return (-1, 0) if site.kind == "embed" else (1 << 30, 0)
    if site.kind == "resid.post":
        return (site.layer + 1, 0)
    return (site.layer, 1 if site.kind in LATE or site.kind == "resid.mid" else 0)


def traversal(parts: Parts, order: str, seed: int = 0) -> tuple[int, ...]:
    """The counted parts' numbers from the output to the input, destination by destination.

    Args:
        parts: nodes, neurons, edges.
        order: "backward" (within a stage the last part first, as the labels read from their end), "ascending" (the first
            first), or "random" (destinations of a stage, and the sources of each, drawn).
        seed: of the draw.

    Raises:
        PatchclampError: no such order.
    """
    if order not in ORDERS:
        raise PatchclampError(f"there is no order {order!r}: choose from {', '.join(ORDERS)}")
    stages: dict[tuple[int, int], dict[Site, list[int]]] = {}
    for number in parts.counted:
        part = parts.labels[number]
        target = part.target if isinstance(part, Edge) else part
        stages.setdefault(stage(part), {}).setdefault(target, []).append(number)
    rng, found = np.random.default_rng([seed, 11]), list[int]()
    for _, by_target in sorted(stages.items(), reverse=True):
        groups = [by_target[target] for target in sorted(by_target)]
        if order == "random":
            groups = [[group[int(i)] for i in rng.permutation(len(group))] for group in groups]
            groups = [groups[int(i)] for i in rng.permutation(len(groups))]
        elif order == "backward":
            groups = [group[::-1] for group in groups[::-1]]
        found += [number for group in groups for number in group]
    return tuple(found)


@dataclass(frozen=True)
class Reach:
    """Which edges still lead to the logits, while edges are closed from the output to the input.

    A destination whose parts have no open edge behind them changes nothing, so that closing an edge into it costs nothing.
    Known only where all edges of a model are gated: anything else may be read where no gate is.

    Args:
        leaves: by number of an edge, the numbers of the edges that leave its destination's parts; None where it ends at the logits.
    """

    leaves: tuple[tuple[int, ...] | None, ...]

    def cut_off(self, number: int, closed: Collection[int]) -> bool:
        """Whether nothing leads on from this edge, every edge behind it having been decided."""
        leaves = self.leaves[number]
        return leaves is not None and all(leave in closed for leave in leaves)


def reach_of(parts: Parts) -> Reach | None:
    """The reach of all edges of a model; None for other parts, for which nothing is known."""
    if not isinstance(parts, Edges):
        return None
    labels: Sequence[Edge] = parts.labels
    if any(edge.source.position is not None or edge.target.position is not None for edge in labels):
        return None
    if not set(edges(parts.model).labels) <= set(labels):
        return None
    out: dict[Site, list[int]] = {}
    for number, edge in enumerate(labels):
        out.setdefault(edge.source, []).append(number)
    sizes = parts.model.anatomy.sizes
    found: dict[Site, tuple[int, ...] | None] = {}
    for target in {edge.target for edge in labels}:
        if target.layer is None:
            found[target] = None
            continue
        group = sizes[target.layer].heads // sizes[target.layer].kv_heads
        found[target] = tuple(number for part in owner(target, group) for number in out.get(part, ()))
    return Reach(tuple(found[edge.target] for edge in labels))
