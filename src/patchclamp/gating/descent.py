"""One descent on gate logits: Adam, many settings in one fold, each stopping for itself."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.errors import NumericsError
from patchclamp.gating.objective import GatingSettings, Stage, penalty, penalty_slope
from patchclamp.metrics import METRICS, Metric
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks._batch import Batch

UNDECIDED = 0.45  # gates from .05 to .95 are neither open nor closed
Progress = Callable[[str, int, int], None]
"""Called with (what is being fitted, updates done, updates at most)."""


@dataclass(frozen=True, eq=False)
class Descent:
    """Where the settings of one descent ended.

    Args:
        logits: [setting, part].
        losses: [setting, update], the objective (NLL and penalty) on each update's own batch; NaN after a setting stopped.
        stopped_at: [setting], updates done.
        reason: per setting, "plateau" or "budget".
    """

    logits: Float[np.ndarray, "setting part"]
    losses: Float[np.ndarray, "setting update"]
    stopped_at: Int[np.ndarray, " setting"]
    reason: tuple[str, ...]

    def take(self, rows: slice) -> "Descent":
        """Some of the settings."""
        return Descent(self.logits[rows], self.losses[rows], self.stopped_at[rows], self.reason[rows])


@dataclass(frozen=True)
class Loss:
    """What a descent minimises besides the pressure.

    Args:
        slope: (parts, batch, logits, fallback) -> the loss per setting, and its slope in each logit.
        value: (parts, batch, gates of all parts, fallback) -> the loss per setting, without gradient.
    """

    slope: Callable[[Parts, Any, Tensor, Fallback], tuple[Tensor, Tensor]]
    value: Callable[[Parts, Any, Tensor, Fallback], Tensor]


def full_gates(parts: Parts, gate: Float[Tensor, "setting part"]) -> Float[Tensor, "setting 1 1 every"]:
    """Gates of the counted parts as gates of all: the others stay open."""
    gates = parts.open(len(gate))
    gates[:, 0, 0, list(parts.counted)] = gate.to(gates)
    return gates


def nll_slope(
    parts: Parts, batch: Batch, logits: Float[Tensor, "setting part"], fallback: Fallback, metric: Metric = METRICS["nll"]
) -> tuple[Float[Tensor, " setting"], Float[Tensor, "setting part"]]:
    """Mean NLL per answer token of the batch, and its slope in each logit: slope in the gate times G (1 - G)."""
    gate = logits.sigmoid()
    values, slopes = parts.gradient(batch, full_gates(parts, gate), fallback, metric)
    nll, slope = values.mean(1).double().cpu(), slopes.mean(1)[:, list(parts.counted)].double().cpu()
    if not bool(torch.isfinite(nll).all()) or not bool(torch.isfinite(slope).all()):
        raise NumericsError(
            f"the answers' NLL is not finite while gates are learned: try float32, or another fallback than {fallback.kind}"
        )
    return nll, slope * gate * (1 - gate)


def nll_value(
    parts: Parts, batch: Batch, gates: Float[Tensor, "setting 1 1 every"], fallback: Fallback, metric: Metric = METRICS["nll"]
) -> Float[Tensor, " setting"]:
    """Mean NLL per answer token of the batch, per setting."""
    return parts.measure(batch, gates, fallback, metric).mean(1).double().cpu()


NLL = Loss(nll_slope, nll_value)


def random_logits(parts: int, seeds: Sequence[int], settings: GatingSettings) -> Float[Tensor, "setting part"]:
    """logit(U(0, 1)) per seed; the same seed gives the same gates whatever the others are."""
    rows = [np.random.default_rng([seed, 2]).uniform(1e-4, 1 - 1e-4, parts) for seed in seeds]
    return _held(torch.from_numpy(np.stack(rows)).logit(), settings)


def descend(
    parts: Parts,
    batches: Iterator[Any],
    fallback: Fallback,
    logits: Float[Tensor, "setting part"],
    lam: Float[Tensor, " setting"],
    stage: Stage,
    settings: GatingSettings,
    title: str = "",
    progress: Progress | None = None,
    loss: Loss = NLL,
) -> Descent:
    """Adam on gate logits. Each setting stops for itself, on its plateau or at the end of the budget."""
    logits, lam = _held(logits.double(), settings), lam.double()
    adam = Adam(logits, settings.memory)
    active = np.arange(len(logits))
    losses = np.full((len(logits), stage.updates), np.nan)
    trail = [sigmoid(logits.numpy())]
    stopped = np.full(len(logits), stage.updates)
    for update in range(stage.updates):
        here = torch.from_numpy(active)
        nll, slope = loss.slope(parts, next(batches), logits[here], fallback)
        losses[active, update] = (nll + penalty(logits[here], lam[here], settings)).numpy()
        slope = clipped(slope + penalty_slope(logits[here], lam[here], settings), settings.clip)
        rate = stage.rate + (stage.last_rate - stage.rate) * update / max(1, stage.updates - 1)
        logits = _held(adam.step(logits, slope, here, rate), settings)
        trail = [*trail[-settings.window :], sigmoid(logits.numpy())]
        if progress is not None:
            progress(title, update + 1, stage.updates)
        gates = np.stack(trail)
        flat = [row for row in active if _plateau(gates[:, row], losses[row, : update + 1], settings)]
        stopped[flat] = update + 1
        active = np.setdiff1d(active, flat)
        if not len(active):
            break
    done = int(stopped.max())
    reason = tuple("budget" if row in active else "plateau" for row in range(len(logits)))
    return Descent(logits.numpy(), losses[:, :done], stopped, reason)


def press(
    parts: Parts,
    batches: Iterator[Any],
    fallback: Fallback,
    logits: Float[Tensor, "setting part"],
    lam: Float[Tensor, " setting"],
    stage: Stage,
    settings: GatingSettings,
    title: str = "",
    progress: Progress | None = None,
    loss: Loss = NLL,
) -> Descent:
    """A descent with pressure, and what it left half open settled on the batch after its last."""
    found = descend(parts, batches, fallback, logits, lam, stage, settings, title, progress, loss)
    if not settings.settle:
        return found
    return replace(found, logits=settle(parts, next(batches), fallback, found.logits, lam, settings, loss))


def settle(
    parts: Parts,
    batch: Any,
    fallback: Fallback,
    logits: Float[np.ndarray, "setting part"],
    lam: Float[Tensor, " setting"],
    settings: GatingSettings,
    loss: Loss = NLL,
) -> Float[np.ndarray, "setting part"]:
    """Bring gates that are neither open nor closed to the end where the objective is lower, one after the other.

    Two parts that can replace each other share the work at half-open gates, and pressure takes thousands of updates to choose
    one: along the line on which they suffice it hardly has a slope. Here each undecided gate is tried open and closed, with
    the pressure's nats on the scale. Those that resist their push most come first, so that the rest is judged beside them.

    Cost: two forward passes over the batch per undecided gate; settings are folded.
    """
    logits, end = logits.copy(), settings.clamp
    order = np.argsort(np.sign(lam.numpy())[:, None] * logits, axis=1, kind="stable")
    undecided = np.abs(sigmoid(logits) - 0.5) < UNDECIDED
    middle = [[p for p in order[row] if undecided[row, p]] for row in range(len(logits))]
    for turn in range(max(map(len, middle))):
        rows = [row for row in range(len(logits)) if turn < len(middle[row])]
        both = np.repeat(logits[rows], 2, axis=0)
        for number, row in enumerate(rows):
            both[2 * number : 2 * number + 2, middle[row][turn]] = -end, end
        gates = full_gates(parts, torch.from_numpy(sigmoid(both)))
        nll = loss.value(parts, batch, gates, fallback)
        cost = (nll + penalty(torch.from_numpy(both), lam[rows].double().repeat_interleave(2), settings)).numpy().reshape(-1, 2)
        for number, row in enumerate(rows):
            logits[row, middle[row][turn]] = end if cost[number, 1] < cost[number, 0] else -end
    return logits


def sigmoid(logits: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-logits))


def _held(logits: Float[Tensor, "setting part"], settings: GatingSettings) -> Float[Tensor, "setting part"]:
    return logits.clamp(-settings.clamp, settings.clamp) if settings.hold else logits


def clipped(slope: Float[Tensor, "setting part"], largest: float | None) -> Float[Tensor, "setting part"]:
    """Each setting's gradient, shortened to the norm `largest`; as `torch.nn.utils.clip_grad_norm_` for a fit on its own."""
    if largest is None:
        return slope
    return slope * (largest / (slope.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)


def _plateau(gates: Float[np.ndarray, "step part"], losses: Float[np.ndarray, " update"], settings: GatingSettings) -> bool:
    """Whether a setting stands still: its gates over the last window, and its objective from the window before to this."""
    window = settings.window
    if not window or len(losses) < 2 * window:
        return False
    moved = np.abs(gates[-1] - gates[0]).max()
    fallen = losses[-2 * window : -window].mean() - losses[-window:].mean()
    return bool(moved <= settings.still and fallen <= settings.level)


class Adam:
    """Adam on some of the rows at a time; rows that have stopped do not come back."""

    def __init__(self, logits: Float[Tensor, "setting part"], memory: float) -> None:
        self.memory = memory
        self.mean, self.square, self.steps = torch.zeros_like(logits), torch.zeros_like(logits), 0

    def step(
        self,
        logits: Float[Tensor, "setting part"],
        slope: Float[Tensor, "active part"],
        rows: Int[Tensor, " active"],
        rate: float,
    ) -> Float[Tensor, "setting part"]:
        """The logits after one step."""
        self.steps += 1
        self.mean[rows] = 0.9 * self.mean[rows] + 0.1 * slope
        self.square[rows] = self.memory * self.square[rows] + (1 - self.memory) * slope**2
        root = (self.square[rows] / (1 - self.memory**self.steps)).sqrt()
        out = logits.clone()
        out[rows] -= rate / (1 - 0.9**self.steps) * self.mean[rows] / (root + 1e-8)
        return out
