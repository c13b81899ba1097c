"""Curvature: interactions estimated by the second derivative of the benefit in the gates.

    H(i, j) = d2 m / d g(i) d g(j)      at gates g

Closing i and j is a step of -1 in each gate, so to second order I(i, j) = H(i, j) at the open gates. (The mean of H over the
square between both open and both closed is I exactly; one point of it is an estimate, and its agreement with the exact values
is to be shown beside it: `agreement`. Units that are piecewise linear bend where no derivative sees it; saturated ones are flat.)
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.dependence.closings import Pairs, place_of
from patchclamp.dependence.table import Dependence
from patchclamp.errors import GateError, MetricError, PatchclampError
from patchclamp.methods import counted, groups_of
from patchclamp.metrics import Metric, metric_named
from patchclamp.models.replay import reference
from patchclamp.models.scope import eager, still
from patchclamp.models.standing import Start
from patchclamp.parts import Fallback, Gated, Parts
from patchclamp.parts.slopes import frozen
from patchclamp.scores import Part
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch


def curvature(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    *,
    metric: str | Metric | None = None,
    rows: Sequence[Part | str] | None = None,
    gate: float = 1.0,
    frozen_norm: bool = False,
    batch_size: int = 16,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> Dependence:
    """Second-order estimate of every pair's interaction, with intervals over examples.

    Args:
        parts: at sites (`nodes`, `gated`).
        examples: on which prompts.
        fallback: what a closed gate passes.
        metric: by default the task's.
        rows: parts one of which every pair has; by default all of them, so that the pairs are all pairs.
        gate: at which gates the derivative is taken, the same for all counted parts: 1 is the model itself.
        frozen_norm: hold the final norm's scale at the model's own run.
        batch_size: examples at once, whose activations are kept.
        seed: of the bootstrap and the sign flips.
        about: provenance to add.

    Cost: one forward pass, one backward pass that is itself kept, and one backward pass through both for each row.

    Raises:
        GateError: parts that are not at sites; or a model an operation of which has no second derivative (named).
        MetricError: a metric whose slope is zero by definition or where all gates are open (KL, top1).
    """
    labels = counted(parts)
    chosen = list(range(len(labels))) if rows is None else sorted({place_of(labels, part) for part in rows})
    found = hessian(
        parts, examples, fallback, metric=metric, rows=chosen, gate=gate, frozen_norm=frozen_norm, batch_size=batch_size
    )
    place = {number: row for row, number in enumerate(chosen)}
    pairs = [(i, j) for i, j in combinations(range(len(labels)), 2) if i in place or j in place]
    at = [(place[i], j) if i in place else (place[j], i) for i, j in pairs]
    samples = found[[row for row, _ in at], [column for _, column in at]]
    name = metric.name if isinstance(metric, Metric) else metric or examples.metric
    facts = {
        "method": "curvature", "metric": name, "fallback": fallback.kind, "seed": seed, "gate": gate, "model": parts.model.name,
        "norm": "frozen" if frozen_norm else "free", "task": examples.task, **(about or {}),
    }  # fmt: skip
    return Dependence.from_samples(labels, pairs, samples, facts, groups_of(examples), seed=seed)


def hessian(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    *,
    metric: str | Metric | None = None,
    rows: Sequence[int],
    gate: float = 1.0,
    frozen_norm: bool = False,
    batch_size: int = 16,
) -> Float[np.ndarray, "row part example"]:
    """Rows of the benefit's Hessian in the counted parts' gates, per example; arguments, cost and errors as of `curvature`."""
    chosen = metric if isinstance(metric, Metric) else metric_named(metric or examples.metric)
    curved = require_curved(parts, chosen)
    pieces: list[Tensor] = []
    for batch in examples.batches(batch_size):
        pieces.append(chosen.sign * _of_batch(curved, batch.to(parts.model.device), fallback, chosen, rows, gate, frozen_norm))
    return torch.cat(pieces, -1).cpu().double().numpy()


def require_curved(parts: Parts, metric: Metric) -> Gated:
    """The parts, where second derivatives are known of them under this metric.

    Raises:
        GateError: parts that are not at sites.
        MetricError: a metric whose slope is zero by definition or where all gates are open (KL, top1).
    """
    if not isinstance(parts, Gated):
        raise GateError(f"second derivatives are known of parts at sites (nodes, gated), not of {type(parts).__name__}")
    if metric.reference or metric.name == "top1":
        raise MetricError(
            f"{metric.name} has no slope where all gates are open, so no curvature tells anything: take another metric"
        )
    return parts


def _of_batch(
    parts: Gated, batch: Batch, fallback: Fallback, metric: Metric, rows: Sequence[int], gate: float, frozen_norm: bool
) -> Float[Tensor, "row part example"]:
    model, columns = parts.model, list(parts.counted)
    start, routed = Start(), parts.routing == "frozen"
    if frozen_norm or routed:
        with model.editing(parts.base(), batch):
            start = reference(model, batch, inputs=False, prefix=False, routed=routed, normed=frozen_norm)
    gates = parts.open().expand(-1, len(batch), -1, -1).clone()
    gates[..., columns] = gate
    with frozen(model), eager(model.anatomy), torch.enable_grad(), _explained(model.name):
        leaf = gates.double() if model.dtype == torch.float64 else gates
        leaf = leaf.requires_grad_()
        edits = parts.compiled(leaf, fallback, batch, Start())
        with model.editing({**parts.base(), **edits}, batch), still(model.hf):
            value = metric(model.target_logits(batch, start=start), batch)[0]
            (slope,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
            each = slope[0, :, 0]
            found: list[Tensor] = []
            for number, row in enumerate(rows):
                wanted = each[:, columns[row]]
                if not wanted.requires_grad:  # nothing that the gates do changes this slope
                    found.append(torch.zeros(len(columns), len(batch), device=each.device, dtype=each.dtype))
                    continue
                (second,) = torch.autograd.grad(wanted.sum(), leaf, retain_graph=number + 1 < len(rows), materialize_grads=True)
                found.append(second[0, :, 0, columns].T)
    return torch.stack(found).detach()


@contextmanager
def _explained(name: str) -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        if "derivative" not in str(error):
            raise
        raise GateError(
            f"{name} has no second derivative in its gates: {error}. Use exact interactions of named pairs"
        ) from error


@dataclass(frozen=True)
class Fit:
    """How far estimates of interactions agree with exact ones, over the pairs that both have.

    Args:
        spearman: rank correlation; None where a side is constant or fewer than 3 pairs are shared.
        signs: share of pairs with the same sign, among those whose exact interaction is clear; None where none is.
        clear: how many are.
        n: pairs that both have.
    """

    spearman: float | None
    signs: float | None
    clear: int
    n: int

    def __str__(self) -> str:
        rank = "rank correlation undefined" if self.spearman is None else f"Spearman {self.spearman:+.2f}"
        sign = "no clear sign" if self.signs is None else f"{self.signs:.0%} of {self.clear} clear signs agree"
        return f"{rank}, {sign} (n = {self.n} pairs)"

    def to_record(self) -> dict[str, Any]:
        """As plain numbers."""
        return dict(vars(self))


def agreement(estimate: Dependence, exact: Dependence) -> Fit:
    """How far an estimate agrees with exact interactions; clear are those with an interval that leaves zero out, q <= .05,
    and more than rounding.

    Raises:
        PatchclampError: one of the two is directed.
    """
    if estimate.directed or exact.directed:
        raise PatchclampError("agreement compares interactions, which have no direction")
    import polars as pl
    from scipy.stats import spearmanr

    both = exact.table.join(estimate.table.select("a", "b", estimate="score"), on=["a", "b"], how="inner", maintain_order="left")
    clear = (
        both.filter(((pl.col("low") > 0) | (pl.col("high") < 0)) & (pl.col("q") <= 0.05)) if "q" in both.columns else both.clear()
    )
    clear = clear.filter(~pl.col("below_noise")) if "below_noise" in clear.columns else clear
    true, guess = both["score"].to_numpy(), both["estimate"].to_numpy()
    ranked = both.height > 2 and np.ptp(true) > 0 and np.ptp(guess) > 0
    same = clear.select((pl.col("score").sign() == pl.col("estimate").sign()).mean()).item() if clear.height else None
    return Fit(float(spearmanr(true, guess).statistic) if ranked else None, same, clear.height, both.height)  # type: ignore[attr-defined]


def largest(table: Dependence, k: int) -> Pairs:
    """The `k` pairs of largest |score|, as indices into the table's parts."""
    index = {name: number for number, name in enumerate(table.parts)}
    return [(index[a], index[b]) for a, b in table.top(k).select("a", "b").iter_rows()]
