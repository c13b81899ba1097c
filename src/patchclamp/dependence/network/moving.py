"""The dynamic connectome: which parts go together at which tokens, as a few motifs that come and go.

Affinity: |correlation| of two parts' outputs over the prompts and tokens of a window that slides over positions, [part, part, time].
Non-negative factorisation: A[i, j, t] ~ sum over r of out[i, r] in[j, r] course[t, r], by multiplicative updates, each of which lowers
the squared error. https://arxiv.org/abs/2402.14102 (dynamic functional connectome: units there are neurons, time is recorded time).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float, Int

from patchclamp.dependence.association.recording import Recorded
from patchclamp.dependence.association.units import codes_of, residual
from patchclamp.dependence.network.communities import communities
from patchclamp.dependence.network.graph import Connectome
from patchclamp.errors import PatchclampError

Tensor3 = Float[np.ndarray, "part part time"]
TINY = 1e-12


def affinity(
    outputs: Recorded, window: int = 3, step: int = 1, *, given: Sequence[str] = ("position",), prompts: int = 10
) -> tuple[Tensor3, list[int]]:
    """|correlation| of every two parts in each window of positions, and the windows' first positions.

    Args:
        outputs: one number per part and token.
        window: positions at once.
        step: between windows.
        given: what is taken off first, within the window: "position", "token".
        prompts: windows that fewer prompts reach are left out.

    Raises:
        PatchclampError: no window has enough prompts, a window or step of no positions, a condition that is none, or outputs are
            vectors.
    """
    if window < 1 or step < 1:
        raise PatchclampError(f"windows of {window} positions, {step} apart, were asked for: give 1 or more of both")
    if strange := sorted({*given} - {"position", "token"}):
        raise PatchclampError(f"affinities given {strange[0]!r} were asked for: choose from position, token")
    if any(value.shape[1] != 1 for value in outputs.values):
        raise PatchclampError("a dynamic connectome needs one number per part and token: record a norm or a contribution")
    table = np.hstack(list(outputs.values))
    slices, starts = list[np.ndarray](), list[int]()
    for start in range(0, int(outputs.position.max()) + 2 - window, step):
        rows = np.flatnonzero((outputs.position >= start) & (outputs.position < start + window))
        if len(np.unique(outputs.example[rows])) < prompts:
            continue
        left = residual(table[rows], [codes_of(getattr(outputs, name)[rows]) for name in given])
        left = np.where(np.linalg.norm(left, axis=0) > 1e-6 * np.linalg.norm(table[rows], axis=0), left, 0.0)
        length = np.linalg.norm(left, axis=0)
        left = left / np.where(length > 0, length, 1.0)
        slices.append(np.abs(left.T @ left) * (1 - np.eye(table.shape[1])))
        starts.append(start)
    if not slices:
        raise PatchclampError(
            f"no window of {window} positions is reached by {prompts} prompts: give more prompts or a smaller window"
        )
    return np.clip(np.stack(slices, 2), 0, 1), starts


@dataclass(frozen=True, eq=False)
class Factors:
    """A non-negative factorisation of [part, part, time].

    Args:
        out: [part, motif], columns of sum 1: how much each part belongs to a motif (as the first of a pair).
        into: the same, as the second of a pair; equal to `out` up to the fit where the tensor is symmetric.
        course: [time, motif]: how strong each motif is when.
        explained: 1 - squared error / squared size.
        errors: squared error after each update.
        stability: mean cosine of each motif with its match in other seeds' fits, lowest motif.
    """

    out: Float[np.ndarray, "part motif"]
    into: Float[np.ndarray, "part motif"]
    course: Float[np.ndarray, "time motif"]
    explained: float
    errors: tuple[float, ...]
    stability: float = 1.0

    def rebuilt(self) -> Tensor3:
        """What the motifs make of the tensor."""
        return np.einsum("ir,jr,tr->ijt", self.out, self.into, self.course)


def factorise(tensor: Tensor3, motifs: int, *, updates: int = 1000, tolerance: float = 1e-10, seed: int = 0) -> Factors:
    """One factorisation. Motifs start at slices in time that are unlike each other, the first of them random.

    Each factor in turn is multiplied by (tensor x others) / (fit x others): non-negative always, and the squared error never rises
    (Lee and Seung's argument, for each unfolding).

    Raises:
        PatchclampError: negative numbers, or no motif.
    """
    if (tensor < 0).any() or motifs < 1:
        raise PatchclampError("a non-negative factorisation takes numbers of 0 or more, and at least one motif")
    draw = np.random.default_rng([seed, 8])
    size = float((tensor**2).sum())
    factors = _start(tensor, motifs, draw)
    forms = ("ijt,jr,tr->ir", "ijt,ir,tr->jr", "ijt,ir,jr->tr")
    errors: list[float] = []
    for _ in range(updates):
        for axis, form in enumerate(forms):
            one, two = (factor for number, factor in enumerate(factors) if number != axis)
            above = np.einsum(form, tensor, one, two, optimize=True)
            below = factors[axis] @ ((one.T @ one) * (two.T @ two))
            factors[axis] = factors[axis] * above / (below + TINY)
        gram = (factors[0].T @ factors[0]) * (factors[1].T @ factors[1]) * (factors[2].T @ factors[2])
        errors.append(max(size - 2 * float((factors[2] * above).sum()) + float(gram.sum()), 0.0))  # pyright: ignore[reportPossiblyUnboundVariable]
        if len(errors) > 1 and errors[-2] - errors[-1] <= tolerance * size:
            break
    out, into, course = factors
    sums = [factor.sum(0) for factor in (out, into)]
    out, into = (factor / np.where(total > 0, total, 1.0) for factor, total in zip((out, into), sums, strict=True))
    course = course * sums[0] * sums[1]
    order = np.argsort(-course.sum(0))
    return Factors(out[:, order], into[:, order], course[:, order], 1 - errors[-1] / size if size else 1.0, tuple(errors))


def _start(tensor: Tensor3, motifs: int, draw: np.random.Generator) -> list[Float[np.ndarray, "_ motif"]]:
    """Each motif begins as the best rank-one form of one slice; noise lets every part and time join it.

    From a start at random all motifs run to the heaviest block, and what has reached 0 never leaves it. As in k-means++, a slice is
    drawn with a chance that grows with its squared distance from those drawn.
    """
    slices = np.moveaxis(tensor, 2, 0)
    flat = slices.reshape(len(slices), -1)
    chance, picked = np.ones(len(slices)), list[int]()
    for _ in range(motifs):
        total = chance.sum()
        picked.append(int(draw.choice(len(slices), p=chance / total if total > 0 else None)))
        chance = np.min([((flat - flat[t]) ** 2).sum(1) for t in picked], 0)
    ends = [np.linalg.svd(slices[t]) for t in picked]
    sizes = [np.sqrt(one[1][0]) for one in ends]
    out = np.stack([size * np.abs(one[0][:, 0]) for size, one in zip(sizes, ends, strict=True)], 1)
    into = np.stack([size * np.abs(one[2][0]) for size, one in zip(sizes, ends, strict=True)], 1)
    course = np.stack([flat @ flat[t] / max(float(flat[t] @ flat[t]), TINY) for t in picked], 1)
    return [one + 0.1 * (one.mean() + TINY) * draw.uniform(0.1, 1, one.shape) for one in (out, into, course)]


def motifs(tensor: Tensor3, count: int, *, seeds: int = 5, updates: int = 1000, seed: int = 0) -> Factors:
    """The best of several factorisations, with how alike the others' motifs are."""
    found = [factorise(tensor, count, updates=updates, seed=seed * 1009 + number) for number in range(seeds)]
    best = max(found, key=lambda one: one.explained)
    alike = [_matched(best, one) for one in found if one is not best]
    stability = float(np.mean(alike, 0).min()) if alike else 1.0
    return Factors(best.out, best.into, best.course, best.explained, best.errors, stability)


def _matched(one: Factors, two: Factors) -> Float[np.ndarray, " motif"]:
    """Cosine of each motif with its partner (the three factors' cosines multiplied), partners chosen for the largest sum."""
    from scipy.optimize import linear_sum_assignment

    cosines = np.ones((one.out.shape[1], two.out.shape[1]))
    for name in ("out", "into", "course"):
        left, right = (
            factor / np.maximum(np.linalg.norm(factor, axis=0), TINY) for factor in (getattr(one, name), getattr(two, name))
        )
        cosines = cosines * (left.T @ right)
    rows, columns = linear_sum_assignment(-cosines)
    return cosines[rows, columns]


@dataclass(frozen=True, eq=False)
class Moving:
    """A dynamic connectome.

    Args:
        parts: names.
        starts: first position of each window.
        tensor: [part, part, window], the affinities.
        factors: the motifs.
        labels: [motif, part]: the community of each part while that motif is on (parts weighted by it), -1 where it has no part in it.
    """

    parts: tuple[str, ...]
    starts: tuple[int, ...]
    tensor: Tensor3
    factors: Factors
    labels: Int[np.ndarray, "motif part"]

    def to_record(self) -> dict[str, Any]:
        """Frames `membership` (motif, part, weight, community) and `course` (motif, position, strength), and scalars."""
        count = self.factors.out.shape[1]
        weight = (self.factors.out + self.factors.into) / 2
        member = [
            {"motif": r, "part": part, "weight": float(weight[i, r]), "community": int(self.labels[r, i])}
            for r in range(count) for i, part in enumerate(self.parts)
        ]  # fmt: skip
        course = [
            {"motif": r, "position": start, "strength": float(self.factors.course[t, r])}
            for r in range(count) for t, start in enumerate(self.starts)
        ]  # fmt: skip
        return {"membership": pl.DataFrame(member), "course": pl.DataFrame(course), "explained": self.factors.explained,
                "stability": self.factors.stability}  # fmt: skip


def moving_connectome(
    outputs: Recorded, count: int = 3, *, window: int = 3, step: int = 1, given: Sequence[str] = ("position",), seeds: int = 5,
    seed: int = 0,
) -> Moving:  # fmt: skip
    """Affinities over a sliding window, their motifs, and each motif's communities.

    A motif's communities are those of the affinities averaged over time with its course as weights, among the parts whose membership
    is above that of a motif that takes all parts alike (1 / parts).

    Args:
        outputs: one number per part and token.
        count: motifs.
        window, step, given: see `affinity`.
        seeds: factorisations tried.
        seed: of them.
    """
    tensor, starts = affinity(outputs, window, step, given=given)
    factors = motifs(tensor, count, seeds=seeds, seed=seed)
    labels = np.full((count, len(outputs.parts)), -1)
    for r in range(count):
        course = factors.course[:, r]
        member = np.flatnonzero((factors.out[:, r] + factors.into[:, r]) / 2 > 1 / len(outputs.parts))
        if course.sum() <= 0 or not len(member):
            continue
        weights = (tensor * course).sum(2)[np.ix_(member, member)] / course.sum()
        graph = Connectome(tuple(outputs.parts[i] for i in member), (weights + weights.T) / 2, False, {})
        labels[r, member] = communities(graph, seed=seed).label
    return Moving(outputs.parts, tuple(starts), tensor, factors, labels)
