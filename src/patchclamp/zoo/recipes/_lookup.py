"""A lookup of two steps, found again: what stands behind a key knows the key, and a query like that key finds it.

As in induction, and in classification in context. Layer 0 tells what stands at a place which token is before
it; the keys of layer 1 there are made of that; its queries come from the token that is asked about. `found` says so of a model by
where heads look and by exact interventions, each with what must not matter beside it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from patchclamp.edits import Put
from patchclamp.models.editing import Edits
from patchclamp.sites import Site
from patchclamp.units.heads import mass
from patchclamp.zoo.recipes._look import judged, named
from patchclamp.zoo.recipes._recipe import Finding, Goal
from patchclamp.zoo.recipes.backcopy import At

if TYPE_CHECKING:
    from patchclamp.models.model import Model

LOOKS, PART, ABOVE, KEPT = 0.5, 0.3, 0.15, 0.8
"""Attention of what does one thing, and of a head that takes part; how far above chance counts as lost; accuracy that counts as kept."""


@dataclass(frozen=True, eq=False)
class Lookup:
    """Rows in which something is looked up.

    Args:
        tokens: the rows.
        asked: the tokens whose prediction is looked up.
        before: of every place that can be found, the place that its key stands at.
        after: of every place that asks (the one before an asked token), the places that answer.
        exchange: for each place, the place whose keys it gets when two answers are exchanged (itself, elsewhere).
        other: what the asked tokens are then.
        chance: accuracy of one that knows the answers of its row but not which, and attention that rests evenly on all of them.
    """

    tokens: Int[Tensor, "row position"]
    asked: Bool[Tensor, "row position"]
    before: Bool[Tensor, "row query key"]
    after: Bool[Tensor, "row query key"]
    exchange: Int[Tensor, "row position"]
    other: Int[Tensor, "row position"]
    chance: float

    def accuracy(self, model: "Model", edits: Edits | None = None, wanted: Int[Tensor, "row position"] | None = None) -> float:
        """Share of asked tokens that are the most probable ones; against `wanted`, where it is given."""
        return judged(model.run(self.tokens, edits or {}), self.tokens if wanted is None else wanted, self.asked)["accuracy"]


def attention(model: "Model", rows: Lookup) -> dict[str, list[float]]:
    """Mean attention of each head of layer 0 on `before` and of layer 1 on `after`; one forward pass."""
    patterns = model.record(rows.tokens, ["L0.pattern", "L1.pattern"])
    pairs = (("before", 0, rows.before), ("after", 1, rows.after))
    return {name: mass(patterns[Site("pattern", layer)], where).nanmean(0).tolist() for name, layer, where in pairs}


def closed(model: "Model", rows: Lookup, heads: set[Site], where: Bool[Tensor, "row position"]) -> Edits:
    """Heads held at their mean over rows and positions, at some queries only; one forward pass."""
    if not heads:
        return {}
    values = model.record(rows.tokens, sorted(heads))
    return {site: At(Put(value.mean((0, 1))), where) for site, value in values.items()}


def exchanged(model: "Model", rows: Lookup) -> Edits:
    """Keys of layer 1 with those of two answers exchanged, as they were made at their own places; one forward pass."""
    keys = model.record(rows.tokens, "L1.k")[Site("k", 1)]
    index = rows.exchange.reshape(*rows.exchange.shape, *[1] * (keys.dim() - 2)).expand_as(keys)
    return {Site("k", 1): Put(keys.gather(1, index))}


def found(model: "Model", rows: Lookup) -> tuple[Finding, ...]:
    """Where heads look; what is lost without them, and what not; how one needs the other; which answer follows which key."""
    seen = attention(model, rows)
    first, second = ({Site("z", layer, head) for head in range(model.anatomy.sizes[layer].heads)} for layer in (0, 1))
    back = {Site("z", 0, head) for head, score in enumerate(seen["before"]) if score > PART}
    ahead = {Site("z", 1, head) for head, score in enumerate(seen["after"]) if score > PART}
    found, asks = rows.before.any(-1), rows.after.any(-1)

    def without(heads: set[Site], where: Bool[Tensor, "row position"]) -> float:
        return rows.accuracy(model, closed(model, rows, heads, where))

    everywhere = torch.ones_like(found)
    kept = closed(model, rows, back, everywhere)
    made = {kind: model.record(rows.tokens, f"L1.{kind}", kept)[Site(kind, 1)] for kind in ("q", "k")}

    def looked(kind: str) -> float:
        """The best head's attention on the answers when layer 1 has the queries or keys of a run without `back`."""
        pattern = model.record(rows.tokens, "L1.pattern", {Site(kind, 1): Put(made[kind])})[Site("pattern", 1)]
        return float(mass(pattern, rows.after).nanmean(0).max())

    lost = Goal("accuracy", most=rows.chance + ABOVE)
    whole = Goal("accuracy", least=KEPT)
    claims = [
        Finding(f"layer 1 looks at the answer: {named(ahead)}", max(seen["after"]), Goal("score", least=LOOKS)),
        Finding(f"layer 0 looks one token back from it: {named(back)}", max(seen["before"]), Goal("score", least=LOOKS)),
        Finding("with all of them most are right", rows.accuracy(model), whole),
        Finding("without the latter at answers few are right", without(back, found), lost),
        Finding("without the latter everywhere else most are right", without(back, ~found), whole),
        Finding("without the former where it is asked few are right", without(ahead, asks), lost),
        Finding("layer 1 finds nothing with keys made without layer 0's", looked("k"), Goal("score", most=rows.chance + ABOVE)),
        Finding("layer 1 finds as much with queries made without them", looked("q"), Goal("score", least=LOOKS)),
        Finding(
            "two answers' keys exchanged, the other is said", rows.accuracy(model, exchanged(model, rows), rows.other), whole
        ),
    ]
    others = {0: first - back, 1: second - ahead}
    return (*claims, *(
        Finding(f"without all other heads of layer {layer} ({named(rest)}) most are right", without(rest, everywhere), whole)
        for layer, rest in others.items() if rest
    ))  # fmt: skip
