"""Fitting dynamic gates and, in the same passes, the static gates that are their null."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchclamp.errors import GateError, NumericsError, TaskError
from patchclamp.gating.dynamic.controller import Controller
from patchclamp.gating.dynamic.objective import TARGETS, DynamicSettings
from patchclamp.gating.dynamic.redraw import worst_redraw
from patchclamp.gating.dynamic.sight import Sight, generated, look, right_rows
from patchclamp.parts import Fallback, Parts, sites_of
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

Progress = Callable[[str, int, int], None]
FIRST = 0.1  # nats per open gate from which a learned price starts
DEARER = (3.0, 10.0)  # times the highest price
DUAL = 0.05  # share by which a learned price follows the number of open gates, per update and gate too many


@dataclass(frozen=True, eq=False)
class Dynamic:
    """Learned controllers and their static twins, a row per kind, price and seed.

    Args:
        labels: the driven parts, in forward order.
        sight: what the moving ones see.
        bias: [fit, phase, part]; up: [fit, part, rank]; down: [fit, seen, rank]: as in `Controller`. Static fits have up = 0 and
            one bias for both phases.
        moves: [fit], whether its gates hang on the input.
        price: [fit], nats per open gate (where it was learned: at the end).
        wanted: [fit], open gates aimed at, NaN where the price was given.
        seed: [fit].
        losses: [fit, update], D on each update's batch, under the worst redraw.
        settings: how they were learned.
        about: task, fallback, n, seconds.
    """

    labels: tuple[Site, ...]
    sight: Sight
    bias: Float[Tensor, "fit 2 part"]
    up: Float[Tensor, "fit part rank"]
    down: Float[Tensor, "fit seen rank"]
    moves: Bool[np.ndarray, " fit"]
    price: Float[np.ndarray, " fit"]
    wanted: Float[np.ndarray, " fit"]
    seed: Float[np.ndarray, " fit"]
    losses: Float[np.ndarray, "fit update"]
    settings: DynamicSettings
    about: dict[str, Any] = field(default_factory=dict[str, Any])

    def __len__(self) -> int:
        return len(self.moves)

    def controller(self, fit: int) -> Controller:
        """One of them, with gates of 0 and 1."""
        sight = self.sight if self.moves[fit] else Sight("static")
        down = self.down[fit] if self.moves[fit] else self.down[fit][:0]
        return Controller(self.labels, sight, self.bias[fit], self.up[fit], down)

    @property
    def strength(self) -> Float[np.ndarray, " fit"]:
        """What tells fits of one kind and seed apart: open gates aimed at where the price was learned, else the price."""
        return np.where(np.isnan(self.wanted), self.price, self.wanted)

    def pick(self, moves: bool, strength: float | None = None) -> list[int]:
        """The fits of a kind, at one price (or number of open gates aimed at)."""
        there = [i for i in range(len(self)) if bool(self.moves[i]) == moves]
        return there if strength is None else [i for i in there if np.isclose(self.strength[i], strength)]


def fit_dynamic(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    settings: DynamicSettings = DynamicSettings(),
    *,
    progress: Progress | None = None,
) -> Dynamic:
    """Learn controllers at every price and seed, and static gates beside them on the same batches with the same redraws.

    Static gates are also fitted at 3 and 10 times the highest price, so that their curve of D over open gates has points where
    moving gates may need fewer.

    What a controller reads is the plain pass's stream, which no gate changes: so the slope in a controller's numbers is the
    slope in its gates (`parts.gradient`, exact) times the controller's own, and all fits are rows of one pass.

    Args:
        parts: what is gated; `embed` stays open.
        examples: to fit on.
        fallback: what a closed gate passes.
        settings: see `DynamicSettings`.
        progress: called after each update.

    Cost: per update and fit, one forward and one backward pass over the batch, and one forward pass per redraw and one more
    where there are any; one pass over all examples for what is seen.

    Raises:
        TaskError: nothing to fit on. GateError: a site that cannot be read. NumericsError: D is not finite.
    """
    if not len(examples):
        raise TaskError(f"dynamic gates need prompts to fit on, and {examples.task!r} gives none")
    began, model = time.perf_counter(), parts.model
    sight = look(model, examples, settings.site, settings.scope, places=settings.places)
    rows = _Rows.start(sites_of(parts), sight, settings, model.device)
    adam = torch.optim.Adam(rows.groups(settings), betas=(0.9, 0.99))
    draws = torch.Generator().manual_seed(settings.seed)
    losses: list[Tensor] = []
    for update, drawn in zip(range(settings.updates), batches_of(examples, settings), strict=False):
        batch = drawn.to(model.device)
        for group in adam.param_groups:
            group["lr"] = group["peak"] * (1 - 0.9 * update / max(1, settings.updates - 1))
        gates, mask = rows.gates(sight.features(model, batch), batch, settings, draws)
        value, slope, shrink = worst_redraw(parts, batch, _every(parts, gates.detach()), fallback, settings, draws)
        opened = (gates * mask).sum((1, 2, 3)) / mask.expand(1, *gates.shape[1:3], 1).sum()
        into = (slope * shrink)[..., list(parts.counted)].detach()
        if not bool(torch.isfinite(value).all()) or not bool(torch.isfinite(into).all()):
            raise NumericsError(
                f"{TARGETS[settings.target].name} is not finite while gates are learned: try float32, or another fallback than "
                f"{fallback.kind}"
            )
        adam.zero_grad()
        ((into * gates).sum((1, 2, 3)) / len(batch) + rows.price * (opened + settings.inertia * rows.moving)).sum().backward()
        adam.step()
        rows.after(settings, opened.detach(), adam.param_groups[0]["lr"])
        losses.append(value.mean(1).double().cpu())
        if progress is not None:
            progress("dynamic gates", update + 1, settings.updates)
    about = {
        "task": examples.task, "metric": TARGETS[settings.target].name, "fallback": fallback.kind, "n": len(examples),
        "off_distribution": fallback.off_distribution, "sees": str(sight), "seconds": time.perf_counter() - began,
    }  # fmt: skip
    return rows.done(sight, torch.stack(losses, 1).numpy(), settings, about)


def batches_of(examples: Examples, settings: DynamicSettings) -> Iterator[Batch]:
    """Batches without end, each round in a new random order."""
    draws, size = np.random.default_rng([settings.seed, 11]), min(settings.batch, len(examples))
    while True:
        order = draws.permutation(len(examples))
        for start in range(0, len(order) - size + 1, size):
            yield examples.batch(order[start : start + size].tolist())


def without_wrong(examples: Examples) -> Examples:
    """The same prompts and right answers without wrong ones, which KL to the model's own distribution does not need."""
    return replace(examples, items=tuple(replace(item, wrong=()) for item in examples))


def _every(parts: Parts, gates: Float[Tensor, "fit example #position part"]) -> Float[Tensor, "fit example #position every"]:
    """Gates of the counted parts as gates of all: the others stay open."""
    every = torch.ones(*gates.shape[:3], len(parts.labels), device=gates.device)
    every[..., list(parts.counted)] = gates.to(every)
    return every


@dataclass(eq=False)
class _Rows:
    """What is learned, a row per fit."""

    labels: tuple[Site, ...]
    bias: Float[Tensor, "fit part"]
    behind: Float[Tensor, "fit part"]
    """The bias behind the prompt, in scope phase: a number of its own, so that a phase's slopes move that phase's gates alone."""
    up: Float[Tensor, "fit part rank"]
    down: Float[Tensor, "fit seen rank"]
    moves: Float[Tensor, " fit"]
    price: Float[Tensor, " fit"]
    wanted: Float[Tensor, " fit"]
    seeds: tuple[int, ...]

    @classmethod
    def start(cls, labels: list[Site], sight: Sight, settings: DynamicSettings, device: torch.device) -> "_Rows":
        """Static fits and moving ones start from the same gates: logits around 1, more open than closed, and U = 0."""
        kinds = (False,) if settings.scope == "static" else (False, True)
        given = [(price, np.nan) for price in settings.prices] if not settings.target_open else []
        aims = given or [(FIRST, wanted) for wanted in settings.target_open]
        # static gates are fitted at higher prices too, so that their curve reaches as few open gates as moving ones may need
        dearer = [(factor * max(settings.prices), np.nan) for factor in DEARER] if given else []
        table = [
            (moves, *aim, seed)
            for moves in kinds
            for aim in (aims if moves or settings.scope == "static" else aims + dearer)
            for seed in range(settings.seeds)
        ]
        bias: list[Tensor] = []
        down: list[Tensor] = []
        rank = settings.rank if sight.reads else 0
        for *_, seed in table:
            draws = torch.Generator().manual_seed(1000 * settings.seed + seed)
            bias.append(1 + 0.5 * torch.randn(len(labels), generator=draws))
            down.append(torch.randn(sight.width, rank, generator=draws) / max(1, sight.width) ** 0.5)
        shape = (len(table), len(labels))
        every = torch.stack(bias), torch.stack(bias), torch.zeros(*shape, rank), torch.stack(down)
        bias_of, behind, up, down_of = (one.to(device).requires_grad_() for one in every)
        moves, price, wanted, seeds = zip(*table, strict=True)
        return cls(
            tuple(labels), bias_of, behind, up, down_of, torch.tensor(moves, device=device).float(),
            torch.tensor(price, device=device), torch.tensor(wanted, device=device), tuple(seeds),
        )  # fmt: skip

    def groups(self, settings: DynamicSettings) -> list[dict[str, Any]]:
        """For Adam: V has many numbers that act together, so its rate is smaller."""
        slow = settings.rate / max(1, self.down.shape[1]) ** 0.5
        return [
            {"params": [self.bias, self.behind, self.up], "lr": settings.rate, "peak": settings.rate},
            {"params": [self.down], "lr": slow, "peak": slow},
        ]

    @property
    def directions(self) -> Float[Tensor, "fit seen rank"]:
        """V, its columns of length 1: how far gates move is in U alone."""
        return torch.nn.functional.normalize(self.down, dim=1)

    @property
    def moving(self) -> Float[Tensor, " fit"]:
        """Sum over parts of |U_part|, smooth at 0: what moving costs. Whole parts stop moving where it is not worth it."""
        return self.moves * ((self.up**2).sum(-1) + 1e-8).sqrt().sum(-1)

    def gates(
        self, seen: Float[Tensor, "example #position seen"], batch: Batch, settings: DynamicSettings, draws: torch.Generator
    ) -> tuple[Float[Tensor, "fit example #position part"], Float[Tensor, "1 #example #position 1"]]:
        """Gates of a batch as they are learned, and which tokens count."""
        moves = self.moves[:, None, None, None]
        logits = self.bias[:, None, None, :] + moves * torch.einsum(
            "epw,fwr,fnr->fepn", seen.to(self.down), self.directions, self.up
        )
        mask = torch.ones(1, 1, 1, 1, device=logits.device)
        if settings.scope in ("token", "phase"):
            rows = right_rows(batch, settings.scope)
            after = generated(batch)[rows][None, :, :, None]
            mask = batch.mask[rows][None, :, :, None].to(logits)
            if settings.scope == "phase":
                logits = torch.where((moves > 0) & after, self.behind[:, None, None, :], logits)
        logits = logits.expand(-1, len(batch), -1, -1)
        return _relaxed(logits, settings, draws), mask

    @torch.no_grad()
    def after(self, settings: DynamicSettings, opened: Float[Tensor, " fit"], rate: float) -> None:
        """The learned prices' step towards the wanted number of open gates."""
        step = (DUAL * rate / settings.rate * (opened - self.wanted)).clamp(-0.1, 0.1).exp()
        self.price = torch.where(self.wanted.isnan(), self.price, (self.price * step).clamp(1e-5, 10))

    def done(self, sight: Sight, losses: np.ndarray, settings: DynamicSettings, about: dict[str, Any]) -> Dynamic:
        """What was learned, on the CPU."""
        moves = self.moves[:, None]
        apart = (moves > 0) & (settings.scope == "phase")
        bias = torch.stack([self.bias, torch.where(apart, self.behind, self.bias)], 1).detach().cpu()
        up = (self.up * moves[..., None]).detach().cpu()
        return Dynamic(
            self.labels, sight, bias, up, self.directions.detach().cpu(), self.moves.bool().cpu().numpy(),
            self.price.double().cpu().numpy(), self.wanted.double().cpu().numpy(), np.array(self.seeds, dtype=float), losses,
            settings, about,
        )  # fmt: skip


def _relaxed(logits: Tensor, settings: DynamicSettings, draws: torch.Generator) -> Tensor:
    """Gates while they are learned: see `DynamicSettings.relaxation`."""
    if settings.relaxation == "sigmoid":
        return logits.sigmoid()
    if settings.relaxation == "straight":
        smooth = logits.sigmoid()
        return (logits > 0).to(smooth) + smooth - smooth.detach()
    if settings.relaxation != "relaxed":
        raise GateError(f"there is no relaxation {settings.relaxation!r}: choose sigmoid, relaxed or straight")
    chance = torch.rand(1, *logits.shape[1:], generator=draws).clamp(1e-6, 1 - 1e-6).to(logits.device)
    return ((logits + chance.logit()) / settings.temperature).sigmoid()
