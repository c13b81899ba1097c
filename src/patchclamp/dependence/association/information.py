"""Mutual information in nats: nearest neighbours (Kraskov, Stoegbauer, Grassberger) and Gaussian.

KSG:       I = psi(k) + psi(N) - < psi(n_x + 1) + psi(n_y + 1) >, k = 3, max norm, each coordinate standardised.
           n_x: how many other points lie nearer in x than the k-th neighbour in (x, y). https://arxiv.org/abs/cond-mat/0305641
Gaussian:  I = -1/2 sum log(1 - rho_c^2) over canonical correlations; its bias, about D_x D_y / 2n, is the permuted null's mean.

KSG is trustworthy up to 3 dimensions a side: with one correlated coordinate (.83 nat) hidden in 10 it gives .2.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.spatial import KDTree
from scipy.special import digamma

from patchclamp.dependence.association.contract import Measure, Order, Pairs, Values
from patchclamp.errors import PatchclampError

NEIGHBOURS = 3
SMALL = 300
"""Up to so many rows all distances are computed; above, trees find neighbours."""
JITTER, ROUNDING = 1e-10, 1e-14


def ksg(x: Float[np.ndarray, "row _"], y: Float[np.ndarray, "row _"], k: int = NEIGHBOURS, seed: int = 0) -> float:
    """Mutual information by k nearest neighbours, in nats; may come out slightly below 0. Rows must be independent.

    Ties are parted by noise of 1e-10 of the spread, drawn with `seed`.
    """
    one, two = _spread(x, seed), _spread(y, seed + 1)
    if len(one) <= k + 1:
        raise PatchclampError(
            f"mutual information of {len(one)} rows was asked for: {k} nearest neighbours need at least {k + 2}"
        )
    return _by_distances(_distances(one), _distances(two), k) if len(one) <= SMALL else _by_trees(one, two, k)


def gaussian(x: Float[np.ndarray, "row _"], y: Float[np.ndarray, "row _"]) -> float:
    """-1/2 sum log(1 - rho_c^2) in nats: right where the two are jointly normal, a lower bound of what is linear else."""
    one, two = _whitened(x), _whitened(y)
    if one.shape[1] + two.shape[1] + 2 > len(one):
        raise PatchclampError(
            f"{len(one)} rows of {one.shape[1]} and {two.shape[1]} dimensions always correlate perfectly: project, or give more rows"
        )
    canonical = np.linalg.svd(one.T @ two, compute_uv=False) if min(one.shape[1], two.shape[1]) else np.zeros(0)
    return float(-0.5 * np.log1p(-(np.minimum(canonical, 1 - 1e-12) ** 2)).sum())


def _spread(values: Float[np.ndarray, "row _"], seed: int) -> Float[np.ndarray, "row _"]:
    spread = values.std(0)
    out = (values - values.mean(0)) / np.where(spread > 0, spread, 1.0)
    return out + JITTER * np.random.default_rng([seed, len(out)]).normal(size=out.shape)


def _distances(values: Float[np.ndarray, "row _"]) -> Float[np.ndarray, "row row"]:
    return np.abs(values[:, None] - values[None]).max(-1)


def _by_distances(one: Float[np.ndarray, "row row"], two: Float[np.ndarray, "row row"], k: int) -> float:
    n = len(one)
    both = np.maximum(one, two)
    np.fill_diagonal(both, np.inf)
    reach = np.partition(both, k - 1, axis=1)[:, k - 1 : k]
    inside = digamma((one < reach - ROUNDING).sum(1)) + digamma(
        (two < reach - ROUNDING).sum(1)
    )  # a point is nearer to itself: n + 1
    return float(digamma(k) + digamma(n) - inside.mean())


def _by_trees(one: Float[np.ndarray, "row _"], two: Float[np.ndarray, "row _"], k: int) -> float:
    reach = KDTree(np.hstack([one, two])).query(np.hstack([one, two]), k=k + 1, p=np.inf)[0][:, k]
    inside = digamma(_nearer(one, reach)) + digamma(_nearer(two, reach))
    return float(digamma(k) + digamma(len(one)) - inside.mean())


def _nearer(values: Float[np.ndarray, "row _"], reach: Float[np.ndarray, " row"]) -> np.ndarray:
    """How many points lie strictly nearer than `reach`, the point itself among them.

    The k-th neighbour lies at `reach` exactly, in x or in y: rounding must not let it in.
    """
    reach = np.maximum(reach - ROUNDING, 0)
    if values.shape[1] == 1:
        order = np.sort(values[:, 0])
        low, high = np.searchsorted(order, values[:, 0] - reach, "left"), np.searchsorted(order, values[:, 0] + reach, "right")
        return np.maximum(high - low, 1)
    return KDTree(values).query_ball_point(values, reach, p=np.inf, return_length=True)


def _whitened(values: Float[np.ndarray, "row _"]) -> Float[np.ndarray, "row _"]:
    """An orthonormal basis of the centred columns' span (dependent and constant columns fall out)."""
    centred = values - values.mean(0)
    basis, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    return basis[:, sizes > 1e-10 * max(sizes.max(initial=0), 1e-300)]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """KSG of each pair."""

    left: Values
    right: Values
    pairs: Pairs
    apart: dict[tuple[str, int], Float[np.ndarray, "row row"]]
    """All distances, where there are few rows."""

    def score(self) -> Float[np.ndarray, " pair"]:
        """In nats."""
        return self.statistic()

    def statistic(self, order: Order | None = None) -> Float[np.ndarray, " pair"]:
        """In nats, of permuted rows too."""
        place = np.arange(len(self.left[0])) if order is None else order
        if self.apart:
            cells = np.ix_(place, place)
            both = ((self.apart["left", i], self.apart["right", j][cells]) for i, j in self.pairs)
            return np.array([_by_distances(one, two, NEIGHBOURS) for one, two in both])
        return np.array([_by_trees(self.left[i], self.right[j][place], NEIGHBOURS) for i, j in self.pairs])


def prepare_ksg(left: Values, right: Values, pairs: Pairs, freedom: int, seed: int) -> Neighbours:
    """See `contract.Measure`."""
    one, two = (
        [_spread(value, seed + 1000 * side + n) for n, value in enumerate(values)] for side, values in enumerate((left, right))
    )
    if len(one[0]) <= NEIGHBOURS + 1:
        raise PatchclampError(f"mutual information of {len(one[0])} rows was asked for: give more prompts")
    apart: dict[tuple[str, int], Float[np.ndarray, "row row"]] = {}
    if len(one[0]) <= SMALL:
        apart |= {("left", i): _distances(one[i]) for i in {i for i, _ in pairs}}
        apart |= {("right", j): _distances(two[j]) for j in {j for _, j in pairs}}
    return Neighbours(one, two, pairs, apart)


@dataclass(frozen=True, eq=False)
class Canonical:
    """Gaussian mutual information of each pair, from orthonormal bases of both sides."""

    left: Values
    right: Values
    pairs: Pairs

    def score(self) -> Float[np.ndarray, " pair"]:
        """In nats, bias and all."""
        return self.statistic()

    def statistic(self, order: Order | None = None) -> Float[np.ndarray, " pair"]:
        """In nats."""
        out = np.zeros(len(self.pairs))
        for number, (i, j) in enumerate(self.pairs):
            right = self.right[j] if order is None else self.right[j][order]
            if self.left[i].shape[1] and right.shape[1]:
                canonical = np.minimum(np.linalg.svd(self.left[i].T @ right, compute_uv=False), 1 - 1e-12)
                out[number] = -0.5 * np.log1p(-(canonical**2)).sum()
        return out


def prepare_gaussian(left: Values, right: Values, pairs: Pairs, freedom: int, seed: int) -> Canonical:
    """See `contract.Measure`."""
    one = [_whitened(value) for value in left]
    two = one if right is left else [_whitened(value) for value in right]
    widest = max((one[i].shape[1] + two[j].shape[1] for i, j in pairs), default=0)
    if widest + 2 + freedom > len(left[0]):
        raise PatchclampError(
            f"{len(left[0])} rows of {widest} dimensions on both sides together always correlate perfectly: record a direction or a norm"
        )
    return Canonical(one, two, pairs)


KSG = Measure("mutual information", prepare_ksg, widest=3)
GAUSSIAN = Measure("gaussian information", prepare_gaussian, subtract=True)
