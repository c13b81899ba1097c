"""Optimal ablation: closed gates pass the constants under which the behaviour loses least (Li and Janson 2024).

    constants = argmin over a of E [ KL( model's own prediction || prediction with closed parts passing a ) ]

https://arxiv.org/abs/2409.09951. A mean is the constant nearest to what a part writes; this is the constant nearest to what the
model then does. What is lost even so is lost because the part's value told of the prompt, and not because it was put off its
usual range. One constant per place and unit, the same at every position, so that it also serves new tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError, NumericsError
from patchclamp.metrics import METRICS, Metric
from patchclamp.models.editing import Edits
from patchclamp.models.model import Model
from patchclamp.parts.fallbacks import Values, learn_mean
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

UPDATES, ROWS, SETTINGS, RATE = 150, 16, 4, 0.03
"""Of the descent: updates, prompts and settings of gates in each, and the step (Adam), in standard deviations of each place."""


@runtime_checkable
class Learner(Protocol):
    """What constants are learned through: parts that can record and make edits."""

    model: Model

    @property
    def counted(self) -> tuple[int, ...]: ...

    def record(self, batch: Batch) -> Values: ...

    def open(self, settings: int = 1) -> Float[Tensor, "setting 1 1 part"]: ...

    def only(self, sites: Sequence[Any], settings: int = 1) -> Float[Tensor, "setting 1 1 part"]: ...

    def edits(self, gates: Tensor, fallback: Any, batch: Batch | None = None) -> Edits: ...


@dataclass(frozen=True, eq=False)
class Optimal:
    """Learned constants. No prompt need ever give them; but they are chosen so as to hurt least, and not marked off-distribution.

    Attributes:
        constants: by place, [1, 1, ...].
        loss: what was minimised, on the prompts they were learned on: of the constants, and of the means that they began from.
    """

    constants: Values
    loss: tuple[float, float] = (0.0, 0.0)
    kind: str = "optimal"
    off_distribution: bool = False
    about: dict[str, Any] = field(default_factory=dict[str, Any])

    def at(self, batch: Batch | None) -> Values:
        """The constants, for any batch and for new tokens."""
        return self.constants

    def since(self, batch: Batch) -> int:
        """0."""
        return 0


def learn_optimal(
    parts: Learner,
    fit: Examples | None,
    *,
    circuit: Sequence[Any] | None = None,
    metric: Metric | None = None,
    updates: int = UPDATES,
    rows: int = ROWS,
    settings: int = SETTINGS,
    rate: float = RATE,
    seed: int = 0,
) -> Optimal:
    """Learn the constants by descent, from the means on.

    Args:
        parts: whose closed gates will pass them.
        fit: prompts to learn on (clean ones only: the constants are to serve the model's own behaviour).
        circuit: learn them for this circuit, everything else closed. By default each update closes random subsets: of one size
            in each setting, any size from one part to all being as likely.
        metric: what is lost; by default the divergence from the model's own prediction. Others are taken with their sign.
        updates: of the descent.
        rows: prompts in each.
        settings: of gates in each.
        rate: the step, in standard deviations of what each coordinate holds.
        seed: of prompts and subsets.

    Returns:
        The constants of lowest loss on a fixed sample of the fit set, that of the means included: never worse than these there.

    Cost: per update a forward and a backward pass over `rows` x `settings` prompts.

    Raises:
        GateError: no fit set.
        NumericsError: the loss is not a number.
    """
    from patchclamp.parts.slopes import frozen

    if fit is None or not len(fit):
        raise GateError("the fallback 'optimal' is learned: give the fit set, fit=")
    metric = metric or METRICS["kl"]
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        mean = learn_mean(parts.record, _clean(fit), by="all")
    spread = _spread(parts, _clean(fit), mean.total)
    steps = {place: torch.zeros_like(value, requires_grad=True) for place, value in mean.total.items()}

    def constants() -> dict[Site, Tensor]:
        return {place: mean.total[place] + steps[place] * spread[place] for place in steps}

    with frozen(parts.model):
        descent = torch.optim.Adam(steps.values(), lr=rate)
        held = [(fit.batch(some), _gates(parts, circuit, settings, chance)) for some in _some(len(fit), rows, 4, chance)]
        first = best = _loss(parts, held, Optimal(constants()), metric)
        kept = {place: value.detach().clone() for place, value in steps.items()}
        for number, some in enumerate(_some(len(fit), rows, updates, chance), 1):
            batch = fit.batch(some).to(parts.model.device)
            with torch.enable_grad():
                values = _ablated(parts, batch, _gates(parts, circuit, settings, chance), Optimal(constants()), metric)
                loss = -metric.sign * values.mean()
                descent.zero_grad()
                loss.backward()
            descent.step()
            if number % 25 == 0 or number == updates:
                now = _loss(parts, held, Optimal(constants()), metric)
                if now < best:
                    best, kept = now, {place: value.detach().clone() for place, value in steps.items()}
    steps = kept
    about = {
        "updates": updates,
        "metric": metric.name,
        "seed": seed,
        "n": len(fit),
        "for": "subsets" if circuit is None else "circuit",
    }
    return Optimal({place: value.detach() for place, value in constants().items()}, (best, first), about=about)


def _ablated(
    parts: Learner, batch: Batch, gates: Float[Tensor, "setting 1 1 part"], fallback: Optimal, metric: Metric
) -> Float[Tensor, "setting example"]:
    with torch.no_grad():
        plain = parts.model.target_logits(batch)[0] if metric.reference else None
    logits = parts.model.target_logits(batch, parts.edits(gates, fallback, batch), len(gates))
    return metric(logits, batch, plain)


def _loss(parts: Learner, held: Sequence[tuple[Batch, Tensor]], fallback: Optimal, metric: Metric) -> float:
    """Mean over the held batches; raises where it is not a number."""
    with torch.no_grad():
        found = [_ablated(parts, batch.to(parts.model.device), gates, fallback, metric).mean() for batch, gates in held]
    loss = float(-metric.sign * torch.stack(found).double().mean())
    if math.isnan(loss):
        raise NumericsError("optimal constants: the loss is not a number. Try float32, or a lower rate")
    return loss


def _gates(
    parts: Learner, circuit: Sequence[Any] | None, settings: int, chance: torch.Generator
) -> Float[Tensor, "setting 1 1 part"]:
    """One setting for a circuit; random subsets closed, in each setting another number of parts."""
    if circuit is not None:
        return parts.only(circuit)
    gates, count = parts.open(settings), len(parts.counted)
    for setting in range(settings):
        closed = int(torch.randint(1, count + 1, (1,), generator=chance))
        chosen = torch.randperm(count, generator=chance)[:closed].tolist()
        gates[setting, ..., [parts.counted[number] for number in chosen]] = 0
    return gates


def _some(n: int, rows: int, times: int, chance: torch.Generator) -> Iterator[list[int]]:
    """Indices of prompts, drawn anew each time."""
    for _ in range(times):
        yield torch.randperm(n, generator=chance)[:rows].tolist()


def _clean(fit: Examples) -> Examples:
    """The same prompts without their corrupt halves."""
    return replace(fit, items=tuple(replace(item, corrupt=None) for item in fit.items))


def _spread(parts: Learner, fit: Examples, mean: Values) -> Values:
    """Standard deviation of each coordinate over tokens, at least a hundredth of the place's mean one."""
    total: dict[Site, Tensor] = {}
    count = 0
    for batch in fit.batches(64):
        with torch.no_grad():
            values, where = parts.record(batch), batch.mask
        count += int(where.sum())
        for place, value in values.items():
            apart = (value.detach() - mean[place])[where.to(value.device)].double().square().sum(0)
            total[place] = total[place] + apart if place in total else apart
    found = {place: (value / max(count, 1)).sqrt()[None, None] for place, value in total.items()}
    return {place: value.clamp(min=float(value.mean()) / 100 + 1e-12).to(mean[place].dtype) for place, value in found.items()}
