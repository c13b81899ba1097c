"""Exactly k parts: area-constrained gates (extremal perturbations; Fong, Patrick, Vedaldi, 1910.08485).

    objective(m) = mean over examples of NLL(answer; gates m) + weight * ||sort(m) - r_k||^2 + lambda * mean M,   m = sigmoid(M)

where r_k is 0 (parts - k times) and then 1 (k times), so that the constraint is met where exactly k gates are open and all others
closed. The weight grows geometrically over the descent. The last term, the pressure of `fit`, lets parts sink that do nothing:
without it those that happen to lie highest at first would be held among the k by the constraint itself. At the end the
k largest gates are the set. No smoothness is asked of the mask: parts have no neighbours. https://arxiv.org/abs/1910.08485
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.gating.descent import Adam, Progress, clipped, full_gates, nll_slope, random_logits, sigmoid
from patchclamp.gating.examples import balanced
from patchclamp.gating.objective import GatingSettings, Stage
from patchclamp.gating.sufficiency import nll_of
from patchclamp.metrics import METRICS
from patchclamp.parts import Fallback, Parts, sites_of
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

OPEN, NOISE = (
    2.0,
    0.3,
)  # gates begin mostly open, where slopes say what each part is worth beside the others; seeds differ a little
WEIGHTS = (0.01, 3.0)  # of the constraint, at the first and the last update
SWAPS = 400  # tried at most in one round of polishing: every pair, or those of the parts that look best
ROUNDS = 6


@dataclass(frozen=True, eq=False)
class Exactly:
    """Sets of exactly k parts.

    Args:
        labels: the gated parts.
        sizes: each k.
        seeds: by number.
        gate: [size, seed, part], the masks as learned.
        kept: [size, seed, part], the k largest, after swaps.
        nll: [size, seed], of `kept` on the prompts of the fit.
        swaps: [size, seed], how many swaps bettered the learned set.
        warnings: what the reader must know.
    """

    labels: tuple[Site, ...]
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    gate: Float[np.ndarray, "size seed part"]
    kept: Bool[np.ndarray, "size seed part"]
    nll: Float[np.ndarray, "size seed"]
    swaps: np.ndarray
    warnings: tuple[str, ...] = ()

    @property
    def best(self) -> Bool[np.ndarray, "size part"]:
        """For each size, the set of the seed with the lowest NLL on the prompts of the fit."""
        return self.kept[np.arange(len(self.sizes)), self.nll.argmin(1)]


def area(
    gate: Float[Tensor, "setting part"], sizes: Sequence[int]
) -> tuple[Float[Tensor, " setting"], Float[Tensor, "setting part"]]:
    """||sort(m) - r_k||^2 and its slope in each gate: 2 (m - r_k at the gate's rank)."""
    order = torch.argsort(gate, dim=1, stable=True)
    template = (torch.arange(gate.shape[1])[None] >= gate.shape[1] - torch.tensor(sizes)[:, None]).to(gate)
    apart = gate - torch.zeros_like(gate).scatter(1, order, template)
    return apart.square().sum(1), 2 * apart


def fit_exactly(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    sizes: Sequence[int],
    settings: GatingSettings = GatingSettings(),
    stage: Stage = Stage(80, 0.6, 0.1),
    rounds: int = ROUNDS,
    *,
    progress: Progress | None = None,
) -> Exactly:
    """Learn the sets of exactly k parts that keep the answers likeliest, for every k and seed in one fold.

    What was learned is then polished by exact swaps on the prompts of the fit: of all pairs (one part of the set, one other), or
    where these are more than 400 of those that look best one by one, the swap that lowers the NLL most is made, as long as one does.

    Args:
        parts: what is gated; `embed` stays open.
        examples: to fit on; pairs are read in both directions where they can be mirrored.
        fallback: what a closed gate passes.
        sizes: each k.
        settings: seeds, batch, clip, memory, hold, clamp and seed are taken.
        stage: updates and learning rates.
        rounds: of swaps at most; 0 leaves the learned set.

    Cost: per update, one forward and one backward pass over the batch per size and seed; per round, set and swap, one forward pass
    over a batch.

    Raises:
        GateError: a size that is not between 0 and the number of parts.
    """
    count = len(parts.counted)
    if not sizes or min(sizes) < 0 or max(sizes) > count:
        raise GateError(f"sets of {list(sizes)} parts were asked for, and there are {count}: give sizes from 0 to {count}")
    ready = balanced(examples, settings)
    seeds = tuple(range(settings.seed, settings.seed + settings.seeds))
    wanted = [size for size in sizes for _ in seeds]
    logits = (OPEN + NOISE * random_logits(count, seeds, settings)).repeat(len(sizes), 1)
    adam, rows = Adam(logits, settings.memory), torch.arange(len(wanted))
    batches = ready.batches(settings.batch, settings.seed, 6)
    for update in range(stage.updates):
        at = update / max(1, stage.updates - 1)
        weight = WEIGHTS[0] * (WEIGHTS[1] / WEIGHTS[0]) ** at
        gate = logits.sigmoid()
        _, slope = nll_slope(parts, next(batches), logits, fallback)
        slope = slope + settings.slope(count) + weight * area(gate, wanted)[1] * gate * (1 - gate)
        rate = stage.rate + (stage.last_rate - stage.rate) * at
        logits = adam.step(logits, clipped(slope, settings.clip), rows, rate)
        logits = logits.clamp(-settings.clamp, settings.clamp)
        if progress is not None:
            progress("exactly k", update + 1, stage.updates)
    gate = sigmoid(logits.numpy())
    kept = np.zeros(gate.shape, dtype=bool)
    for row, size in enumerate(wanted):
        kept[row, np.argsort(-gate[row], kind="stable")[:size]] = True
    polish = ready.examples.take(range(min(len(ready.examples), 2 * settings.batch))).batch()
    swapped = [_polished(parts, polish, fallback, one, rounds) for one in kept]
    kept, shape = np.stack([one for one, _ in swapped]), (len(sizes), len(seeds))
    nll = nll_of(parts, kept, ready.examples, fallback).reshape(shape)
    swaps = np.array([many for _, many in swapped]).reshape(shape)
    return Exactly(
        tuple(sites_of(parts)),
        tuple(sizes),
        seeds,
        gate.reshape(*shape, -1),
        kept.reshape(*shape, -1),
        nll,
        swaps,
        ready.warnings,
    )


def _polished(
    parts: Parts, batch: Batch, fallback: Fallback, kept: Bool[np.ndarray, " part"], rounds: int
) -> tuple[Bool[np.ndarray, " part"], int]:
    """The set after swaps that each lower the NLL most, and how many these were."""
    kept = kept.copy()

    def nll(rows: np.ndarray) -> np.ndarray:
        gates = full_gates(parts, torch.from_numpy(rows.astype(float)))
        return parts.measure(batch, gates, fallback, METRICS["nll"]).mean(1).double().cpu().numpy()

    for done in range(rounds):
        inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
        if not len(inside) or not len(outside):
            return kept, done
        if len(inside) * len(outside) > SWAPS:
            inside, outside = _promising(kept, inside, outside, nll)
        pairs = [(one, other) for one in inside for other in outside]
        rows = np.repeat(kept[None], 1 + len(pairs), 0)
        for number, (one, other) in enumerate(pairs):
            rows[1 + number, [one, other]] = False, True
        found = nll(rows)
        best = int(found.argmin())
        if found[best] >= found[0] - 1e-6:
            return kept, done
        kept = rows[best]
    return kept, rounds


def _promising(
    kept: np.ndarray, inside: np.ndarray, outside: np.ndarray, nll: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The parts whose closing costs least and those whose opening gains most, one by one: as many as make 400 pairs."""
    rows = np.repeat(kept[None], len(inside) + len(outside), 0)
    turned = np.concatenate([inside, outside])
    rows[np.arange(len(turned)), turned] ^= True
    found = nll(rows)
    few = max(1, int(SWAPS**0.5))
    return inside[np.argsort(found[: len(inside)])[:few]], outside[np.argsort(found[len(inside) :])[:few]]
