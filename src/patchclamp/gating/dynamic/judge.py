"""Judging dynamic gates on unseen prompts: how much they explain over static ones with as many gates open."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.gating.dynamic.controller import Controller
from patchclamp.gating.dynamic.fit import Dynamic
from patchclamp.gating.dynamic.redraw import redrawn
from patchclamp.gating.dynamic.sight import right_rows
from patchclamp.methods import groups_of
from patchclamp.metrics import METRICS
from patchclamp.parts import Fallback, Parts
from patchclamp.scores.statistics import mean_interval
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

REDRAWS = 8  # of closed gates, when a fit is judged


@dataclass(frozen=True, eq=False)
class Judged:
    """What every fit gives on unseen prompts, with gates of 0 and 1.

    Args:
        table: a row per fit: moves, strength (its price, or the number of open gates aimed at), price, seed, open (gates per
            token), d (KL to the model's own distribution, nats) with d_low, d_high over groups, worst_d (under the worst of 8
            random redraws of closed gates), right and always_right (share of prompts whose right answer is above the wrong
            one, with the gates as they are, and with them and under each of the redraws; null without wrong answers),
            explained = 1 - d / D with every gate closed, and n.
        advantage: a row per strength: open, d of the moving fits; static_d of static gates with as many open (the lower hull of
            all static fits and of all open and all closed: what mixing static gates can reach), difference = static_d - d
            with low, high over groups, and n.
        d: [fit, example]. opened: [fit, example]. closed: [example], D with every gate closed. right: [fit, example], 1 where the
            right answer is above the wrong one (NaN without wrong answers). always: [fit, example], the same under every redraw too.
    """

    table: pl.DataFrame
    advantage: pl.DataFrame
    d: Float[np.ndarray, "fit example"]
    opened: Float[np.ndarray, "fit example"]
    closed: Float[np.ndarray, " example"]
    right: Float[np.ndarray, "fit example"]
    always: Float[np.ndarray, "fit example"]


def judge_dynamic(
    parts: Parts, found: Dynamic, examples: Examples, fallback: Fallback, *, batch_size: int = 32, seed: int = 0
) -> Judged:
    """Run every fit on unseen prompts. D is to the model's own distribution, whatever the fit's target was.

    Cost: per fit, 9 forward passes over the examples for D and as many for what is right; two more.
    """
    rows = [found.controller(number) for number in range(len(found))]
    pieces: dict[str, list[Tensor]] = {name: [] for name in ("d", "opened", "closed", "right")}
    draws = torch.Generator().manual_seed(seed)
    for batch in examples.batches(batch_size):
        gates, active = every_gate(parts, rows, batch)
        again = redrawn((gates.shape[1], gates.shape[3]), REDRAWS + 1, draws)[:-1]  # the model itself says nothing of gates
        each = torch.cat([gates + (1 - gates) * one.to(gates) for one in again])
        ends = torch.cat([each, parts.closed().expand(1, *gates.shape[1:])])
        values = parts.measure(batch, ends, fallback, METRICS["kl"])
        pieces["d"].append(values[:-1].unflatten(0, (len(again), -1)))
        pieces["closed"].append(values[-1])
        pieces["opened"].append(active)
        if examples[0].wrong:
            right = parts.measure(batch, each, fallback, METRICS["logit_diff"]) > 0
            pieces["right"].append(right.double().unflatten(0, (len(again), -1)))
    whole = {name: torch.cat(some, -1).double().cpu().numpy() for name, some in pieces.items() if some}
    groups, d = groups_of(examples), whole["d"][0]
    body: list[dict[str, object]] = []
    for number in range(len(found)):
        interval = mean_interval(d[number], groups, seed=seed)
        as_is, share = (whole["right"][0, number], whole["right"][:, number].min(0)) if "right" in whole else (None, None)
        body.append(
            {"moves": bool(found.moves[number]), "strength": float(found.strength[number]), "price": float(found.price[number]),
             "seed": int(found.seed[number]), "open": float(whole["opened"][number].mean()), "d": interval.mean,
             "d_low": interval.low, "d_high": interval.high, "worst_d": float(whole["d"][:, number].mean(-1).max()),
             "right": None if as_is is None else float(as_is.mean()), "always_right": None if share is None else float(share.mean()),
             "explained": 1 - float(interval.mean / max(whole["closed"].mean(), 1e-12)), "n": len(examples)}
        )  # fmt: skip
    advantage = advantages(found, d, whole["opened"], whole["closed"], groups, seed)
    right = whole.get("right", np.full_like(whole["d"], np.nan))
    table = pl.DataFrame(body, infer_schema_length=None)
    return Judged(table, advantage, d, whole["opened"], whole["closed"], right[0], right.min(0))


def every_gate(
    parts: Parts, controllers: Sequence[Controller], batch: Batch
) -> tuple[Float[Tensor, "fit example #position every"], Float[Tensor, "fit example"]]:
    """Gates of several controllers as settings of one measurement; and how many driven gates each holds open, per token."""
    each = [controller.gates(parts, batch).expand(1, len(batch), -1, -1) for controller in controllers]
    width = max(one.shape[2] for one in each)
    gates = torch.cat([one.expand(-1, -1, width, -1) for one in each])
    mask = torch.ones(1, len(batch), 1, device=gates.device)
    if width > 1:
        mask = batch.mask[right_rows(batch, "token")][None].to(gates)
    active = gates[..., list(parts.counted)].sum(-1)
    return gates, (active * mask).sum(-1) / mask.sum(-1)


def advantages(
    found: Dynamic,
    d: Float[np.ndarray, "fit example"],
    opened: Float[np.ndarray, "fit example"],
    closed: Float[np.ndarray, " example"],
    groups: Sequence[object],
    seed: int = 0,
) -> pl.DataFrame:
    """D of static gates less D of moving ones, at as many open gates, example by example (see `Judged`)."""
    static = found.pick(False)
    counts = np.array([opened[number].mean() for number in static] + [0.0, float(len(found.labels))])
    curves = np.stack([d[number] for number in static] + [closed, np.zeros_like(closed)])
    hull = lower_hull(counts, curves.mean(1))
    rows: list[dict[str, object]] = []
    for strength in sorted({float(found.strength[number]) for number in found.pick(True)}):
        fits = found.pick(True, strength)
        at, mine = float(opened[fits].mean()), d[fits].mean(0)
        other = np.array([np.interp(at, counts[hull], curves[hull, one]) for one in range(d.shape[1])])
        interval = mean_interval(other - mine, groups, seed=seed)
        rows.append(
            {"strength": strength, "open": at, "d": float(mine.mean()), "static_d": float(other.mean()),
             "difference": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n}
        )  # fmt: skip
    schema = {name: pl.Float64 for name in ("strength", "open", "d", "static_d", "difference", "low", "high")}
    return pl.DataFrame(rows, schema={**schema, "n": pl.Int64})


def lower_hull(x: Float[np.ndarray, " point"], y: Float[np.ndarray, " point"]) -> list[int]:
    """The points of the lower convex hull, from left to right."""
    hull: list[int] = []
    for point in np.lexsort((y, x)).tolist():
        if hull and x[point] == x[hull[-1]]:
            continue  # the lower one came first
        while len(hull) > 1:
            last = [*hull[-2:], point]
            if not _turns_up(x[last], y[last]):
                break
            hull.pop()
        hull.append(point)
    return hull


def _turns_up(x: Float[np.ndarray, "3"], y: Float[np.ndarray, "3"]) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    return bool((y[1] - y[0]) * (x[2] - x[0]) >= (y[2] - y[0]) * (x[1] - x[0]))
