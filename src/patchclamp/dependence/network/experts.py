"""Neurons that fire together as experts: a dense MLP as a mixture of experts (MoEfication), with the routers that could choose among them.

Neurons of one MLP are split into equal sets by co-activation; on each token only the sets that a router chooses stay, the other neurons are
set to zero; what is kept of the behaviour is set against the share of neurons kept, and against random sets of the same sizes.
https://arxiv.org/abs/2110.01786
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from patchclamp.errors import PatchclampError
from patchclamp.methods import groups_of
from patchclamp.metrics import metric_named
from patchclamp.models.editing import Edits, Seen
from patchclamp.models.model import Model
from patchclamp.scores.statistics import mean_interval
from patchclamp.sites import Site
from patchclamp.tasks import Examples

ROUNDS = 20


def activity(
    model: Model, examples: Examples, layer: int, batch_size: int = 32
) -> tuple[Float[np.ndarray, "token neuron"], Float[np.ndarray, "token width"]]:
    """|activation| of an MLP's neurons at every prompt token, and the residual stream that the MLP reads. One forward pass."""
    neurons, source = Site("neuron", layer), _source(model, layer)
    out: list[np.ndarray] = []
    read: list[np.ndarray] = []
    for batch in examples.batches(batch_size):
        kept = model.record(batch, [neurons, source])
        inside = batch.mask & (batch.sign > 0)[:, None]
        out.append(kept[neurons].detach()[inside].abs().double().cpu().numpy())
        read.append(kept[source].detach()[inside].double().cpu().numpy())
    return np.concatenate(out), np.concatenate(read)


def _source(model: Model, layer: int) -> Site:
    return Site("resid.pre" if model.anatomy.parallel else "resid.mid", layer)


def coactivation(active: Float[np.ndarray, "token neuron"]) -> Float[np.ndarray, "neuron neuron"]:
    """Cosine of every two neurons' |activation| over tokens; 0 for a dead neuron, 0 on the diagonal."""
    length = np.linalg.norm(active, axis=0)
    unit = active / np.where(length > 0, length, 1.0)
    out = unit.T @ unit
    np.fill_diagonal(out, 0.0)
    return out


def balanced_partition(weights: Float[np.ndarray, "neuron neuron"], experts: int, *, seed: int = 0) -> Int[np.ndarray, " neuron"]:
    """Neurons in sets of equal size (but for a remainder of one) that go together: balanced k-means on the graph's leading eigenvectors.

    Each round assigns all neurons at once so that the summed distance to the sets' centres is smallest with every set full.

    Raises:
        PatchclampError: fewer than 2 sets, or more than neurons.
    """
    count = len(weights)
    if not 2 <= experts <= count:
        raise PatchclampError(f"{count} neurons in {experts} experts were asked for: give 2 to {count}")
    degree = np.maximum(weights.sum(1), 1e-12)
    vectors = np.linalg.eigh(weights / np.sqrt(np.outer(degree, degree)))[1][:, -experts:]
    points = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    slots = np.arange(count) % experts  # which expert each seat belongs to
    best, found = np.inf, slots
    for start in range(5):
        label, cost = _balanced(points, slots, np.random.default_rng([seed, start]))
        if cost < best:
            best, found = cost, label
    return found


def _balanced(
    points: Float[np.ndarray, "neuron dimension"], slots: Int[np.ndarray, " seat"], draw: np.random.Generator
) -> tuple[Int[np.ndarray, " neuron"], float]:
    experts = int(slots.max()) + 1
    picked = [int(draw.integers(len(points)))]
    while len(picked) < experts:  # as k-means++: far from those picked
        apart = np.min([((points - points[p]) ** 2).sum(1) for p in picked], 0)
        picked.append(
            int(draw.choice(len(points), p=apart / apart.sum())) if apart.sum() > 0 else int(draw.integers(len(points)))
        )
    centres, label, cost = points[picked], np.full(len(points), -1), np.inf
    for _ in range(ROUNDS):
        apart = ((points[:, None] - centres[None]) ** 2).sum(2)
        rows, seats = linear_sum_assignment(apart[:, slots])
        new = np.empty(len(points), dtype=np.int64)
        new[rows] = slots[seats]
        cost = float(apart[np.arange(len(points)), new].sum())
        if np.array_equal(new, label):
            break
        label = new
        centres = np.stack([points[label == e].mean(0) for e in range(experts)])
    return label, cost


def inside_share(weights: Float[np.ndarray, "neuron neuron"], label: Int[np.ndarray, " neuron"]) -> float:
    """Share of all co-activation that lies within experts."""
    return float(weights[label[:, None] == label[None]].sum() / max(weights.sum(), 1e-300))


@dataclass(frozen=True, eq=False)
class LinearRouter:
    """Each expert's activity, foretold linearly from the residual stream (ridge regression on the logarithm of summed |activation|)."""

    weight: Float[Tensor, "width expert"]
    bias: Float[Tensor, " expert"]

    @classmethod
    def learned(
        cls, read: Float[np.ndarray, "token width"], active: Float[np.ndarray, "token neuron"], label: Int[np.ndarray, " neuron"]
    ) -> "LinearRouter":
        """From tokens of fit prompts."""
        from sklearn.linear_model import RidgeCV

        sums = np.stack([active[:, label == e].sum(1) for e in range(int(label.max()) + 1)], 1)
        scale = read.std(0).mean() or 1.0
        model: Any = RidgeCV(np.geomspace(1e-4, 1e4, 9)).fit(read / scale, np.log(sums + 1e-6))
        return cls(torch.from_numpy(np.atleast_2d(model.coef_).T / scale), torch.from_numpy(np.atleast_1d(model.intercept_)))


@dataclass(frozen=True, eq=False)
class Routed:
    """An edit at an MLP's neurons: those of experts that are not chosen are zero. Without a router the choice is the oracle's (own activity)."""

    label: Int[Tensor, " neuron"]
    keep: int
    source: Site
    router: LinearRouter | None = None

    @property
    def reads(self) -> tuple[Site, ...]:
        """What the router looks at."""
        return () if self.router is None else (self.source,)

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        experts = int(self.label.max()) + 1
        one_hot = torch.nn.functional.one_hot(self.label, experts).to(value)
        if self.router is None:
            score = value.abs() @ one_hot
        else:
            score = seen.values[self.source].to(value) @ self.router.weight.to(value) + self.router.bias.to(value)
        chosen = torch.zeros_like(score).scatter(-1, score.topk(self.keep, -1).indices, 1.0)
        return value * (chosen @ one_hot.T)


def moefied(
    model: Model,
    fit: Examples,
    confirm: Examples,
    layer: int,
    experts: int,
    *,
    keeps: Sequence[int] | None = None,
    metric: str | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> pl.DataFrame:
    """How much of the behaviour stays when an MLP runs a share of its experts on each token.

    Args:
        model: the model.
        fit: prompts by which neurons are grouped and the router is learned.
        confirm: other prompts, on which it is measured.
        layer: whose MLP.
        experts: how many.
        keeps: experts kept per token; by default every number.
        metric: by default the task's.
        seed: of partitions.
        batch_size: examples at once.

    Returns:
        A row per number kept, partition ("co-activation", "random") and router ("oracle", "learned"): `keep`, `share`, `partition`, `router`,
        `benefit`, `low`, `high`, `open` (all neurons), `inside` (co-activation within experts).

    Cost: one pass over fit, 4 passes over confirm per number kept.

    Raises:
        PatchclampError: more kept than there are, or the layer's neurons are no site.
    """
    keeps = list(range(1, experts + 1)) if keeps is None else list(keeps)
    if any(not 1 <= keep <= experts for keep in keeps):
        raise PatchclampError(f"of {experts} experts {max(keeps)} cannot be kept: give 1 to {experts}")
    active, read = activity(model, fit, layer, batch_size)
    weights = coactivation(active)
    together = balanced_partition(weights, experts, seed=seed)
    mixed = np.random.default_rng([seed, 13]).permutation(together)
    opened = run_benefits(model, confirm, {}, metric, batch_size).mean()
    rows: list[dict[str, Any]] = []
    for name, label in (("co-activation", together), ("random", mixed)):
        learned = LinearRouter.learned(read, active, label)
        for keep in keeps:
            for router in (None, learned):
                edit = Routed(torch.from_numpy(label).to(model.device), keep, _source(model, layer), router)
                values = run_benefits(model, confirm, {Site("neuron", layer): edit}, metric, batch_size)
                mean = mean_interval(values, groups_of(confirm), seed=seed)
                rows.append({
                    "keep": keep, "share": keep / experts, "partition": name, "router": "oracle" if router is None else "learned",
                    "benefit": mean.mean, "low": mean.low, "high": mean.high, "open": float(opened), "inside": inside_share(weights, label),
                })  # fmt: skip
    return pl.DataFrame(rows)


def run_benefits(
    model: Model, examples: Examples, edits: Edits, metric: str | None, batch_size: int
) -> Float[np.ndarray, " example"]:
    """The behaviour's benefit of each example while edits are on. One forward pass (two where the metric compares with the open run)."""
    chosen = metric_named(metric or examples.metric)
    out: list[np.ndarray] = []
    for batch in examples.batches(batch_size):
        with torch.no_grad():
            here = batch.to(model.device)
            reference = model.target_logits(here)[0] if chosen.reference else None
            out.append(chosen.sign * chosen(model.target_logits(here, edits), here, reference)[0].double().cpu().numpy())
    return np.concatenate(out)
