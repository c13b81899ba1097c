"""Null graphs: random but for what they keep, so that what is beyond chance can be said."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float

from patchclamp.dependence.network.graph import Connectome
from patchclamp.errors import PatchclampError

SWAPS = 10
"""Swaps tried per edge."""


def rewired(graph: Connectome, seed: int, swaps: int = SWAPS, strengths: bool = True) -> Connectome:
    """A random graph with every part's number of edges kept (in and out where directed), and its strength nearly.

    Edges a-b, c-d become a-d, c-b wherever that makes no loop and no double edge, `swaps` times per edge on average (Maslov
    and Sneppen). The same weights are then given out so that strengths come near what they were: again and again a random edge
    gets the weight whose rank is that of strength left(a) x strength left(b) among the edges left (Rubinov and Sporns,
    https://doi.org/10.1016/j.neuroimage.2011.03.069). A complete graph has no other wiring: its weights alone move.

    Args:
        graph: the graph.
        seed: of swaps and weights.
        swaps: tried per edge.
        strengths: whether strengths are kept nearly; else the same weights are given out at random.
    """
    draw = np.random.default_rng(seed)
    edges = _swapped(graph.edges, graph.directed, swaps, draw)
    given = _given_out(graph.weights, edges, graph.directed, draw) if strengths else _shuffled(graph, edges, draw)
    return graph.with_weights(given)


def null_graphs(graph: Connectome, count: int, seed: int = 0, strengths: bool = True) -> Iterator[Connectome]:
    """`count` rewired graphs."""
    if graph.count < 2:
        raise PatchclampError(f"{graph!r} has too few edges to be wired in another way")
    for number in range(count):
        yield rewired(graph, hash_of(seed, number), strengths=strengths)


def hash_of(seed: int, number: int) -> int:
    """A seed of its own for each null."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def against_nulls(
    seen: Float[np.ndarray, " level"], null: Float[np.ndarray, "draw level"]
) -> dict[str, Float[np.ndarray, " level"]]:
    """z, and p = (1 + nulls at least as large) / (1 + nulls), of each number."""
    spread = null.std(0, ddof=1)
    z = np.divide(seen - null.mean(0), spread, out=np.full(seen.shape, np.nan), where=spread > 0)
    p = (1 + (null >= seen - 1e-12).sum(0)) / (1 + len(null))
    return {"null_mean": null.mean(0), "null_95": np.quantile(null, 0.95, axis=0), "z": z, "p": p}


def _swapped(
    edges: Bool[np.ndarray, "part part"], directed: bool, swaps: int, draw: np.random.Generator
) -> Bool[np.ndarray, "part part"]:
    there = edges.copy()
    ends = [list(pair) for pair in zip(*np.nonzero(there if directed else np.triu(there)), strict=True)]
    for _ in range(swaps * len(ends)):
        one, two = (int(number) for number in draw.integers(len(ends), size=2))
        a, b = ends[one]
        c, d = ends[two]
        if not directed and draw.random() < 0.5:
            c, d = d, c
        if len({a, b, c, d}) < 4 or there[a, d] or there[c, b]:
            continue
        for i, j, on in ((a, b, False), (c, d, False), (a, d, True), (c, b, True)):
            there[i, j] = on
            if not directed:
                there[j, i] = on
        ends[one], ends[two] = [a, d], [c, b]
    return there


def _shuffled(
    graph: Connectome, edges: Bool[np.ndarray, "part part"], draw: np.random.Generator
) -> Float[np.ndarray, "part part"]:
    once = (lambda table: table) if graph.directed else np.triu
    out = np.zeros_like(graph.weights)
    out[once(edges)] = draw.permutation(graph.weights[once(graph.edges)])
    return out if graph.directed else out + out.T


def _given_out(
    weights: Float[np.ndarray, "part part"], edges: Bool[np.ndarray, "part part"], directed: bool, draw: np.random.Generator
) -> Float[np.ndarray, "part part"]:
    once: Callable[[np.ndarray], np.ndarray] = (lambda table: table) if directed else np.triu
    left = np.sort(weights[once(weights) > 0])
    rows, columns = np.nonzero(once(edges))
    out_left, in_left = weights.sum(1), weights.sum(0)
    out = np.zeros_like(weights)
    step = max(1, len(left) // 200)
    while len(left):
        expected = np.maximum(out_left[rows], 0) * np.maximum(in_left[columns], 0)
        order = np.argsort(expected + 1e-12 * draw.random(len(expected)))
        picked = np.sort(draw.choice(len(left), size=min(step, len(left)), replace=False))
        for rank in picked:
            i, j, weight = rows[order[rank]], columns[order[rank]], left[rank]
            out[i, j] = weight
            out_left[i], in_left[j] = out_left[i] - weight, in_left[j] - weight
            if not directed:
                out[j, i] = weight
                out_left[j], in_left[i] = out_left[j] - weight, in_left[i] - weight
        keep = np.ones(len(left), dtype=bool)
        keep[order[picked]] = False
        rows, columns, left = rows[keep], columns[keep], np.delete(left, picked)
    return out
