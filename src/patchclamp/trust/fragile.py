"""Fragility: whether a circuit that is enough with everything else closed is enough when only some of the rest is closed.

Parts outside a circuit that work against each other cancel where all of them are closed, and not where some are: a circuit may
then pass the one test that is usually made and no other. So random subsets of what is outside are closed, and subsets that are
looked for, on prompts of their own, so as to take the circuit furthest from the model. The circuit is also asked to do a nonsense
task (the same prompts, answers dealt out at random): what keeps that as well keeps everything, and says nothing about the task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Float

from patchclamp.circuit import Circuit
from patchclamp.errors import PatchclampError
from patchclamp.methods import groups_of
from patchclamp.metrics import Metric, metric_named
from patchclamp.parts import Fallback, Gates, Parts, benefits
from patchclamp.scores import Part
from patchclamp.scores.ratios import Shares
from patchclamp.scores.statistics import Interval, mean_interval
from patchclamp.tasks import Examples
from patchclamp.trust.draws import pick

Verdict = Literal["robust", "fragile", "insufficient"]
CLOSED = (0.25, 0.5, 0.75)
"""Of the parts outside, which shares are closed at random."""


@dataclass(frozen=True, eq=False)
class Fragility:
    """How a circuit does when some of the rest is closed.

    Attributes:
        verdict: "insufficient" where |1 - f| is above the tolerance with everything outside closed; "fragile" where that is passed
            and a subset is not: the mean over random subsets of some size, or a subset that was looked for; else "robust".
        closed: f with everything outside closed.
        subsets: a row per random subset: share (of the parts outside that are closed), draw, f.
        worst: f with the subsets looked for, on prompts that did not choose them: a row per direction ("down", "up") with f, low,
            high, and parts, the subset.
        kept: 1 - E|m(C) - m(M)| / E|m(nothing) - m(M)|: how much of each prompt's score the circuit keeps.
        nonsense: the same on the nonsense task; None where the task has no answers to deal out.
        about: tolerance, metric, fallback, n, seed.
    """

    verdict: Verdict
    closed: Interval
    subsets: pl.DataFrame
    worst: pl.DataFrame
    kept: Interval
    nonsense: Interval | None
    about: dict[str, Any]

    def __str__(self) -> str:
        by = self.subsets.group_by("share", maintain_order=True).agg(pl.col("f").mean()).iter_rows()
        shares = ", ".join(f"{share:.0%} {f:.2f}" for share, f in by)
        found = ", ".join(f"{row['f']:.2f} ({len(row['parts'])} parts)" for row in self.worst.iter_rows(named=True))
        text = f"{self.verdict}: faithfulness {self.closed.mean:.2f} with everything outside closed; with random shares closed: {shares}; "
        text += f"with subsets looked for: {found}"
        if self.nonsense is None:
            return text
        return f"{text}; keeps {self.kept.mean:.0%} of each prompt's score, and {self.nonsense.mean:.0%} of a nonsense task's"


def fragility(
    parts: Parts,
    search: Examples,
    examples: Examples,
    fallback: Fallback,
    circuit: Circuit,
    *,
    tolerance: float = 0.15,
    shares: Sequence[float] = CLOSED,
    draws: int = 20,
    metric: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Fragility:
    """Close random and adversarial subsets of what is outside a circuit.

    Args:
        parts: what the circuit is made of.
        search: prompts on which adversarial subsets are looked for (the select set).
        examples: prompts on which everything is reported (the confirm set).
        fallback: what closed parts pass.
        circuit: the circuit.
        tolerance: how far from 1 faithfulness may be.
        shares: of the parts outside, that are closed at random.
        draws: random subsets of each share.
        metric: by default the task's.
        seed: of the draws, and of the nonsense task.
        batch_size: examples at once.

    Cost: 2 P forward passes over `search` for P parts outside, `draws` times the number of shares over `examples`, and a few more.

    Raises:
        PatchclampError: the circuit holds every part, so that there is nothing to close.
        MetricError: closing everything changes nothing.
    """
    members, inside = [*circuit], set(circuit.sites)
    outside = [parts.labels[number] for number in parts.counted if parts.labels[number] not in inside]
    if not outside:
        raise PatchclampError(f"the circuit holds all {len(members)} parts: there is nothing outside it that could be closed")
    if any(not 0 < share < 1 for share in shares) or draws < 1:
        raise PatchclampError(
            f"{draws} subsets of the shares {list(shares)} were asked for: choose shares between 0 and 1, 1 or more"
        )
    chosen, rng = metric_named(metric or examples.metric), np.random.default_rng([seed, 17])
    drawn = [(share, draw, pick(rng, outside, max(1, round(share * len(outside))))) for share in shares for draw in range(draws)]
    found = _adversaries(parts, search, fallback, members, outside, chosen, seed, batch_size)
    plan: list[Gates] = [parts.open(), parts.closed(), parts.only(members)]
    plan += [parts.without(subset) for *_, subset in drawn] + [parts.without(subset) for subset in found.values()]
    values = benefits(parts, examples, torch.cat(plan), fallback, chosen, batch_size).double().numpy()
    opened, closed, alone = values[:3]
    ratio = Shares.of(opened, closed, groups_of(examples), metric=chosen.name, seed=seed)
    some, sought = ratio.point(values[3 : 3 + len(drawn)]), values[3 + len(drawn) :]
    subsets = pl.DataFrame({"share": [s for s, _, _ in drawn], "draw": [d for _, d, _ in drawn], "f": some})
    ends = [ratio.interval(row) for row in sought]
    worst = pl.DataFrame(
        {"direction": [*found], "f": [end.mean for end in ends], "low": [end.low for end in ends], "high": [end.high for end in ends],
         "parts": [[str(part) for part in subset] for subset in found.values()]},
        schema={"direction": pl.String, "f": pl.Float64, "low": pl.Float64, "high": pl.Float64, "parts": pl.List(pl.String)},
    )  # fmt: skip
    whole = ratio.interval(alone)
    about = {"tolerance": tolerance, "metric": chosen.name, "fallback": fallback.kind, "n": len(examples), "searched": len(search),
             "draws": draws, "seed": seed}  # fmt: skip
    return Fragility(
        _verdict(whole.mean, subsets, worst, tolerance),
        whole,
        subsets,
        worst,
        kept(opened, closed, alone, groups_of(examples), seed),
        _nonsense(parts, examples, fallback, members, chosen, seed, batch_size),
        about,
    )


def _verdict(closed: float, subsets: pl.DataFrame, worst: pl.DataFrame, tolerance: float) -> Verdict:
    if abs(1 - closed) > tolerance:
        return "insufficient"
    means = subsets.group_by("share").agg(pl.col("f").mean())["f"].to_list()
    return "fragile" if any(abs(1 - f) > tolerance for f in [*means, *worst["f"].to_list()]) else "robust"


def _adversaries(
    parts: Parts,
    search: Examples,
    fallback: Fallback,
    members: Sequence[Part],
    outside: Sequence[Part],
    metric: Metric,
    seed: int,
    batch_size: int,
) -> dict[str, list[Part]]:
    """The subsets of what is outside whose closing takes f furthest down and furthest up: by single effects, then cumulatively.

    Closing the parts one by one, in the order of what each does alone, gives as many subsets as there are parts; the worst is
    taken. It is a search along one path and may miss worse subsets: what it finds bounds the worst from one side only.
    """
    alone = torch.cat([parts.open(), parts.closed(), *(parts.without([part]) for part in outside)])
    values = benefits(parts, search, alone, fallback, metric, batch_size).double().numpy()
    ratio = Shares.of(values[0], values[1], groups_of(search), metric=metric.name, seed=seed)
    single = ratio.point(values[2:])
    found: dict[str, list[Part]] = {}
    for direction, sign in (("down", 1), ("up", -1)):
        order = [outside[int(i)] for i in np.argsort(sign * single, kind="stable") if sign * (single[int(i)] - 1) < -1e-9]
        if not order:
            continue
        gates = torch.cat([parts.without(order[: k + 1]) for k in range(len(order))])
        path = ratio.point(benefits(parts, search, gates, fallback, metric, batch_size).double().numpy())
        found[direction] = order[: int(np.argmin(sign * path)) + 1]
    return found


def kept(
    opened: Float[np.ndarray, " example"],
    closed: Float[np.ndarray, " example"],
    values: Float[np.ndarray, " example"],
    groups: Sequence[str],
    seed: int = 0,
) -> Interval:
    """1 - E|m(C) - m(M)| / E|m(nothing) - m(M)|, prompt by prompt: errors of different signs do not cancel, as in f they may."""
    span = float(np.abs(closed - opened).mean())
    if span < 1e-9:
        return Interval(float("nan"), None, None, len(values))
    return mean_interval(1 - np.abs(values - opened) / span, groups, seed=seed)


def _nonsense(
    parts: Parts, examples: Examples, fallback: Fallback, members: Sequence[Part], metric: Metric, seed: int, batch_size: int
) -> Interval | None:
    if not examples[0].answers or len(examples) < 2:
        return None
    some = examples.shuffled_answers(seed)
    gates = torch.cat([parts.open(), parts.closed(), parts.only(members)])
    opened, closed, alone = benefits(parts, some, gates, fallback, metric, batch_size).double().numpy()
    return kept(opened, closed, alone, groups_of(examples), seed)
