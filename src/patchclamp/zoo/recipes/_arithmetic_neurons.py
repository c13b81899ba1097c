"""A bag of heuristics: neurons of late MLPs at the last token, each on for a range or a remainder of an operand or the result.

Nikankin, Reusch, Mueller and Belinkov 2024, Arithmetic Without Algorithms, https://arxiv.org/abs/2410.21272. A neuron's activations over
all pairs of numbers are compared with the indicators of simple sets of pairs; the set that they go with best is its heuristic. If
heuristics make the result, then a prompt is lost without the neurons whose set it is in, and not without as many others.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.models.editing import Edits, Seen
from patchclamp.sites import Site
from patchclamp.zoo.recipes._arithmetic import ASKS, END, HIGHEST, LOWEST, SUMS, Arithmetic, all_pairs, kept_back
from patchclamp.zoo.recipes._llama import last, share
from patchclamp.zoo.recipes._recipe import Finding, Goal, drawing

if TYPE_CHECKING:
    from patchclamp.models.model import Model

VARIABLES = ("a", "b", "c")
MODULI = tuple(range(2, 11))
STEP = 6
"""Ranges begin and end at multiples of it."""
GOES_WITH = 0.6
"""A neuron is a heuristic whose activations correlate so much with its set (the paper's threshold of its match score)."""
DRAWS = 5
MOST = 0.25
"""Share of neurons that are taken from one prompt, at most: so that there are as many others."""


@dataclass(frozen=True)
class Heuristic:
    """A set of prompts: where `variable` (a, b, or the result c) is from `low` to below `high`, or leaves the remainder `low` modulo `m`."""

    variable: str
    low: int
    high: int = 0
    m: int = 0

    @property
    def kind(self) -> str:
        """ "range" or "modulo"."""
        return "modulo" if self.m else "range"

    def holds(self, value: Int[Tensor, " pair"]) -> Bool[Tensor, " pair"]:
        """For which values of its variable."""
        return value.remainder(self.m) == self.low if self.m else (value >= self.low) & (value < self.high)

    def __str__(self) -> str:
        return f"{self.variable} = {self.low} mod {self.m}" if self.m else f"{self.low} <= {self.variable} < {self.high}"


def heuristics() -> tuple[Heuristic, ...]:
    """All that are tried: every range between multiples of `STEP`, and every remainder for moduli of 2 to 10."""
    cuts = range(LOWEST - LOWEST % STEP, HIGHEST + STEP + 1, STEP)
    ranges = (Heuristic(name, low, high) for name in VARIABLES for low in cuts for high in cuts if low < high)
    return (*ranges, *(Heuristic(name, rest, m=m) for name in VARIABLES for m in MODULI for rest in range(m)))


def matched(
    activations: Float[Tensor, "pair neuron"], values: dict[str, Int[Tensor, " pair"]]
) -> tuple[list[Heuristic], Float[Tensor, " neuron"], Bool[Tensor, "pair neuron"]]:
    """Each neuron's heuristic: the set whose indicator its activations correlate with most.

    Args:
        activations: over prompts.
        values: each prompt's a, b and result.

    Returns:
        The heuristics; the correlations, 0 to 1; which prompts each neuron is on for: the set, or, where the correlation is
        negative, what is not in it.
    """
    tried, sets = list[Heuristic](), list[Tensor]()
    for one in heuristics():
        where = one.holds(values[one.variable])
        if 0 < int(where.sum()) < len(where):
            tried.append(one)
            sets.append(where)
    indicator = torch.stack(sets, 1)
    found = _standard(indicator.double()).T @ _standard(activations.double()) / len(activations)
    best = found.abs().argmax(0)
    chosen = found.gather(0, best[None])[0]
    on = indicator[:, best] ^ (chosen < 0)
    return [tried[i] for i in best.tolist()], chosen.abs(), on


def _standard(values: Float[Tensor, "pair column"]) -> Float[Tensor, "pair column"]:
    """Mean 0, variance 1; columns that do not vary are 0."""
    centred = values - values.mean(0)
    return centred / centred.square().mean(0).sqrt().clamp(min=1e-12)


@dataclass(frozen=True, eq=False)
class Bag:
    """Neurons of late MLPs at the last token, for one question.

    Attributes:
        tokens: prompts of all pairs of numbers, without the answers; `answers`, and which pairs were `new`.
        heuristic: by neuron, layer by layer; `match`: how well; `on` [pair, neuron]: for which prompts.
        mean: each neuron's mean activation over all pairs.
    """

    tokens: Int[Tensor, "pair position"]
    answers: Int[Tensor, " pair"]
    new: Bool[Tensor, " pair"]
    layers: tuple[int, ...]
    heuristic: list[Heuristic]
    match: Float[Tensor, " neuron"]
    on: Bool[Tensor, "pair neuron"]
    mean: Float[Tensor, " neuron"]

    @classmethod
    def of(cls, model: "Model", ask: int) -> "Bag":
        """The second half of the layers; one forward pass over all pairs."""
        rows, layers = all_pairs(ask), len(model.anatomy.sizes)
        assert rows.labels is not None
        late = tuple(range(layers // 2, layers))
        tokens = rows.tokens[:, :-1]
        values = model.record(tokens, [Site("neuron", layer) for layer in late])
        activations = torch.cat([values[Site("neuron", layer)][:, END] for layer in late], 1)
        found = matched(activations, {name: rows.labels[name] for name in VARIABLES})
        new = kept_back()[rows.labels["a"], rows.labels["b"]]
        return cls(tokens, rows.tokens[:, -1], new, late, *found, activations.mean(0))

    @property
    def matching(self) -> Bool[Tensor, " neuron"]:
        """Neurons that are heuristics."""
        return self.match >= GOES_WITH

    def without(self, model: "Model", off: Bool[Tensor, "pair neuron"]) -> float:
        """Accuracy on new pairs with these neurons at their mean at the last token, prompt by prompt; one forward pass."""
        per = off.shape[1] // len(self.layers)
        edits: Edits = {
            Site("neuron", layer): Held(off[self.new, i * per : (i + 1) * per], self.mean[i * per : (i + 1) * per])
            for i, layer in enumerate(self.layers)
        }
        return share(last(model, self.tokens[self.new], edits), self.answers[self.new])


@dataclass(frozen=True, eq=False)
class Held:
    """An edit of neurons: some, row by row, are at their mean at the last token."""

    off: Bool[Tensor, "row neuron"]
    mean: Float[Tensor, " neuron"]

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        changed = value.clone()
        changed[:, END] = torch.where(self.off, self.mean, value[:, END])
        return changed


def as_many(
    off: Bool[Tensor, "pair neuron"], among: Bool[Tensor, "pair neuron"], draw: torch.Generator
) -> Bool[Tensor, "pair neuron"]:
    """For each prompt, as many neurons as `off` has, drawn from `among` (all of them where there are fewer)."""
    noise = torch.where(among, torch.rand(among.shape, generator=draw), 2.0)
    rank = noise.argsort(1).argsort(1)
    return (rank < off.sum(1, keepdim=True)) & among


def own(model: "Model", bag: Bag) -> dict[str, float]:
    """Accuracy on new pairs: as it is (`whole`); without the heuristics that each prompt is in (`own`; at most `MOST` of all neurons, those
    that match best); without as many neurons that are no heuristic of the prompt's (`others`, mean of `DRAWS`); and how many these
    are, on average (`number`, `other`). Cost: 2 + `DRAWS` forward passes."""
    mine = bag.on & bag.matching
    rank = torch.where(mine, bag.match, -1.0).argsort(1, descending=True).argsort(1)
    off = mine & (rank < round(MOST * mine.shape[1]))
    rest = [as_many(off, ~mine, drawing("neurons", i)) for i in range(DRAWS)]
    found = {"whole": bag.without(model, torch.zeros_like(off)), "own": bag.without(model, off)}
    found["others"] = sum(bag.without(model, one) for one in rest) / DRAWS
    return found | {"number": float(off.sum(1).float().mean()), "other": float(rest[0].sum(1).float().mean())}


def kinds(model: "Model", bag: Bag) -> dict[str, dict[str, float]]:
    """By type of heuristic ("range a", "modulo c", ...): how many neurons, accuracy on new pairs without them on all prompts
    (`own`), and without as many neurons drawn from all others (`others`, mean of `DRAWS`). Cost: 1 + `DRAWS` passes a type."""
    found = dict[str, dict[str, float]]()
    types = [f"{one.kind} {one.variable}" for one in bag.heuristic]
    for name in sorted({kind for kind, fits in zip(types, bag.matching.tolist(), strict=True) if fits}):
        mine = torch.tensor([kind == name for kind in types]) & bag.matching
        off = mine.expand(len(bag.tokens), -1)
        draws = list[float]()
        for i in range(DRAWS):
            rest = (~mine).nonzero()[:, 0]
            chosen = rest[torch.randperm(len(rest), generator=drawing(name, i))[: int(mine.sum())]]
            other = torch.zeros_like(mine).index_fill(0, chosen, True)
            draws.append(bag.without(model, other.expand(len(bag.tokens), -1)))
        found[name] = {"number": float(mine.sum()), "own": bag.without(model, off), "others": sum(draws) / DRAWS}
    return found


def found(model: "Model", data: Arithmetic) -> tuple[Finding, ...]:
    """Most neurons are heuristics, and a prompt hangs on those that it is in; of + and - the worse one."""
    bags = {ASKS[ask]: Bag.of(model, ask) for ask in SUMS}
    number = min(float(bag.matching.float().mean()) for bag in bags.values())
    numbers = [own(model, bag) for bag in bags.values()]
    worst, gap = max(one["own"] for one in numbers), min(one["others"] - one["own"] for one in numbers)
    some = max(one["number"] for one in numbers)
    return (
        Finding("late MLPs' neurons at the last token that are heuristics: share", number, Goal("share", least=0.5)),
        Finding(f"without those that a prompt is in ({some:.0f} neurons at most, on average) few are right", worst, Goal("accuracy", most=0.3)),
        Finding("without as many others more are right, by", gap, Goal("accuracy", least=0.3)),
    )  # fmt: skip
