"""Partial correlation: what two parts have in common that no other part explains (linearly).

    theta_ij = -P_ij / sqrt(P_ii P_jj),   P = inverse of the covariance

The covariance is shrunk (Ledoit-Wolf or OAS), so that it can be inverted where parts are about as many as rows. Which pairs are
not zero (the support of the graph) is chosen by EBIC over graphical lasso penalties, by stability selection over random
halves, or by permutations (`association(measure="partial correlation")`): never by cross-validation, whose penalty predicts well
and selects far too much.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from patchclamp.dependence.association.contract import Measure, Order, Pairs, Values, columns, shrink_factor
from patchclamp.errors import PatchclampError

Matrix = Float[np.ndarray, "part part"]


def intensity(rows: Float[np.ndarray, "row part"], how: str = "ledoit-wolf") -> float:
    """How far the covariance is shrunk towards a multiple of the identity: 0 (empirical) to 1.

    Raises:
        PatchclampError: no such way, or "empirical" with no more rows than parts.
    """
    from sklearn.covariance import ledoit_wolf, oas

    if how == "empirical":
        if len(rows) <= rows.shape[1]:
            raise PatchclampError(
                f"{len(rows)} rows of {rows.shape[1]} parts have no inverse covariance: use 'ledoit-wolf' or 'oas'"
            )
        return 0.0
    if how not in ("ledoit-wolf", "oas"):
        raise PatchclampError(f"a covariance is shrunk by ledoit-wolf or oas, or is empirical, not {how!r}")
    return float((ledoit_wolf if how == "ledoit-wolf" else oas)(rows)[1])


def shrunk(rows: Float[np.ndarray, "row part"], how: str | float = "ledoit-wolf") -> Matrix:
    """The covariance, shrunk as `intensity` says or by a share of one's own: (1 - share) S + share mean(diag S) I."""
    centred = rows - rows.mean(0)
    covariance, share = centred.T @ centred / len(rows), intensity(rows, how) if isinstance(how, str) else how
    return (1 - share) * covariance + share * np.trace(covariance) / len(covariance) * np.eye(len(covariance))


def explained_by(rows: Float[np.ndarray, "row part"], share: float) -> float:
    """Degrees of freedom that a regression on all columns takes when their covariance is shrunk: sum of d / (d + ridge)."""
    sizes = np.maximum(np.linalg.eigvalsh(shrunk(rows, 0.0)), 0.0)
    kept, ridge = (1 - share) * sizes, share * float(sizes.mean())
    return float((kept / np.maximum(kept + ridge, 1e-300)).sum())


def partial_of(precision: Matrix) -> Matrix:
    """theta from an inverse covariance; 1 on the diagonal."""
    scale = np.sqrt(np.diag(precision))
    theta = -precision / np.outer(scale, scale)
    np.fill_diagonal(theta, 1.0)
    return theta


def partial_correlations(rows: Float[np.ndarray, "row part"], how: str | float = "ledoit-wolf") -> Matrix:
    """theta of every pair given all other parts. Each part is brought to unit variance first."""
    return partial_of(np.linalg.inv(shrunk(_standard(rows), how)))


def _standard(rows: Float[np.ndarray, "row part"]) -> Float[np.ndarray, "row part"]:
    spread = rows.std(0)
    return (rows - rows.mean(0)) / np.where(spread > 0, spread, 1.0)


# --- the permutation test


@dataclass(frozen=True, eq=False)
class Partials:
    """theta by the shrunk inverse; tested by the correlation of the two parts' residuals on all other parts.

    The residuals of the pair regressed on the others are R_ij = X P[:, ij] P[ij, ij]^-1; in the empirical inverse their
    correlation is theta itself. Units of the right residual change places (Freedman and Lane), so that what the others explain
    stays explained. The empirical inverse is used where there are at least twice as many rows as parts, else the shrunk one.
    """

    theta: Float[np.ndarray, " pair"]
    left: Float[np.ndarray, "pair row"]
    right: Float[np.ndarray, "pair row"]
    shrink: float

    def score(self) -> Float[np.ndarray, " pair"]:
        """theta."""
        return self.theta

    def statistic(self, order: Order | None = None) -> Float[np.ndarray, " pair"]:
        """Correlation of residuals."""
        if order is None:
            return (self.left * self.right).sum(1)
        return (self.left * self.right[:, order]).sum(1) / self.shrink


def prepare(left: Values, right: Values, pairs: Pairs, freedom: int, seed: int) -> Partials:
    """See `contract.Measure`. With a lag the two sides are 2p variables: each at its own time, given all others at both times."""
    same = left is right
    table = columns(left) if same else np.vstack([columns(left), columns(right)])
    parts, rows = table.shape
    table = table * np.sqrt(rows)
    live = table.any(1)  # a constant part has no inverse covariance and nothing in common with any other
    tested = np.eye(parts)
    shown, taken = np.eye(parts), 2.0
    cells = np.ix_(live, live)
    if live.any():
        kept = table[live].T
        shown[cells] = partial_correlations(kept)
        share = intensity(kept, "empirical" if rows >= 2 * parts else "ledoit-wolf")
        tested[cells], taken = np.linalg.inv(shrunk(kept, share)), explained_by(kept, share)
    shift = 0 if same else parts // 2
    index = np.array([(i, j + shift) for i, j in pairs], dtype=int).reshape(-1, 2)
    ends = [_residuals(table, tested, i, j) for i, j in index.tolist()]
    one, two = (np.stack([end[side] for end in ends]) if ends else np.zeros((0, rows)) for side in (0, 1))
    return Partials(shown[tuple(index.T)], one, two, shrink_factor(rows, freedom + round(taken) - 2))


def _residuals(table: Float[np.ndarray, "part row"], precision: Matrix, i: int, j: int) -> Float[np.ndarray, "2 row"]:
    left = np.linalg.solve(precision[np.ix_([i, j], [i, j])], precision[[i, j]] @ table)
    left = left - left.mean(1, keepdims=True)
    length = np.linalg.norm(left, axis=1, keepdims=True)
    return left / np.where(length > 0, length, 1.0)


PARTIAL = Measure("partial correlation", prepare, two_sided=True, vectors=False)


# --- the support


def support_by_ebic(
    rows: Float[np.ndarray, "row part"], gamma: float = 0.5, penalties: int = 20
) -> Bool[np.ndarray, "part part"]:
    """Pairs that are not zero in the graphical lasso of least extended BIC; never the cross-validated one.

        EBIC = -2 log likelihood + E log n + 4 E gamma log p,   E = number of edges

    The likelihood is that of the covariance refitted without penalty on the chosen edges, so that shrinkage is not
    counted against sparse graphs. Paper: https://arxiv.org/abs/1011.6640. Rows must be independent.

    Args:
        rows: the data.
        gamma: 0 is BIC; .5 guards against many parts.
        penalties: tried, evenly spread in log from the largest that leaves no edge to a hundredth of it.
    """
    data = _standard(rows)
    n, p = data.shape
    covariance = data.T @ data / n
    best, chosen = np.inf, np.zeros((p, p), dtype=bool)
    for penalty in _penalties(covariance, penalties):
        edges = _lasso_edges(covariance, penalty)
        if edges is None or edges.sum() // 2 > n // 2:
            continue
        precision = _refit(covariance, edges)
        count = int(edges.sum()) // 2
        likelihood = n / 2 * (np.linalg.slogdet(precision)[1] - np.trace(covariance @ precision))
        score = -2 * likelihood + count * np.log(n) + 4 * count * gamma * np.log(p)
        if score < best:
            best, chosen = score, edges
    return chosen


def stability(
    rows: Float[np.ndarray, "row part"],
    groups: list[str] | tuple[str, ...] | None = None,
    *,
    halves: int = 50,
    threshold: float = 0.9,
    edges: int | None = None,
    seed: int = 0,
) -> tuple[Bool[np.ndarray, "part part"], Matrix]:
    """Pairs whose |theta| (Ledoit-Wolf) is among the largest in most random halves of the groups, and how often each one's is.

    Each half chooses its `edges` largest. At most edges^2 / ((2 threshold - 1) pairs) of the pairs that stand are false on
    average, if false ones are exchangeable (Meinshausen and Buehlmann, https://arxiv.org/abs/0809.2932).

    Args:
        rows: the data.
        groups: of each row; halves are drawn of groups, every row on its own without.
        halves: how many.
        threshold: share of halves.
        edges: by default sqrt((2 threshold - 1) pairs): one false pair on average at most, and no more true ones than that.
        seed: of the halves.

    Raises:
        PatchclampError: a threshold that is not above a half (the bound holds from there on), or no halves.
    """
    if not 0.5 < threshold <= 1 or halves < 1:
        raise PatchclampError(
            f"pairs that stand in {threshold} of {halves} halves were asked for: give a share above .5, up to 1, and 1 half or more"
        )
    data, draw = _standard(rows), np.random.default_rng(seed)
    p = data.shape[1]
    wanted = edges or max(1, int(np.sqrt((2 * threshold - 1) * p * (p - 1) / 2)))
    member = np.unique(np.arange(len(data)) if groups is None else np.asarray(groups), return_inverse=True)[1]
    often, count = np.zeros((p, p)), int(member.max()) + 1
    upper, share = np.triu_indices(p, 1), min(intensity(data), 0.9)  # at 1 nothing would be left to rank
    for _ in range(halves):
        half = data[np.isin(member, draw.permutation(count)[: count // 2])]
        strength = np.abs(partial_correlations(half, share)[upper])
        often[tuple(ends[np.argsort(strength)[-wanted:]] for ends in upper)] += 1
    often = (often + often.T) / halves
    return often >= threshold, often


def _penalties(covariance: Matrix, count: int) -> Float[np.ndarray, " penalty"]:
    largest = float(np.abs(covariance - np.diag(np.diag(covariance))).max())
    return np.geomspace(max(largest, 1e-6), max(largest, 1e-6) / 100, count)


def _lasso(covariance: Matrix, penalty: float) -> Matrix | None:
    """theta of the graphical lasso, or None where it does not converge."""
    from sklearn.covariance import graphical_lasso
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            return partial_of(np.asarray(graphical_lasso(covariance, penalty, max_iter=200)[1]))
        except (ConvergenceWarning, FloatingPointError):
            return None


def _lasso_edges(covariance: Matrix, penalty: float) -> Bool[np.ndarray, "part part"] | None:
    theta = _lasso(covariance, penalty)
    if theta is None:
        return None
    edges = np.abs(theta) > 1e-8
    np.fill_diagonal(edges, False)
    return edges


def _refit(covariance: Matrix, edges: Bool[np.ndarray, "part part"], sweeps: int = 100) -> Matrix:
    """The inverse covariance of greatest likelihood that is zero off the edges (Hastie, Tibshirani, Friedman, algorithm 17.1)."""
    fitted, p = covariance.copy(), len(covariance)
    for _ in range(sweeps):
        before = fitted.copy()
        for j in range(p):
            rest, near = np.arange(p) != j, np.flatnonzero(edges[j])
            fitted[rest, j] = 0.0
            if len(near):
                slope = np.linalg.solve(fitted[np.ix_(near, near)], covariance[near, j])
                fitted[rest, j] = fitted[np.ix_(np.flatnonzero(rest), near)] @ slope
            fitted[j, rest] = fitted[rest, j]
        if np.abs(fitted - before).max() < 1e-7:
            break
    return np.linalg.inv(fitted)


def support(
    rows: Float[np.ndarray, "row part"], how: str = "ebic", groups: list[str] | tuple[str, ...] | None = None, seed: int = 0
) -> Bool[np.ndarray, "part part"]:
    """Which pairs have a partial correlation: by "ebic", by "stability", or by "permutation" (q <= .05)."""
    ways: dict[str, Callable[[], Bool[np.ndarray, "part part"]]] = {
        "ebic": lambda: support_by_ebic(rows),
        "stability": lambda: stability(rows, groups, seed=seed)[0],
        "permutation": lambda: _by_permutation(rows, groups, seed),
    }
    if how not in ways:
        raise PatchclampError(f"a support is chosen by {', '.join(ways)}, not by {how!r} (cross-validation selects far too much)")
    return ways[how]()


def _by_permutation(
    rows: Float[np.ndarray, "row part"], groups: list[str] | tuple[str, ...] | None, seed: int, draws: int = 199
) -> Bool[np.ndarray, "part part"]:
    """|theta| above what permuting every part's units on its own gives, at a false discovery rate of .05.

    Permuted data are shrunk as far as the data are (left to itself, the shrinkage of independent parts goes to 1 and their theta
    to 0). The null values of all pairs are pooled, so that p resolves below 1 / draws.
    """
    from scipy.stats import false_discovery_control

    from patchclamp.dependence.association.units import units_of

    n, p = rows.shape
    names = list(map(str, range(n) if groups is None else groups))
    slots = [names[:row].count(name) for row, name in enumerate(names)]
    units, draw = units_of(names, slots), np.random.default_rng(seed)
    upper = np.triu_indices(p, 1)
    share = intensity(_standard(rows))
    seen = np.abs(partial_correlations(rows, share)[upper])
    null = np.sort(np.concatenate([
        np.abs(partial_correlations(np.stack([column[units.permutation(draw)] for column in rows.T], 1), share)[upper])
        for _ in range(draws)
    ]))  # fmt: skip
    above = len(null) - np.searchsorted(null, seen, side="left")
    chosen = false_discovery_control((1 + above) / (1 + len(null))) <= 0.05
    out = np.zeros((p, p), dtype=bool)
    out[upper] = chosen
    return out | out.T
