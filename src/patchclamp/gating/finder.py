"""Gates as a circuit finder with a sparsity knob: sets of every size, and how faithful they are on held-out prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool

from patchclamp.errors import GateError
from patchclamp.gating.descent import Progress
from patchclamp.gating.exactly import fit_exactly
from patchclamp.gating.hard import fit_hard
from patchclamp.gating.objective import GatingSettings
from patchclamp.gating.sufficiency import shares
from patchclamp.parts import Fallback, Parts, sites_of
from patchclamp.scores import Part
from patchclamp.tasks import Examples

PRICES = (0.01, 0.03, 0.1, 0.3, 1.0)
EXACTLY, HARD, RANDOM = "exactly k", "hard concrete", "random"


@dataclass(frozen=True, eq=False)
class Sets:
    """Sets of parts by method and size, each with what it alone keeps of the behaviour on held-out prompts.

    Args:
        table: a row per set: method; knob (k, or the price of an open gate in nats); seed; size; kept (parts joined by blanks);
            share, low, high (`sufficiency.shares`); value (mean benefit). Of "random", a row per draw.
        about: task, metric, fallback, n.
        warnings: what the reader must know.
    """

    table: pl.DataFrame
    about: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    def best(self, method: str, size: int) -> dict[str, Any]:
        """The method's row of the largest share among sets of `size` parts at most.

        Raises:
            GateError: the method has no such set.
        """
        rows = self.table.filter((pl.col("method") == method) & (pl.col("size") <= size)).sort("share", descending=True)
        if not rows.height:
            known = ", ".join(sorted(self.table["method"].unique()))
            raise GateError(f"there is no set of {size} parts or fewer by {method!r}: methods are {known}")
        return rows.row(0, named=True)

    def to_record(self) -> dict[str, Any]:
        """Frames and scalars."""
        return {"table": self.table, "about": dict(self.about), "warnings": list(self.warnings)}


def find_sets(
    parts: Parts,
    fit_on: Examples,
    held_out: Examples,
    fallback: Fallback,
    sizes: Sequence[int],
    prices: Sequence[float] = PRICES,
    settings: GatingSettings = GatingSettings(),
    *,
    orders: Mapping[str, Sequence[Part]] | None = None,
    draws: int = 20,
    metric: str | None = None,
    progress: Progress | None = None,
) -> Sets:
    """Sets of exactly k parts, sets by the price of an open gate, those that orders of parts give, and random ones.

    Args:
        parts: what is gated.
        fit_on: prompts that sets are learned on.
        held_out: prompts that all sets are judged on.
        fallback: what closed gates pass.
        sizes: each k; the best set of all seeds on the prompts of the fit is shown. None leaves sets of exactly k parts out; orders
            and random sets are then of the sizes that prices give.
        prices: nats per open gate of the hard-concrete gates; none leaves them out.
        settings: seeds, batch and seed.
        orders: parts best first, by name, to compare with: threshold discovery is the order of a table of scores.
        draws: random sets of each size.
        metric: what shares are of; by default the task's.

    Cost: see `fit_exactly` and `fit_hard`; one forward pass over the held-out prompts per set.

    Raises:
        GateError: neither sizes nor prices, or an order that names a part which is not gated.
    """
    labels, rows, masks = sites_of(parts), list[dict[str, Any]](), list[np.ndarray]()

    def add(method: str, knob: float, seed: int | None, mask: Bool[np.ndarray, " part"]) -> None:
        kept = " ".join(str(labels[number]) for number in np.flatnonzero(mask))
        rows.append({"method": method, "knob": float(knob), "seed": seed, "size": int(mask.sum()), "kept": kept})
        masks.append(mask)

    if not sizes and not prices:
        raise GateError("sets were asked for, and neither how many parts they hold nor what a part costs: give sizes or prices")
    warnings: tuple[str, ...] = ()
    if sizes:
        exactly = fit_exactly(parts, fit_on, fallback, sizes, settings, progress=progress)
        warnings = exactly.warnings
        for size, mask in zip(sizes, exactly.best, strict=True):
            add(EXACTLY, float(size), None, mask)
    if prices:
        hard = fit_hard(parts, fit_on, fallback, prices, settings, progress=progress)
        warnings = hard.warnings
        for price, masks_of in zip(prices, hard.kept, strict=True):
            for seed, mask in zip(hard.seeds, masks_of, strict=True):
                add(HARD, price, seed, mask)
    sizes = sizes or sorted({int(mask.sum()) for mask in masks})  # of other sets, as many parts as a price has left
    for name, order in (orders or {}).items():
        if strange := set(order) - set(labels):
            raise GateError(f"the order {name!r} names {min(strange, key=str)}, which is not among the {len(labels)} parts")
        for size in sizes:
            add(name, float(size), None, np.isin(np.arange(len(labels)), [labels.index(part) for part in order[:size]]))  # type: ignore[arg-type]
    rng = np.random.default_rng([settings.seed, 8])
    for size in sizes:
        for draw in range(draws):
            add(RANDOM, float(size), draw, np.isin(np.arange(len(labels)), rng.choice(len(labels), size, replace=False)))
    found = shares(parts, np.stack(masks), held_out, fallback, metric, settings.seed)
    table = pl.DataFrame(rows, schema_overrides={"seed": pl.Int64}).with_columns(
        share=pl.Series(found.share), low=pl.Series(found.low), high=pl.Series(found.high), value=pl.Series(found.value)
    )
    about = {"task": fit_on.task, "metric": found.metric, "fallback": fallback.kind, "n": found.n, "fit_on": len(fit_on),
             "opened": found.opened, "closed": found.closed, "seed": settings.seed}  # fmt: skip
    return Sets(table, about, warnings)
