"""Screen, then verify: a cheap method ranks all parts; those it ranks first are closed one by one, until what it may have missed is
known to be smaller than what was found.

    1. screen: scores of every part (by default their slopes: one forward and one backward pass)
    2. verify: the exact effects of the parts of largest |score|, and of others drawn at random
    3. bound the largest |effect| among those left out (`discover.missed`), from those drawn at random
    4. stop where the bound is below the k-th largest effect found (or a hundredth of the largest, where that is more), else
       verify twice as many
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Float

from patchclamp.discover.missed import Missed, looks, missed
from patchclamp.errors import MetricError, NumericsError, PatchclampError
from patchclamp.methods import Direction, effects, groups_of, noise_floor
from patchclamp.methods.exact import closing
from patchclamp.metrics import Metric, metric_named
from patchclamp.parts import Fallback, Parts
from patchclamp.scores import Part, Scores
from patchclamp.tasks import Examples

MATERIAL = 0.01
"""Effects below this share of the largest are not looked for."""
Stopped = Literal["bounded", "everything", "budget"]
FREE = 64
"""So many parts are verified whatever share of all they are: few parts are verified all."""
SHARE, FEWEST, MOST = 20, 32, 512
"""One part in so many is drawn at random, so many at least and so many at most; as many of largest score are verified first."""


@dataclass(frozen=True, eq=False)
class Screened:
    """What a screen found and what exact effects made of it.

    Args:
        scores: a row per verified part, by |score|: the exact effect with its interval; `screen`, what the screen had said; `drawn`,
            whether it was drawn at random.
        ranking: a row per part: the exact effect where it was measured, else the screen's score; `verified` says which.
        missed: how large an effect may have been left out.
        goal: what is to be excluded: the k-th largest |effect| found, or a hundredth of the largest where that is more.
        stopped: "bounded" (missed is below the goal), "everything" (all were verified) or "budget".
        settings: exact effects measured.
        agreement: rank correlation of screen and exact effect among the parts drawn at random; None where it is not defined.
    """

    scores: Scores
    ranking: Scores
    missed: Missed
    goal: float
    stopped: Stopped
    settings: int
    agreement: float | None

    def __str__(self) -> str:
        done = {
            "bounded": f"No effect above {self.goal:.3g} was missed",
            "everything": "Every part was verified",
            "budget": f"The budget ended before it was known that no effect above {self.goal:.3g} was missed",
        }[self.stopped]
        return f"{done}: {self.settings} of {len(self.ranking)} exact effects measured; {self.missed}"


def screened(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    method: str = "gradient",
    *,
    top: int = 10,
    budget: float = 0.25,
    confidence: float = 0.95,
    sample: int | None = None,
    metric: str | Metric | None = None,
    direction: Direction = "noising",
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Screened:
    """Rank all parts by a cheap method and verify what it ranks first, until nothing larger can have been missed.

    Args:
        parts: edges, neurons, nodes.
        examples: on which prompts.
        fallback: what a closed gate passes.
        method: of the screen; any but exact.
        top: k: how many of the largest effects are to be found for certain.
        budget: share of all parts that are verified at most; 64 are in any case.
        confidence: that nothing larger was missed, over all looks together.
        sample: parts drawn at random; by default one in 20, from 32 to 512.
        metric: by default the task's.
        direction: noising or denoising, as `attribute` has them.
        batch_size: examples at once.
        seed: of the draw, of the bootstrap, and of methods that draw.
        progress: told (exact effects measured, how many there may be at most).

    Cost: that of the method, and a forward pass over the examples per verified part, from its block on.

    Raises:
        MetricError: the method cannot serve the metric (the slope of KL to the model itself is zero), or every score and every
            effect drawn is zero.
        PatchclampError: a budget, confidence or k that makes no sense.
    """
    if method == "exact":
        raise PatchclampError("exact effects were asked for as a screen of themselves: attribute(..., 'exact') measures them all")
    if not 0 < budget <= 1 or top < 1 or (sample is not None and sample < 1):
        raise PatchclampError(
            f"budget {budget}, top {top} and sample {sample} were asked for: a share up to 1, and counts from 1"
        )
    chosen = metric if isinstance(metric, Metric) else metric_named(metric or examples.metric)
    cheap = effects(parts, examples, fallback, method, metric=chosen, direction=direction, batch_size=batch_size, seed=seed)
    guess = cheap.double().mean(1).numpy()
    exact = partial(_exact, parts, examples, fallback, chosen, direction, batch_size)
    count = len(guess)
    sample, _, most = planned(count, top, budget, sample)
    search = _Search(guess, np.random.default_rng([seed, 13]).permutation(count), sample, confidence, top, most)
    found = search.run(exact, progress)
    about: dict[str, Any] = {
        "method": "exact", "screen": method, "metric": chosen.name, "fallback": fallback.kind, "n": len(examples), "seed": seed,
        "direction": direction, "model": parts.model.name, "task": examples.task, "top": top, "of": count, "settings": len(found.known),
    }  # fmt: skip
    if not found.largest and not np.abs(guess).max():
        raise MetricError(
            f"every score of the screen {method} and every exact effect drawn is zero under {chosen.name}: there is nothing to rank. "
            "Choose prompts, a metric or a fallback under which the behaviour goes away"
        )
    return _result(parts, examples, fallback, chosen, found, guess, about, seed)


def planned(count: int, top: int = 10, budget: float = 0.25, sample: int | None = None) -> tuple[int, int, int]:
    """Of so many parts: how many are drawn at random, how many exact effects are measured at first, and how many at most."""
    most = min(count, max(FREE, round(budget * count)))
    drawn = min(count, min(MOST, max(FEWEST, count // SHARE)) if sample is None else sample)
    return drawn, min(most, drawn + max(drawn, 2 * top)), most


def _exact(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    metric: Metric,
    direction: Direction,
    batch_size: int,
    numbers: Sequence[int],
) -> Float[np.ndarray, "part example"]:
    """Exact effects of some counted parts."""
    pieces: list[torch.Tensor] = []
    for whole in examples.batches(batch_size):
        batch = whole.swapped() if direction == "denoising" else whole
        pieces.append(closing(parts, batch, fallback, metric, [parts.counted[number] for number in numbers]).cpu())
    table = torch.cat(pieces, 1).double() * (-1.0 if direction == "denoising" else 1.0)
    if not bool(torch.isfinite(table).all()):
        raise NumericsError(f"exact effects are not finite under the fallback {fallback.kind}: try float32, or another fallback")
    return table.numpy()


@dataclass(frozen=True)
class _Found:
    known: dict[int, np.ndarray]
    drawn: frozenset[int]
    missed: Missed
    goal: float
    stopped: Stopped

    @property
    def largest(self) -> float:
        return max(abs(float(one.mean())) for one in self.known.values())


@dataclass(frozen=True)
class _Search:
    """The order in which parts are verified, and when that ends.

    Args:
        guess: the screen's score of each part.
        order: all parts in random order: the first `sample` of it that the screen has left out are the random sample.
        sample, confidence, top, most: as asked.
    """

    guess: np.ndarray
    order: np.ndarray
    sample: int
    confidence: float
    top: int
    most: int

    def run(self, exact: Callable[[Sequence[int]], np.ndarray], progress: Callable[[int, int], None] | None) -> _Found:
        best = [int(one) for one in np.argsort(-np.abs(self.guess), kind="stable")]
        cap = len(best) if self.most >= len(best) else max(1, self.most - self.sample)
        known: dict[int, np.ndarray] = {}
        first, look = min(cap, max(self.sample, 2 * self.top)), 0
        while True:
            leading = set(best[:first])
            drawn = [int(one) for one in self.order if int(one) not in leading][: self.sample]
            wanted = [one for one in (*best[:first], *drawn) if one not in known]
            if wanted:
                known |= zip(wanted, exact(wanted), strict=True)
            if progress is not None:
                progress(len(known), self.most)
            bound = self._missed(known, drawn, looks(self.confidence, look))
            sizes = sorted((abs(float(one.mean())) for one in known.values()), reverse=True)
            goal = max(sizes[min(self.top, len(sizes)) - 1], MATERIAL * sizes[0])
            stopped: Stopped | None = None
            if len(known) == len(best):
                stopped = "everything"
            elif bound.size < goal:
                stopped = "bounded"
            elif first == cap:
                stopped = "budget"
            if stopped is not None:
                return _Found(known, frozenset(drawn), bound, goal, stopped)
            first, look = min(cap, 2 * first), look + 1

    def _missed(self, known: dict[int, np.ndarray], drawn: Sequence[int], confidence: float) -> Missed:
        left = [one for one in range(len(self.guess)) if one not in known]
        exact = np.array([float(known[one].mean()) for one in drawn])
        return missed(exact, self.guess[list(drawn)], self.guess[left], confidence)


def _result(
    parts: Parts, examples: Examples, fallback: Fallback, metric: Metric, found: _Found, guess: np.ndarray, about: dict[str, Any], seed: int
) -> Screened:  # fmt: skip
    labels: list[Part] = [parts.labels[number] for number in parts.counted]
    numbers = sorted(found.known, key=lambda one: (-abs(float(found.known[one].mean())), one))
    noise = noise_floor(parts, examples, fallback, metric)
    verified = Scores.from_samples(
        [labels[one] for one in numbers], np.stack([found.known[one] for one in numbers]), about | {"noise_floor": noise},
        groups_of(examples), seed=seed, noise=noise,
    )  # fmt: skip
    table = verified.table.with_columns(
        pl.Series("screen", guess[numbers]), pl.Series("drawn", [one in found.drawn for one in numbers])
    )
    best = [float(found.known[one].mean()) if one in found.known else float(guess[one]) for one in range(len(guess))]
    ranking = Scores.of(labels, best, {**about, "method": f"{about['screen']}, then exact"},
                        screen=guess, verified=[one in found.known for one in range(len(guess))])  # fmt: skip
    drawn = sorted(found.drawn)
    agreement = _rank([float(found.known[one].mean()) for one in drawn], guess[drawn])
    return Screened(Scores(table, verified.about), ranking, found.missed, found.goal, found.stopped, len(found.known), agreement)


def _rank(exact: Sequence[float], guess: np.ndarray) -> float | None:
    from scipy.stats import spearmanr

    if len(exact) < 3 or not np.ptp(exact) or not np.ptp(guess):
        return None
    return float(spearmanr(exact, guess).statistic)  # type: ignore[union-attr]
