"""Which edges of a compiled program are real: three answers, each within the one before.

structural      what the source writes is read there: the product of its write and the destination's read is not zero
live, zero      with this edge alone carrying zero, some output changes on some input
live, resample  with this edge alone carrying what the source writes on the corrupt input, some output changes on some pair

What is constant (positions, the first position's mark) is live under zero and not under resample. All three are computed from
the blueprint in plain numpy, one edge at a time: no torch, no model class, no hooks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from patchclamp.zoo._wiring import Array, Head
from patchclamp.zoo.compiled.weights import Blueprint

STRUCTURAL = 1e-9
LIVE = 1e-6  # logits are multiples of 10, or of shares times 10
Edge = tuple[str, str]
Writes = Mapping[str, Float[Array, "row position width"]]


@dataclass(frozen=True)
class Truth:
    """Edges, by name (`L0.mlp>L1.h0.q`); `edges` is all there are."""

    edges: tuple[str, ...]
    structural: frozenset[str]
    zero: frozenset[str]
    resample: frozenset[str]


def truth_of(blueprint: Blueprint, clean: Int[Array, "row position"], corrupt: Int[Array, "row position"]) -> Truth:
    """The three answers; the live ones on these inputs (BOS first, all of one length).

    Cost: two runs of the blueprint per structural edge, and three more.
    """
    edges = edges_of(blueprint)
    structural = [edge for edge in edges if virtual_weight(blueprint, edge) > STRUCTURAL]
    itself, other = run(blueprint, clean), run(blueprint, corrupt)
    zero = {source: np.zeros_like(value) for source, value in itself.writes.items()}
    live = [
        frozenset(name(edge) for edge in structural if _moves(blueprint, clean, edge, fallback, itself.logits))
        for fallback in (zero, other.writes)
    ]
    return Truth(tuple(map(name, edges)), frozenset(map(name, structural)), *live)


def name(edge: Edge) -> str:
    """How an edge is written."""
    return ">".join(edge)


def edges_of(blueprint: Blueprint) -> tuple[Edge, ...]:
    """Every source with everything that reads after it; silent heads too."""
    count, found = max(map(len, blueprint.heads)), list[Edge]()
    before = ["embed"]
    for layer in range(len(blueprint.heads)):
        heads = [f"L{layer}.h{number}" for number in range(count)]
        slots = [f"L{layer}.{slot}" for number in range(count) for slot in (f"h{number}.q", f"kv{number}.k", f"kv{number}.v")]
        found += [(source, target) for target in slots for source in before]
        found += [(source, f"L{layer}.mlp") for source in [*before, *heads]]
        before += [*heads, f"L{layer}.mlp"]
    return (*found, *((source, "logits") for source in before))


def virtual_weight(blueprint: Blueprint, edge: Edge) -> float:
    """The largest entry of what the source writes times what the destination reads."""
    write, read = _write(blueprint, edge[0]), _read(blueprint, edge[1])
    return float(np.abs(write @ read).max(initial=0.0))


def _head(blueprint: Blueprint, site: str) -> Head | None:
    """The head of `L2.h1`, `L2.h1.q` or `L2.kv1.k`; None for a silent one."""
    layer, unit = site.split(".")[:2]
    heads, number = blueprint.heads[int(layer[1:])], int(unit.lstrip("hkv"))
    return heads[number] if number < len(heads) else None


def _write(blueprint: Blueprint, source: str) -> Float[Array, "row width"]:
    if source == "embed":
        return np.vstack([blueprint.embed, blueprint.positions])
    if source.endswith("mlp"):
        return blueprint.mlps[_layer(source)].write
    head = _head(blueprint, source)
    return np.zeros((1, blueprint.space.width)) if head is None else head.write


def _read(blueprint: Blueprint, target: str) -> Float[Array, "width column"]:
    if target == "logits":
        return blueprint.unembed
    if target.endswith("mlp"):
        return blueprint.mlps[_layer(target)].read
    head = _head(blueprint, target)
    if head is None:
        return np.zeros((blueprint.space.width, 1))
    return {"q": head.query, "k": head.key, "v": head.read}[target[-1]]


def _layer(site: str) -> int:
    return int(site.partition(".")[0][1:])


@dataclass(frozen=True, eq=False)
class Run:
    """What a run of a blueprint gives, and what each source writes in it."""

    logits: Float[Array, "row position token"]
    writes: Writes


def run(
    blueprint: Blueprint,
    tokens: Int[Array, "row position"],
    closed: Sequence[Edge] = (),
    fallback: Writes | None = None,
) -> Run:
    """One run, in which each closed edge carries the fallback of its source; what is behind is computed anew.

    Args:
        blueprint: the model.
        tokens: ids, BOS first, without padding.
        closed: edges.
        fallback: by source, where any edge is closed.
    """
    writes: dict[str, Array] = {"embed": blueprint.embed[tokens] + blueprint.positions[: tokens.shape[1]]}
    fallback = fallback or {}

    def into(target: str) -> Float[Array, "row position width"]:
        carried = [fallback[source] - writes[source] for source, to in closed if to == target]
        return np.sum([*writes.values(), *carried], axis=0)

    count = max(map(len, blueprint.heads))
    for layer, (heads, mlp) in enumerate(zip(blueprint.heads, blueprint.mlps, strict=True)):
        made = dict[str, Array]()
        for number in range(count):
            query, key, value = (into(f"L{layer}.{slot}") for slot in (f"h{number}.q", f"kv{number}.k", f"kv{number}.v"))
            causal, silent = blueprint.program.causal, number >= len(heads)
            made[f"L{layer}.h{number}"] = 0 * query if silent else _attention(heads[number], query, key, value, causal)
        writes |= made
        writes[f"L{layer}.mlp"] = np.maximum(into(f"L{layer}.mlp") @ mlp.read, 0) @ mlp.write
    return Run(into("logits") @ blueprint.unembed, writes)


def _attention(head: Head, to_query: Array, to_key: Array, to_value: Array, causal: bool) -> Float[Array, "row position width"]:
    scores = np.einsum("bir,bjr->bij", to_query @ head.query, to_key @ head.key)
    if causal:
        scores = np.where(np.tri(scores.shape[1], dtype=bool), scores, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return (weight / weight.sum(-1, keepdims=True)) @ (to_value @ head.read @ head.write)


def _moves(blueprint: Blueprint, tokens: Array, edge: Edge, fallback: Writes, logits: Array) -> bool:
    """Whether closing the edge changes any output; what the first position says is none."""
    other = run(blueprint, tokens, [edge], fallback).logits
    return bool(np.abs(other - logits)[:, 1:].max() > LIVE)
