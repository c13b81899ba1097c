"""Attention sinks: heads that look at the first token, the values and the stream there, and heads that do nothing.

Papers: Gu et al. 2024, When Attention Sink Emerges in Language Models, https://arxiv.org/abs/2410.10781 (P234); Guo et al. 2024,
Active-Dormant Attention Heads, https://arxiv.org/abs/2410.13835 (P285); Bondarenko et al. 2023, Quantizable Transformers: Removing
Outliers by Helping Attention Heads Do Nothing, https://arxiv.org/abs/2306.12929 (P145).
"""

from collections.abc import Iterator, Mapping

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchclamp.edits import Zero
from patchclamp.errors import MeasureError
from patchclamp.models.model import Inputs, Model
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch
from patchclamp.units.context import losses
from patchclamp.units.table import Numbers, recorded, tidy

EPSILON = 0.3
LITTLE = 0.5
"""A key is idle whose value's norm is below so many times the median of its row."""


def alpha(pattern: Float[Tensor, "row head query key"], mask: Bool[Tensor, "row position"]) -> Float[Tensor, "row head key"]:
    """What each key gets from the queries that see it: alpha_k = mean over real t >= k of A[t, k]; NaN at padding.

    The key's own query is among them. Attention spread evenly gives alpha_1 = H_T / T, with H_T the T-th harmonic number.
    """
    real = mask.double()
    n = mask.shape[1]
    got = (pattern.double() * real[:, None, :, None]).sum(2)
    seen = (real[:, :, None] * torch.ones(n, n, device=mask.device, dtype=torch.double).tril()).sum(1)
    return torch.where(mask[:, None], got / seen.clamp(min=1)[:, None], torch.nan)


def first_key(mask: Bool[Tensor, "row position"], key: int = 1) -> Bool[Tensor, "row position"]:
    """The row's `key`-th real token, counted from 1."""
    return mask & (mask.long().cumsum(-1) == key)


def even(length: int, key: int = 1) -> float:
    """alpha of the key-th of `length` tokens when attention is spread evenly: (H_T - H_(k-1)) / (T - k + 1)."""
    return sum(1 / t for t in range(key, length + 1)) / (length - key + 1)


def sinks(
    model: Model, inputs: Inputs, *, epsilon: float = EPSILON, key: int = 1, length: int | None = None, seed: int = 0
) -> pl.DataFrame:
    """How far heads rest on one token, what stands there, and which heads write next to nothing.

    Args:
        model: any.
        inputs: rows. What is measured depends on their length: give one length (the paper: 64).
        epsilon: a head is a sink on a row where alpha is above it (the paper: 0.3).
        key: the token that may be the sink, counted from 1 at each row's first.
        length: rows are cut to so many tokens; None: as they are.
        seed: of the intervals.

    Returns:
        part `Li.hj`: `alpha` (see `alpha`), `sink` (share of rows with alpha > epsilon), `written` (mean over tokens of |what
        the head writes| / |the stream it is added to|), `idle` (attention on keys whose value has less than half the median
        norm of the row's): a no-op head has much idle and little written.
        part `Li.kvj`: `drain`: |value of the key| / mean |value of the other tokens|; far below 1 it is drained.
        part `Li.resid.post`, and embed: `peak`: |stream at the key| / mean |stream at the other tokens|.
        part "model": `sink` (Sink_k^eps: share of heads with alpha > epsilon), `chance.alpha` (attention spread evenly).
        Intervals over rows.

    Cost: one forward pass (patterns, values and writes kept).

    Raises:
        MeasureError: rows with no token behind the key.
    """
    batch = model.batch(inputs)
    short = int(batch.mask.sum(1).min())
    if key < 1 or short <= key or (length is not None and length <= key):
        raise MeasureError(
            f"token {key} is to be a sink, and the shortest row has {short} tokens (cut to {length}): give longer rows"
        )
    found: dict[tuple[str, str], list[Tensor]] = {}
    for one, values in _cut(model, batch, length):
        at = first_key(one, key)
        for site, value in values.items():
            for part, name, numbers in _read(site, value, values, one, at, epsilon):
                found.setdefault((part, name), []).append(numbers.double().cpu())
        lengths = one.sum(1)
        spread = torch.tensor([even(int(n), key) for n in lengths], dtype=torch.double)
        found.setdefault(("model", "chance.alpha"), []).append(spread)
    numbers = {name: torch.cat(some).numpy() for name, some in found.items()}
    rate = np.mean([values for (_, name), values in numbers.items() if name == "sink"], axis=0)
    table = [Numbers(part, name, values) for (part, name), values in numbers.items()]
    return tidy([*table, Numbers("model", "sink", rate)], seed)


def _cut(model: Model, inputs: Inputs, length: int | None) -> Iterator[tuple[Bool[Tensor, "row position"], dict[Site, Tensor]]]:
    """Recorded values of rows, cut behind their first `length` tokens: the others change nothing before them."""
    for batch, values in recorded(model, inputs, ["pattern", "v", "write", "resid.pre", "resid.post", "embed"]):
        mask = batch.mask
        if length is not None:
            mask = mask & (mask.long().cumsum(-1) <= length)
        yield mask, values


def _read(
    site: Site,
    value: Tensor,
    values: dict[Site, Tensor],
    mask: Bool[Tensor, "row position"],
    at: Bool[Tensor, "row position"],
    epsilon: float,
) -> list[tuple[str, str, Tensor]]:
    """Numbers per row of one recorded site."""
    if site.kind == "pattern":
        return _of_pattern(site, value, values[Site("v", site.layer)], mask, at, epsilon)
    if site.kind == "write":
        stream = values[Site("resid.pre", site.layer)].norm(dim=-1)[:, :, None]
        share = value.norm(dim=-1) / stream.clamp(min=1e-30)
        return [(f"L{site.layer}.h{h}", "written", _mean(share[:, :, h], mask)) for h in range(value.shape[2])]
    if site.kind == "v":
        size = value.norm(dim=-1)
        return [(f"L{site.layer}.kv{h}", "drain", _against(size[:, :, h], mask, at)) for h in range(value.shape[2])]
    if site.kind in ("resid.post", "embed"):
        return [(str(site), "peak", _against(value.norm(dim=-1), mask, at))]
    return []


def _of_pattern(
    site: Site,
    pattern: Tensor,
    v: Tensor,
    mask: Bool[Tensor, "row position"],
    at: Bool[Tensor, "row position"],
    epsilon: float,
) -> list[tuple[str, str, Tensor]]:
    got = (alpha(pattern, mask).nan_to_num() * at[:, None].double()).sum(-1)
    size = v.norm(dim=-1).double().masked_fill(~mask[:, :, None], torch.nan)
    idle = (size < LITTLE * size.nanquantile(0.5, 1, keepdim=True)).double()
    idle = idle.repeat_interleave(pattern.shape[1] // v.shape[2], 2)
    rest = torch.einsum("rhij,rjh->rhi", pattern.double(), idle)
    found: list[tuple[str, str, Tensor]] = []
    for h in range(pattern.shape[1]):
        part = f"L{site.layer}.h{h}"
        found += [
            (part, "alpha", got[:, h]),
            (part, "sink", (got[:, h] > epsilon).double()),
            (part, "idle", _mean(rest[:, h], mask)),
        ]
    return found


def _mean(values: Float[Tensor, "row position"], mask: Bool[Tensor, "row position"]) -> Float[Tensor, " row"]:
    return torch.where(mask, values.double(), 0).sum(1) / mask.sum(1)


def _against(
    size: Float[Tensor, "row position"], mask: Bool[Tensor, "row position"], at: Bool[Tensor, "row position"]
) -> Float[Tensor, " row"]:
    """A number at one position over its mean at the others; NaN where those are 0."""
    others = _mean(size, mask & ~at)
    here = torch.where(at, size.double(), 0).sum(1)
    return torch.where(others > 0, here / others, torch.nan)


# --- active on one kind of input, dormant on another


def dormancy(
    model: Model, kinds: Mapping[str, Inputs], *, effects: bool = True, length: int | None = None, seed: int = 0
) -> pl.DataFrame:
    """Heads that work on one kind of input and rest on the first token on another (active-dormant heads).

    Args:
        model: any.
        kinds: rows of two kinds of input, by name (the paper: code and prose).
        effects: also close each head, to see on which kind it matters.
        length: as in `sinks`; it cuts what alpha is measured on.
        seed: of the intervals.

    Returns:
        part `Li.hj`, of each KIND: `alpha.KIND`; `effect.KIND`: loss with the head's z at zero less loss, mean over a row's
        tokens, in nats. And `switch`: alpha on the second kind less alpha on the first (no interval: rows are not paired): near 1
        for a head that is active on the first kind and dormant on the second, near -1 for the reverse.

    Cost: one forward pass, and with effects one more per head, over both kinds.

    Raises:
        MeasureError: not two kinds.
    """
    if len(kinds) != 2:
        raise MeasureError(f"active-dormant heads are told by two kinds of input, and {len(kinds)} were given: give two, by name")
    found: list[Numbers] = []
    rested: dict[str, list[float]] = {}
    for kind, inputs in kinds.items():
        batch = model.batch(inputs)
        before = np.nanmean(losses(model, batch), 1) if effects else None
        for part, values in _alphas(model, batch, length).items():
            rested.setdefault(part, []).append(float(values.mean()))
            found.append(Numbers(part, f"alpha.{kind}", values))
            if before is not None:
                found.append(Numbers(part, f"effect.{kind}", ablated(model, batch, part) - before))
    found += [Numbers(part, "switch", np.array([second - first])) for part, (first, second) in rested.items()]
    return tidy(found, seed)


def _alphas(model: Model, batch: Batch, length: int | None) -> dict[str, Float[np.ndarray, " example"]]:
    """Each head's alpha of the first token, by row."""
    got: dict[str, list[Tensor]] = {}
    for piece, values in recorded(model, batch, ["pattern"]):
        mask = piece.mask if length is None else piece.mask & (piece.mask.long().cumsum(-1) <= length)
        for site, pattern in values.items():
            each = (alpha(pattern, mask).nan_to_num() * first_key(mask)[:, None].double()).sum(-1)
            for h in range(pattern.shape[1]):
                got.setdefault(f"L{site.layer}.h{h}", []).append(each[:, h].cpu())
    return {part: torch.cat(some).numpy() for part, some in got.items()}


def ablated(model: Model, inputs: Inputs, part: str) -> Float[np.ndarray, " example"]:
    """Mean loss of each row's tokens, in nats, with a head's z at zero."""
    edits = {Site.parse(part): Zero()}
    return np.nanmean(losses(model, inputs, edits), 1)
