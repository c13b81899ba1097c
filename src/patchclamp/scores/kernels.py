"""Gram matrices and the Hilbert-Schmidt independence criterion.

With H the centring and K, L the Gram matrices of n rows: HSIC = tr(K H L H) / n^2
(Gretton et al. 2005, https://www.gatsby.ucl.ac.uk/~gretton/papers/GreBouSmoSch05.pdf).
"""

import numpy as np
from jaxtyping import Float

Gram = Float[np.ndarray, "row row"]


def gaussian_gram(values: Float[np.ndarray, "row _"], width: float | None = None) -> Gram:
    """exp(-d^2 / 2 w^2); w by default the median distance between rows (1 where all are equal)."""
    square = (values**2).sum(1)
    apart = np.maximum(square[:, None] + square[None] - 2 * values @ values.T, 0.0)
    if width is None:
        middle = float(np.median(apart[np.triu_indices(len(values), 1)]))
        width = float(np.sqrt(middle)) or float(np.sqrt(apart.max() / 2)) or 1.0
    return np.exp(-apart / (2 * width**2))


def centred(gram: Gram) -> Gram:
    """H K H."""
    return gram - gram.mean(0) - gram.mean(1, keepdims=True) + gram.mean()


def hsic(one: Gram, two: Gram) -> float:
    """Biased HSIC: 0 only where there is no dependence at all (Gaussian kernels)."""
    return float((centred(one) * centred(two)).sum() / len(one) ** 2)
