"""Stochastic shape metrics: how far two noisy representations are apart once one is turned onto the other.

A stimulus i has mean mu_i and covariance S_i over repeats (dropout, paraphrases, the prompts of one answer). With an orthogonal Q,

    d(A, B)^2 = min over Q of  mean over i of  (2 - alpha) |mu_i^A - Q mu_i^B|^2 + alpha B^2(S_i^A, Q S_i^B Q')
    B^2(S, T) = tr S + tr T - 2 tr (S^1/2 T S^1/2)^1/2                                  (Bures: Gaussians' 2-Wasserstein)

alpha 0: means alone (Procrustes), 1: 2-Wasserstein, 2: covariances alone. A metric: 0 for equal ones up to a turn, symmetric, triangle
inequality. https://arxiv.org/abs/2211.11665 (representational dissimilarity metric spaces for stochastic neural networks)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Float

from patchclamp.errors import PatchclampError


@dataclass(frozen=True, eq=False)
class Representation:
    """Means [stimulus, width] and covariances [stimulus, width, width] of responses."""

    mean: Float[np.ndarray, "stimulus width"]
    covariance: Float[np.ndarray, "stimulus width width"]

    @classmethod
    def of(cls, states: Float[np.ndarray, "example width"], stimulus: Sequence[object]) -> "Representation":
        """From responses; the examples of one stimulus are its repeats. Stimuli in sorted order; the grand mean is taken off.

        Raises:
            PatchclampError: a stimulus with fewer than 2 repeats.
        """
        names, place = np.unique(np.asarray(stimulus), return_inverse=True)
        counts = np.bincount(place)
        if counts.min() < 2:
            raise PatchclampError(
                f"{names[counts.argmin()]} was shown once: its spread is not known. Give two repeats or more of each stimulus"
            )
        each = [states[place == i] for i in range(len(names))]
        mean = np.stack([one.mean(0) for one in each])
        covariance = np.stack([np.atleast_2d(np.cov(one.T)) for one in each])
        return cls(mean - mean.mean(0), covariance)

    def padded(self, width: int) -> "Representation":
        """With zero dimensions added."""
        more = width - self.mean.shape[1]
        return Representation(np.pad(self.mean, ((0, 0), (0, more))), np.pad(self.covariance, ((0, 0), (0, more), (0, more))))


def _root(matrix: Float[np.ndarray, "width width"]) -> Float[np.ndarray, "width width"]:
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def bures(one: Float[np.ndarray, "width width"], two: Float[np.ndarray, "width width"]) -> float:
    """Squared Bures distance of two covariances."""
    root = _root(one)
    return float(max(np.trace(one) + np.trace(two) - 2 * np.trace(_root(root @ two @ root)), 0.0))


def shape_distance(
    one: Representation, two: Representation, alpha: float = 1.0, *, updates: int = 200, starts: int = 5, seed: int = 0
) -> float:
    """d of two representations of the same stimuli (widths may differ: the narrower is filled up with zeros).

    By alternation: given Q, each pair of covariances has its best partial turn (polar factor U_i of S_i^A^1/2 Q S_i^B^1/2); given these,
    Q is an orthogonal Procrustes problem. The objective never rises; the best of several starts is taken (alpha 0 needs one).

    Raises:
        PatchclampError: alpha outside [0, 2], or other stimuli.
    """
    if not 0 <= alpha <= 2 or len(one.mean) != len(two.mean):
        raise PatchclampError(
            f"alpha {alpha} must lie in [0, 2], and {len(one.mean)} and {len(two.mean)} stimuli must be the same"
        )
    width = max(one.mean.shape[1], two.mean.shape[1])
    one, two = one.padded(width), two.padded(width)
    left, right = (np.stack([_root(each) for each in side.covariance]) for side in (one, two))
    draw = np.random.default_rng([seed, 10])
    firsts = [_polar((2 - alpha) * one.mean.T @ two.mean + alpha * (left @ right).sum(0))]
    firsts += [np.linalg.qr(draw.normal(size=(width, width)))[0] for _ in range(starts - 1 if alpha > 0 else 0)]
    sizes = float((2 - alpha) * ((one.mean**2).sum() + (two.mean**2).sum()))
    sizes += alpha * float(np.trace(one.covariance, axis1=1, axis2=2).sum() + np.trace(two.covariance, axis1=1, axis2=2).sum())
    best = max(_aligned(one.mean, two.mean, left, right, turn, alpha, updates) for turn in firsts)
    return float(np.sqrt(max(sizes - 2 * best, 0.0) / len(one.mean)))


def _polar(matrix: Float[np.ndarray, "width width"]) -> Float[np.ndarray, "width width"]:
    u, _, v = np.linalg.svd(matrix)
    return u @ v


def _aligned(
    one: Float[np.ndarray, "stimulus width"], two: Float[np.ndarray, "stimulus width"], left: Float[np.ndarray, "stimulus width width"],
    right: Float[np.ndarray, "stimulus width width"], turn: Float[np.ndarray, "width width"], alpha: float, updates: int,
) -> float:  # fmt: skip
    """max over Q of (2 - alpha) <mu^A, mu^B Q'> + alpha sum_i |S_i^A^1/2 Q S_i^B^1/2|_nuclear, from one start."""
    means, seen = (2 - alpha) * one.T @ two, -np.inf
    for _ in range(updates):
        u, sizes, v = np.linalg.svd(left @ turn @ right)
        value = float((means * turn).sum() + alpha * sizes.sum())
        if value <= seen + 1e-12 * abs(value):
            break
        seen = value
        inner = left @ (u @ v) @ right  # gradient of the nuclear norms in Q
        turn = _polar(means + alpha * inner.sum(0))
    return seen


def shape_distances(
    all_of: Mapping[str, Representation], alpha: float = 1.0, *, seed: int = 0
) -> tuple[tuple[str, ...], Float[np.ndarray, "net net"]]:
    """Distances of every two representations: models, layers, checkpoints."""
    names = tuple(all_of)
    out = np.zeros((len(names), len(names)))
    for i, one in enumerate(names):
        for j in range(i):
            out[i, j] = out[j, i] = shape_distance(all_of[one], all_of[names[j]], alpha, seed=seed)
    return names, out


def embedded(distances: Float[np.ndarray, "net net"], dimensions: int = 2) -> Float[np.ndarray, "net dimension"]:
    """Classical scaling: points whose distances are near the given ones."""
    n = len(distances)
    centre = np.eye(n) - 1 / n
    values, vectors = np.linalg.eigh(-0.5 * centre @ distances**2 @ centre)
    order = np.argsort(-values)[:dimensions]
    return vectors[:, order] * np.sqrt(np.maximum(values[order], 0))


def regressed(distances: Float[np.ndarray, "net net"], value: Sequence[float], neighbours: int = 3) -> pl.DataFrame:
    """How well a property of each network (its depth, dropout, step) is told by its nearest others: leave-one-out.

    A row per network: `value`, `predicted` (mean over its nearest neighbours).
    """
    apart = distances + np.diag(np.full(len(distances), np.inf))
    near = np.argsort(apart, 1)[:, :neighbours]
    known = np.asarray(value, dtype=float)
    return pl.DataFrame({"value": known, "predicted": known[near].mean(1)})
