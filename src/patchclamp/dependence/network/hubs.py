"""Hubs: parts that much runs through; whether closing them does more than closing others; and whether they form a club."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int

from patchclamp.dependence.network.graph import Connectome
from patchclamp.dependence.network.rewiring import against_nulls, null_graphs
from patchclamp.errors import PatchclampError
from patchclamp.methods import groups_of
from patchclamp.metrics import metric_named
from patchclamp.parts import Fallback, Parts, benefits
from patchclamp.parts.contract import sites_of
from patchclamp.scores.statistics import Interval, mean_interval
from patchclamp.sites import Site
from patchclamp.tasks import Examples


def hub_table(graph: Connectome, label: Int[np.ndarray, " part"] | None = None) -> pl.DataFrame:
    """A row per part, strongest first: `part`, `strength` (`in`, `out`), `degree`, `betweenness`, `participation`, `rank`.

    Betweenness counts shortest paths with distance 1 / weight. Participation is 1 - sum over communities (k_ic / k_i)^2: 0 for a
    part whose weight stays in one community, near 1 where it is spread evenly (needs `label`). `rank` is the mean rank by
    strength and betweenness.
    """
    weights = graph.weights
    both = weights.sum(0) + weights.sum(1) if graph.directed else weights.sum(1)
    edges = graph.edges.sum(0) + graph.edges.sum(1) if graph.directed else graph.edges.sum(1)
    between: Any = nx.betweenness_centrality(graph.networkx(), weight="distance")
    path = np.array([between[i] for i in range(len(weights))])
    body: dict[str, Any] = {"part": graph.parts, "strength": both, "out": weights.sum(1), "in": weights.sum(0), "degree": edges,
                            "betweenness": path}  # fmt: skip
    if label is not None:
        body["participation"] = participation(graph, label)
    ranks = [pl.col(name).rank("average", descending=True) for name in ("strength", "betweenness")]
    return pl.DataFrame(body).with_columns(((ranks[0] + ranks[1]) / 2).alias("rank")).sort("rank", maintain_order=True)


def participation(graph: Connectome, label: Int[np.ndarray, " part"]) -> Float[np.ndarray, " part"]:
    """1 - sum_c (k_ic / k_i)^2 over weights in both directions; 0 for parts without edges."""
    weights = graph.weights + graph.weights.T if graph.directed else graph.weights
    total = weights.sum(1)
    shares = np.stack([weights[:, label == c].sum(1) for c in np.unique(label)], 1)
    shares = np.divide(shares, total[:, None], out=np.zeros_like(shares), where=total[:, None] > 0)
    return np.where(total > 0, 1 - (shares**2).sum(1), 0.0)


@dataclass(frozen=True, eq=False)
class Lesion:
    """What closing a set takes, against random sets of the same size and kinds under the same fallback.

    Args:
        parts: the set.
        effect: benefit open less benefit with the set closed; mean and interval over groups.
        random: mean effect of each random set.
        p: (1 + random sets that take at least as much) / (1 + random sets).
        about: fallback, metric, n, how random sets were matched.
    """

    parts: tuple[str, ...]
    effect: Interval
    random: Float[np.ndarray, " draw"]
    p: float
    about: dict[str, Any]

    def to_record(self) -> dict[str, Any]:
        """Plain numbers."""
        low, high = np.quantile(self.random, [0.025, 0.975])
        return {"parts": list(self.parts), "effect": self.effect.mean, "low": self.effect.low, "high": self.effect.high, "p": self.p,
                "random_mean": float(self.random.mean()), "random_low": float(low), "random_high": float(high), **self.about}  # fmt: skip

    def __str__(self) -> str:
        span = "" if self.effect.low is None else f" [{self.effect.low:+.3f}, {self.effect.high:+.3f}]"
        return (
            f"closing {', '.join(self.parts)} takes {self.effect.mean:+.3f}{span}; {len(self.random)} random sets of the same size and "
            f"kinds take {self.random.mean():+.3f} on average, p {self.p:.3f}"
        )


def lesion(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    chosen: Sequence[str | Site],
    *,
    draws: int = 99,
    match: str = "kind",
    among: Sequence[str | Site] | None = None,
    metric: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Lesion:
    """Close a set of parts at once, and random sets of the same size: the same operator for both.

    Args:
        parts: whose gates.
        examples: on which prompts: others than those by which the set was chosen.
        fallback: what closed parts pass.
        chosen: the set (hubs).
        draws: random sets; members of the set may be in them.
        match: "kind": as many heads and as many MLPs; "layer": as many of each kind in each layer; "any": only the size.
        among: the parts that random sets are drawn from, those that the set was chosen from; by default all counted parts.
        metric: by default the task's.
        seed: of the draws.
        batch_size: examples at once.

    Cost: draws + 2 passes over the examples, less what replay spares.

    Raises:
        PatchclampError: a part that is not there, or no other set matches.
    """
    known = None if among is None else {str(one) for one in among}
    sites = [site for site in sites_of(parts) if known is None or str(site) in known]
    names = [str(site) for site in sites]
    if missing := [str(one) for one in chosen if str(one) not in names] or ([] if chosen else ["an empty set"]):
        raise PatchclampError(f"{missing[0]} cannot be closed: the parts are {', '.join(names[:4])} ... ({len(names)})")
    which = np.array([names.index(str(one)) for one in chosen])
    sets = [which, *matched_sets(sites, which, draws, match, seed)]
    gates = torch.cat([parts.open(), *(parts.without([sites[i] for i in one]) for one in sets)])
    measured = benefits(parts, examples, gates, fallback, metric_named(metric or examples.metric), batch_size).double().numpy()
    effects = measured[0] - measured[1:]
    random = effects[1:].mean(1)
    p = float((1 + (random >= effects[0].mean() - 1e-9).sum()) / (1 + len(random)))
    about = {"fallback": fallback.kind, "metric": metric or examples.metric, "n": len(examples), "match": match, "among": len(sites),
             "seed": seed}  # fmt: skip
    return Lesion(tuple(names[i] for i in which), mean_interval(effects[0], groups_of(examples), seed=seed), random, p, about)


def matched_sets(
    sites: Sequence[Site], which: Int[np.ndarray, " member"], draws: int, match: str, seed: int
) -> list[Int[np.ndarray, " member"]]:
    """Random sets with as many of each stratum as the given one."""
    keys = {"any": lambda s: "", "kind": lambda s: s.kind, "layer": lambda s: f"{s.kind}{s.layer}"}
    if match not in keys:
        raise PatchclampError(f"random sets are matched by any, kind or layer, not {match!r}")
    stratum = np.array([keys[match](site) for site in sites])
    pools = {name: np.flatnonzero(stratum == name) for name in set(stratum[which].tolist())}
    counts = {name: int((stratum[which] == name).sum()) for name in pools}
    if all(len(pools[name]) == counts[name] for name in pools):
        raise PatchclampError(f"no other set of {len(which)} parts is matched by {match}: match by kind or any")
    draw = np.random.default_rng([seed, 5])
    return [
        np.concatenate([draw.choice(pools[name], counts[name], replace=False) for name in sorted(pools)]) for _ in range(draws)
    ]


def rich_club(graph: Connectome, *, nulls: int = 99, seed: int = 0) -> pl.DataFrame:
    """Whether the parts with most edges are joined to each other by more weight than their degrees make expected.

        phi(k) = weight among parts with more than k edges / the largest weights that as many pairs could carry

    Nulls keep every part's number of edges, and give the weights out at random: a club is that the rich are joined to the rich more
    often, or by heavier weights, than that.

    A row per k with at least 3 such parts: `k`, `parts`, `phi`, `normalised` (phi / its mean in nulls), `null_95`, `z`, `p`.
    https://doi.org/10.1103/PhysRevLett.101.168702
    """
    degree = graph.edges.sum(0) + graph.edges.sum(1) if graph.directed else graph.edges.sum(1)
    levels = [int(k) for k in np.unique(degree) if (degree > k).sum() >= 3]
    if not levels:
        raise PatchclampError(f"{graph!r} has no three parts of more edges than others: there is no club to look for")
    seen = _phi(graph.weights, degree, levels)
    drawn = np.stack([_phi(one.weights, degree, levels) for one in null_graphs(graph, nulls, seed, strengths=False)])
    facts = against_nulls(seen, drawn)
    ratio = np.divide(seen, facts["null_mean"], out=np.full(seen.shape, np.nan), where=facts["null_mean"] > 0)
    body = {"k": levels, "parts": [int((degree > k).sum()) for k in levels], "phi": seen, "normalised": ratio,
            "null_95": facts["null_95"], "z": facts["z"], "p": facts["p"]}  # fmt: skip
    return pl.DataFrame(body)


def _phi(
    weights: Float[np.ndarray, "part part"], degree: Int[np.ndarray, " part"], levels: Sequence[int]
) -> Float[np.ndarray, " level"]:
    largest, out = np.sort(weights.ravel())[::-1], np.zeros(len(levels))
    for number, k in enumerate(levels):
        rich = degree > k
        out[number] = weights[np.ix_(rich, rich)].sum() / largest[: int(rich.sum() * (rich.sum() - 1))].sum()
    return out
