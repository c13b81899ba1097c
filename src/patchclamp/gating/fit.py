"""Fitting gates: causal head gating (Nam et al. 2025, https://arxiv.org/abs/2505.13737) over the parts of any `Parts`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float

from patchclamp.gating.descent import Descent, Progress, descend, press, random_logits, sigmoid
from patchclamp.gating.examples import balanced
from patchclamp.gating.objective import GatingSettings, Stage
from patchclamp.parts import Fallback, Parts, sites_of
from patchclamp.sites import Site
from patchclamp.tasks import Examples

P = ParamSpec("P")
T = TypeVar("T")


@runtime_checkable
class Keep(Protocol):
    """Computes `function(*args, **kwargs)`, or gives back what it was when a piece of this name was computed before."""

    def __call__(self, name: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T: ...


def at_once(name: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Computes it: nothing is kept."""
    return function(*args, **kwargs)


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
    keep: Keep = at_once,
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
        keep: computes each descent ("G", "pressed"), or gives back what it was when it was computed before.

    Cost: per update, one forward and one backward pass over the batch per seed (free) or two (pressed), and one forward pass
    for the fallback.

    Raises:
        TaskError: one answer dominates and pairs cannot be mirrored.
        NumericsError: the NLL is not finite.
    """
    began, ready = time.perf_counter(), balanced(examples, settings)
    start = random_logits(len(parts.counted), range(settings.seed, settings.seed + settings.seeds), settings)
    none = torch.zeros(settings.seeds)
    free = keep(
        "G", descend, parts, ready.batches(settings.batch, settings.seed, 0), fallback, start, none, settings.free, settings, "G",
        progress,
    )  # fmt: skip
    ends = torch.from_numpy(free.logits)
    sign = torch.ones(settings.seeds) * settings.lam
    pressed = keep(
        "pressed", press, parts, ready.batches(settings.batch, settings.seed, 1), fallback, torch.cat([ends, ends]), torch.cat([sign, -sign]),
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
