"""Roles: what learned gates say of each part, and how much of that stands.

facilitation = G-, interference = 1 - G+, irrelevance = G+ (1 - G-) (Nam et al. 2025, https://arxiv.org/abs/2505.13737, table 1;
the text of its section 3.3 has plus and minus of the last exchanged). Learned gates also fit noise, so a role counts as found
only with every safeguard of `roles`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from patchclamp.errors import TaskError
from patchclamp.gating.descent import Progress
from patchclamp.gating.fit import Gated, Keep, P, T, at_once, fit, refit
from patchclamp.gating.judge import Evidence, calls, judge, most
from patchclamp.gating.nulls import REINITIALISED, SHUFFLED, on_twin, twin_of
from patchclamp.gating.objective import GatingSettings
from patchclamp.gating.substitutes import substitutes
from patchclamp.gating.table import role_names, table_of
from patchclamp.gating.toggle import toggle
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks import Examples

FACTORS = (1 / 3, 3.0)  # of lambda: a role that does not outlast them is fragile
FAR = 10.0  # a null whose logits had to be shrunk by more is told of


@dataclass(frozen=True)
class Null:
    """Shares of parts that gating calls facilitating and interfering where there is nothing to find.

    `raw_*`: by the gates alone, in most seeds; the others: with every safeguard but the comparison with a null, which a null
    cannot make with itself. `bar_*`: nats that a part has to be worth in order to beat this null (`Evidence.bar`).
    """

    name: str
    facilitating: float
    interfering: float
    raw_facilitating: float
    raw_interfering: float
    parts: int
    seeds: int
    bar_facilitating: float = 0.0
    bar_interfering: float = 0.0


@dataclass(frozen=True, eq=False)
class Roles:
    """What `roles` found.

    Args:
        table: a row per part; columns as in `table.COLUMNS`.
        gated: the learned gates of every seed, with the objective per update and where each fit stopped.
        worth: [seed, part], nats that the part's gate is worth in the seed's fitted circuit on held-out prompts:
            "facilitating" in G-, "interfering" in G+.
        nulls: shares that the nulls were called, with and without safeguards.
        toggles: parts closed in the order of each score (see `toggle`).
        pressure: nats that opening or closing one gate fully is worth; n, seeds, seconds by step and the like are in `about`.
        warnings: what the reader must know.
    """

    table: pl.DataFrame
    gated: Gated
    worth: Mapping[str, Float[np.ndarray, "seed part"]]
    nulls: tuple[Null, ...]
    toggles: pl.DataFrame
    pressure: float
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    warnings: tuple[str, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """Scalars, frames and arrays, for storing without these classes."""
        descents = self.gated.descents
        return {
            "table": self.table,
            "toggles": self.toggles,
            "logits": {name: descent.logits for name, descent in descents.items()},
            "worth": dict(self.worth),
            "losses": {name: descent.losses for name, descent in descents.items()},
            "stopped_at": {name: descent.stopped_at for name, descent in descents.items()},
            "reasons": {name: list(descent.reason) for name, descent in descents.items()},
            "nulls": [asdict(null) for null in self.nulls],
            "settings": asdict(self.gated.settings),
            "pressure": self.pressure,
            "about": dict(self.about),
            "warnings": list(self.warnings),
        }


def roles(
    parts: Parts,
    fit_on: Examples,
    select: Examples,
    fallback: Fallback,
    settings: GatingSettings = GatingSettings(),
    *,
    progress: Progress | None = None,
    keep: Keep = at_once,
) -> Roles:
    """Fit gates, fit their nulls, and keep the roles that stand.

    Facilitating or interfering is found where all of this holds; else the part is "undecided", and `note` says what failed:

    1. most seeds' gates say so;
    2. on held-out prompts (`select`), toggling the part in the fitted circuits moves the answer's log-probability the right
       way (mean over seeds, q < .05) by at least the pressure;
    3. that is more than 97.5 % of the parts of each null show that is fitted beside it (answers permuted, weights drawn anew),
       where a null's part counts only if 1, 2 and 4 hold of it there;
    4. closing the part alone in the whole model, under the same metric and fallback, has an effect of the same sign (q < .05).

    Irrelevant is what most seeds' gates let go either way and whose exact effect is nothing: it reads "irrelevant while the
    others are open". A part that gates keep in some seed and whose exact effect is nothing is "redundant" where closing it
    together with another such part costs much more than both alone. `fragile` marks roles by gates that change when lambda
    is a third or three times as large (two seeds, refitted from their own ends).

    Args:
        parts: what is gated.
        fit_on: prompts that gates are learned on.
        select: prompts that they are judged on; at most `settings.held_out` are used.
        fallback: what a closed gate passes, in the fit and in every judgement.
        settings: see `GatingSettings`.
        progress: told of every update of every fit.
        keep: computes each descent, or gives back what it was when it was computed before (`Run.piece`).

    Cost: see `fit`, once for the gates and once for each null with `null_seeds` seeds; two refits; `judge` for each.

    Raises:
        TaskError: one answer dominates and pairs cannot be mirrored.
        NumericsError: the answers' NLL is not finite.
    """
    clock = _Clock()
    held = select.take(range(min(len(select), settings.held_out)))
    gated = fit(parts, fit_on, fallback, settings, progress=progress, keep=keep)
    clock("fit")
    evidence = judge(parts, gated, held, fallback, settings.seed)
    clock("judge")
    nulls, warnings = _nulls(parts, fit_on, held, fallback, settings, progress, keep)
    clock("nulls")
    fragile = _fragile(parts, gated, fit_on, fallback, progress)
    clock("lambda")
    redundant = substitutes(parts, gated, evidence, held, fallback, settings.seed)
    clock("substitutes")
    shuffled = next((fits for null, fits in nulls if null.name == SHUFFLED), None)
    table = table_of(gated, evidence, bars([null for null, _ in nulls]), fragile, redundant, shuffled)
    toggles = toggle(parts, gated, held, fallback)
    clock("toggle")
    said = [*gated.warnings, *warnings]
    if fallback.off_distribution:
        said.append(
            f"gates under the fallback {fallback.kind} are off-distribution: a closed gate passes what no prompt ever gives"
        )
    about = {**gated.about, "judged_on": len(held), "seeds": settings.seeds, "pressure": gated.pressure, "seconds": clock.seconds}
    worth = {"facilitating": evidence.facilitating.worth, "interfering": evidence.interfering.worth}
    return Roles(table, gated, worth, tuple(null for null, _ in nulls), toggles, gated.pressure, about, tuple(said))


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now


def _nulls(
    parts: Parts,
    fit_on: Examples,
    held: Examples,
    fallback: Fallback,
    settings: GatingSettings,
    progress: Progress | None,
    keep: Keep,
) -> tuple[list[tuple[Null, Gated]], list[str]]:
    """The same fit with answers permuted (in the fit and in what judges it), and on re-initialised weights."""
    if not settings.null_seeds:
        return [], ["no null was fitted: no part can be called facilitating or interfering"]
    mine, found, warnings = settings.for_null(), list[tuple[Null, Gated]](), list[str]()

    def one(name: str, parts: Parts, fit_on: Examples, held: Examples, fallback: Fallback) -> None:
        gated = fit(parts, fit_on, fallback, mine, progress=_named(progress, name), keep=_within(keep, name))
        found.append((_null(name, judge(parts, gated, held, fallback, settings.seed)), gated))

    try:
        seed = 1000 + settings.seed
        one(SHUFFLED, parts, fit_on.shuffled_answers(seed), held.shuffled_answers(seed + 1), fallback)
    except TaskError as error:
        warnings.append(f"no null of shuffled answers: {error}")
    model, shrunk = twin_of(parts.model, fit_on, settings.seed)
    twin, values = on_twin(parts, model, fit_on, fallback, settings.seed)
    if shrunk > FAR:
        warnings.append(
            f"re-initialised weights gave logits {shrunk:.0f} times as wide as the model's: that null's were divided by as much"
        )
    one(REINITIALISED, twin, fit_on, held, values)
    return found, warnings


def _named(progress: Progress | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda title, done, of: progress(f"{name}: {title}", done, of)


def _within(keep: Keep, null: str) -> Keep:
    def one(name: str, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return keep(f"{null.split(maxsplit=1)[0]}-{name}", function, *args, **kwargs)

    return one


def _null(name: str, evidence: Evidence) -> Null:
    called, share = evidence.calls, {role: float(evidence.stands(role).mean()) for role in evidence.sides}
    raw = {role: float(most(getattr(called, role)).mean()) for role in evidence.sides}
    seeds, parts = called.irrelevant.shape
    return Null(
        name,
        facilitating=share["facilitating"],
        interfering=share["interfering"],
        raw_facilitating=raw["facilitating"],
        raw_interfering=raw["interfering"],
        parts=parts,
        seeds=seeds,
        bar_facilitating=evidence.bar("facilitating"),
        bar_interfering=evidence.bar("interfering"),
    )


def bars(nulls: Sequence[Null]) -> dict[str, float] | None:
    """Nats that a part has to be worth in order to beat every null; None where there is none."""
    if not nulls:
        return None
    return {
        "facilitating": max(null.bar_facilitating for null in nulls),
        "interfering": max(null.bar_interfering for null in nulls),
    }


def _fragile(parts: Parts, gated: Gated, fit_on: Examples, fallback: Fallback, progress: Progress | None) -> list[str]:
    """Per part, what its role by gates becomes at a third and at three times lambda, where that is another role.

    Refits are of the first two seeds: another role than those two give, and than all of them give, at the lambda of the fit.
    """
    texts = [list[str]() for _ in gated.labels]
    if gated.settings.refits:
        few = gated.first(2)
        whole, now = role_names(calls(gated)), role_names(calls(few))
        for factor, other in zip(FACTORS, refit(parts, few, fit_on, fallback, FACTORS, progress=progress), strict=True):
            for text, *known, then in zip(texts, whole, now, role_names(calls(other)), strict=True):
                if then not in known:
                    text.append(f"{then or 'seeds differ'} at lambda {'/ 3' if factor < 1 else 'x 3'}")
    return [", ".join(text) for text in texts]
