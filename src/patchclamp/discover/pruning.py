"""Circuits of edges as graphs: which edges lie on a path from input to output, and growing a circuit from the logits down."""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from patchclamp.errors import PatchclampError
from patchclamp.scores import Scores
from patchclamp.sites import Edge, Site

INPUT, OUTPUT = Site("embed"), Site("logits")


def owner(site: Site, group: int = 1) -> tuple[Site, ...]:
    """The parts that read at a site: a head for its queries, every head of the group for a key/value head, an MLP, the logits.

    Args:
        site: where an edge ends.
        group: how many heads share a key/value head.
    """
    if site.kind == "q":
        return (Site("head", site.layer, site.index),)
    if site.kind in ("k", "v"):
        assert site.index is not None
        return tuple(Site("head", site.layer, site.index * group + h) for h in range(group))
    return (site,)


def pruned(edges: Iterable[Edge], group: int = 1) -> tuple[Edge, ...]:
    """The edges that lie on a path from the embedding to the logits, in forward order.

    The others can change nothing: nothing reaches them, or nothing is read behind them. Drops edges until none is left to drop.

    Args:
        edges: a circuit's.
        group: query heads per key/value head.
    """
    kept = sorted(set(edges))
    while True:
        reached = {INPUT, *(part for edge in kept for part in owner(edge.target, group))}
        read = {OUTPUT, *(edge.source for edge in kept)}
        left = [edge for edge in kept if edge.source in reached and any(part in read for part in owner(edge.target, group))]
        if len(left) == len(kept):
            return tuple(kept)
        kept = left


def grown(scores: Scores, sizes: Sequence[int], group: int = 1) -> dict[int, tuple[Edge, ...]]:
    """Circuits grown from the logits: at each step the edge of largest |score| whose reader is in the circuit already.

    Returns:
        By size, the circuit when it had so many edges; all there are where fewer can be reached.

    Raises:
        PatchclampError: the scores are not of edges.
    """
    edges = edges_of(scores)
    size = {edge: abs(value) for edge, value in zip(edges, scores.values(), strict=True)}
    waiting: dict[Site, list[Edge]] = {}
    for edge in edges:
        for part in owner(edge.target, group):
            waiting.setdefault(part, []).append(edge)
    open_, taken, inside = list(waiting.get(OUTPUT, [])), list[Edge](), {OUTPUT}
    while open_ and len(taken) < max(sizes, default=0):
        best = max(open_, key=lambda edge: (size[edge], edge.key))
        open_.remove(best)
        taken.append(best)
        if best.source not in inside:
            inside.add(best.source)
            open_ += [edge for edge in waiting.get(best.source, []) if edge not in taken and edge not in open_]
    return {count: tuple(taken[:count]) for count in sizes}


def edges_of(scores: Scores) -> tuple[Edge, ...]:
    """The scored parts, all of them edges."""
    found = tuple(part for part in scores.sites if isinstance(part, Edge))
    if len(found) < len(scores):
        raise PatchclampError("paths are of edges, and these scores are of nodes: score edges(model)")
    return found


def rank_auroc(values: Float[np.ndarray, " part"], true: Sequence[bool]) -> float:
    """Area under the receiver's curve: how often a true part has the larger value than a false one, ties counting half.

    Raises:
        PatchclampError: all parts are true, or none is.
    """
    from scipy.stats import rankdata

    flags = np.asarray(true, dtype=bool)
    positive, negative = int(flags.sum()), int((~flags).sum())
    if not positive or not negative:
        raise PatchclampError(f"{positive} parts are true and {negative} are not: an AUROC needs some of both")
    return float((rankdata(values)[flags].sum() - positive * (positive + 1) / 2) / (positive * negative))
