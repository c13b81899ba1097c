"""Repair: the few parts whose intervention makes a failing example succeed (Merullo et al. 2024, https://arxiv.org/abs/2310.08744).

Where a model fails on some prompts of a behaviour that it shows on others, it often has the parts that it would need, and they
are not at work, or others speak against them. Each failing prompt is tried with every part closed and with every part
amplified; then with two, and so on. What repairs many at once is tested on prompts that chose nothing, on those that succeed
already, and against as many acts drawn at random.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool
from scipy.stats import binomtest, false_discovery_control

from patchclamp.errors import MetricError, PatchclampError
from patchclamp.methods import counted, effects
from patchclamp.metrics import Metric, metric_named
from patchclamp.parts import Fallback, Parts, benefits
from patchclamp.repair.acts import Act, gates_of, of_their_own, together
from patchclamp.tasks import Examples

ACTS = (0.0, 2.0)
"""Gates that are tried: closed, and twice as far from the fallback as the model has it."""
SWAPS = 2000
"""Exchanges of failing and succeeding prompts behind each p."""


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval (Clopper and Pearson); None where there is nothing to share."""

    share: float | None
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, flags: Bool[np.ndarray, " example"]) -> "Share":
        """The share of true flags."""
        if not len(flags):
            return cls(None, None, None, 0)
        ends = binomtest(int(flags.sum()), len(flags)).proportion_ci()
        return cls(float(flags.mean()), float(ends.low), float(ends.high), len(flags))

    def __str__(self) -> str:
        return "none there" if self.share is None else f"{self.share:.0%} [{self.low:.0%}, {self.high:.0%}] of {self.n}"


@dataclass(frozen=True, eq=False)
class Repaired:
    """What `repair` found.

    Attributes:
        before: share of the prompts searched that succeed as they are.
        examples: a row per failing prompt searched: prompt, before, after (benefit), acts (its own repair, best first), repaired.
        common: the acts that repair most prompts together, in the order in which they were added.
        steps: what each added act brought on the prompts searched: k, act, repaired (share of the failing), kept (share of the
            succeeding).
        repaired: of unseen failing prompts, the share that succeeds under `common`.
        kept: of unseen succeeding prompts, the share that still does.
        random: mean and 97.5 % quantile of the share repaired by as many random acts on the same unseen prompts, and the share
            of draws that repair at least as many.
        differences: a row per part: its exact effect on failing and on succeeding prompts, their difference with p (prompts
            exchanged between the two) and q.
        about: metric, fallback, numbers of prompts, seed.
    """

    before: Share
    examples: pl.DataFrame
    common: tuple[Act, ...]
    steps: pl.DataFrame
    repaired: Share
    kept: Share
    random: tuple[float, float, float] | None
    differences: pl.DataFrame
    about: dict[str, Any]

    def to_record(self) -> dict[str, Any]:
        """Frames, texts and numbers."""
        shares = {name: vars(getattr(self, name)) for name in ("before", "repaired", "kept")}
        return {**shares, "examples": self.examples, "common": [str(act) for act in self.common], "steps": self.steps,
                "random": self.random, "differences": self.differences, "about": self.about}  # fmt: skip


def repair(
    parts: Parts,
    search: Examples,
    test: Examples,
    fallback: Fallback,
    *,
    metric: str | None = None,
    acts: Sequence[float] = ACTS,
    most: int = 3,
    draws: int = 100,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Repaired:
    """Find the few parts whose intervention makes failing prompts succeed.

    A prompt succeeds where its benefit (metric, signed so that more is better) is above 0. Acts are added greedily: for a
    prompt of its own, the act after which its benefit is largest; for all together, the act after which the mean of two shares
    is largest, the failing prompts that succeed then and the succeeding ones that still do. It stops when nothing is gained.

    Args:
        parts: whose gates are tried.
        search: prompts on which acts are chosen, failing and succeeding ones.
        test: prompts on which the common repair is judged.
        fallback: what a closed gate passes; a mean over succeeding prompts says "as it is where the model succeeds".
        metric: one whose sign says success (logit_diff, the default of tasks with wrong answers).
        acts: gates that are tried.
        most: acts at most.
        draws: random repairs of the same size.
        seed: of the draws and exchanges.
        progress: told (what, done, of).

    Cost: (parts x acts) forward passes over the failing prompts per act of their own, and over all prompts searched per act
    together; parts + draws passes over the test prompts.

    Raises:
        MetricError: the metric's sign says nothing about success.
        PatchclampError: no prompt fails, or none succeeds; no act other than a gate of 1; or no parts or draws were asked for.
    """
    chosen = _of_success(metric or search.metric)
    if most < 1 or draws < 1:
        raise PatchclampError(f"{most} parts at most and {draws} random repairs were asked for: give 1 or more of both")
    if not any(gate != 1 for gate in acts) or not np.isfinite(acts).all():
        raise PatchclampError(
            f"the acts {', '.join(f'{gate:g}' for gate in acts) or 'none'} change nothing: give gates other than 1, such as 0"
        )
    told = progress or (lambda what, done, of: None)
    plain = benefits(parts, search, parts.open(), fallback, chosen)[0]
    right = (plain > 0).numpy()
    if right.all() or not right.any():
        raise PatchclampError(
            f"repair compares prompts that fail with prompts that succeed, and all {len(search)} prompts of {search.task!r} "
            f"{'succeed' if right.all() else 'fail'}: choose harder or easier prompts"
        )
    failing = search.take(np.flatnonzero(~right).tolist())
    tries = [Act(part, gate) for part in counted(parts) for gate in acts if gate != 1]
    before = plain[~torch.from_numpy(right)].cpu()
    own, after = of_their_own(parts, failing, before, fallback, chosen, tries, most, told)
    common, steps = together(parts, search, fallback, chosen, tries, most, right, told)
    told("unseen prompts", 0, 1)
    repaired, kept, random = _tested(parts, test, fallback, chosen, tries, common, draws, seed)
    told("unseen prompts", 1, 1)
    return Repaired(
        before=Share.of(right),
        examples=pl.DataFrame(
            {"prompt": [prompt_of(failing, number) for number in range(len(failing))], "before": before.double().numpy(),
             "after": after.double().numpy(), "acts": [", ".join(map(str, one)) for one in own], "repaired": (after > 0).numpy()}
        ),
        common=common,
        steps=steps,
        repaired=repaired,
        kept=kept,
        random=random,
        differences=_differences(parts, search, fallback, chosen, right, seed),
        about={"metric": chosen.name, "fallback": fallback.kind, "acts": list(acts), "searched": len(search), "failing": len(failing),
               "tested": len(test), "seed": seed},
    )  # fmt: skip


def fallback_of(parts: Parts, kind: str, fit: Examples, metric: str | None = None) -> Fallback:
    """The fallback called `kind`; "success" is the mean over those of the fit prompts on which the model succeeds.

    Raises:
        MetricError: the metric's sign says nothing about success.
        PatchclampError: it succeeds on none.
    """
    if kind != "success":
        return parts.fallback(kind, fit=fit)
    chosen = _of_success(metric or fit.metric)
    good = benefits(parts, fit, parts.open(), parts.fallback("zero"), chosen)[0] > 0
    if not bool(good.any()):
        raise PatchclampError(
            f"the model succeeds on none of {len(fit)} prompts of {fit.task!r}, so there is no value of success to put in"
        )
    return parts.fallback("mean", fit=fit.take(torch.nonzero(good)[:, 0].tolist()))


def _of_success(name: str) -> Metric:
    """The metric, where its sign says whether a prompt succeeds."""
    chosen = metric_named(name)
    if not chosen.wrong:
        raise MetricError(
            f"repair needs a metric whose sign says whether a prompt succeeds, and {chosen.name} is none: give wrong answers and use logit_diff"
        )
    return chosen


def prompt_of(examples: Examples, number: int) -> str:
    """A prompt as text, where its task has text."""
    clean = examples[number].pair.clean
    return clean if isinstance(clean, str) else str(list(examples[number].clean))


def _tested(
    parts: Parts, test: Examples, fallback: Fallback, metric: Metric, tries: Sequence[Act], common: Sequence[Act], draws: int, seed: int
) -> tuple[Share, Share, tuple[float, float, float] | None]:  # fmt: skip
    """The common repair on unseen prompts, beside random ones."""
    rng, sets = np.random.default_rng([seed, 11]), [gates_of(parts, common)]
    if common:
        sets += [
            gates_of(parts, [tries[int(i)] for i in rng.choice(len(tries), len(common), replace=False)]) for _ in range(draws)
        ]
    good = (benefits(parts, test, torch.cat([parts.open(), *sets]), fallback, metric) > 0).numpy()
    failed, shares = ~good[0], None
    if common and failed.any():
        drawn = good[2:, failed].mean(1)
        shares = (
            float(drawn.mean()),
            float(np.quantile(drawn, 0.975)),
            float((1 + (drawn >= good[1, failed].mean()).sum()) / (1 + draws)),
        )
    return Share.of(good[1, failed]), Share.of(good[1, ~failed]), shares


def _differences(
    parts: Parts, search: Examples, fallback: Fallback, metric: Metric, right: Bool[np.ndarray, " example"], seed: int
) -> pl.DataFrame:  # fmt: skip
    """Which parts are at work otherwise where the model fails: exact effects, failing less succeeding."""
    table = effects(parts, search, fallback, "exact", metric=metric).double().numpy()
    wrong = ~right
    difference = table[:, wrong].mean(1) - table[:, right].mean(1)
    rng, hits = np.random.default_rng([seed, 12]), np.zeros(len(table))
    for _ in range(SWAPS // 100):
        drawn = np.stack([rng.permutation(wrong) for _ in range(100)], 1).astype(np.float64)
        swapped = table @ (drawn / wrong.sum() - (1 - drawn) / right.sum())
        hits += (np.abs(swapped) >= np.abs(difference)[:, None] * (1 - 1e-9)).sum(1)
    p = (1 + hits) / (1 + SWAPS)
    return pl.DataFrame(
        {"site": [str(part) for part in counted(parts)], "failing": table[:, wrong].mean(1), "succeeding": table[:, right].mean(1),
         "difference": difference, "p": p, "q": np.asarray(false_discovery_control(p))}
    )  # fmt: skip
