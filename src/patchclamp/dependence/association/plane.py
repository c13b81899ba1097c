"""The information plane with adaptive bins (EBAB) and adaptive kernels (aKDE): what a layer keeps of input and label over training.

I(T; X) and I(T; Y) of a layer's activity T at each checkpoint, over the same inputs. A deterministic layer's I(T; X) is infinite; what is
estimated is that of T coarse-grained. Bins of fixed width over the whole range take growing activity for less or more information than
there is; adaptive ones do not:

- EBAB (entropy-based adaptive binning): every unit is cut at the quantiles of its own distinct activity, so that as many of its values lie in each
  bin: growth by a monotone function changes nothing.
- aKDE (adaptive kernel density): T is blurred by Gaussian noise whose variance is a share of the layer's own largest activity (squared),
  and I = H(T) - H(T | X) is bounded from below by pairwise Bhattacharyya distances: https://arxiv.org/abs/1706.02419.

Paper: https://arxiv.org/abs/1902.09037 (adaptive estimators).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float, Int
from scipy.special import logsumexp

from patchclamp.errors import PatchclampError

BINS, NOISE = 30, 1e-3


def binned(states: Float[np.ndarray, "example unit"], bins: int = BINS) -> Int[np.ndarray, "example unit"]:
    """Each unit's activity as a bin's number: bins hold as many of its distinct values each; equal values share a bin."""
    if bins < 2:
        raise PatchclampError(f"activity in {bins} bins says nothing: give at least 2")
    out = np.zeros(states.shape, dtype=np.int64)
    for unit, column in enumerate(states.T):
        values, place = np.unique(column, return_inverse=True)
        out[:, unit] = place * min(bins, len(values)) // len(values)
    return out


def _entropy(codes: Int[np.ndarray, "example unit"]) -> float:
    counts = np.unique(codes, axis=0, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def ebab(states: Float[np.ndarray, "example unit"], label: Sequence[object], bins: int = BINS) -> tuple[float, float]:
    """(I(T; X), I(T; Y)) in nats of binned activity; every example is an input of its own, so I(T; X) = H(T)."""
    codes = binned(states, bins)
    return _entropy(codes), _entropy(codes) - _given(codes, label)


def _given(codes: Int[np.ndarray, "example unit"], label: Sequence[object]) -> float:
    names, place = np.unique(np.asarray(label), return_inverse=True)
    return sum(_entropy(codes[place == y]) * float((place == y).mean()) for y in range(len(names)))


def akde(states: Float[np.ndarray, "example unit"], label: Sequence[object], noise: float = NOISE) -> tuple[float, float]:
    """(I(T; X), I(T; Y)) in nats of activity blurred by noise of variance `noise` x the layer's largest |activity|^2."""
    if noise <= 0:
        raise PatchclampError(f"noise of {noise} blurs nothing: a deterministic layer has infinite information about its input")
    largest = float(np.abs(states).max()) ** 2
    if largest == 0:
        return 0.0, 0.0
    square = (states**2).sum(1)
    apart = np.maximum(square[:, None] + square[None] - 2 * states @ states.T, 0) / (8 * noise * largest)  # Bhattacharyya
    names, place = np.unique(np.asarray(label), return_inverse=True)
    whole = _pairwise(apart)
    within = sum(_pairwise(apart[np.ix_(place == y, place == y)]) * float((place == y).mean()) for y in range(len(names)))
    return whole, whole - within


def _pairwise(apart: Float[np.ndarray, "example example"]) -> float:
    """-< log < exp(-distance) > >: the entropy of a mixture of equal Gaussians less that of one."""
    return float(-(logsumexp(-apart, axis=1) - np.log(len(apart))).mean())


def information_plane(
    states: Mapping[object, Float[np.ndarray, "example unit"]],
    label: Sequence[object],
    *,
    how: str = "ebab",
    permutations: int = 19,
    seed: int = 0,
    **options: Any,
) -> pl.DataFrame:
    """The curve over checkpoints (or layers): a row each, `step`, `input`, `output`, `output_null` (mean with labels permuted).

    With few examples and many bins every example has its own code and I(T; Y) is H(Y) whatever T is: the null says so.

    Args:
        states: by checkpoint or layer: activity for the same examples in the same order.
        label: of each example.
        how: "ebab" (option `bins`) or "akde" (option `noise`).
        permutations: of labels, for the null.
        seed: of them.
        options: of the estimator.

    Raises:
        PatchclampError: no such estimator, no permutations, or states of other examples than the labels.
    """
    ways = {"ebab": ebab, "akde": akde}
    if how not in ways:
        raise PatchclampError(f"an information plane is estimated by ebab or akde, not by {how!r}")
    if permutations < 1:
        raise PatchclampError(f"{permutations} permutations of the labels were asked for: the null needs 1 or more")
    draw = np.random.default_rng([seed, 9])
    names = np.unique(np.asarray(label), return_inverse=True)[1]
    mixed = [draw.permutation(names) for _ in range(permutations)]
    rows: list[dict[str, Any]] = []
    for step, value in states.items():
        if len(value) != len(names):
            raise PatchclampError(
                f"{step} has {len(value)} examples and there are {len(names)} labels: give the same examples throughout"
            )
        own, known = ways[how](value, names.tolist(), **options)
        null = [ways[how](value, one.tolist(), **options)[1] for one in mixed]
        rows.append({"step": str(step), "input": own, "output": known, "output_null": float(np.mean(null))})
    return pl.DataFrame(rows)
