"""Masks: gates on edges, neurons or nodes learned by descent, each exactly open or closed in the end.

Every gate z is hard-concrete (`parts.concrete`) with a logit a of its own; loss D is a mean over examples, as ACDC has it.

    probe   D(z) + price * mean over parts of P(z > 0)                        subnetwork probing (Cao et al. 2021; Conmy et al. 2023)
    prune   D(z) + l1 (t - s) + l2 (t - s)^2,  s = 1 - mean of P(z > 0)       edge pruning (Bhaskar et al. 2024), to a sparsity t

In `prune` the target t rises from 0 to the wanted sparsity over the first part of the updates, and l1 and l2 are themselves moved
uphill, so that the sparsity is met rather than a price paid. Here the roles of t - s are such that too few closed gates cost.

https://arxiv.org/abs/2104.03514, https://arxiv.org/abs/2406.16778
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.circuit import Circuit
from patchclamp.errors import MetricError, NumericsError, PatchclampError
from patchclamp.metrics import Metric, metric_named
from patchclamp.parts import Fallback, Parts
from patchclamp.parts.concrete import draw, logits_of, open_probability, settled
from patchclamp.scores import Part, Scores
from patchclamp.tasks import Examples

WARM = 5 / 6
"""Share of the updates over which the target sparsity rises (2500 of 3000, as published)."""


@dataclass(frozen=True)
class MaskSettings:
    """How a mask is learned.

    Args:
        updates: steps of Adam.
        rate: of the logits; of l1 and l2 likewise.
        batch: examples of an update, each with its own draws.
        start: P(z > 0) of every gate at first.
        seed: of the draws and of the batches.
    """

    updates: int = 200
    rate: float = 0.1
    batch: int = 16
    start: float = 0.95
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Mask:
    """A learned mask.

    Args:
        circuit: the parts whose test-time gate is more than half open.
        scores: the logit of each part, and its test-time `gate` and `open`, P(z > 0).
        losses: by update, D on its batch under the drawn gates.
        sparsity: by update, the expected share of closed gates.
        multipliers: l1 and l2 at the end; None with a price.
    """

    circuit: Circuit
    scores: Scores
    losses: Float[np.ndarray, " update"]
    sparsity: Float[np.ndarray, " update"]
    multipliers: tuple[float, float] | None

    @property
    def realised(self) -> float:
        """The share of parts that the circuit leaves out."""
        return 1 - len(self.circuit) / len(self.scores)


def probe(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    price: float,
    *,
    objective: str | Metric = "kl",
    settings: MaskSettings = MaskSettings(),
    progress: Callable[[int, int], None] | None = None,
) -> Mask:
    """Subnetwork probing: a loss and a price on open gates.

    Args:
        parts: nodes, neurons, edges.
        examples: to fit on.
        fallback: what a closed gate passes.
        price: of the mean probability of being open, in units of the objective (the published sweeps go from .01 to 250).
        objective: a metric by name; less of a benefit is more of a loss.
        settings: of the descent.
        progress: told (updates done, updates).

    Cost: one forward and one backward pass over a batch per update.

    Raises:
        PatchclampError: a price that is not above 0.
        MetricError: closing everything changes nothing.
    """
    if not price > 0:
        raise PatchclampError(f"a price of {price} was asked for: choose a number above 0")

    def pressure(closed: Tensor, update: int) -> Tensor:
        return -price * closed

    about: dict[str, object] = {"method": "subnetwork probing", "price": price}
    return _learned(parts, examples, fallback, objective, settings, pressure, None, about, progress)


def prune(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    sparsity: float,
    *,
    objective: str | Metric = "kl",
    settings: MaskSettings = MaskSettings(),
    progress: Callable[[int, int], None] | None = None,
) -> Mask:
    """Edge pruning, of parts of any kind: a loss at a wanted sparsity.

    Args:
        sparsity: the share of parts that are to be closed, above 0 and below 1.
        parts, examples, fallback, objective, settings, progress: as for `probe`.

    Cost: one forward and one backward pass over a batch per update.

    Raises:
        PatchclampError: a sparsity that is not between 0 and 1.
        MetricError: closing everything changes nothing.
    """
    if not 0 < sparsity < 1:
        raise PatchclampError(f"a sparsity of {sparsity} was asked for: choose a share between 0 and 1, such as 0.95")
    multipliers = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    warm = max(1, round(WARM * settings.updates))

    def pressure(closed: Tensor, update: int) -> Tensor:
        apart = sparsity * min(1.0, (update + 1) / warm) - closed
        return multipliers[0] * apart + multipliers[1] * apart.square()

    about: dict[str, object] = {"method": "edge pruning", "sparsity": sparsity}
    return _learned(parts, examples, fallback, objective, settings, pressure, multipliers, about, progress)


def _learned(
    parts: Parts, examples: Examples, fallback: Fallback, objective: str | Metric, settings: MaskSettings,
    pressure: Callable[[Tensor, int], Tensor], multipliers: Tensor | None, about: dict[str, object],
    progress: Callable[[int, int], None] | None,
) -> Mask:  # fmt: skip
    metric = objective if isinstance(objective, Metric) else metric_named(objective)
    if not len(examples) or not parts.counted or settings.updates < 1:
        raise PatchclampError(
            f"{settings.updates} updates of {len(parts.counted)} gates on {len(examples)} examples were asked for: give some of each"
        )
    _check(parts, examples, fallback, metric)
    logits = torch.full((len(parts.counted),), logits_of(settings.start), dtype=torch.float64, requires_grad=True)
    ascent = [] if multipliers is None else [{"params": [multipliers], "lr": settings.rate, "maximize": True}]
    adam = torch.optim.Adam([{"params": [logits], "lr": settings.rate}, *ascent])
    rng, losses, closed = np.random.default_rng([settings.seed, 17]), list[float](), list[float]()
    order = list[int]()
    for update in range(settings.updates):
        while len(order) < min(settings.batch, len(examples)):
            order += rng.permutation(len(examples)).tolist()
        some, order = order[: settings.batch], order[settings.batch :]
        value, slope = _slope(parts, examples, some, fallback, metric, logits.detach(), rng)
        adam.zero_grad()
        share = 1 - open_probability(logits).mean()
        pressure(share, update).backward()
        assert logits.grad is not None
        logits.grad += slope
        adam.step()
        if multipliers is not None:
            with torch.no_grad():
                multipliers.clamp_(min=0)  # a target that is overshot is no reason to open gates
        losses.append(value)
        closed.append(float(share.detach()))
        if progress is not None:
            progress(update + 1, settings.updates)
    return _mask(parts, logits.detach(), about | _facts(parts, examples, fallback, metric, settings), losses, closed, multipliers)


def _check(parts: Parts, examples: Examples, fallback: Fallback, metric: Metric) -> None:
    """Refuse what nothing can be learned from."""
    ends = parts.measure(
        examples.take(range(min(8, len(examples)))).batch(), torch.cat([parts.open(), parts.closed()]), fallback, metric
    )
    if float((ends[0] - ends[1]).abs().max()) < 1e-9:
        raise MetricError(f"closing every part leaves {metric.name} as it is: there is no behaviour to keep")


def _slope(
    parts: Parts,
    examples: Examples,
    some: list[int],
    fallback: Fallback,
    metric: Metric,
    logits: Tensor,
    rng: np.random.Generator,
) -> tuple[float, Tensor]:
    """The loss on some examples under drawn gates, and its slope in each logit."""
    batch = examples.batch(some)
    uniform = torch.from_numpy(rng.uniform(1e-6, 1 - 1e-6, (1, len(batch), len(logits))))
    gate, inner = draw(logits[None], uniform)
    gates = parts.open().repeat(1, len(batch), 1, 1)
    gates[:, :, 0, list(parts.counted)] = gate.to(gates)
    values, slopes = parts.gradient(batch, gates, fallback, metric)
    found = -metric.sign * slopes[0, :, list(parts.counted)].double().cpu()
    if not bool(torch.isfinite(values).all()) or not bool(torch.isfinite(found).all()):
        raise NumericsError(
            f"{metric.name} is not finite while a mask is learned under the fallback {fallback.kind}: try float32"
        )
    return float(-metric.sign * values.double().mean()), (found * inner[0]).mean(0)


def _facts(parts: Parts, examples: Examples, fallback: Fallback, metric: Metric, settings: MaskSettings) -> dict[str, object]:
    return {"metric": metric.name, "fallback": fallback.kind, "n": len(examples), "seed": settings.seed, "updates": settings.updates,
            "model": parts.model.name, "task": examples.task}  # fmt: skip


def _mask(
    parts: Parts, logits: Tensor, about: dict[str, object], losses: list[float], closed: list[float], multipliers: Tensor | None
) -> Mask:
    labels: list[Part] = [parts.labels[number] for number in parts.counted]
    gate = settled(logits)
    kept = [label for label, one in zip(labels, gate.tolist(), strict=True) if one > 0.5]
    scores = Scores.of(labels, logits.numpy(), about, gate=gate.numpy(), open=open_probability(logits).numpy())
    ends = None if multipliers is None else (float(multipliers[0].detach()), float(multipliers[1].detach()))
    return Mask(Circuit(kept, {**about, "size": len(kept), "of": len(labels)}), scores, np.array(losses), np.array(closed), ends)
