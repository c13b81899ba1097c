"""Signals: the few directions in which two tokens agree where a head attends, and which parts wrote them.

A head's score for query i and key j is bilinear in what it reads (a 1 appended for the biases, the norm of each run behind):

    s_ij = x_i' W_ij x_j,   W_ij = (R_i [Wq bq])' (R_j [Wk bk]) * scale,   R: rotary embedding (the identity where there is none)
         = sum over k of (x_i' u_k) sigma_k (v_k' x_j)                      by the singular vectors of W_ij

Where a head attends (pattern above a half), few terms make up the score: the smallest set whose sum reaches it is the signal, and
what earlier parts wrote along its v_k (at j) or u_k (at i) is traced, the norm held at this run's scale (Franco & Crovella 2024,
https://arxiv.org/abs/2410.00340). `removed` takes the signal out of what one key holds, so that the reading can be tested.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.errors import FamilyError, PatchclampError
from patchclamp.models.editing import Edits, Seen
from patchclamp.models.model import Model
from patchclamp.models.norms import held, scale_of
from patchclamp.models.recording import Recorder
from patchclamp.models.scope import unobserved
from patchclamp.parts.edge_maps import maps_of
from patchclamp.parts.edge_norms import Slot, weight_of
from patchclamp.sites import Site

FIRES = 0.5
"""A head attends where its pattern is above this."""


@dataclass(frozen=True, eq=False)
class Signal:
    """What makes one head attend from one token to another.

    Args:
        head: the head.
        query, key: positions.
        weight: of the pattern there.
        score: s_ij.
        terms: of every singular vector, largest first: its part of the score.
        count: how many of them are the signal: the fewest whose sum reaches the score.
        left, right: u_k and v_k sigma_k of the signal's terms, as functions of what the norm gives with a 1 appended.
        read: what query and key read, with the 1.
    """

    head: Site
    query: int
    key: int
    weight: float
    score: float
    terms: Float[np.ndarray, " rank"]
    count: int
    left: Float[Tensor, "term inner"]
    right: Float[Tensor, "term inner"]
    read: tuple[Float[Tensor, " inner"], Float[Tensor, " inner"]]

    @property
    def strength(self) -> float:
        """The sum of the signal's terms: at least the score, where that is above 0."""
        return float(self.terms[: self.count].sum())


@dataclass(frozen=True, eq=False)
class _Read:
    """What attention of one layer reads and makes of it, for one prompt."""

    layer: int
    inputs: Float[Tensor, "position inner"]
    """What the norm gives, a 1 appended."""
    queries: Float[Tensor, "head position width inner"]
    keys: Float[Tensor, "head position width inner"]
    scale: float
    scores: Float[Tensor, "head query key"]
    pattern: Float[Tensor, "head query key"]


def signals(
    model: Model, ids: Int[Tensor, " position"], heads: Sequence[Site] | None = None, above: float = FIRES
) -> tuple[Signal, ...]:
    """The signal of every place where a head attends.

    Args:
        model: the model.
        ids: a prompt's tokens.
        heads: which heads; by default all.
        above: the pattern's weight from which on a head is said to attend.

    Cost: two forward passes, one of them with as many rows as a head is wide, per layer; an SVD of the head's width per signal.

    Raises:
        FamilyError: scores are not bilinear in what attention reads (norms on queries, position biases), or are not read through
            a norm and linear maps that are known.
    """
    wanted = heads or [
        Site("head", layer, head) for layer in range(model.layers) for head in range(model.anatomy.sizes[layer].heads)
    ]
    found: list[Signal] = []
    for layer in sorted({head.layer for head in wanted if head.layer is not None}):
        read = _read(model, ids, layer)
        for head in (one for one in wanted if one.layer == layer and one.index is not None):
            for query, key in (read.pattern[head.index or 0] > above).nonzero().tolist():
                found.append(_signal(read, head, query, key))
    return tuple(found)


def _signal(read: _Read, head: Site, query: int, key: int) -> Signal:
    left, right, terms = _terms(read, head.index or 0, query, key)
    score, running = float(read.scores[head.index or 0, query, key]), torch.cumsum(terms, 0)
    reached = (running >= score - 1e-9 * abs(score)).nonzero()
    count = 0 if score <= 0 else int(reached[0]) + 1 if len(reached) else len(terms)
    return Signal(
        head, query, key, float(read.pattern[head.index or 0, query, key]), score, terms.numpy(), count,
        left[:count], right[:count], (read.inputs[query], read.inputs[key]),
    )  # fmt: skip


def _terms(
    read: _Read, head: int, query: int, key: int
) -> tuple[Float[Tensor, "rank inner"], Float[Tensor, "rank inner"], Float[Tensor, " rank"]]:
    """u_k, v_k sigma_k and the terms of a score, largest first: singular vectors by two thin factorisations, for the rank is the
    head's width."""
    ql, rl = torch.linalg.qr(read.queries[head, query].T)
    qr, rr = torch.linalg.qr(read.keys[head, key].T)
    u, sigma, v = torch.linalg.svd(rl @ rr.T * read.scale)
    left, right = (ql @ u).T, (qr @ v.T).T * sigma[:, None]
    terms = (left @ read.inputs[query]) * (right @ read.inputs[key])
    order = torch.argsort(terms, descending=True)
    return left[order], right[order], terms[order]


def trace(model: Model, ids: Int[Tensor, " position"], signal: Signal) -> pl.DataFrame:
    """Who wrote a signal: each earlier part's share of it, on the key's side and on the query's.

    A part's share is what its write, through the norm at this run's scale, adds along the signal's directions, the other side
    being as it is; the shares of all parts, the embedding and what is constant (norm and output biases) add up to 1.

    Returns:
        A row per side and part: side ("key", "query"), part, position, share; largest |share| first.

    Cost: one forward pass.

    Raises:
        PatchclampError: the signal is empty: the head's score there is not above 0.
    """
    if not signal.count:
        raise PatchclampError(
            f"{signal.head} attends from {signal.query} to {signal.key} with a score of {signal.score:.3g}: no signal"
        )
    layer = signal.head.layer or 0
    parts = _written(model, ids, layer)
    stream = parts.pop("stream")
    found = maps_of(model).attention[layer]
    assert found is not None  # or there would be no signal
    rows: list[dict[str, object]] = []
    sides = (
        ("key", signal.key, signal.right, signal.left @ signal.read[0]),
        ("query", signal.query, signal.left, signal.right @ signal.read[1]),
    )
    for side, position, directions, other in sides:
        functional = other @ directions
        for part, value in parts.items():
            normed = _through(model, found.norm, value[position], stream[position])
            rows.append(
                {"side": side, "part": part, "position": position, "share": float(functional[:-1] @ normed) / signal.strength}
            )
        told = sum(float(str(row["share"])) for row in rows if row["side"] == side)
        rows.append({"side": side, "part": "constant", "position": position, "share": 1 - told})
    return pl.DataFrame(rows).sort(pl.col("share").abs(), descending=True, maintain_order=True)


@dataclass(frozen=True, eq=False)
class _Take:
    """Take something off one key of one head."""

    column: int
    taken: Tensor

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        out = value.clone()
        out[:, self.column] -= self.taken.to(value)
        return out


def removed(model: Model, ids: Int[Tensor, " position"], signal: Signal, other: bool = False) -> Edits:
    """Edits under which the key of a signal no longer holds it: s_ij falls by the signal's strength, and no other part is touched.

    Args:
        model: the model.
        ids: the prompt's tokens, as one row.
        signal: what is taken out.
        other: as a control, take out as many of the head's other directions, those of smallest terms, instead.

    Under grouped-query attention the heads that share the key see it changed, too.
    """
    layer, number = signal.head.layer or 0, signal.head.index or 0
    read, sizes = _read(model, ids, layer), model.anatomy.sizes[layer]
    _, right, terms = _terms(read, number, signal.query, signal.key)
    chosen = torch.arange(signal.count) if not other else terms.abs().argsort()[: signal.count]
    directions = torch.nn.functional.normalize(right[chosen], dim=1)
    taken = read.keys[number, signal.key] @ (directions.T @ (directions @ read.inputs[signal.key]))
    site = Site("k", layer, number // (sizes.heads // sizes.kv_heads))
    return {site: _Take(signal.key, taken)}


def _read(model: Model, ids: Int[Tensor, " position"], layer: int) -> _Read:
    """What a layer's attention reads, the maps by which it makes queries and keys of it at each position, and its scores."""
    found, sizes = maps_of(model).attention[layer], model.anatomy.sizes[layer]
    if found is None:
        raise FamilyError(
            f"{model.name}: how layer {layer} reads the stream is not known in closed form, so scores have no signals"
        )
    places = [Site(kind, layer) for kind in ("resid.pre", "scores", "pattern")]
    kept = model.record(ids[None], places)
    scores, pattern = (kept[place][0].double() for place in places[1:])
    with torch.no_grad(), unobserved():
        normed = kept[places[0]] if found.norm is None else found.norm(kept[places[0]])
    inputs = torch.cat([normed[0].double(), torch.ones(len(ids), 1, dtype=torch.float64)], 1)
    turned = _rotations(model, ids, layer, found.slots["q"], found.slots["k"])
    queries, keys = (torch.einsum("phwn,hni->hpwi", turned[slot], _matrix(found.slots[slot])) for slot in ("q", "k"))
    keys = keys.repeat_interleave(sizes.heads // sizes.kv_heads, 0)
    raw = torch.einsum("hqwi,qi,hkwj,kj->hqk", queries, inputs, keys, inputs)
    seen = torch.ones(len(ids), len(ids)).tril().bool() & (scores > scores.max().abs() * -1e3 - 1e4)
    one, two = raw[seen], scores[seen]
    scale = float((one @ two) / (one @ one).clamp(min=1e-30))
    worst = float((scale * one - two).abs().max())
    if worst > 1e-3 * max(1.0, float(two.abs().max())):
        raise FamilyError(
            f"{model.name}: scores of layer {layer} are not a bilinear form of what attention reads (they differ by {worst:.2g}): norms on "
            "queries and keys, caps and position biases have no signals"
        )
    return _Read(layer, inputs, queries, keys, scale, raw * scale, pattern)


def _matrix(slot: Slot) -> Float[Tensor, "head inner1 inner"]:
    """Weights and bias of queries or keys, by head: [head, width, inputs and 1]."""
    weight = weight_of(slot.module)
    assert weight is not None  # or the slot would not have been found
    bias = getattr(slot.module, "bias", None)
    rows = weight.detach().double()[slot.columns]
    last = rows.new_zeros(*rows.shape[:2], 1) if bias is None else bias.detach().double()[slot.columns][..., None]
    return torch.cat([rows, last], -1)


def _rotations(
    model: Model, ids: Int[Tensor, " position"], layer: int, q: Slot, k: Slot
) -> dict[str, Float[Tensor, "position head inner1 inner"]]:
    """What is done to queries and keys behind their maps: [position, head, out, in], found by putting unit vectors through."""
    width = q.columns.shape[1]
    batch = model.batch(ids[None].repeat(width, 1)).to(model.device)
    recorder = Recorder(model.anatomy, [Site("q", layer), Site("k", layer)])

    def units(columns: Sequence[Int[Tensor, "head inner"]], value: Tensor) -> Tensor:
        out = torch.zeros_like(value)
        for some in columns:
            for head in some:
                out[torch.arange(width), :, head] = 1
        return out

    session, wanted = recorder.session(), {id(slot.module): list[Tensor]() for slot in (q, k)}
    for slot in (q, k):  # of fused maps both are columns of one output
        wanted[id(slot.module)].append(slot.columns)
    for module in {id(slot.module): slot.module for slot in (q, k)}.values():
        session.after(module, partial(units, wanted[id(module)]))
    with torch.no_grad(), session.open():
        model.forward(batch, columns=torch.zeros(1, dtype=torch.long, device=model.device))
    return {slot: recorder.kept[Site(slot, layer)].double().permute(1, 2, 3, 0) for slot in ("q", "k")}


def _through(model: Model, norm: torch.nn.Module | None, value: Tensor, at: Tensor) -> Float[Tensor, " width"]:
    """A contribution through a norm that divides by what it divides by at `at`, less its bias."""
    if norm is None:
        return value.double()
    scale = scale_of(norm, model.width)
    weight = next(iter(norm.parameters()), value)
    with torch.no_grad(), unobserved():
        rows = torch.stack([value, torch.zeros_like(value)])[None].to(weight.dtype)
        # a contribution of length 0 has no direction for the norm to keep
        out = held(norm, scale, rows, scale(at[None, None].to(weight.dtype)))[0].double()
    return out[0] - out[1]


def _written(model: Model, ids: Int[Tensor, " position"], layer: int) -> dict[str, Float[Tensor, "position width"]]:
    """What the embedding and every part below a layer wrote, by its label; and the stream there."""
    below = [Site("write", one, head) for one in range(layer) for head in range(model.anatomy.sizes[one].heads)]
    mlps, first, here = [Site("mlp.write", one) for one in range(layer)], Site("resid.pre", 0), Site("resid.pre", layer)
    with torch.no_grad():
        kept = model.record(ids[None], [*below, *mlps, first, here])
    out = {"embed": kept[first][0], **{f"L{site.layer}.h{site.index}": kept[site][0] for site in below},
           **{f"L{site.layer}.mlp": kept[site][0] for site in mlps}}  # fmt: skip
    return {**out, "stream": kept[here][0]}
