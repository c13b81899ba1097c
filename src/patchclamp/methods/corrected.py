"""Corrected: attribution patching with AtP*'s two corrections of false negatives (Kramar et al. 2403.00745; P120).

QK fix, for parts that are queries or keys. A saturated softmax hides what they do from the gradient, so softmax is computed anew:

    score(q) = sum over its queries i of <A_i - softmax(q'_i K), d benefit / d A_i>,
    score(k) = sum over all queries i of <A_i - softmax(q_i K'), d benefit / d A_i>,   K' with the part's keys changed

(one key by itself in closed form, `key_changes`). Softmax is the model's own, with whatever it does to scores.

For edges into queries or keys, likewise, q' and K' being those of a stream in which the edge's source writes its fallback:

    score(s>q) = sum over queries i of <A_i - softmax(q_i(stream - value_s + value'_s) K), d benefit / d A_i>.

GradDrop, in models of more than 4 layers (`drop` says otherwise; a model of one layer has nothing to drop). Effects that cancel,
direct against indirect, hide a part, so layers are left out of the backward pass one after the other:

    size(part) = 1 / (L - 1) sum over layers l of |score_l(part)|,   score_l with nothing flowing back through l's attention and MLP

(of each example; the part's own layer gives 0: of an edge the layer that reads, of one into the logits the last). The paper's score is
this size. Here it has the sign of the plain estimate (+ where that is 0). On models of few layers GradDrop was found to harm:
docs/attribution.md.

Parts of other kinds are scored as the gradient scores them. Cost: one forward and one backward pass; three forward passes for the QK
fix, and one more for each span of several keys (of edges: two forward and one backward pass, and a layer's attention weights once
more for each source of its queries and of its keys); and one forward and one backward pass per layer for GradDrop (of edges two).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.edits import Put
from patchclamp.methods._attention import Rows, key_changes, query_changes
from patchclamp.methods._slopes import PLAIN, Keep, counted_rows, first_order, slopes, slopes_at
from patchclamp.metrics import Metric
from patchclamp.models.attention import rests
from patchclamp.models.backward import Rules
from patchclamp.parts import Edges, Fallback, Parts, edges
from patchclamp.parts.edge_patterns import through_softmax
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

SHALLOW = 4
"""Up to so many layers nothing is dropped unless it is asked for."""


def passes(layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch."""
    dropped = layers if layers > SHALLOW else 0
    return dropped + 4, dropped + 1


def samples(
    parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int, drop: bool | None = None
) -> Float[Tensor, "part example"]:
    """[part, example].

    Raises:
        MetricError: a metric that has no slope at the open run.
    """
    first_order(metric, "corrected")
    batch, layers = batch.to(parts.model.device), parts.model.layers
    drops = (layers > SHALLOW if drop is None else drop) and layers > 1
    rules = [PLAIN, *(Rules(dropped=layer) for layer in range(layers) if drops)]
    if isinstance(parts, Edges):
        plain, *dropped = _edges(parts, batch, fallback, metric, rules)
    else:
        seen = attention_seen(parts, batch, fallback)
        plain, *dropped = (_estimate(parts, batch, fallback, metric, seen, one) for one in rules)
    if not dropped:
        return counted_rows(parts, metric, plain)
    sign = torch.where(plain < 0, -1.0, 1.0).to(plain)
    return counted_rows(parts, metric, sign * torch.stack(dropped).abs().sum(0) / (layers - 1))


def _edges(
    parts: Edges, batch: Batch, fallback: Fallback, metric: Metric, rules: Sequence[Rules]
) -> list[Float[Tensor, "example gate"]]:
    """By rule, slopes in gates of edges, those into queries and keys through softmax itself."""
    layers = sorted({edge.target.layer or 0 for edge in parts.labels if edge.target.kind in ("q", "k")})
    sites = [Site("pattern", layer) for layer in layers]
    bare = edges(parts.model, ["embed"], ["logits"])  # whose gates leave attention as it is
    found: list[Tensor] = []
    by_layer: list[dict[int, Rows]] = []
    for one in rules:
        if one is PLAIN:
            found.append(parts.gradient(batch, parts.open(), fallback, metric)[1][0])
        else:
            found.append(slopes(parts, batch, fallback, metric, one)[1].clone())
        at = slopes_at(bare, batch, bare.fallback("zero"), metric, one, sites=sites)[2] if sites else {}
        by_layer.append({layer: at[Site("pattern", layer)] for layer in layers})
    for edge, through in through_softmax(parts, batch, fallback.at(batch), by_layer).items() if layers else ():
        for slope, mine in zip(found, through, strict=True):
            slope[:, edge] = mine.to(slope)
    return found


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention in the model's own run, and with other queries or keys, by layer.

    Args:
        patterns: attention weights.
        scores: softmax's input.
        changed: by (q or k, position): attention weights where every such query or key is its fallback.
        keys: softmax's input where every key is its fallback.
    """

    patterns: Mapping[int, Rows]
    scores: Mapping[int, Rows]
    changed: Mapping[tuple[str, int | str | None], Mapping[int, Rows]]
    keys: Mapping[int, Rows]


def attention_seen(parts: Parts, batch: Batch, fallback: Fallback) -> Attention:
    """What the model's own softmax makes of the parts that are queries or keys; nothing without such parts.

    All layers change at once: patterns are put back to the run's own, so that nothing behind them does. Queries do not matter to
    each other, so all positions change at once too. Of keys, single ones are had in closed form (but not beside a sink, which
    softmax's input does not show); spans of several are put in, one forward pass each.
    """
    mine = [label for label in parts.labels if isinstance(label, Site) and label.kind in ("q", "k") and label.layer is not None]
    layers = sorted({label.layer for label in mine if label.layer is not None})
    if not layers:
        return Attention({}, {}, {}, {})
    model = parts.model
    own = model.record(batch, [Site(kind, layer) for layer in layers for kind in ("scores", "pattern")])
    patterns = {layer: own[Site("pattern", layer)] for layer in layers}
    asked: dict[tuple[str, int | str | None], None] = {}
    for label in mine:
        asked[label.kind, None if label.kind == "q" or _closed_form(parts, batch, label) else label.position] = None
    changed: dict[tuple[str, int | str | None], Mapping[int, Rows]] = {}
    keys: dict[int, Rows] = {}
    for kind, position in asked:
        changed[kind, position], scores = _changed(parts, batch, fallback, kind, position, patterns)
        keys = scores if (kind, position) == ("k", None) else keys
    return Attention(patterns, {layer: own[Site("scores", layer)] for layer in layers}, changed, keys)


def _closed_form(parts: Parts, batch: Batch, label: Site) -> bool:
    """Whether a part is a single key of every row, in a layer without a sink or a gate."""
    assert label.layer is not None
    if label.position is None or rests(parts.model.anatomy.layers[label.layer].attention):
        return False
    return bool((batch.columns(label.position).sum(-1) == 1).all())


def _changed(
    parts: Parts, batch: Batch, fallback: Fallback, kind: str, position: int | str | None, patterns: Mapping[int, Rows]
) -> tuple[dict[int, Rows], dict[int, Rows]]:
    """Attention weights and softmax's input, by layer, in a run with other queries or keys and the old patterns behind them."""
    values, keeps = fallback.at(batch), {layer: Keep() for layer in patterns}
    edits: dict[Site, Any] = {}
    for layer, pattern in patterns.items():
        if (place := Site(kind, layer)) in values:
            edits[place.at(position)] = Put(values[place])
        edits[Site("pattern", layer)] = [keeps[layer], Put(pattern)]
    scores = parts.model.record(batch, [Site("scores", layer) for layer in patterns], edits)
    return {layer: keep.value for layer, keep in keeps.items()}, {layer: scores[Site("scores", layer)] for layer in patterns}


def _estimate(
    parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seen: Attention, rules: Rules
) -> Float[Tensor, "example gate"]:
    """Slopes in gates, those of queries and keys through softmax itself."""
    sites = [Site("pattern", layer) for layer in seen.patterns]
    _, found, at = slopes_at(parts, batch, fallback, metric, rules, sites=sites)
    found = found.clone()
    kept: dict[tuple[object, ...], Tensor] = {}
    for number, label in enumerate(parts.labels):
        if not isinstance(label, Site) or label.kind not in ("q", "k") or label.layer is None:
            continue
        key = (label.kind, label.layer, label.position)
        if key not in kept:
            kept[key] = _changes(parts, batch, label, seen, at[Site("pattern", label.layer)])
        mine = kept[key] if label.index is None else kept[key][:, label.index : label.index + 1]
        found[:, number] = -torch.zeros_like(found[:, 0]).index_add(0, batch.example, mine.sum(1).to(found))
    return found


def _changes(parts: Parts, batch: Batch, label: Site, seen: Attention, slope: Rows) -> Float[Tensor, "row unit"]:
    """By row, and head or key/value head: what changed queries or keys, where the label stands, add to the metric."""
    layer = label.layer
    assert layer is not None
    pattern = seen.patterns[layer]
    if label.kind == "q":
        by_query = query_changes(seen.changed["q", None][layer], pattern, slope)
        return (by_query if label.position is None else by_query * batch.columns(label.position)[:, None]).sum(-1)
    if label.position is not None and _closed_form(parts, batch, label):
        by_key = key_changes(seen.keys[layer], seen.scores[layer], pattern, slope)
        by_head = (by_key * batch.columns(label.position)[:, None]).sum(-1)
    else:
        by_head = query_changes(seen.changed["k", label.position][layer], pattern, slope).sum(-1)
    return by_head.unflatten(1, (parts.model.anatomy.sizes[layer].kv_heads, -1)).sum(-1)
