"""Stability: whether the same search gives the same circuit on other prompts, with other seeds, in another order, by another method."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import polars as pl

from patchclamp.circuit import Circuit
from patchclamp.errors import PatchclampError
from patchclamp.methods import groups_of
from patchclamp.tasks import Examples


@runtime_checkable
class Find(Protocol):
    """A search for a circuit: (examples; by which method, with which seed, in which order of traversal) -> circuit."""

    def __call__(self, examples: Examples, /, *, method: str, seed: int, order: int) -> Circuit: ...


@dataclass(frozen=True, eq=False)
class Stability:
    """How far a search finds the same circuit again.

    Attributes:
        reference: the circuit found on the prompts as they are, by the first method, seed and order.
        table: a row per source of variation ("prompts", "seed", "order", "method"): searches, and of the Jaccard index with the
            reference jaccard (mean), lowest, and chance: what circuits of the same sizes would have, drawn at random.
        parts: site, share: in which share of all circuits a part is, most frequent first.
        circuits: every circuit found, the source of its variation in `about`.
    """

    reference: Circuit
    table: pl.DataFrame
    parts: pl.DataFrame
    circuits: tuple[Circuit, ...]

    def __str__(self) -> str:
        rows = self.table.iter_rows(named=True)
        return "; ".join(
            f"{row['source']}: Jaccard {row['jaccard']:.2f} (lowest {row['lowest']:.2f}, chance {row['chance']:.2f})"
            for row in rows
        )


def stability(
    find: Find,
    examples: Examples,
    of: int,
    *,
    methods: Sequence[str] = ("exact",),
    seeds: Sequence[int] = (0,),
    orders: Sequence[int] = (0,),
    resamples: int = 10,
    seed: int = 0,
) -> Stability:
    """Search again: on resampled prompts (groups drawn with replacement), with each other seed, order and method.

    Args:
        find: the search.
        examples: its prompts.
        of: how many parts there are to choose from.
        methods: the first is the reference's.
        seeds: likewise.
        orders: likewise; of methods that visit parts in an order (ACDC).
        resamples: how many times prompts are drawn anew.
        seed: of these draws.

    Cost: that of `find`, 1 + resamples + (seeds - 1) + (orders - 1) + (methods - 1) times.
    """
    if not methods or not seeds or not orders or resamples < 0:
        raise PatchclampError("a search needs a method, a seed and an order at least, and resamples of 0 or more")
    first: dict[str, Any] = {"method": methods[0], "seed": seeds[0], "order": orders[0]}
    reference = find(examples, **first)
    names, rng = groups_of(examples), np.random.default_rng([seed, 19])
    groups = sorted(set(names))
    found: list[tuple[str, Circuit]] = []
    for _ in range(resamples):
        counts = Counter(groups[int(i)] for i in rng.integers(len(groups), size=len(groups)))
        drawn = [i for i, name in enumerate(names) for _ in range(counts[name])]
        found.append(("prompts", find(examples.take(drawn), **first)))
    found += [("seed", find(examples, method=methods[0], seed=other, order=orders[0])) for other in seeds[1:]]
    found += [("order", find(examples, method=methods[0], seed=seeds[0], order=other)) for other in orders[1:]]
    found += [("method", find(examples, method=other, seed=seeds[0], order=orders[0])) for other in methods[1:]]
    rows: list[dict[str, object]] = []
    for source in dict.fromkeys(source for source, _ in found):
        some = [circuit for name, circuit in found if name == source]
        alike = [reference.jaccard(circuit) for circuit in some]
        by_chance = float(np.mean([_chance(len(reference), len(circuit), of) for circuit in some]))
        rows.append(
            {"source": source, "searches": len(some), "jaccard": float(np.mean(alike)), "lowest": min(alike), "chance": by_chance}
        )
    every = [reference, *(circuit for _, circuit in found)]
    shares = Counter(str(site) for circuit in every for site in circuit)
    schema = {"source": pl.String, "searches": pl.Int64, "jaccard": pl.Float64, "lowest": pl.Float64, "chance": pl.Float64}
    chosen = pl.DataFrame({"site": [*shares], "share": [count / len(every) for count in shares.values()]})
    return Stability(
        reference,
        pl.DataFrame(rows, schema=schema),
        chosen.sort("share", descending=True, maintain_order=True),
        tuple(Circuit(circuit.sites, {**circuit.about, "varied": source}) for source, circuit in found),
    )


def _chance(one: int, two: int, of: int) -> float:
    """The expected Jaccard index of two sets of these sizes drawn at random: over the hypergeometric number of parts they share."""
    from scipy.stats import hypergeom

    if not one and not two:
        return 1.0
    shared = np.arange(max(0, one + two - of), min(one, two) + 1)
    return float((hypergeom.pmf(shared, of, one, two) * shared / (one + two - shared)).sum())
