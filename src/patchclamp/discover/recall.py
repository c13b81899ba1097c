"""Recall: what a ranking costs to be right about the k largest effects.

The *cost of verified recall* (Kramar et al. 2024, https://arxiv.org/abs/2403.00745) is how many exact effects it takes, in the
order of the ranking, until all of the k largest are among them.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from patchclamp.discover.missed import by_chance
from patchclamp.errors import PatchclampError
from patchclamp.scores import Scores


@dataclass(frozen=True, eq=False)
class Recall:
    """The cost of verified recall of a ranking.

    Args:
        table: a row per k: k, cost (exact effects measured in the ranking's order until all of the k largest are among them), chance
            (what a random order takes on average); a perfect one takes k.
        of: how many parts there are.
    """

    table: pl.DataFrame
    of: int

    @property
    def area(self) -> float:
        """Mean over k of cost / parts: the area under the curve, 0 to 1."""
        return float((self.table["cost"] / self.of).mean())  # type: ignore[arg-type]

    @property
    def relative(self) -> float:
        """Geometric mean of cost / k, each k weighted by 1 / k: how many times what a perfect order takes; 1 is perfect."""
        k, cost = self.table["k"].to_numpy().astype(float), self.table["cost"].to_numpy().astype(float)
        return float(np.exp((np.log(cost / k) / k).sum() / (1 / k).sum()))

    def cost(self, k: int) -> int:
        """Of the k largest; raises `PatchclampError` where k was not asked for."""
        found = self.table.filter(pl.col("k") == k)
        if not found.height:
            raise PatchclampError(f"the cost of the {k} largest was not counted: there are {self.table['k'].to_list()}")
        return int(found["cost"][0])


def verified_recall(ranking: Scores, exact: Scores, most: int | None = None) -> Recall:
    """How many exact effects it takes, in the order of |ranking|, until all of the k largest |exact| are measured; for each k.

    Args:
        ranking: any scores.
        exact: exact effects of the same parts.
        most: the largest k, by default a tenth of the parts (at least 5, and no more than there are).

    Raises:
        PatchclampError: parts that one of the two does not score.
    """
    if set(ranking.table["site"]) != set(exact.table["site"]):
        raise PatchclampError(f"the ranking has {len(ranking)} parts and exact effects {len(exact)}, and not the same ones")
    sites = exact.table["site"].to_list()
    known, count = {site: abs(value) for site, value in zip(ranking.table["site"], ranking.values(), strict=True)}, len(sites)
    order = np.argsort(-np.array([known[site] for site in sites]), kind="stable")
    place = np.empty(count, dtype=np.int64)
    place[order] = np.arange(1, count + 1)
    largest = np.argsort(-np.abs(exact.values()), kind="stable")
    wanted = range(1, min(count, max(5, count // 10) if most is None else most) + 1)
    cost = [int(place[largest[:k]].max()) for k in wanted]
    return Recall(pl.DataFrame({"k": list(wanted), "cost": cost, "chance": by_chance(count, wanted)}), count)
