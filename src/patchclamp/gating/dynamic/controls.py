"""Controls: the same fit where it should find nothing. A controller can solve the task by itself; here one sees how far."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float

from patchclamp.errors import TaskError
from patchclamp.gating.dynamic.fit import Progress, fit_dynamic
from patchclamp.gating.dynamic.judge import Judged, judge_dynamic
from patchclamp.gating.dynamic.objective import DynamicSettings
from patchclamp.gating.dynamic.sight import Sight, last_column, look, right_rows
from patchclamp.gating.nulls import on_reinitialised
from patchclamp.methods import groups_of
from patchclamp.metrics import METRICS
from patchclamp.parts import Fallback, Parts
from patchclamp.scores.statistics import mean_interval
from patchclamp.tasks import Examples

Score = Callable[[Examples], Float[np.ndarray, " example"]]
"""A number per example."""


def arbitrary(examples: Examples, *others: Examples, score: Score | None = None, seed: int = 0) -> tuple[Examples, ...]:
    """The same prompts, labelled by a random function: right and wrong are exchanged where it is above the set's median.

    So half of each set are exchanged, and gates that are the same for all prompts lift nothing. The labels have nothing to do with
    what the model says, and yet they can be read off the prompt: what a controller learns of them carries over to unseen prompts.

    Args:
        examples: prompts.
        others: more sets, labelled by the same function.
        score: a number per example; by default the mean of the weights of its tokens, each drawn from N(0, 1).
        seed: of the weights.

    Raises:
        TaskError: examples without wrong answers, or that the function gives all the same label.
    """
    if any(not item.wrong for one in (examples, *others) for item in one):
        raise TaskError(f"arbitrary labels exchange right and wrong answers, and {examples.task!r} has prompts without 'wrong'")
    scores = [(score or partial(_by_words, seed))(one) for one in (examples, *others)]
    upper = [_upper_half(each) for each in scores]
    if any(half.all() or not half.any() for half in upper):
        raise TaskError(f"the prompts of {examples.task!r} are alike throughout: no labelling can tell them apart")
    return tuple(
        replace(one, items=tuple(replace(item, answers=item.wrong, wrong=item.answers) if above else item
                                 for item, above in zip(one, half.tolist(), strict=True)))
        for one, half in zip((examples, *others), upper, strict=True)
    )  # fmt: skip


def _upper_half(scores: Float[np.ndarray, " example"]) -> Bool[np.ndarray, " example"]:
    """Which scores are above the median, or at it and above where that is nearer to half of them (few different scores)."""
    middle = np.median(scores)
    return min((scores > middle, scores >= middle), key=lambda half: abs(float(half.mean()) - 0.5))


def _by_words(seed: int, examples: Examples) -> Float[np.ndarray, " example"]:
    """The mean of weights from N(0, 1), one per token, the same in every set."""
    kinds = sorted({token for item in examples for token in item.clean})
    weight = {token: np.random.default_rng([seed, 23, token]).standard_normal() for token in kinds}
    return np.array([np.mean([weight[token] for token in item.clean]) for item in examples])


def seen_direction(parts: Parts, sight: Sight, seed: int = 0) -> Score:
    """Scores for `arbitrary`: a random direction of what a controller sees at the prompt's last token.

    No labelling is easier for it to read, so none is a harder test of the safeguards.
    """
    weight = torch.randn(sight.width, generator=torch.Generator().manual_seed(seed))

    def score(examples: Examples) -> Float[np.ndarray, " example"]:
        found: list[np.ndarray] = []
        for batch in examples.batches(64):
            seen = sight.features(parts.model, batch)
            last = (
                torch.zeros(len(batch), dtype=torch.long)
                if seen.shape[1] == 1
                else last_column(batch)[right_rows(batch, "token")]
            )
            found.append((seen[torch.arange(len(batch)), last] @ weight.to(seen)).cpu().numpy())
        return np.concatenate(found)

    return score


@dataclass(frozen=True, eq=False)
class LabelControl:
    """How far a controller lifts arbitrary labels on unseen prompts.

    Args:
        table: a row per fit that moves: guarded, strength, seed, open, before (share of unseen prompts whose arbitrary label the
            model itself gives), after (with the gates), lift = after - before with low, high over groups; kept (share of prompts whose
            label comes out with the gates and under each of 8 random redraws of the closed ones), kept_lift = kept - before with
            kept_low, kept_high; n.
        margin: kept lift that is still called none.
    """

    table: pl.DataFrame
    margin: float

    @property
    def rejected(self) -> bool:
        """Whether what guarded fits lift is gone where closed gates are redrawn: kept lift, mean over seeds, at any price.

        What they lift with closed gates as they are is `lift`: a controller of whatever kind can shut what speaks for an answer.
        """
        rows = self.table.filter("guarded").group_by("strength").agg(pl.col("kept_lift").mean())
        return bool((rows["kept_lift"] <= self.margin).all())


def label_control(
    parts: Parts,
    fit: Examples,
    held: Examples,
    fallback: Fallback,
    settings: DynamicSettings,
    *,
    unguarded: bool = True,
    margin: float = 0.1,
    progress: Progress | None = None,
) -> LabelControl:
    """The same fit to arbitrary labels: a random direction of what the controller sees (of the words, where it sees nothing).

    Guarded: the model's own distribution with the two answers exchanged where the label says so, closed gates redrawn. And, to
    show what the safeguards are for, unguarded: the labels' NLL, with closed gates left closed.

    Cost: that of one or two fits, and 20 forward passes over `held` per fit and row.

    Raises:
        TaskError: examples without wrong answers.
    """
    sight = look(parts.model, fit, settings.site, settings.scope, places=settings.places)
    score = seen_direction(parts, sight, settings.seed) if sight.reads else None
    chosen, unseen = arbitrary(fit, held, score=score, seed=settings.seed)
    plain = METRICS["logit_diff"]
    before = np.concatenate(
        [parts.measure(batch, parts.open(), fallback, plain)[0].cpu().numpy() for batch in unseen.batches(64)]
    )
    said, groups = (before > 0).astype(float), groups_of(held)
    rows: list[dict[str, object]] = []
    kinds = [(True, replace(settings, target="exchanged"))] + [(False, settings.unguarded())] * unguarded
    for guarded, how in kinds:
        found = fit_dynamic(parts, chosen, fallback, how, progress=progress)
        judged = judge_dynamic(parts, found, unseen, fallback, seed=settings.seed)
        for number in found.pick(True):
            told = judged.table.row(number, named=True)
            lift = mean_interval(judged.right[number] - said, groups, seed=settings.seed)
            kept = mean_interval(judged.always[number] - said, groups, seed=settings.seed)
            rows.append(
                {"guarded": guarded, "strength": told["strength"], "seed": told["seed"], "open": told["open"],
                 "before": float(said.mean()), "after": told["right"], "lift": lift.mean, "low": lift.low, "high": lift.high,
                 "kept": told["always_right"], "kept_lift": kept.mean, "kept_low": kept.low, "kept_high": kept.high,
                 "n": len(unseen)}
            )  # fmt: skip
    return LabelControl(pl.DataFrame(rows, infer_schema_length=None), margin)


def untrained_control(
    parts: Parts,
    fit: Examples,
    held: Examples,
    fallback: Fallback,
    settings: DynamicSettings,
    *,
    progress: Progress | None = None,
) -> Judged:
    """The same fit on a copy of the model with re-initialised weights, to that copy's own distribution.

    What moving gates explain over static ones there, they explain of any function of the input.
    """
    twin, rule = on_reinitialised(parts, fit, fallback, settings.seed)
    found = fit_dynamic(twin, fit, rule, settings, progress=progress)
    return judge_dynamic(twin, found, held, rule, seed=settings.seed)


def blind(settings: DynamicSettings) -> DynamicSettings:
    """The same for a controller that sees only position and token: the embedding at the token it gates by, and where it is."""
    return replace(settings, site="embed", places=True)
