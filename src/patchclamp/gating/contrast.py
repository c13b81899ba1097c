"""Contrastive gating: gates that keep behaviour A while losing behaviour B (Nam et al. 2025, https://arxiv.org/abs/2505.13737).

    objective(M) = mean over A of NLL(answer; G) - weight * mean over B of min(NLL(answer; G), ceiling)
                   - lambda * reduce over gates of clamp(M, -c, c),    G = sigmoid(M)

Without the ceiling the second term has no end: gates would go on to make B's answers ever less likely, whatever it does to A. With
lambda > 0 gates are pushed open: those that stay closed are what B needs and A does not. With lambda < 0 they are pushed closed:
those that stay open are a sub-circuit for A that does not do B. B may be another task, another form of prompt, or the same prompts
with other answers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool
from torch import Tensor

from patchclamp.errors import GateError, TaskError
from patchclamp.gating.descent import (
    Descent,
    Loss,
    Progress,
    descend,
    nll_slope,
    nll_value,
    press,
    random_logits,
    sigmoid,
)
from patchclamp.gating.examples import balanced
from patchclamp.gating.objective import GatingSettings
from patchclamp.gating.sufficiency import shares
from patchclamp.metrics import METRICS, Metric
from patchclamp.parts import Fallback, Parts, sites_of
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

CEILING = 3.0  # nats: an answer below 5 % is lost, and is not pushed further
KEEP, LOSE = 0.8, 0.2  # shares of the behaviour that count as kept (at least) and lost (at most)
CONTRAST, REVERSE, SELF, MIXED = "A without B", "B without A", "A without A", "mixed up"
SIDES = ("open", "few")


@dataclass(frozen=True, eq=False)
class Behaviour:
    """A behaviour: prompts to fit on, and prompts to judge on."""

    fit: Examples
    held_out: Examples


@dataclass(frozen=True, eq=False)
class Mask:
    """Gates of every seed that keep one behaviour without another.

    Args:
        labels: the gated parts.
        open: with pressure to open: what is closed is what the lost behaviour needs alone.
        few: with pressure to close: what is open is a sub-circuit of the kept behaviour alone.
    """

    labels: tuple[Site, ...]
    open: Descent
    few: Descent

    def kept(self, side: str) -> Bool[np.ndarray, "seed part"]:
        """The gates that are at least half open."""
        return sigmoid({"open": self.open, "few": self.few}[side].logits) >= 0.5


@dataclass(frozen=True, eq=False)
class Contrast:
    """What `contrast` found.

    Args:
        parts: a row per part: site, isolated (share of seeds that close it under pressure to open: B needs it and A does not),
            kept (share of seeds that keep it under pressure to close), and the same of the reverse direction; alone_a, alone_b: the
            share of A and B that is lost when it alone is closed, with low and high.
        evaluation: a row per direction ("A without B", "B without A", and the controls "A without A", "mixed up"), side ("open",
            "few") and seed: size (parts kept), closed (parts not kept), share_a, low_a, high_a, share_b, low_b, high_b on held-out
            prompts, separates (the kept behaviour's low is at least .8 and the lost one's high at most .2).
        masks: gates by direction.
        about: tasks, metrics, fallback, n, ceiling, weight.
        warnings: what the reader must know.
    """

    parts: pl.DataFrame
    evaluation: pl.DataFrame
    masks: Mapping[str, Mask]
    about: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    def separates(self, direction: str = CONTRAST, side: str = "open") -> float:
        """Share of seeds whose gates keep the one behaviour and lose the other."""
        rows = self.evaluation.filter((pl.col("direction") == direction) & (pl.col("side") == side))
        return float(rows["separates"].mean()) if rows.height else 0.0  # type: ignore[arg-type]

    def to_record(self) -> dict[str, Any]:
        """Frames, arrays and scalars."""
        return {
            "parts": self.parts, "evaluation": self.evaluation, "about": dict(self.about), "warnings": list(self.warnings),
            "logits": {name: {side: getattr(mask, side).logits for side in SIDES} for name, mask in self.masks.items()},
        }  # fmt: skip


def contrast(
    parts: Parts,
    a: Behaviour,
    b: Behaviour,
    fallback: Fallback,
    settings: GatingSettings = GatingSettings(),
    *,
    ceiling: float = CEILING,
    weight: float = 1.0,
    controls: bool = True,
    progress: Progress | None = None,
) -> Contrast:
    """Keep A and lose B, keep B and lose A, and the two controls that must find nothing.

    Args:
        parts: what is gated.
        a, b: the behaviours.
        fallback: what a closed gate passes, on prompts of both (means: learned on both).
        settings: see `GatingSettings`; seeds, budget, lambda and seed are taken.
        ceiling: nats of B's NLL beyond which nothing is gained.
        weight: of B's term.
        controls: whether A is set against itself, and two random halves of both against each other.

    Cost: per direction and update, one forward and one backward pass over a batch of A and of B per seed (free) or two (pressed);
    one forward pass over both held-out sets per mask and part.

    Raises:
        GateError: a ceiling or weight that is not positive.
        TaskError: one answer dominates A, and pairs cannot be mirrored.
    """
    if ceiling <= 0 or weight <= 0:
        raise GateError(f"the ceiling and the weight of what is lost must be positive, not {ceiling} and {weight}")
    jobs = {CONTRAST: (a, b), REVERSE: (b, a)}
    warnings: list[str] = []
    if controls:
        jobs[SELF] = (a, a)
        try:
            jobs[MIXED] = mixed(a, b, settings.seed)
        except TaskError as error:
            warnings.append(f"no control of mixed-up prompts: {error}")
    loss, masks = bounded(ceiling, weight), dict[str, Mask]()
    for name, (keep, lose) in jobs.items():
        masks[name] = _fit(parts, keep.fit, lose.fit, fallback, settings, loss, name, progress)
    evaluation = pl.concat([_judged(parts, name, mask, *jobs[name], fallback, settings.seed) for name, mask in masks.items()])
    alone = 1 - np.eye(len(masks[CONTRAST].labels))
    table: dict[str, Any] = {"site": [str(site) for site in masks[CONTRAST].labels]}
    for direction, tail in ((CONTRAST, ""), (REVERSE, "_reverse")):
        mask = masks[direction]
        table |= {f"isolated{tail}": 1 - mask.kept("open").mean(0), f"kept{tail}": mask.kept("few").mean(0)}
    for tail, one in (("a", a), ("b", b)):
        found = shares(parts, alone.astype(bool), one.held_out, fallback, None, settings.seed)
        table |= {f"alone_{tail}": 1 - found.share, f"alone_{tail}_low": 1 - found.high, f"alone_{tail}_high": 1 - found.low}
    about = {
        "a": a.fit.task, "b": b.fit.task, "metric_a": a.held_out.metric, "metric_b": b.held_out.metric, "fallback": fallback.kind,
        "n_a": len(a.held_out), "n_b": len(b.held_out), "ceiling": ceiling, "weight": weight, "seeds": settings.seeds,
        "seed": settings.seed, "pressure": settings.pressure(len(alone)), "keep": KEEP, "lose": LOSE,
    }  # fmt: skip
    return Contrast(pl.DataFrame(table), evaluation, masks, about, tuple(warnings))


def bounded(ceiling: float, weight: float) -> Loss:
    """NLL of the first batch less `weight` times the NLL, up to the ceiling, of the second."""
    nll = METRICS["nll"]

    def up_to(logits: Tensor, batch: Batch, reference: Tensor | None) -> Tensor:
        return nll.per_target(logits, batch, reference).clamp(max=ceiling)

    capped = Metric("nll up to a ceiling", False, True, False, False, -1, up_to)

    def slope(parts: Parts, pair: tuple[Batch, Batch], logits: Tensor, fallback: Fallback) -> tuple[Tensor, Tensor]:
        value, down = nll_slope(parts, pair[0], logits, fallback)
        lost, up = nll_slope(parts, pair[1], logits, fallback, capped)
        return value - weight * lost, down - weight * up

    def value(parts: Parts, pair: tuple[Batch, Batch], gates: Tensor, fallback: Fallback) -> Tensor:
        return nll_value(parts, pair[0], gates, fallback) - weight * nll_value(parts, pair[1], gates, fallback, capped)

    return Loss(slope, value)


def mixed(a: Behaviour, b: Behaviour, seed: int) -> tuple[Behaviour, Behaviour]:
    """Two behaviours that differ in nothing: each half of A and half of B, drawn at random.

    Raises:
        TaskError: the two have prompts of different forms, which no batch can hold together.
    """
    if a.fit.metric != b.fit.metric:
        raise TaskError(f"{a.fit.task!r} is measured by {a.fit.metric}, and {b.fit.task!r} by {b.fit.metric}")
    rng = np.random.default_rng([seed, 9])

    def halves(one: Examples, other: Examples) -> tuple[Examples, Examples]:
        found: tuple[list[Any], list[Any]] = ([], [])
        for items in (one.items, other.items):
            order = rng.permutation(len(items))
            for place, number in enumerate(order):
                found[place % 2].append(items[int(number)])
        return replace(one, items=tuple(found[0]), task="mixed"), replace(one, items=tuple(found[1]), task="mixed")

    (fit_a, fit_b), (held_a, held_b) = halves(a.fit, b.fit), halves(a.held_out, b.held_out)
    return Behaviour(fit_a, held_a), Behaviour(fit_b, held_b)


def _fit(
    parts: Parts, keep: Examples, lose: Examples, fallback: Fallback, settings: GatingSettings, loss: Loss, title: str,
    progress: Progress | None,
) -> Mask:  # fmt: skip
    """The free descent from random gates, then both pressed ones from its ends, as in `fit`."""
    first, second = balanced(keep, settings), balanced(lose, replace(settings, one_sided=True))

    def batches(stream: int) -> Iterator[tuple[Batch, Batch]]:
        a, b = (one.batches(settings.batch, settings.seed, stream + place) for place, one in enumerate((first, second)))
        return zip(a, b, strict=True)  # neither ends

    start = random_logits(len(parts.counted), range(settings.seed, settings.seed + settings.seeds), settings)
    run = partial(descend, parts, batches(10), fallback, start, torch.zeros(settings.seeds), settings.free, settings)
    ends = torch.from_numpy(run(f"{title}: G", progress, loss).logits)
    sign = torch.ones(settings.seeds) * settings.lam
    pressed = press(
        parts, batches(12), fallback, torch.cat([ends, ends]), torch.cat([sign, -sign]), settings.pressed, settings,
        f"{title}: open and few", progress, loss,
    )  # fmt: skip
    return Mask(tuple(sites_of(parts)), pressed.take(slice(0, settings.seeds)), pressed.take(slice(settings.seeds, None)))


def _judged(parts: Parts, name: str, mask: Mask, keep: Behaviour, lose: Behaviour, fallback: Fallback, seed: int) -> pl.DataFrame:
    """What every mask, its gates brought to 0 and 1, keeps of both behaviours."""
    masks = np.concatenate([mask.kept(side) for side in SIDES])
    kept, lost = (shares(parts, masks, one.held_out, fallback, None, seed) for one in (keep, lose))
    a, b = (lost, kept) if name == REVERSE else (kept, lost)
    seeds = len(masks) // 2
    return pl.DataFrame(
        {
            "direction": [name] * len(masks), "side": [side for side in SIDES for _ in range(seeds)],
            "seed": [seed + number for _ in SIDES for number in range(seeds)], "size": masks.sum(1), "closed": (~masks).sum(1),
            "share_a": a.share, "low_a": a.low, "high_a": a.high, "share_b": b.share, "low_b": b.low, "high_b": b.high,
            "separates": (kept.low >= KEEP) & (lost.high <= LOSE),
        }
    )  # fmt: skip
