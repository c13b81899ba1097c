"""Self-repair: how much of what a closed part no longer writes, the parts behind it write instead (the hydra effect).

Direct effects go through the residual stream to the logits with everything between held at the model's own run, the final
norm's scale included (`direct`). With D(j | i) the share of part j's write while part i is closed:

    direct(i)          = D(i | nothing) - D(i | i)                 what i itself no longer gives
    compensation(i, j) = D(j | i) - D(j | nothing)                 what j gives more (or less) because i is closed
    total(i)           = direct(i) - sum_j compensation(i, j) - rest(i)

the total being what closing i takes where the final norm's scale is held. The identity is exact: the last residual stream is
the sum of all writes. `rest` is what output biases behind post-norms give (0 in all other families). What the final norm does by itself
is the difference between the total with its scale held and with it free.

McGrath et al. 2307.15771 (https://arxiv.org/abs/2307.15771), Rushing and Nanda 2402.15390 (https://arxiv.org/abs/2402.15390).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from patchclamp.dependence.closings import closed_gates, place_of
from patchclamp.dependence.direct import Shares, factor, shares
from patchclamp.dependence.table import Dependence
from patchclamp.errors import GateError
from patchclamp.methods import counted, groups_of
from patchclamp.metrics import metric_named
from patchclamp.parts import Fallback, Gated, Parts, benefits
from patchclamp.scores import Part, Scores
from patchclamp.scores.statistics import judged
from patchclamp.sites import Site
from patchclamp.tasks import Examples

ALPHA = 0.05
ASLEEP = 0.5
"""A backup's own direct effect is at most this share of what it is while its partner is closed."""


@dataclass(frozen=True, eq=False)
class SelfRepair:
    """What closing each part does, and what the others do about it; in units of the logit difference.

    Args:
        table: directed, `a` closed, `b` behind it: `score` = compensation(a, b) with `low`, `high`, `p`, `q`; `direct`: b's direct
            effect in the own run, less what its fallback would give; `direct_closed`: the same while a is closed; `moved`: how far
            what b writes at the answer position is from the own run's, |difference| / |own|; `backup`: b is a backup of a.
        parts: a row per closed part: `site`, `total` (the norm free, as the method exact has it), `total_held`, `direct`, `compensation` (the sum
            over b), its share by `heads` and by `mlps`, `rest`, `norm` (= total_held - total: what the norm's own change repairs),
            each with `_low` and `_high`; `repaired` = compensation / direct, empty where direct is not clearly above or below 0.
        about: what produced it.
    """

    table: Dependence
    parts: pl.DataFrame
    about: Mapping[str, Any]

    def backups(self) -> pl.DataFrame:
        """The rows of `table` in which b is a backup of a, largest compensation first."""
        return self.table.table.filter("backup").sort("score", descending=True)

    def to_record(self) -> dict[str, Any]:
        """As plain frames."""
        return {"pairs": self.table.table, "parts": self.parts, "about": dict(self.about)}


def self_repair(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    *,
    closed: Sequence[Part | str] | None = None,
    alpha: float = ALPHA,
    batch_size: int = 32,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> SelfRepair:
    """Close parts one at a time, and read off what every part behind them gives to the logits then.

    A part b is a backup of a where closing a raises b's direct effect clearly (q <= alpha over all pairs, the interval above 0), and
    b's direct effect without that is at most half of what it is with it.

    Args:
        parts: heads and MLPs (`nodes`).
        examples: with one right and one wrong token each.
        fallback: what a closed gate passes.
        closed: which parts to close; by default each.
        alpha: of q.
        batch_size: examples at once.
        seed: of the bootstrap and the sign flips.
        about: provenance to add.

    Cost: two forward passes per closed part (one from its block on, one through replay), see `direct.shares`.

    Raises:
        GateError: parts that are not whole heads and MLPs, or that are not there.
        MetricError: answers of several tokens, or none that are wrong.
    """
    nodes_, labels = _nodes(parts), counted(parts)
    chosen = list(range(len(labels))) if closed is None else [place_of(labels, part) for part in closed]
    found = shares(nodes_, examples, fallback, [(), *((number,) for number in chosen), range(len(labels))], batch_size=batch_size)
    facts = _facts(parts, examples, fallback, seed) | {"method": "self-repair", "alpha": alpha, **(about or {})}
    groups = groups_of(examples)
    gates = closed_gates(parts, [(), *((number,) for number in chosen)])
    free = benefits(parts, examples, gates, fallback, metric_named("logit_diff"), batch_size).double().numpy()
    table = _pairs(found, labels, chosen, groups, alpha, seed, facts)
    return SelfRepair(table, _by_part(found, labels, chosen, free[0] - free[1:], groups, seed), facts)


def joint_backups(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    closed: Sequence[Part | str],
    *,
    alpha: float = ALPHA,
    batch_size: int = 32,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> Scores:
    """Backups of several parts at once: what each other part's direct effect rises by when all of them are closed together.

        score(b) = E[D(b) | all of `closed` closed] - E[D(b) | nothing closed]

    Backups of backups show here and not one by one. https://arxiv.org/abs/2607.01940 (CoAx). `backup` is as in `self_repair`.

    Args:
        parts: heads and MLPs.
        examples: with one right and one wrong token each.
        fallback: what a closed gate passes.
        closed: the parts that are closed together: those with the largest direct effects, say.
        alpha: of q.
        batch_size: examples at once.
        seed: of the bootstrap and the sign flips.
        about: provenance to add.

    Cost: two forward passes, and one with everything closed.
    """
    labels = counted(parts)
    shut = [place_of(labels, part) for part in closed]
    if not shut:
        raise GateError("no part was named to be closed: name those whose backups are looked for")
    found = shares(_nodes(parts), examples, fallback, [(), tuple(shut), range(len(labels))], batch_size=batch_size)
    left = [number for number in range(len(labels)) if number not in shut]
    own, then, nothing = found.shares[:, left]
    facts = _facts(parts, examples, fallback, seed) | {"method": "joint backups", "closed": [str(labels[i]) for i in shut]}
    scores = Scores.from_samples([labels[i] for i in left], then - own, facts | dict(about or {}), groups_of(examples), seed=seed)
    direct, direct_closed = (own - nothing).mean(1), (then - nothing).mean(1)
    rise = judged(then - own, groups_of(examples), seed).clear(alpha=alpha)
    columns = {"direct": direct, "direct_closed": direct_closed, "backup": _asleep(rise, direct, direct_closed)}
    return Scores(scores.table.with_columns(**{name: pl.Series(value) for name, value in columns.items()}), scores.about)


def erasure(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    *,
    alpha: float = ALPHA,
    batch_size: int = 32,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
) -> Scores:
    """Which MLPs turn down the token that the model gives most: each MLP's direct effect on it.

        score(MLP) = D(MLP | nothing) - D(MLP's fallback)     on the likeliest token's logit, less the mean over the vocabulary

    A column `erases` marks those that are clearly negative (q <= alpha over all MLPs, the interval below 0): late ones are expected to
    (McGrath et al. 2307.15771).

    Cost: two forward passes.
    """
    labels = counted(parts)
    found = shares(_nodes(parts), examples, fallback, [(), range(len(labels))], "likeliest", batch_size)
    mlps = [number for number, label in enumerate(labels) if isinstance(label, Site) and label.kind == "mlp"]
    if not mlps:
        raise GateError("erasure is what MLPs do, and there is none among the parts: take nodes(model) with mlps")
    samples, groups = (found.shares[0] - found.shares[1])[mlps], groups_of(examples)
    facts = _facts(parts, examples, fallback, seed) | {"method": "erasure", "readout": "likeliest", **(about or {})}
    scores = Scores.from_samples([labels[number] for number in mlps], samples, facts, groups, seed=seed)
    erases = judged(samples, groups, seed).clear(alpha=alpha) < 0
    return Scores(scores.table.with_columns(erases=pl.Series(erases)), scores.about)


def _nodes(parts: Parts) -> Gated:
    if not isinstance(parts, Gated):
        raise GateError(f"direct effects are known of whole heads and MLPs (nodes), not of {type(parts).__name__}")
    parts.frozen_norm()  # says what is wrong where the norm cannot be held
    return parts


def _facts(parts: Parts, examples: Examples, fallback: Fallback, seed: int) -> dict[str, Any]:
    return {
        "metric": "logit_diff", "fallback": fallback.kind, "n": len(examples), "seed": seed, "model": parts.model.name,
        "task": examples.task, "readout": "difference" if factor(parts.model) is not None else "difference, before the cap",
    }  # fmt: skip


def _asleep(rise: Float[np.ndarray, " row"], direct: Float[np.ndarray, " row"], then: Float[np.ndarray, " row"]) -> Any:
    return (rise > 0) & (then > 0) & (direct <= ASLEEP * then)


def _pairs(
    found: Shares, labels: list[Part], chosen: list[int], groups: list[str], alpha: float, seed: int, facts: Mapping[str, Any]
) -> Dependence:
    """Compensation of every part in or behind the closed part's block (below it nothing changes)."""
    rows = [
        (row, i, j)
        for row, i in enumerate(chosen)
        for j in range(len(labels))
        if j != i and _layer(labels[j]) >= _layer(labels[i])
    ]
    at, i, j = (np.array([one[n] for one in rows], dtype=int) for n in range(3))
    own, nothing = found.shares[0][j], found.shares[-1][j]
    then = found.shares[1 + at, j]
    direct, direct_closed = (own - nothing).mean(1), (then - nothing).mean(1)
    rise = judged(then - own, groups, seed).clear(alpha=alpha)
    return Dependence.from_samples(
        labels, list(zip(i.tolist(), j.tolist(), strict=True)), then - own, facts, groups, seed=seed, directed=True,
        direct=direct, direct_closed=direct_closed, moved=found.moved[1 + at, j].mean(1),
        backup=_asleep(rise, direct, direct_closed),
    )  # fmt: skip


def _by_part(
    found: Shares, labels: list[Part], chosen: list[int], total: np.ndarray, groups: list[str], seed: int
) -> pl.DataFrame:
    """A row per closed part; `total` is what closing it takes with the norm free."""
    change = found.shares[1:-1] - found.shares[0]
    rows = np.arange(len(chosen))
    direct = -change[rows, chosen]
    change[rows, chosen] = 0
    held = found.total[0] - found.total[1:-1]
    mlp = np.array([isinstance(label, Site) and label.kind == "mlp" for label in labels])
    compensation = change.sum(1)
    rest = direct - compensation - held
    named = {
        "total": total, "total_held": held, "direct": direct, "compensation": compensation, "heads": change[:, ~mlp].sum(1),
        "mlps": change[:, mlp].sum(1), "rest": rest, "norm": held - total,
    }  # fmt: skip
    body: dict[str, Any] = {"site": [str(labels[number]) for number in chosen]}
    for name, samples in named.items():
        of = judged(samples, groups, seed)
        body |= {name: of.mean, f"{name}_low": of.low, f"{name}_high": of.high}
    clear = judged(direct, groups, seed).clear() != 0
    share = np.divide(compensation.mean(1), direct.mean(1), out=np.full(len(chosen), np.nan), where=clear)
    return pl.DataFrame({**body, "repaired": share}).with_columns(pl.col(pl.Float64).fill_nan(None))


def _layer(part: Part) -> int:
    return part.layer or 0 if isinstance(part, Site) else -1
