"""Conditional roles: what a part does for the benefit once another part is closed, from the numbers of `close_pairs`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl

from patchclamp.dependence.closings import Closings
from patchclamp.dependence.interactions import ALPHA
from patchclamp.dependence.table import Dependence
from patchclamp.scores.statistics import judged

ROLES = {1.0: "facilitating", -1.0: "interfering", 0.0: "nothing"}


def conditional_roles(
    closings: Closings, *, alpha: float = ALPHA, seed: int = 0, about: Mapping[str, Any] | None = None
) -> Dependence:
    """The role of every part given that another is closed, and where that is another role than with all gates open.

        effect of i given j = m(j closed) - m(both closed)      = e(i) - I(i, j)

    A role is facilitating (the effect is above 0) or interfering (below), where its q is at most `alpha`, its 95 % interval leaves
    zero out and it is more than rounding; else "nothing". q is Benjamini and Hochberg's over all rows.

    Args:
        closings: what was measured.
        alpha: of q.
        seed: of the bootstrap and the sign flips.
        about: provenance to add.

    Returns:
        Directed, two rows per pair: `a` is the part that is closed, `b` the part whose role it is. `score`, `low`, `high`, `p`,
        `q`, `role`: given `a` closed; `open`, `open_role`: with all gates open; `shift` = score - open and `shift_q`;
        `changes`: the roles differ and the shift itself is clear (that one effect is clear and another is not does not yet
        make them different).
    """
    i, j = closings.first, closings.second
    groups, noise = closings.groups, closings.noise
    pairs = [*zip(i, j, strict=True), *zip(j, i, strict=True)]
    samples = np.concatenate([closings.alone[i] - closings.both, closings.alone[j] - closings.both])
    used = sorted({*i, *j})
    opened, row_of = judged(closings.effects[used], groups, seed), {number: row for row, number in enumerate(used)}
    mine = np.array([row_of[part] for _, part in pairs], dtype=int)
    shift = judged(-closings.interaction, groups, seed)
    twice = np.tile(np.arange(len(i)), 2)
    role, role_open = judged(samples, groups, seed).clear(noise, alpha), opened.clear(noise, alpha)[mine]
    changes = (role != role_open) & (shift.clear(2 * noise, alpha)[twice] != 0)
    facts = {"method": "conditional roles", **closings.about, "alpha": alpha, "seed": seed, "noise_floor": noise, **(about or {})}
    return Dependence.from_samples(
        closings.parts, pairs, samples, facts, groups, seed=seed, directed=True,
        role=pl.Series([ROLES[float(one)] for one in role], dtype=pl.String), open=opened.mean[mine],
        open_role=pl.Series([ROLES[float(one)] for one in role_open], dtype=pl.String),
        shift=shift.mean[twice], shift_q=shift.q[twice], changes=changes,
    )  # fmt: skip


def changed_roles(table: Dependence, at_least: float = 0.0) -> pl.DataFrame:
    """The rows of `conditional_roles` in which a role changes, by a shift of `at_least`, largest first."""
    large = pl.col("changes") & (pl.col("shift").abs() >= at_least)
    return table.table.filter(large).sort(pl.col("shift").abs(), descending=True)
