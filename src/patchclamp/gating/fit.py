"""Fitting gates: causal head gating (Nam et al. 2025, https://arxiv.org/abs/2505.13737) over the parts of any `Parts`."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.errors import NumericsError
from patchclamp.gating.examples import balanced
from patchclamp.gating.objective import GatingSettings, Stage, penalty, penalty_slope
from patchclamp.metrics import METRICS
from patchclamp.parts import Fallback, Parts, sites_of
from patchclamp.sites import Site
from patchclamp.tasks import Examples
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


@dataclass(frozen=True, eq=False)
class Gated:
    """Learned gates of every seed.

    Args:
        labels: the gated parts, in forward order (`embed` stays open and is not among them).
        free: the fits without pressure, to G; plus: with pressure to open, to G+; minus: with pressure to close, to G-.
        settings: how they were learned.
        pressure: nats that opening or closing one gate fully is worth (`GatingSettings.pressure`).
        about: task, fallback, n, what was mirrored, seconds.
        warnings: what the reader must know.
    """

    labels: tuple[Site, ...]
    free: Descent
    plus: Descent
    minus: Descent
    settings: GatingSettings
    pressure: float
    about: dict[str, Any] = field(default_factory=dict[str, Any])
    warnings: tuple[str, ...] = ()

    def first(self, seeds: int) -> "Gated":
        """The same with its first seeds only."""
        rows = slice(0, seeds)
        return replace(self, free=self.free.take(rows), plus=self.plus.take(rows), minus=self.minus.take(rows))

    @property
    def descents(self) -> dict[str, Descent]:
        """By what they learn: "gate", "gate_plus", "gate_minus"."""
        return {"gate": self.free, "gate_plus": self.plus, "gate_minus": self.minus}

    @property
    def gate(self) -> Float[np.ndarray, "seed part"]:
        """G."""
        return sigmoid(self.free.logits)

    @property
    def gate_plus(self) -> Float[np.ndarray, "seed part"]:
        """G+."""
        return sigmoid(self.plus.logits)

    @property
    def gate_minus(self) -> Float[np.ndarray, "seed part"]:
        """G-."""
        return sigmoid(self.minus.logits)

    @property
    def facilitation(self) -> Float[np.ndarray, "seed part"]:
        """G-: what is kept although closing is rewarded."""
        return self.gate_minus

    @property
    def interference(self) -> Float[np.ndarray, "seed part"]:
        """1 - G+: what is closed although opening is rewarded."""
        return 1 - self.gate_plus

    @property
    def irrelevance(self) -> Float[np.ndarray, "seed part"]:
        """G+ (1 - G-): what goes where it is pushed (the paper's table; its text has plus and minus exchanged)."""
        return self.gate_plus * (1 - self.gate_minus)


def fit(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    settings: GatingSettings = GatingSettings(),
    *,
    progress: Progress | None = None,
) -> Gated:
    """Learn G, G+ and G- for every seed.

    First the free descent (lambda = 0) from uniform random gates, then G+ and G- from where it ended, folded into one. Every
    seed is a fit of its own: that seeds share a forward pass changes nothing but rounding. In each update all seeds see the
    same batch; the free and the pressed descent see different ones.

    Args:
        parts: what is gated; `embed` stays open.
        examples: to fit on. Pairs are read in both directions where they can be mirrored.
        fallback: what a closed gate passes.
        settings: see `GatingSettings`.
        progress: called after each update.

    Cost: per update, one forward and one backward pass over the batch per seed (free) or two (pressed), and one forward pass
    for the fallback.

    Raises:
        TaskError: one answer dominates and pairs cannot be mirrored.
        NumericsError: the NLL is not finite.
    """
    began, ready = time.perf_counter(), balanced(examples, settings)
    start = random_logits(len(parts.counted), range(settings.seed, settings.seed + settings.seeds), settings)
    none = torch.zeros(settings.seeds)
    free = descend(
        parts, ready.batches(settings.batch, settings.seed, 0), fallback, start, none, settings.free, settings, "G", progress
    )
    ends = torch.from_numpy(free.logits)
    sign = torch.ones(settings.seeds) * settings.lam
    pressed = press(
        parts, ready.batches(settings.batch, settings.seed, 1), fallback, torch.cat([ends, ends]), torch.cat([sign, -sign]),
        settings.pressed, settings, "G+ and G-", progress,
    )  # fmt: skip
    about = {
        "task": examples.task, "metric": "nll", "fallback": fallback.kind, "n": len(examples), "mirrored": ready.mirrored,
        "off_distribution": fallback.off_distribution, "seconds": time.perf_counter() - began,
    }  # fmt: skip
    labels = tuple(sites_of(parts))
    return Gated(
        labels, free, pressed.take(slice(0, settings.seeds)), pressed.take(slice(settings.seeds, None)), settings,
        settings.pressure(len(labels)), about, ready.warnings,
    )  # fmt: skip


def refit(
    parts: Parts,
    gated: Gated,
    examples: Examples,
    fallback: Fallback,
    factors: Sequence[float],
    *,
    progress: Progress | None = None,
) -> tuple[Gated, ...]:
    """G+ and G- at other lambdas: a short descent from each seed's own ends, all folded into one; half-open gates stay so.

    Args:
        parts, examples, fallback: as in the fit.
        gated: the fit to go on from; its G is kept.
        factors: of lambda.

    Cost: per update, one forward and one backward pass over a batch per seed, sign and factor.
    """
    settings, seeds = gated.settings, len(gated.gate)
    ends = torch.from_numpy(np.concatenate([gated.plus.logits, gated.minus.logits]))
    sign = torch.cat([torch.ones(seeds), -torch.ones(seeds)]).double() * settings.lam
    stage = Stage(settings.refits, settings.pressed.rate, settings.pressed.last_rate)
    batches = balanced(examples, settings).batches(settings.null_batch, settings.seed, 3)
    moved = descend(
        parts, batches, fallback, ends.repeat(len(factors), 1), torch.cat([factor * sign for factor in factors]), stage,
        replace(settings, window=0), "other lambdas", progress,
    )  # fmt: skip
    found: list[Gated] = []
    for number, factor in enumerate(factors):
        at = 2 * seeds * number
        found.append(
            replace(
                gated,
                plus=moved.take(slice(at, at + seeds)),
                minus=moved.take(slice(at + seeds, at + 2 * seeds)),
                settings=replace(settings, lam=factor * settings.lam),
                pressure=factor * gated.pressure,
            )
        )
    return tuple(found)


def random_logits(parts: int, seeds: Sequence[int], settings: GatingSettings) -> Float[Tensor, "setting part"]:
    """logit(U(0, 1)) per seed; the same seed gives the same gates whatever the others are."""
    rows = [np.random.default_rng([seed, 2]).uniform(1e-4, 1 - 1e-4, parts) for seed in seeds]
    return _held(torch.from_numpy(np.stack(rows)).logit(), settings)


def descend(
    parts: Parts,
    batches: Iterator[Batch],
    fallback: Fallback,
    logits: Float[Tensor, "setting part"],
    lam: Float[Tensor, " setting"],
    stage: Stage,
    settings: GatingSettings,
    title: str = "",
    progress: Progress | None = None,
) -> Descent:
    """Adam on gate logits. Each setting stops for itself, on its plateau or at the end of the budget."""
    logits, lam = _held(logits.double(), settings), lam.double()
    adam = _Adam(logits, settings.memory)
    active = np.arange(len(logits))
    losses = np.full((len(logits), stage.updates), np.nan)
    trail = [sigmoid(logits.numpy())]
    stopped = np.full(len(logits), stage.updates)
    for update in range(stage.updates):
        here = torch.from_numpy(active)
        nll, slope = nll_slope(parts, next(batches), logits[here], fallback)
        losses[active, update] = (nll + penalty(logits[here], lam[here], settings)).numpy()
        slope = _clipped(slope + penalty_slope(logits[here], lam[here], settings), settings.clip)
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
    batches: Iterator[Batch],
    fallback: Fallback,
    logits: Float[Tensor, "setting part"],
    lam: Float[Tensor, " setting"],
    stage: Stage,
    settings: GatingSettings,
    title: str = "",
    progress: Progress | None = None,
) -> Descent:
    """A descent with pressure, and what it left half open settled on the batch after its last."""
    found = descend(parts, batches, fallback, logits, lam, stage, settings, title, progress)
    if not settings.settle:
        return found
    return replace(found, logits=settle(parts, next(batches), fallback, found.logits, lam, settings))


def settle(
    parts: Parts,
    batch: Batch,
    fallback: Fallback,
    logits: Float[np.ndarray, "setting part"],
    lam: Float[Tensor, " setting"],
    settings: GatingSettings,
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
        nll = parts.measure(batch, gates, fallback, METRICS["nll"]).mean(1).double().cpu()
        cost = (nll + penalty(torch.from_numpy(both), lam[rows].double().repeat_interleave(2), settings)).numpy().reshape(-1, 2)
        for number, row in enumerate(rows):
            logits[row, middle[row][turn]] = end if cost[number, 1] < cost[number, 0] else -end
    return logits


def nll_slope(
    parts: Parts, batch: Batch, logits: Float[Tensor, "setting part"], fallback: Fallback
) -> tuple[Float[Tensor, " setting"], Float[Tensor, "setting part"]]:
    """Mean NLL per answer token of the batch, and its slope in each logit: slope in the gate times G (1 - G)."""
    gate = logits.sigmoid()
    values, slopes = parts.gradient(batch, full_gates(parts, gate), fallback, METRICS["nll"])
    nll, slope = values.mean(1).double().cpu(), slopes.mean(1)[:, list(parts.counted)].double().cpu()
    if not bool(torch.isfinite(nll).all()) or not bool(torch.isfinite(slope).all()):
        raise NumericsError(
            f"the answers' NLL is not finite while gates are learned: try float32, or another fallback than {fallback.kind}"
        )
    return nll, slope * gate * (1 - gate)


def full_gates(parts: Parts, gate: Float[Tensor, "setting part"]) -> Float[Tensor, "setting 1 1 every"]:
    """Gates of the counted parts as gates of all: the others stay open."""
    gates = parts.open(len(gate))
    gates[:, 0, 0, list(parts.counted)] = gate.to(gates)
    return gates


def sigmoid(logits: Float[np.ndarray, "*any"]) -> Float[np.ndarray, "*any"]:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-logits))


def _held(logits: Float[Tensor, "setting part"], settings: GatingSettings) -> Float[Tensor, "setting part"]:
    return logits.clamp(-settings.clamp, settings.clamp) if settings.hold else logits


def _clipped(slope: Float[Tensor, "setting part"], largest: float | None) -> Float[Tensor, "setting part"]:
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


class _Adam:
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
