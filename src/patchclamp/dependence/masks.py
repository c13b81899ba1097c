"""Screening by random masks: which pairs of parts interact, from runs with many random gates closed, by sparse regression.

With x(i) = 1 where part i is closed, the benefit is m(x) = m(0) - sum_i e(i) x(i) + sum_{i<j} I(i, j) x(i) x(j) + ..., so products
of closings carry interactions. Every example gets masks of its own, so that one pass over n examples is n observations.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from patchclamp.dependence.closings import Pairs
from patchclamp.errors import PatchclampError
from patchclamp.metrics import Metric, metric_named
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks import Examples

KEPT = 600
"""Products of closings that the sparse regression sees at once."""
ROUNDS = 3


@dataclass(frozen=True, eq=False)
class Masked:
    """Observations: which parts were closed, and what that took from the example's benefit."""

    closed: Bool[np.ndarray, "observation part"]
    loss: Float[np.ndarray, " observation"]


def masked(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    *,
    metric: str | Metric | None = None,
    passes: int = 64,
    share: float = 0.05,
    batch_size: int = 64,
    seed: int = 0,
) -> Masked:
    """Run every example under random masks that close a share of the counted parts each.

    Cost: `passes` forward passes over the examples, and one for the benefit with all gates open.

    Raises:
        PatchclampError: no passes, or a share that closes nothing or everything.
    """
    if passes < 1 or not 0 < share < 1:
        raise PatchclampError(
            f"{passes} masks that close {share} of the parts were asked for: give 1 or more, and a share below 1"
        )
    chosen = metric if isinstance(metric, Metric) else metric_named(metric or examples.metric)
    draw, shut, lost = torch.Generator().manual_seed(seed), list[np.ndarray](), list[np.ndarray]()
    columns = list(parts.counted)
    for batch in examples.batches(batch_size):
        mask = torch.rand(passes, len(batch), len(columns), generator=draw) < share
        gates = parts.open(passes + 1).repeat(1, len(batch), 1, 1)
        gates[:passes, :, 0, columns] = (~mask).to(gates)
        values = (chosen.sign * parts.measure(batch, gates, fallback, chosen)).cpu().double()
        shut.append(mask.flatten(0, 1).numpy())
        lost.append((values[-1] - values[:-1]).flatten().numpy())
    return Masked(np.concatenate(shut), np.concatenate(lost))


def sparse_pairs(seen: Masked, kept: int = KEPT, rounds: int = ROUNDS) -> tuple[Pairs, Float[np.ndarray, " pair"]]:
    """Pairs whose closings go together, with their estimated interactions, largest first.

    Iterated sure independence screening (Fan and Lv 2008, https://doi.org/10.1111/j.1467-9868.2008.00674.x): every product of two
    centred closings is correlated with what the regression so far leaves unexplained, the largest join it, and a lasso, its
    price chosen by cross-validation, keeps what it needs; a few rounds. No heredity is asked for: two parts that do nothing
    alone are found as any others.

    Raises:
        PatchclampError: fewer than 10 observations, which cannot be cross-validated.
    """
    if len(seen.loss) < 10:
        raise PatchclampError(
            f"pairs were to be found in {len(seen.loss)} observations: give more prompts, or more masks (passes=)"
        )
    from sklearn.linear_model import LassoCV

    share = seen.closed.mean(0)
    free = (seen.closed - share) / np.sqrt(np.maximum(share * (1 - share), 1e-12))
    parts = free.shape[1]
    upper = np.triu_indices(parts, 1)
    loss = seen.loss - seen.loss.mean()
    alone = np.argsort(-np.abs(free.T @ loss))[: min(kept, parts)]
    pairs = np.zeros((0, 2), dtype=int)
    left = loss - _fitted(free[:, alone], loss)
    weights = np.zeros(0)
    for number in range(rounds):
        gram = (free * left[:, None]).T @ free  # every product at once
        found = np.argsort(-np.abs(gram[upper]))[: max(1, kept * (number + 1) // rounds)]
        fresh = np.stack([upper[0][found], upper[1][found]], 1)
        pairs = np.unique(np.concatenate([pairs, fresh]), axis=0)
        columns = np.concatenate([free[:, alone], free[:, pairs[:, 0]] * free[:, pairs[:, 1]]], 1)
        model: Any = LassoCV(cv=5, alphas=20, max_iter=20_000, tol=1e-3, fit_intercept=True)
        model.fit(columns, loss)
        weights = np.asarray(model.coef_)[len(alone) :]
        left = loss - np.asarray(model.predict(columns))
        pairs, weights = pairs[weights != 0], weights[weights != 0]
    size = np.sqrt(share * (1 - share))
    estimate = -weights / np.maximum(size[pairs[:, 0]] * size[pairs[:, 1]], 1e-12)  # the loss is minus the benefit
    order = np.argsort(-np.abs(estimate))
    return [(int(i), int(j)) for i, j in pairs[order]], estimate[order]


def _fitted(
    columns: Float[np.ndarray, "observation column"], target: Float[np.ndarray, " observation"]
) -> Float[np.ndarray, " observation"]:
    """Ridge regression's fit: single parts' share, which the products are not to explain."""
    gram = columns.T @ columns + len(columns) * 1e-2 * np.eye(columns.shape[1])
    return columns @ np.linalg.solve(gram, columns.T @ target)
