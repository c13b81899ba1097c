"""Episodic memory: how attention moves over a list that is said a second time, in another order; what is recalled in order.

A row is special tokens, a list of L different tokens, and the same tokens again, shuffled (or as they were). At the second time
of item i, attention to the first time of item i + lag says what is thought of: lag + 1 is what came next in the list (an
induction head), 0 the item itself. Shuffled, no head gets this by distance.

Papers: Mistry et al. 2025, Emergence of Episodic Memory in Transformers, https://arxiv.org/abs/2502.06902 (P142); the measures are
those of free recall in people, as in Ji-An et al. 2024, Linking In-context Learning in Transformers to Human Episodic Memory,
https://arxiv.org/abs/2405.14992.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.edits import Put, Zero
from patchclamp.errors import MeasureError
from patchclamp.models.editing import Edits
from patchclamp.models.model import Inputs, Model
from patchclamp.sites import Site
from patchclamp.units.heads import LENGTH, fitting, repeated
from patchclamp.units.table import Numbers, pieces, recorded, tidy

FAR = 5
EDGE = 3


def shuffled(model: Model, n: int = 32, length: int = LENGTH, seed: int = 0) -> Int[Tensor, "row position"]:
    """Rows of random tokens said twice, as `repeated` makes them, the second time shuffled."""
    rows = repeated(model, n, length, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    again = torch.stack([row[-length:][torch.randperm(length, generator=generator)] for row in rows])
    return torch.cat([rows[:, :-length], again], 1)


def half_of(tokens: Int[Tensor, "row position"], ordered: bool = False) -> tuple[int, int]:
    """Where the first time of the list begins, and its length: the longest end of all rows that is one list said twice.

    Args:
        tokens: rows.
        ordered: whether the second time must be in the same order.

    Raises:
        MeasureError: rows do not end in a list of different tokens said twice.
    """
    n = tokens.shape[1]
    for length in range(n // 2, 1, -1):
        first, second = tokens[:, n - 2 * length : n - length], tokens[:, n - length :]
        same = torch.equal(first, second) if ordered else torch.equal(first.sort(1).values, second.sort(1).values)
        if same and all(len(row.unique()) == length for row in first):
            return n - 2 * length, length
    raise MeasureError(
        "episodic memory is measured on rows that end in one list of different tokens, said twice"
        f"{' in the same order (units.repeated makes such rows)' if ordered else ' (recall.shuffled and repeated make such rows)'}; "
        f"these {len(tokens)} rows of {n} tokens do not"
    )


def second_times(tokens: Int[Tensor, "row position"], start: int, length: int) -> Int[Tensor, "row item"]:
    """At which position each item of the list is said the second time."""
    first, second = tokens[:, start : start + length], tokens[:, start + length : start + 2 * length]
    return (first[:, :, None] == second[:, None, :]).long().argmax(-1) + start + length


def recalled(
    pattern: Float[Tensor, "row head query key"], again: Int[Tensor, "row item"], start: int
) -> Float[Tensor, "row head item of"]:
    """Attention from each item's second time to each item's first time."""
    heads, length = pattern.shape[1], again.shape[1]
    rows = pattern[..., start : start + length].double()
    return rows.gather(2, again[:, None, :, None].expand(-1, heads, -1, length))


def crp(block: Float[Tensor, "row head item of"], lag: int) -> Float[Tensor, "row head"]:
    """Conditional response probability: attention to item i + lag / attention to the whole list, summed over the items i that
    have such an item, above and below. Attention spread evenly gives 1 / L. Items at which a head does not look at the list
    weigh nothing.
    """
    length = block.shape[-1]
    items = slice(max(0, -lag), length - max(0, lag))
    return block.diagonal(lag, 2, 3).sum(-1) / block[:, :, items].sum((2, 3)).clamp(min=1e-30)


def recall(model: Model, inputs: Inputs | None = None, *, far: int = FAR, edge: int = EDGE, seed: int = 0) -> pl.DataFrame:
    """How each head's attention moves over a list said twice.

    Args:
        model: any.
        inputs: rows that end in a list said twice; by default 32 rows of random tokens, the second time shuffled.
        far: largest lag (or less, where the list is short).
        edge: how many items at the list's beginning and end are its ends.
        seed: of the default rows and the intervals.

    Returns:
        part `Li.hj`: `crp.LAG` for -far to +far (evenly: `chance`), `asymmetry` = (sum of forward - sum of backward) / (their sum),
        `contiguity` = mean of crp at lags -1, +1 less mean at lags of 2 to far, `primacy` and `recency` = share of the list's
        attention that goes to one of the first (last) items less that to one of the middle, lags 0 and +1 left out, `listed` = share of the
        second time's attention that goes to the first list at all.
        part "model": `serial` (see `serial_recall`), `chance` = 1 / L. Intervals over rows.

    Cost: two forward passes (patterns kept).

    Raises:
        MeasureError: other rows, or a list too short for its ends.
    """
    given = shuffled(model, length=fitting(model), seed=seed) if inputs is None else inputs
    start, length = half_of(model.batch(given).tokens)
    far = min(far, length - 1)
    if length <= 2 * edge or far < 2:
        raise MeasureError(f"a list of {length} items has no middle between ends of {edge}: give longer lists, or edge=1")
    found: dict[tuple[str, str], list[Tensor]] = {}
    for piece, values in recorded(model, given, ["pattern"]):
        again = second_times(piece.tokens, start, length)
        for site, pattern in values.items():
            for name, each in _of_layer(recalled(pattern, again, start), far, edge).items():
                for h in range(each.shape[1]):
                    found.setdefault((f"L{site.layer}.h{h}", name), []).append(each[:, h].cpu())
    numbers = [Numbers(part, name, torch.cat(some).numpy()) for (part, name), some in found.items()]
    said = serial_recall(model, given).mean(1)
    return tidy([*numbers, Numbers("model", "serial", said), Numbers("model", "chance", np.full(len(said), 1 / length))], seed)


def _of_layer(block: Float[Tensor, "row head item of"], far: int, edge: int) -> dict[str, Float[Tensor, "row head"]]:
    length = block.shape[-1]
    lags = {lag: crp(block, lag) for lag in range(-far, far + 1)}
    forward, backward = (torch.stack([lags[sign * lag] for lag in range(1, far + 1)]).sum(0) for sign in (1, -1))
    near = (lags[1] + lags[-1]) / 2
    distant = torch.stack([lags[sign * lag] for lag in range(2, far + 1) for sign in (1, -1)]).mean(0)
    item = torch.arange(length, device=block.device)
    other = ((item[None] - item[:, None] != 0) & (item[None] - item[:, None] != 1)).double()
    whole = (block.sum(-1, keepdim=True) * other).sum(2).clamp(min=1e-30)
    by_place = (block * other).sum(2) / whole  # row, head, item of the first list
    middle = by_place[:, :, edge:-edge].mean(-1)
    listed = block.sum(-1).mean(-1)
    both = forward + backward
    return {
        **{f"crp.{lag:+d}" if lag else "crp.0": value for lag, value in lags.items()},
        "asymmetry": torch.where(both > 0, (forward - backward) / both.clamp(min=1e-30), torch.nan),
        "contiguity": near - distant,
        "primacy": by_place[:, :, :edge].mean(-1) - middle,
        "recency": by_place[:, :, -edge:].mean(-1) - middle,
        "listed": listed,
    }


def serial_recall(model: Model, inputs: Inputs, edits: Edits | None = None) -> Float[np.ndarray, "example item"]:
    """Whether, at an item's second time, the model's likeliest next token is what followed it in the list: 0 or 1, for items 2 to L.

    Cost: one forward pass.
    """
    batch = model.batch(inputs)
    start, length = half_of(batch.tokens)
    found: list[Tensor] = []
    for piece in pieces(model, batch, batch.tokens.shape[1] * int(model.anatomy.config.vocab_size)):
        again = second_times(piece.tokens, start, length)[:, :-1]
        best = model.run(piece, edits).argmax(-1).gather(1, again)
        found.append((best == piece.tokens[:, start + 1 : start + length]).double().cpu())
    return torch.cat(found).numpy()


def without(
    model: Model, heads: Sequence[str], inputs: Inputs | None = None, *, how: str = "zero", seed: int = 0
) -> pl.DataFrame:
    """Serial recall before and after heads are closed together.

    Args:
        model: any.
        heads: such as "L1.h2" (of `heads`, those with the largest induction score).
        inputs: as in `recall`.
        how: what a closed head's z is: "zero", or "mean" over these rows, by position.
        seed: of the default rows and the intervals.

    Returns:
        part "model": `serial`, `serial.without`, `change` (after less before, paired by row), and `serial.ITEM`,
        `without.ITEM` for items 2 to L of the list.

    Cost: two forward passes, three with "mean".
    """
    if how not in ("zero", "mean") or not heads:
        raise MeasureError(f"heads {list(heads)} were to be closed to {how!r}: name at least one head, and zero or mean")
    given = shuffled(model, length=fitting(model), seed=seed) if inputs is None else inputs
    sites = [Site.parse(head) for head in heads]
    edits: dict[Site, Zero | Put] = dict.fromkeys(sites, Zero())
    if how == "mean":
        with torch.no_grad():
            edits = {site: Put(value.mean(0)) for site, value in model.record(given, sites).items()}
    before, after = serial_recall(model, given), serial_recall(model, given, edits)
    found = [("serial", before.mean(1)), ("serial.without", after.mean(1)), ("change", (after - before).mean(1))]
    for item in range(before.shape[1]):
        found += [(f"serial.{item + 2}", before[:, item]), (f"without.{item + 2}", after[:, item])]
    return tidy([Numbers("model", name, values) for name, values in found], seed)
