"""Signals as a table: each with who wrote it, and with what the head attends to once it is taken out.

    without         the pattern's weight at (query, key) with the signal's directions taken out of the key
    without_others  with as many other directions of the same head, those of smallest terms: what taking out as such does

A signal says why a score is what it is; that the head looks elsewhere without it, and not without others, is its test.
"""

from collections.abc import Callable, Sequence

import polars as pl
from jaxtyping import Int
from torch import Tensor

from patchclamp.discover.signals import FIRES, Signal, removed, signals, trace
from patchclamp.errors import PatchclampError
from patchclamp.models.model import Model
from patchclamp.sites import Site

COLUMNS = {
    "head": pl.String, "query": pl.Int64, "key": pl.Int64, "query_token": pl.String, "key_token": pl.String, "weight": pl.Float64,
    "score": pl.Float64, "count": pl.Int64, "rank": pl.Int64, "strength": pl.Float64, "key_writer": pl.String, "key_share": pl.Float64,
    "query_writer": pl.String, "query_share": pl.Float64, "without": pl.Float64, "without_others": pl.Float64,
}  # fmt: skip


def signal_table(
    model: Model,
    ids: Int[Tensor, " position"],
    heads: Sequence[Site] | None = None,
    at: Sequence[int] | None = None,
    *,
    above: float = FIRES,
    top: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> pl.DataFrame:
    """The signals of one prompt, those of largest weight first, each traced and tested.

    Args:
        model: the model.
        ids: the prompt's tokens.
        heads: which heads; by default all.
        at: positions that are attended from, negative ones from the end; by default all.
        above: the pattern's weight from which on a head is said to attend.
        top: how many are traced and tested at most; the others are left out.
        progress: told (signals done, signals).

    Returns:
        A row per signal: head, query and key with their tokens, weight, score, count (of how many directions: rank), strength, the part
        that wrote most of it on the key's and on the query's side with its share, and the weight without it and without others. Where a
        head attends at a score that is not above 0 there is no signal: count is 0, and what comes behind it is empty.

    Cost: as `signals`; per signal 7 forward passes and 2 of as many rows as a head is wide.

    Raises:
        PatchclampError: a position that the prompt does not have, or fewer than one signal asked for.
        FamilyError: scores that have no signals, see `signals`.
    """
    length = len(ids)
    if top < 1 or any(not -length <= one < length for one in at or ()):
        raise PatchclampError(
            f"{top} signals from positions {list(at or ())} of {length} tokens were asked for: give 1 or more, and positions {-length} to "
            f"{length - 1}"
        )
    wanted = None if at is None else {one % length for one in at}
    found = [one for one in signals(model, ids, heads, above) if wanted is None or one.query in wanted]
    found = sorted(found, key=lambda one: -one.weight)[:top]
    rows: list[dict[str, object]] = []
    for done, one in enumerate(found):
        rows.append(_row(model, ids, one))
        if progress is not None:
            progress(done + 1, len(found))
    return pl.DataFrame(rows, schema=COLUMNS)


def _row(model: Model, ids: Int[Tensor, " position"], one: Signal) -> dict[str, object]:
    """One signal with its largest writers and its test."""
    query, key = (str(model.tokenizer.decode([int(ids[at])])) for at in (one.query, one.key))
    row: dict[str, object] = {
        "head": str(one.head), "query": one.query, "key": one.key, "query_token": query, "key_token": key, "weight": one.weight,
        "score": one.score, "count": one.count, "rank": len(one.terms),
    }  # fmt: skip
    if not one.count:
        return row
    writers = trace(model, ids, one)
    for side in ("key", "query"):
        first = writers.filter(pl.col("side") == side).row(0, named=True)
        row |= {f"{side}_writer": first["part"], f"{side}_share": first["share"]}
    for name, other in (("without", False), ("without_others", True)):
        site = Site("pattern", one.head.layer, one.head.index)
        seen = model.record(ids[None], [site], removed(model, ids, one, other))[site]
        row[name] = float(seen[0, one.query, one.key])
    return row | {"strength": one.strength}
