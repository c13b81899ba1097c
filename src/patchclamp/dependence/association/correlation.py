"""Correlation: Pearson's r of two outputs. Cost: one matrix product per permutation for all pairs."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from patchclamp.dependence.association.contract import Measure, Order, Pairs, Values, columns, shrink_factor


@dataclass(frozen=True, eq=False)
class Correlations:
    """r = <x - mean x, y - mean y> / (|x - mean x| |y - mean y|)."""

    left: Float[np.ndarray, "part row"]
    right: Float[np.ndarray, "part row"]
    pairs: Pairs
    shrink: float

    def score(self) -> Float[np.ndarray, " pair"]:
        """r of each pair."""
        return self._read(self.left @ self.right.T)

    def statistic(self, order: Order | None = None) -> Float[np.ndarray, " pair"]:
        """r; permuted, as residuals that were projected again would have it."""
        return self.score() if order is None else self._read(self.left @ self.right[:, order].T) / self.shrink

    def _read(self, table: Float[np.ndarray, "part part"]) -> Float[np.ndarray, " pair"]:
        i, j = np.array(self.pairs, dtype=int).reshape(-1, 2).T
        return table[i, j]


def prepare(left: Values, right: Values, pairs: Pairs, freedom: int, seed: int) -> Correlations:
    """See `contract.Measure`."""
    one, two = columns(left), columns(right)
    return Correlations(one, two, pairs, shrink_factor(one.shape[1], freedom))


CORRELATION = Measure("correlation", prepare, two_sided=True, vectors=False)
