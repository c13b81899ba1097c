"""Dynamic roles: the whole question, with its controls, in one call."""

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from patchclamp.errors import GateError
from patchclamp.gating.dynamic.controls import LabelControl, blind, label_control, untrained_control
from patchclamp.gating.dynamic.features import Feature
from patchclamp.gating.dynamic.fit import Dynamic, Progress, fit_dynamic
from patchclamp.gating.dynamic.judge import Judged, judge_dynamic
from patchclamp.gating.dynamic.objective import DynamicSettings
from patchclamp.gating.dynamic.switching import Switching, best_strength, switching
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks import Examples


@dataclass(frozen=True, eq=False)
class DynamicRoles:
    """What gates that look at the input say of the parts, and what they say where there is nothing to say.

    Args:
        found: the fits. judged: on unseen prompts, against static gates. switching: part by part.
        labels: fits to arbitrary labels; None where the task has no wrong answers.
        blind: the same fit that sees only position and token, judged; None in scopes that see nothing.
        untrained: the same fit on re-initialised weights, judged.
    """

    found: Dynamic
    judged: Judged
    switching: Switching
    labels: LabelControl | None
    blind: Judged | None
    untrained: Judged

    @property
    def controls(self) -> pl.DataFrame:
        """Advantage of moving gates over static ones, for the fit itself and its controls: a row per kind and strength."""
        kinds = {"model": self.judged, "position and token": self.blind, "untrained": self.untrained}
        there = [(name, one) for name, one in kinds.items() if one is not None]
        return pl.concat([one.advantage.select(pl.lit(name).alias("kind"), pl.all()) for name, one in there])

    def sentences(self) -> list[str]:
        """What was found, in words, each with its numbers."""
        row = self.judged.advantage.filter(pl.col("strength") == self.switching.strength).row(0, named=True)
        told = [
            f"At {row['open']:.1f} open gates a token, gates that look at {self.found.sight} are {row['difference']:.3f} nats "
            f"[{row['low']:.3f}, {row['high']:.3f}] nearer to the model than static ones on {row['n']} unseen prompts"
        ]
        for name, control in (("sees only position and token", self.blind), ("is fitted to an untrained model", self.untrained)):
            if control is not None:
                best = control.advantage.sort("difference", descending=True).row(0, named=True)
                told.append(
                    f"A controller that {name} gains {best['difference']:.3f} [{best['low']:.3f}, {best['high']:.3f}] at most"
                )
        if self.labels is not None:
            table = self.labels.table.filter("guarded")
            told.append(
                f"Fitted to arbitrary labels, controllers lift them by {table['lift'].mean():+.2f} on unseen prompts, and by "
                f"{table['kept_lift'].mean():+.2f} where closed gates are redrawn: "
                + ("rejected" if self.labels.rejected else "NOT rejected: what controllers say here may be their own doing")
            )
        return told + self.switching.sentences()


def dynamic_roles(
    parts: Parts,
    fit: Examples,
    select: Examples,
    confirm: Examples,
    fallback: Fallback,
    settings: DynamicSettings,
    *,
    named: Mapping[str, Feature] | None = None,
    progress: Progress | None = None,
) -> DynamicRoles:
    """Fit, judge, say what switches on what, verify it, and run every control.

    Args:
        parts, fallback, settings: as for `fit_dynamic`.
        fit: to learn on. select: to judge on, and to choose the strength by. confirm: to verify on.
        named: features of prompts that switching may be told by.
        progress: called after each update.

    Cost: four fits (three in scopes that see nothing, one more where there are wrong answers), and their judging.

    Raises:
        GateError: gates per phase, and answers of one token, behind which nothing runs.
        What else `fit_dynamic` raises.
    """
    if settings.scope == "phase" and not any(
        len(answer) > 1 for one in (fit, select) for item in one for answer in item.answers[:1]
    ):
        raise GateError(
            f"gates per phase differ between the prompt and what is generated, and every answer of {fit.task!r} is one token, behind which "
            "nothing runs: give answers of several tokens, or take gates per example or token"
        )
    found = fit_dynamic(parts, fit, fallback, settings, progress=progress)
    judged = judge_dynamic(parts, found, select, fallback, seed=settings.seed)
    told = switching(parts, found, best_strength(judged), fit, select, confirm, fallback, named=named, seed=settings.seed)
    unseeing = None
    if found.sight.reads:
        learned = fit_dynamic(parts, fit, fallback, blind(settings), progress=progress)
        unseeing = judge_dynamic(parts, learned, select, fallback, seed=settings.seed)
    labels = None
    if all(item.wrong for one in (fit, select) for item in one):
        labels = label_control(parts, fit, select, fallback, settings, progress=progress)
    untrained = untrained_control(parts, fit, select, fallback, settings, progress=progress)
    return DynamicRoles(found, judged, told, labels, unseeing, untrained)
