"""Communities: sets of parts with more weight among themselves than their strengths make expected.

Q = sum over communities [ L_c / m - gamma S_c^out S_c^in / m^2 ]     (directed; undirected with m -> 2m)
"""

from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import polars as pl
from jaxtyping import Float, Int

from patchclamp.dependence.network.graph import Connectome
from patchclamp.dependence.network.rewiring import against_nulls, null_graphs
from patchclamp.errors import PatchclampError

SEEDS = 20


@dataclass(frozen=True, eq=False)
class Communities:
    """A partition of the parts with what is known of it.

    Args:
        parts: names.
        label: of each part, from 0, the largest community first; parts without edges are on their own.
        modularity: Q of the partition.
        stability: mean share of seeds that put a pair of one community together (1: every seed agrees).
        null_mean, null_95, z, p: of Q found likewise in graphs with the same degrees; None where none were drawn.
    """

    parts: tuple[str, ...]
    label: Int[np.ndarray, " part"]
    modularity: float
    stability: float
    null_mean: float | None = None
    null_95: float | None = None
    z: float | None = None
    p: float | None = None
    nulls: int = 0

    @property
    def sets(self) -> list[frozenset[str]]:
        """The communities, largest first."""
        return [frozenset(self.parts[i] for i in np.flatnonzero(self.label == c)) for c in range(int(self.label.max()) + 1)]

    def to_record(self) -> dict[str, Any]:
        """Plain numbers and a frame (`part`, `community`)."""
        frame = pl.DataFrame({"part": self.parts, "community": self.label})
        names = ("modularity", "stability", "null_mean", "null_95", "z", "p", "nulls")
        return {"communities": frame, **{name: getattr(self, name) for name in names}}

    def __str__(self) -> str:
        null = (
            ""
            if self.p is None
            else f" (nulls with the same degrees: {self.null_mean:.3f}, z {self.z:+.1f}, p {self.p:.3f}, n {self.nulls})"
        )
        shown = [", ".join(sorted(one)) for one in self.sets if len(one) > 1]
        return "\n".join([f"modularity {self.modularity:.3f}{null}, {len(shown)} communities", *(f"  {one}" for one in shown)])


def communities(graph: Connectome, *, seeds: int = SEEDS, resolution: float = 1.0, nulls: int = 0, seed: int = 0) -> Communities:
    """The consensus of Louvain's partitions over seeds, against degree-preserving nulls.

    Consensus (https://doi.org/10.1038/srep00336): the share of seeds that put each pair together, kept where it is above what the same
    partitions with shuffled labels give, is partitioned in turn until all seeds agree.

    Args:
        graph: the graph.
        seeds: partitions per round.
        resolution: gamma; above 1 communities are smaller.
        nulls: how many rewired graphs, each searched with as many seeds (the best of them), against the best of the graph itself.
        seed: of it all.
    """
    if seeds < 1 or resolution <= 0:
        raise PatchclampError(
            f"{seeds} seeds at resolution {resolution} were asked for: give at least 1, and a resolution above 0"
        )
    found = partitions(graph.weights, graph.directed, seeds, resolution, seed)
    together = np.mean([one[:, None] == one[None] for one in found], 0)
    label = _ordered(_agreed(found, seeds, seed), graph)
    inside = (label[:, None] == label[None]) & ~np.eye(len(label), dtype=bool)
    stable = float(together[inside].mean()) if inside.any() else 1.0
    out = Communities(graph.parts, label, modularity(graph, label, resolution), stable)
    if not nulls:
        return out
    best = max(modularity(graph, one, resolution) for one in found)
    drawn = np.array([[_best(one, seeds, resolution, seed)] for one in null_graphs(graph, nulls, seed)])
    facts = {name: float(value[0]) for name, value in against_nulls(np.array([best]), drawn).items()}
    return Communities(
        graph.parts, label, out.modularity, stable, facts["null_mean"], facts["null_95"], facts["z"], facts["p"], nulls
    )


def modularity(graph: Connectome, label: Int[np.ndarray, " part"], resolution: float = 1.0) -> float:
    """Q of a partition; 0 for a graph without edges."""
    total = graph.weights.sum()
    if total == 0:
        return 0.0
    expected = np.outer(graph.weights.sum(1), graph.weights.sum(0)) / total
    same = label[:, None] == label[None]
    return float(((graph.weights - resolution * expected) * same).sum() / total)


def partitions(
    weights: Float[np.ndarray, "part part"], directed: bool, seeds: int, resolution: float, seed: int
) -> list[Int[np.ndarray, " part"]]:
    """Louvain's partition under each seed."""
    made = nx.from_numpy_array(weights, create_using=nx.DiGraph if directed else nx.Graph)
    out: list[Int[np.ndarray, " part"]] = []
    for number in range(seeds):
        label = np.zeros(len(weights), dtype=np.int64)
        found: Any = nx.community.louvain_communities(made, weight="weight", resolution=resolution, seed=seed * 10_007 + number)
        for c, members in enumerate(found):
            label[list(members)] = c
        out.append(label)
    return out


def _best(graph: Connectome, seeds: int, resolution: float, seed: int) -> float:
    found = partitions(graph.weights, graph.directed, seeds, resolution, seed)
    return max(modularity(graph, one, resolution) for one in found)


def _agreed(found: list[Int[np.ndarray, " part"]], seeds: int, seed: int, rounds: int = 20) -> Int[np.ndarray, " part"]:
    draw = np.random.default_rng([seed, 4])
    for _ in range(rounds):
        together = np.mean([one[:, None] == one[None] for one in found], 0)
        if np.isin(together, (0.0, 1.0)).all():
            return found[0]
        chance = np.mean([(mixed := draw.permutation(one))[:, None] == mixed[None] for one in found], 0)
        bar = min(float(chance[~np.eye(len(chance), dtype=bool)].max()), 0.5)
        kept = np.where(together > bar, together, 0.0)
        np.fill_diagonal(kept, 0.0)
        found = partitions(kept, False, seeds, 1.0, seed + 1)
    return found[0]


def _ordered(label: Int[np.ndarray, " part"], graph: Connectome) -> Int[np.ndarray, " part"]:
    """Parts without edges alone; communities numbered by size, ties by their first part."""
    alone = (graph.weights.sum(0) + graph.weights.sum(1)) == 0
    label = np.where(alone, label.max() + 1 + np.arange(len(label)), label)
    names, first, sizes = np.unique(label, return_index=True, return_counts=True)
    rank = np.argsort(np.lexsort((first, -sizes)))
    return rank[np.searchsorted(names, label)]


def similarity(one: Int[np.ndarray, " part"], two: Int[np.ndarray, " part"]) -> float:
    """Adjusted Rand index of two partitions: 1 the same, about 0 by chance."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(one, two))
