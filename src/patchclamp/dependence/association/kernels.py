"""Kernel measures: HSIC, COCO and CKA of two outputs.

With H the centring and K, L the Gram matrices of n rows (Gaussian kernel, width the median distance; CKA: linear):
    HSIC = tr(K H L H) / n^2                             https://www.gatsby.ucl.ac.uk/~gretton/papers/GreBouSmoSch05.pdf
    COCO = sqrt(largest eigenvalue of (H K H)(H L H)) / n
    CKA  = |X' Y|_F^2 / (|X' X|_F |Y' Y|_F), centred     https://arxiv.org/abs/1905.00414
    debiased CKA: the same with the unbiased HSIC; about 0 where there is nothing, at any width. https://arxiv.org/abs/2010.15327
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float

from patchclamp.dependence.association.contract import Measure, Order, Pairs, Values
from patchclamp.errors import PatchclampError
from patchclamp.scores.kernels import Gram, centred, gaussian_gram


def linear_gram(values: Float[np.ndarray, "row _"]) -> Gram:
    """X X' of centred rows."""
    centred = values - values.mean(0)
    return centred @ centred.T


def unbiased_hsic(one: Gram, two: Gram) -> float:
    """The U-statistic: 0 on average where there is nothing (Song et al. 2012, equation 5)."""
    return float((ucentred(one) * ucentred(two)).sum() / (len(one) * (len(one) - 3)))


def ucentred(gram: Gram) -> Gram:
    """U-centred: off the diagonal K_ij - row_i / (n-2) - row_j / (n-2) + all / ((n-1)(n-2)), 0 on it."""
    n = len(gram)
    if n < 4:
        raise PatchclampError(f"an unbiased HSIC needs 4 rows, not {n}")
    bare = gram - np.diag(np.diag(gram))
    rows = bare.sum(1)
    out = bare - (rows[:, None] + rows[None]) / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return out - np.diag(np.diag(out))


def coco(one: Gram, two: Gram) -> float:
    """The largest covariance of a unit-norm function of each side: sqrt of the largest eigenvalue of centred K L, over n."""
    left, right = centred(one), centred(two)
    values, vectors = np.linalg.eigh(left)
    root = vectors * np.sqrt(np.maximum(values, 0))
    return float(np.sqrt(max(np.linalg.eigvalsh(root.T @ right @ root)[-1], 0.0)) / len(one))


def cka(x: Float[np.ndarray, "row _"], y: Float[np.ndarray, "row _"], debiased: bool = True) -> float:
    """Linear centred kernel alignment of two representations of the same rows; debiased it may fall below 0."""
    one, two = linear_gram(x), linear_gram(y)
    left, right = (ucentred(one), ucentred(two)) if debiased else (centred(one), centred(two))
    scale = np.sqrt(float((left * left).sum()) * float((right * right).sum()))
    return float((left * right).sum() / scale) if scale > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Grams:
    """Sums of products of Gram matrices: a permutation reorders one side's rows and columns."""

    left: dict[int, Gram]
    right: dict[int, Gram]
    pairs: Pairs
    scale: Float[np.ndarray, " pair"]
    largest: bool = False

    def score(self) -> Float[np.ndarray, " pair"]:
        """As the rows stand."""
        return self.statistic()

    def statistic(self, order: Order | None = None) -> Float[np.ndarray, " pair"]:
        """With the right rows in `order`."""
        moved = self.right if order is None else {j: gram[np.ix_(order, order)] for j, gram in self.right.items()}
        if self.largest:
            return np.array([coco(self.left[i], moved[j]) for i, j in self.pairs])
        sums = np.array([np.einsum("ij,ij->", self.left[i], moved[j]) for i, j in self.pairs])
        return sums * self.scale


def prepare(kind: str, left: Values, right: Values, pairs: Pairs, freedom: int, seed: int) -> Grams:
    """See `contract.Measure`; `kind` is hsic, coco, cka or "debiased cka"."""
    linear, fix = kind.endswith("cka"), ucentred if kind == "debiased cka" else centred
    gram = linear_gram if linear else gaussian_gram
    one = {i: fix(gram(left[i])) for i in {i for i, _ in pairs}}
    two = {j: one[j] if right is left and j in one else fix(gram(right[j])) for j in {j for _, j in pairs}}
    n = len(left[0]) if left else 0
    if not linear:
        return Grams(one, two, pairs, np.full(len(pairs), 1 / n**2), kind == "coco")
    sizes = [np.sqrt(float((one[i] ** 2).sum()) * float((two[j] ** 2).sum())) for i, j in pairs]
    return Grams(one, two, pairs, np.array([1 / size if size > 0 else 0.0 for size in sizes]))


HSIC = Measure("hsic", partial(prepare, "hsic"))
COCO = Measure("coco", partial(prepare, "coco"))
CKA = Measure("cka", partial(prepare, "cka"))
DEBIASED_CKA = Measure("debiased cka", partial(prepare, "debiased cka"))
