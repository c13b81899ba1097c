"""Edges of a wired model in plain numpy: one is closed, everything behind it is computed anew.

A closed edge carries what its source writes on the corrupt prompt. Keys and values belong to key/value heads: where two heads
share one, an edge into its key is an edge into the scores of both.
"""

from collections.abc import Collection, Mapping

import numpy as np
from jaxtyping import Float

from patchclamp.tasks import Example, Examples
from patchclamp.zoo._wiring import GROUP, Array, Wiring, act, pattern_of, slots

LIVE = 1e-3
"""Logits. What wired parts do is 1 logit or more, or e^-24 or less."""
Edge = tuple[str, str]
Writes = Mapping[str, Float[Array, "position width"]]


def edges_of(wiring: Wiring) -> tuple[Edge, ...]:
    """Every source with every query, key/value head, MLP and the logits behind it."""
    before, found = ["embed"], list[Edge]()
    for layer, heads in enumerate(wiring.heads):
        shared = range(len(heads) // GROUP[wiring.family])
        slots_ = [f"L{layer}.h{h}.q" for h in range(len(heads))] + [f"L{layer}.kv{k}.{x}" for k in shared for x in "kv"]
        here = [f"L{layer}.h{h}" for h in range(len(heads))]
        found += [(source, target) for target in slots_ for source in before]
        found += [(source, f"L{layer}.mlp") for source in [*before, *here]]
        before += [*here, f"L{layer}.mlp"]
    return (*found, *((source, "logits") for source in before))


def run(
    wiring: Wiring, tokens: tuple[int, ...], closed: Collection[Edge] = (), fallback: Writes | None = None
) -> tuple[Float[Array, "position token"], Writes]:
    """Logits, and what every source writes.

    Args:
        wiring: the model.
        tokens: one prompt.
        closed: edges that carry the fallback.
        fallback: by source, what it writes on the corrupt prompt, where any edge is closed.
    """
    writes: dict[str, Array] = {"embed": wiring.embed[list(tokens)]}
    group, fallback = GROUP[wiring.family], fallback or {}

    def into(target: str) -> Array:
        carried = [fallback[source] - writes[source] for source, to in closed if to == target]
        return np.sum([*writes.values(), *carried], axis=0)

    for layer, (heads, mlp) in enumerate(zip(wiring.heads, wiring.mlps, strict=True)):
        match, made = slots(heads, group)[0], dict[str, Array]()
        for h, head in enumerate(heads):
            query, key, value = (into(f"L{layer}.{slot}") for slot in (f"h{h}.q", f"kv{h // group}.k", f"kv{h // group}.v"))
            made[f"L{layer}.h{h}"] = pattern_of(wiring, head, query, key, match[h]) @ value @ head.read @ head.write
        writes |= made
        writes[f"L{layer}.mlp"] = act(wiring.family, into(f"L{layer}.mlp") @ mlp.read) @ mlp.write
    return into("logits") @ wiring.unembed, writes


def live(wiring: Wiring, examples: Examples, parts: Collection[str] = ()) -> frozenset[str]:
    """The edges, by name, whose closing alone changes the logit difference of any example, with `parts` closed already."""
    around = [edge for edge in edges_of(wiring) if edge[0] in parts]
    found: set[str] = set()
    for example in examples:
        assert example.corrupt is not None  # wired tasks are pairs
        fallback = run(wiring, example.corrupt)[1]
        plain = _metric(run(wiring, example.clean, around, fallback)[0], example)
        for edge in edges_of(wiring):
            if ">".join(edge) not in found:
                moved = (
                    _metric(run(wiring, example.clean, [*around, edge], fallback)[0], example) if edge not in around else plain
                )
                if abs(moved - plain) > LIVE:
                    found.add(">".join(edge))
    return frozenset(found)


def _metric(logits: Float[Array, "position token"], example: Example) -> float:
    return float(logits[-1, example.answers[0][0]] - logits[-1, example.wrong[0][0]])
