"""Reuse: how much of one task's circuit is another's too, and how much chance alone would give."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import hypergeom

from patchclamp.dependence.network.communities import communities, similarity
from patchclamp.dependence.network.graph import connectome
from patchclamp.dependence.table import SEPARATOR, Dependence
from patchclamp.errors import PatchclampError
from patchclamp.scores import parse_part
from patchclamp.sites import Edge, Site


@dataclass(frozen=True)
class Overlap:
    """What two sets of parts (or edges) have in common.

    `shared` of sizes `one` and `two` among `universe`; `share`: shared / the smaller set; `jaccard`: shared / all of either.
    `expected`: by chance, and `p` at least as many shared, if the second set were drawn anew: of its size among all
    (hypergeometric), and `matched_`: with as many of each kind in each layer. A matched p of 1 says that layers and kinds explain all.
    """

    one: int
    two: int
    universe: int
    shared: int
    share: float
    jaccard: float
    expected: float
    p: float
    matched_expected: float
    matched_p: float
    draws: int

    def to_record(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.shared} of {self.one} and {self.two} shared ({self.share:.0%} of the smaller, Jaccard {self.jaccard:.2f}); chance "
            f"{self.expected:.1f}, p {self.p:.2g}; with layers and kinds matched {self.matched_expected:.1f}, p {self.matched_p:.2g}"
        )


def overlap(
    one: Sequence[object], two: Sequence[object], universe: Sequence[object], *, draws: int = 9999, seed: int = 0
) -> Overlap:
    """Overlap of two circuits with its chance level; parts, or edges (matched by source's and target's layer and kind).

    Paper: https://arxiv.org/abs/2310.08744 (circuit component reuse, 78 % of in-circuit heads shared; it gives no chance level).

    Raises:
        PatchclampError: a set is empty, or not within the universe.
    """
    names, (first, second) = [str(part) for part in universe], ({str(part) for part in side} for side in (one, two))
    if not first or not second:
        raise PatchclampError("an empty circuit shares nothing with any: there is no overlap to judge")
    if strange := sorted((first | second) - set(names)):
        raise PatchclampError(f"{strange[0]} is not among the {len(names)} parts that could have been chosen")
    shared = len(first & second)
    chance = hypergeom(len(names), len(first), len(second))
    inside = np.array([name in first for name in names])
    hits = _matched(names, np.array([name in second for name in names]), inside, draws, seed)
    return Overlap(
        len(first), len(second), len(names), shared, shared / min(len(first), len(second)), shared / len(first | second),
        len(first) * len(second) / len(names), float(chance.sf(shared - 1)), float(hits.mean()), float((1 + (hits >= shared).sum()) / (1 + draws)),
        draws,
    )  # fmt: skip


def _matched(names: list[str], chosen: np.ndarray, inside: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """How many of `inside` random sets hold that match `chosen` in layer and kind: hypergeometric within every stratum."""
    stratum, draw = np.array([_stratum(name) for name in names]), np.random.default_rng([seed, 6])
    hits = np.zeros(draws, dtype=np.int64)
    for name in np.unique(stratum):
        here = stratum == name
        good, size = int((inside & here).sum()), int((chosen & here).sum())
        hits += draw.hypergeometric(good, int(here.sum()) - good, size, draws) if size else 0
    return hits


def _stratum(name: str) -> str:
    part = parse_part(name)
    ends: list[Site] = [part.source, part.target] if isinstance(part, Edge) else [part]
    return ">".join(f"{end.kind}{end.layer}" for end in ends)


def edge_names(table: Dependence, alpha: float = 0.05) -> list[str]:
    """The pairs of a dependence that stand (q <= alpha), as names "a & b"."""
    rows = table.table.filter(pl.col("q") <= alpha) if "q" in table.table.columns else table.table
    return [a + SEPARATOR + b for a, b in rows.select("a", "b").iter_rows()]


def over_time(
    tables: Sequence[Dependence],
    steps: Sequence[object] | None = None,
    *,
    alpha: float | None = 0.05,
    seeds: int = 10,
    seed: int = 0,
) -> pl.DataFrame:
    """How the graph changes over checkpoints, layers' windows or tasks: a row per table.

    `step`, `edges`, `density`, `weight` (sum), `modularity`, `communities`, and against the last table: `jaccard` of edges, `correlation`
    of weights, `rand` (adjusted, of communities); `new` and `gone`: edges against the table before.

    Raises:
        PatchclampError: fewer than two tables, of different parts, or another number of steps.
    """
    if steps is not None and len(steps) != len(tables):
        raise PatchclampError(f"{len(tables)} tables and {len(steps)} steps were given: name each table")
    if len(tables) < 2 or any(tuple(one.parts) != tuple(tables[0].parts) for one in tables):
        raise PatchclampError("a change is of two or more tables of the same parts")
    graphs = [connectome(one, alpha=alpha) for one in tables]
    parted = [communities(one, seeds=seeds, seed=seed) for one in graphs]
    last, rows, before = graphs[-1], list[dict[str, Any]](), graphs[0]
    cells = ~np.eye(len(last.parts), dtype=bool)
    for step, graph, found in zip(steps or range(len(tables)), graphs, parted, strict=True):
        either = (graph.edges | last.edges).sum()
        x, y = graph.weights[cells], last.weights[cells]
        rows.append({
            "step": str(step), "edges": graph.count, "density": graph.density, "weight": float(graph.weights.sum()),
            "modularity": found.modularity, "communities": sum(len(one) > 1 for one in found.sets),
            "jaccard": float((graph.edges & last.edges).sum() / either) if either else 1.0,
            "correlation": float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else None,
            "rand": similarity(found.label, parted[-1].label),
            "new": int((graph.edges & ~before.edges).sum()) // (1 if graph.directed else 2),
            "gone": int((before.edges & ~graph.edges).sum()) // (1 if graph.directed else 2),
        })  # fmt: skip
        before = graph
    return pl.DataFrame(rows)
