"""Compare: what maps of several tasks, models, seeds or checkpoints have in common, and how much chance alone would give."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl

from patchclamp.dependence.network.reuse import overlap
from patchclamp.errors import PatchclampError
from patchclamp.scores import Scores, parse_part
from patchclamp.store import Record

ROLES = ("facilitating", "interfering", "redundant", "irrelevant", "undecided")


@dataclass(frozen=True, eq=False)
class Comparison:
    """What several maps have in common.

    Attributes:
        pairs: a row per pair of maps: one, two; of circuits: size_one, size_two, shared, share (of the smaller), jaccard, expected and p by
            chance, matched_expected and matched_p with as many of each kind in each layer; of exact effects: spearman, sign (share of
            parts clear in both whose sign is the same), clear (how many); of roles: same_role (share), kappa (Cohen's).
        parts: a row per part: site, and for each map its effect, role and whether it is in the circuit; in_circuits, how many.
        everywhere: parts in every circuit; nowhere: parts in none.
        about: names of the maps, and why a column is empty.
    """

    pairs: pl.DataFrame
    parts: pl.DataFrame
    everywhere: tuple[str, ...]
    nowhere: tuple[str, ...]
    about: Mapping[str, Any]

    def to_record(self) -> dict[str, Any]:
        """Frames and names."""
        return {"pairs": self.pairs, "parts": self.parts, "everywhere": list(self.everywhere), "nowhere": list(self.nowhere),
                "about": dict(self.about)}  # fmt: skip


def compare(records: Mapping[str, Record], *, draws: int = 9999, seed: int = 0) -> Comparison:
    """Put maps side by side: circuits, exact effects and roles, pair by pair.

    Maps are of the same parts: one model on several tasks or seeds, checkpoints of one model, or models of one shape.

    Args:
        records: name -> what `patchclamp map` found (`store.load_record`).
        draws: random circuits behind `matched_p`.
        seed: of them.

    No passes.

    Raises:
        PatchclampError: fewer than two maps, or of other parts.
    """
    if len(records) < 2:
        raise PatchclampError(f"{len(records)} map was given: two or more can be compared")
    names = list(records)
    sites = records[names[0]].scores["site"].to_list()
    for name in names[1:]:
        other = records[name].scores["site"].to_list()
        if other != sites:
            strange = next((site for site in (*other, *sites) if (site in other) != (site in sites)), "their order")
            raise PatchclampError(
                f"{name} is a map of other parts than {names[0]} ({strange}): compare maps of models of one shape"
            )
    universe = [site for site, kind in zip(sites, records[names[0]].scores["kind"], strict=True) if kind != "embed"]
    rows = [_pair(one, two, records[one], records[two], universe, draws, seed) for one, two in combinations(names, 2)]
    circuits = {name: {str(site) for site in record.circuit} for name, record in records.items() if record.circuit is not None}
    parts = _parts(records, universe, circuits)
    full = len(circuits) == len(names)
    return Comparison(
        pl.DataFrame(rows, infer_schema_length=None),
        parts,
        tuple(site for site in universe if full and all(site in circuit for circuit in circuits.values())),
        tuple(site for site in universe if full and not any(site in circuit for circuit in circuits.values())),
        {"names": names, "without_circuit": [name for name in names if name not in circuits]},
    )


def _pair(one: str, two: str, first: Record, second: Record, universe: Sequence[str], draws: int, seed: int) -> dict[str, Any]:
    row: dict[str, Any] = {"one": one, "two": two}
    empty = dict.fromkeys(("shared", "share", "jaccard", "expected", "p", "matched_expected", "matched_p"))
    if first.circuit is not None and second.circuit is not None and len(first.circuit) and len(second.circuit):
        found = overlap([*first.circuit], [*second.circuit], universe, draws=draws, seed=seed).to_record()
        row |= {"size_one": found["one"], "size_two": found["two"], **{name: found[name] for name in empty}}
    else:
        row |= {"size_one": None, "size_two": None, **empty}
    return row | _effects(first, second, universe) | _roles(first, second, universe)


def _effects(first: Record, second: Record, universe: Sequence[str]) -> dict[str, Any]:
    """How far exact effects agree; empty where a map has none."""
    if not all("exact" in record.scores.columns for record in (first, second)):
        return {"spearman": None, "sign": None, "clear": None}
    sides = [record.scores.filter(pl.col("site").is_in(universe)) for record in (first, second)]
    one, two = (Scores.of([parse_part(site) for site in universe], side["exact"].to_numpy(), {}) for side in sides)
    same = one.agreement(two)
    sure = np.logical_and.reduce([(side["exact_q"].fill_null(1.0) <= 0.05).to_numpy() for side in sides])
    signs = [np.sign(side["exact"].to_numpy()) for side in sides]
    return {
        "spearman": same.spearman,
        "sign": float((signs[0] == signs[1])[sure].mean()) if sure.any() else None,
        "clear": int(sure.sum()),
    }


def _roles(first: Record, second: Record, universe: Sequence[str]) -> dict[str, Any]:
    """How often roles are the same, and by how much more than chance (Cohen's kappa)."""
    if not all("role" in record.scores.columns for record in (first, second)):
        return {"same_role": None, "kappa": None}
    one, two = (record.scores.filter(pl.col("site").is_in(universe))["role"].to_numpy() for record in (first, second))
    same = float((one == two).mean())
    chance = sum(float((one == role).mean() * (two == role).mean()) for role in ROLES)
    return {"same_role": same, "kappa": None if chance >= 1 else (same - chance) / (1 - chance)}


def _parts(records: Mapping[str, Record], universe: Sequence[str], circuits: Mapping[str, set[str]]) -> pl.DataFrame:
    table = pl.DataFrame({"site": universe})
    for name, record in records.items():
        columns = {"exact": f"{name}: effect", "role": f"{name}: role"}
        there = {old: new for old, new in columns.items() if old in record.scores.columns}
        table = table.join(record.scores.select("site", *there).rename(there), on="site", how="left", maintain_order="left")
        if name in circuits:
            table = table.with_columns(pl.Series(f"{name}: circuit", [site in circuits[name] for site in universe]))
    return table.with_columns(
        pl.Series("in_circuits", [sum(site in circuit for circuit in circuits.values()) for site in universe])
    )
