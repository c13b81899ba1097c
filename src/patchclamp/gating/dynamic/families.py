"""Whole families of inputs held out: do gates that were learned without a template hold on it?"""

from collections.abc import Mapping

import polars as pl

from patchclamp.errors import TaskError
from patchclamp.gating.dynamic.features import Feature
from patchclamp.gating.dynamic.fit import Progress, fit_dynamic
from patchclamp.gating.dynamic.judge import judge_dynamic
from patchclamp.gating.dynamic.objective import DynamicSettings
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks import Examples


def families_of(examples: Examples, family: Feature | None = None) -> Mapping[str, list[int]]:
    """Which examples are of each family: by the group that the task names (its template), or as `family` says.

    Raises:
        TaskError: fewer than two families.
    """
    found: dict[str, list[int]] = {}
    for number, example in enumerate(examples):
        found.setdefault(example.group if family is None else family(example), []).append(number)
    if len(found) < 2:
        raise TaskError(
            f"whole families were to be held out, and the {len(examples)} examples of {examples.task!r} are all of one: name groups "
            "in the task, or say what a family is (family=)"
        )
    return found


def families_held_out(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    settings: DynamicSettings = DynamicSettings(),
    *,
    family: Feature | None = None,
    most: int | None = None,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Fit without one family at a time, and judge on that family.

    Args:
        parts, fallback, settings: as for `fit_dynamic`.
        examples: of all families.
        family: what an example's family is; by default the group that the task names.
        most: families held out at most, the largest first; None: each in turn.
        progress: called after each update.

    Returns:
        A row per family held out and strength: family, fitted (examples), strength, open, d, static_d, difference (static less
        moving, at as many open gates, on the family that the fit never saw), low, high, n.

    Cost: a fit and its judging per family.

    Raises:
        TaskError: fewer than two families.
    """
    found = families_of(examples, family)
    names = sorted(found, key=lambda name: (-len(found[name]), name))[:most]
    tables: list[pl.DataFrame] = []
    for name in names:
        out = set(found[name])
        rest = examples.take(number for number in range(len(examples)) if number not in out)
        learned = fit_dynamic(parts, rest, fallback, settings, progress=progress)
        judged = judge_dynamic(parts, learned, examples.take(found[name]), fallback, seed=settings.seed)
        tables.append(judged.advantage.select(pl.lit(name).alias("family"), pl.lit(len(rest)).alias("fitted"), pl.all()))
    return pl.concat(tables)
