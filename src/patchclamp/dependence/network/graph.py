"""The connectome: a weighted graph of parts, from causal or statistical dependence."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import numpy as np
import polars as pl
from jaxtyping import Bool, Float

from patchclamp.dependence.table import Dependence
from patchclamp.errors import PatchclampError

SIGNS = ("absolute", "positive", "negative")


@dataclass(frozen=True, eq=False)
class Connectome:
    """Parts and the weights between them.

    Args:
        parts: names, in forward order.
        weights: [from, to], 0 where there is no edge, never negative; symmetric unless directed.
        directed: whether a weight is of a acting on b.
        about: what it was made from.
        beside: the other kind's graph of the same parts: a statistical one stands beside the causal one it is to be compared with.
    """

    parts: tuple[str, ...]
    weights: Float[np.ndarray, "part part"]
    directed: bool
    about: Mapping[str, Any]
    beside: "Connectome | None" = None

    def __post_init__(self) -> None:
        if (self.weights < 0).any() or not np.isfinite(self.weights).all() or self.weights.diagonal().any():
            raise PatchclampError("a connectome's weights are finite, not negative, and no part has one to itself")
        if not self.directed and not np.array_equal(self.weights, self.weights.T):
            raise PatchclampError("an undirected connectome's weights are symmetric")

    def __repr__(self) -> str:
        arrow = "directed" if self.directed else "undirected"
        return f"Connectome({len(self.parts)} parts, {self.count} {arrow} edges, density {self.density:.3f})"

    @property
    def count(self) -> int:
        """Number of edges."""
        return int(np.count_nonzero(self.weights)) // (1 if self.directed else 2)

    @property
    def density(self) -> float:
        """Edges as a share of all that could be."""
        n = len(self.parts)
        return self.count / (n * (n - 1) / (1 if self.directed else 2)) if n > 1 else 0.0

    @property
    def edges(self) -> Bool[np.ndarray, "part part"]:
        """Which weights are not 0."""
        return self.weights > 0

    def networkx(self) -> Any:
        """The graph, nodes numbered in `parts`' order; `weight`, and `distance` = 1 / weight."""
        made: Any = nx.DiGraph() if self.directed else nx.Graph()
        made.add_nodes_from(range(len(self.parts)))
        rows, columns = np.nonzero(self.weights if self.directed else np.triu(self.weights))
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True):
            made.add_edge(i, j, weight=float(self.weights[i, j]), distance=1 / float(self.weights[i, j]))
        return made

    def with_weights(self, weights: Float[np.ndarray, "part part"]) -> "Connectome":
        """The same parts with other weights."""
        return replace(self, weights=weights, beside=None)

    def to_frame(self) -> pl.DataFrame:
        """A row per edge: `a`, `b`, `weight` and, where another graph stands beside, `beside`."""
        rows, columns = np.nonzero(self.weights if self.directed else np.triu(self.weights))
        body: dict[str, Any] = {
            "a": [self.parts[i] for i in rows], "b": [self.parts[j] for j in columns], "weight": self.weights[rows, columns],
        }  # fmt: skip
        if self.beside is not None:
            body["beside"] = self.beside.weights[rows, columns]
        return pl.DataFrame(body, schema_overrides={"a": pl.String, "b": pl.String, "weight": pl.Float64})

    def agreement(self) -> dict[str, float]:
        """How far the graph beside agrees: Spearman over all pairs of weights, share of each one's edges that the other has."""
        if self.beside is None:
            raise PatchclampError("there is no graph beside this one: give `statistical` to connectome")
        from scipy.stats import spearmanr

        cells = ~np.eye(len(self.parts), dtype=bool) if self.directed else np.triu(np.ones(self.weights.shape, dtype=bool), 1)
        one, two = self.weights[cells], self.beside.weights[cells]
        both = ((one > 0) & (two > 0)).sum()
        constant = one.std() == 0 or two.std() == 0
        return {
            "spearman": float("nan") if constant else float(np.asarray(spearmanr(one, two))[0]),
            "causal_in_statistical": float(both / max((one > 0).sum(), 1)),
            "statistical_in_causal": float(both / max((two > 0).sum(), 1)),
        }


def connectome(
    causal: Dependence,
    statistical: Dependence | None = None,
    *,
    alpha: float | None = 0.05,
    floor: float = 0.0,
    sign: str = "absolute",
) -> Connectome:
    """The graph of parts, its edges the pairs that stand.

    Args:
        causal: interactions (symmetric) or self-repair and direct effects (directed).
        statistical: an association of the same parts, kept `beside` (thresholded likewise).
        alpha: pairs with q above it are no edges; None takes every pair. A pair whose `below_noise` is set never is one.
        floor: neither are pairs whose |score| is at most this.
        sign: "absolute": weight |score|; "positive" or "negative": pairs of that sign only.

    Raises:
        PatchclampError: no such sign, an alpha where the table has no q, or other parts beside.
    """
    if sign not in SIGNS:
        raise PatchclampError(f"edges are pairs of sign {', '.join(SIGNS)}, not {sign!r}")
    other = None
    if statistical is not None:
        if tuple(statistical.parts) != tuple(causal.parts):
            raise PatchclampError(
                "the statistical table is of other parts than the causal one: record the same parts, in the same order"
            )
        other = connectome(statistical, alpha=alpha, sign="absolute")
    weights = np.nan_to_num(causal.matrix())
    if alpha is not None:
        if "q" not in causal.table.columns:
            raise PatchclampError("edges by q were asked for, and the table has none: give alpha=None and a floor")
        weights = np.where(np.nan_to_num(causal.matrix("q"), nan=1.0) <= alpha, weights, 0.0)
    if "below_noise" in causal.table.columns:
        weights = np.where(np.nan_to_num(causal.matrix("below_noise")) > 0, 0.0, weights)
    weights = {"absolute": np.abs(weights), "positive": np.maximum(weights, 0), "negative": np.maximum(-weights, 0)}[sign]
    weights = np.where(weights > floor, weights, 0.0)
    np.fill_diagonal(weights, 0.0)
    about = {**causal.about, "alpha": alpha, "floor": floor, "sign": sign}
    return Connectome(tuple(causal.parts), weights, causal.directed, about, other)


def of_matrix(
    parts: Sequence[str], weights: Float[np.ndarray, "part part"], directed: bool = False, about: Mapping[str, Any] | None = None
) -> Connectome:
    """A graph from a matrix of one's own."""
    return Connectome(tuple(parts), weights, directed, about or {})
