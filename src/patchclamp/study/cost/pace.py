"""Pace: a calibration of about a second, from which passes become seconds."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

import torch

from patchclamp.gating.descent import nll_slope
from patchclamp.metrics import METRICS
from patchclamp.study.cost.job import BATCH, Job
from patchclamp.study.cost.work import Amount
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

ALLOWED = 0.25
"""Seconds that the repeats of one kind of run take together, where two of them do not take longer."""
LONGEST = 2.0
"""Seconds from which one run is not made larger. Below it, it is, where that took less than twice as long: calls are what it costs."""
SMALLEST = 1 / 256
"""Of the map's size, what is timed first; then four times as much."""


@dataclass(frozen=True)
class Rate:
    """Seconds of one kind of run, where nothing disturbs it: `call` for each call of the model and `prompt` for each prompt in it.

    `mean` and `slow` are what the repeats took in the mean, and the slowest of them, over the fastest: how busy the machine is.
    """

    call: float
    prompt: float
    mean: float
    slow: float

    def seconds(self, calls: float, prompts: float) -> float:
        """call x calls + prompt x prompts."""
        return self.call * calls + self.prompt * prompts


@dataclass(frozen=True)
class Pace:
    """How fast this machine runs each kind of work on this model, now."""

    plain: Rate
    folded: Rate
    sloped: Rate

    def seconds(self, amount: Amount) -> tuple[float, float, float]:
        """About, undisturbed, and as disturbed as the slowest repeats were."""
        each = [
            (rate, rate.seconds(getattr(amount, f"{kind}_calls"), getattr(amount, kind)))
            for kind, rate in (("plain", self.plain), ("folded", self.folded), ("sloped", self.sloped))
        ]
        return sum(rate.mean * s for rate, s in each), sum(s for _, s in each), sum(rate.slow * s for rate, s in each)


Workload = Callable[[float], tuple[Callable[[], object], Amount]]
"""For a share of the size that the map has: something to run, and what it is by count."""


def calibrated(job: Job, kinds: Collection[str] = ("folded", "sloped")) -> Pace:
    """Time each kind of work that there is (`plain` always), on more and more prompts until it takes long enough to be measured or
    is as large as in the map. Costs about a second; more on a busy machine, or where one prompt takes as long."""
    plain = _rate(partial(_plain, job), "plain", None)
    folded = _rate(partial(_folded, job), "folded", plain) if "folded" in kinds else plain
    return Pace(plain, folded, _rate(partial(_sloped, job), "sloped", plain) if "sloped" in kinds else plain)


def _rate(made: Workload, kind: str, plain: Rate | None) -> Rate:
    """The line through the fastest runs of the smallest size and of the largest."""

    def seconds(run: Callable[[], object], amount: Amount) -> float:
        began = time.perf_counter()
        run()
        spent = time.perf_counter() - began
        beside = 0.0 if plain is None else plain.seconds(amount.plain_calls, amount.plain)
        return max(spent - beside, spent / 10)  # what runs beside it was timed by itself, and may be most of it

    def repeated(run: Callable[[], object], amount: Amount, allowed: float) -> list[float]:
        found = [seconds(run, amount)]
        while len(found) < 3 or (sum(found) < allowed and len(found) < 9):
            if sum(found) > LONGEST:
                break
            found.append(seconds(run, amount))
        return found

    share, (run, few) = SMALLEST, made(SMALLEST)
    run()  # warms up
    small = repeated(run, few, ALLOWED / 4)
    amount, took, before = few, min(small), 0.0
    while share < 1 and (took < ALLOWED or (took < LONGEST and (not before or took < 2 * before))):
        share, before = 4 * share, took
        run, amount = made(share)
        took = seconds(run, amount)
    large = small if amount is few else [took, *repeated(run, amount, ALLOWED)]
    (calls, prompts), (few_calls, few_prompts) = _size(amount, kind), _size(few, kind)
    # fastest = call * calls + prompt * prompts for both sizes, neither below zero
    across = few_calls * prompts - few_prompts * calls
    call = (min(small) * prompts - min(large) * few_prompts) / across if across > 0 else 0.0
    call = min(max(call, 0.0), min(large) / calls)
    ratios = [one / min(each) for each in (small, large) for one in each]
    return Rate(call, (min(large) - call * calls) / prompts, sum(ratios) / len(ratios), max(ratios))


def _size(amount: Amount, kind: str) -> tuple[float, float]:
    return getattr(amount, f"{kind}_calls"), getattr(amount, kind)


def _plain(job: Job, share: float) -> tuple[Callable[[], object], Amount]:
    batch = _some(job.split.confirm, BATCH, share)

    def run() -> object:
        with torch.no_grad():
            return job.model.target_logits(batch)

    return run, job.engine.plain(job.engine.shape(batch, job.kind, job.metric))


def _folded(job: Job, share: float) -> tuple[Callable[[], object], Amount]:
    """Parts closed alone, as exact effects close them."""
    batch, parts, every = _some(job.split.confirm, BATCH, share), job.parts, len(job.engine.layers)
    chosen = sorted({round(i * (every - 1) / max(1, round(every * share**0.5))) for i in range(1 + round(every * share**0.5))})
    gates = torch.cat([parts.without([parts.labels[parts.counted[number]]]) for number in chosen])
    settings = [job.engine.singles()[number] for number in chosen]

    def run() -> object:
        return parts.measure(replace(batch), gates, parts.fallback(_cheap(job)), job.metric)

    return run, job.engine.measure(job.engine.shape(batch, job.kind, job.metric), settings)


def _sloped(job: Job, share: float) -> tuple[Callable[[], object], Amount]:
    """An update of the pressed descents."""
    batch, parts = _some(job.split.fit, job.settings.batch, share), job.parts
    settings = max(1, round(2 * job.settings.seeds * share**0.5))

    def run() -> object:
        return nll_slope(parts, replace(batch), torch.zeros(settings, len(parts.counted)).double(), parts.fallback(_cheap(job)))

    return run, job.engine.gradient(job.engine.shape(batch, job.kind, METRICS["nll"]), settings)


def _some(examples: Examples, most: int, share: float) -> Batch:
    return examples.batch(range(max(1, round(min(most, len(examples)) * share**0.5))))


def _cheap(job: Job) -> str:
    """A fallback that need not be learned first, and costs as much to use."""
    return "resample" if job.kind == "resample" else "zero"
