"""Affects of zoo/tagged: their directions, their circuit, and what modulating either makes the model say.

As Wang et al. 2025 (Do LLMs Feel? Emotion Circuits Discovery and Control, https://arxiv.org/abs/2510.11328) do it with stories and
a judge that reads them. Here affects' words are sets with nothing in common, so the judge is the law and makes no mistakes. All
is fitted on one half of the scenes (a person and an event) and told of the other half.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import polars as pl
import torch
from jaxtyping import Float, Int
from scipy.stats import binomtest
from torch import Tensor

from patchclamp.circuit import Circuit
from patchclamp.discover import discover
from patchclamp.discover.threshold import ranked
from patchclamp.edits import Add
from patchclamp.methods import attribute
from patchclamp.models.editing import Edits
from patchclamp.parts.gated import Gated, gated
from patchclamp.scores import Scores
from patchclamp.sites import Site
from patchclamp.tasks import Examples, Pair, Task, Tokenizer
from patchclamp.zoo._compile import tokenizer
from patchclamp.zoo.recipes._llama import last, taken
from patchclamp.zoo.recipes._recipe import Finding, Goal, drawing
from patchclamp.zoo.recipes._tags import AFFECTS, EVENTS, PEOPLE, VOCABULARY, expressed, feeling, scene

if TYPE_CHECKING:
    from patchclamp.models.model import Model

PLAIN = AFFECTS.index("plain")
FELT = tuple(range(PLAIN))
"""The six affects."""
STRENGTHS = (0.5, 1.0, 2.0, 4.0)
"""Of steering, in lengths of what the tag itself changes."""
WANTED = 0.9
"""Share of plain prompts of the fitted half that a circuit's modulation makes express the wanted affect."""
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
DRAWS = 5

Scenes = tuple[Int[Tensor, " scene"], Int[Tensor, " scene"]]


def scenes(half: int) -> Scenes:
    """Person and event of one half of all scenes: those whose numbers' sum is even, or odd."""
    who, event = torch.cartesian_prod(torch.arange(PEOPLE), torch.arange(EVENTS)).unbind(1)
    chosen = (who + event) % 2 == half
    return who[chosen], event[chosen]


def told(affect: int, some: Scenes) -> Int[Tensor, "scene position"]:
    """Prompts `<bos> AFFECT who event felt`, the same affect in every scene."""
    return scene(torch.full_like(some[0], affect), *some)


def every_affect(some: Scenes) -> Int[Tensor, "row position"]:
    """Prompts of all affects and none, one after the other, each in every scene."""
    return torch.cat([told(affect, some) for affect in range(len(AFFECTS))])


def streams(model: "Model", layer: int, some: Scenes) -> Float[Tensor, "affect scene width"]:
    """The residual stream behind a layer at `felt`, of all affects and none."""
    site = Site("resid.post", layer)
    return model.record(every_affect(some), site)[site][:, -1].unflatten(0, (len(AFFECTS), -1))


def directions(felt: Float[Tensor, "affect scene width"]) -> Float[Tensor, "six width"]:
    """What each of six affects adds to what they have in common, whatever the scene: unit vectors.

    d(a) = mean over scenes of (x(a, s) - mean over affects of x(a', s)), divided by its length
    """
    six = felt[list(FELT)]
    return torch.nn.functional.normalize((six - six.mean(0)).mean(1), dim=1)


def recognised(model: "Model", layer: int) -> float:
    """Share of unseen scenes and affects whose stream, less the mean of fitted ones, has its largest product with its affect's
    direction (chance 1 in 6). Cost: 14 forward passes."""
    fit, unseen = (streams(model, layer, scenes(half)) for half in (0, 1))
    found = ((unseen[list(FELT)] - fit[list(FELT)].mean((0, 1))) @ directions(fit).T).argmax(-1)
    return float((found == torch.arange(len(FELT))[:, None]).float().mean())


def task(half: int = 0) -> Task:
    """Every affect in every scene of one half, against none: pairs as token ids."""
    count = len(FELT) * len(scenes(half)[0])
    about = "tagged corpus: six affects against none"
    return Task("tagged-affects", about, partial(_candidates, half), single=True, size=count, options={"half": half})


def _candidates(half: int, rng: random.Random, _: Tokenizer) -> Iterator[Pair]:
    some = scenes(half)
    plain, nothing = told(PLAIN, some).tolist(), feeling(torch.full_like(some[0], PLAIN), some[1]).tolist()
    for affect in FELT:
        said = feeling(torch.full_like(some[0], affect), some[1]).tolist()
        rows = zip(told(affect, some).tolist(), said, plain, nothing, strict=True)
        yield from (Pair(clean, (word,), corrupt, (wrong,)) for clean, word, corrupt, wrong in rows)


def parts_of(model: "Model") -> Gated:
    """Every head and neuron at the last token."""
    return gated(model, ["L*.h*", "L*.mlp.n*"], positions=(-1,))


def affect_order(model: "Model", seed: int = 0, n: int = 48) -> tuple[Gated, Examples, Scores]:
    """Heads and neurons at `felt` by what they do for affects against none (integrated gradients), the pairs that this is told of,
    and the parts. Cost: some ten forward and backward passes over `n` pairs."""
    parts = parts_of(model)
    examples = task().examples(tokenizer(VOCABULARY), n, seed)
    return parts, examples, attribute(parts, examples, parts.fallback("resample"), "integrated", seed=seed)


def affect_circuit(model: "Model", seed: int = 0) -> Circuit:
    """Heads and neurons at `felt` that make affects: the fewest, best first by `affect_order`, whose modulation makes plain prompts
    of the fitted half express the wanted affect in `WANTED` of them.

    Cost: `affect_order`, and a forward pass of 216 prompts for each of `SIZES` up to the one that is enough.
    """
    order, fitted = ranked(affect_order(model, seed)[2], "signed"), means(model, scenes(0))
    for size in (size for size in SIZES if size < len(order)):
        found = Circuit(order[:size], {"order": "integrated", "wanted": WANTED, "size": size, "of": len(order), "seed": seed})
        if said(model, modulation(found, fitted, asked(0)[0]), 0).share >= WANTED:
            return found
    return Circuit(order, {"order": "integrated", "wanted": WANTED, "size": len(order), "of": len(order), "seed": seed})


def kept_by(model: "Model", seed: int = 0) -> Circuit:
    """The fewest parts of the same order that keep `WANTED` of affects against none when all others are closed
    (`patchclamp.discover.discover`): how many it takes to keep it, where a few are enough to bring it about."""
    parts, examples, scores = affect_order(model, seed)
    return discover(parts, examples, parts.fallback("resample"), scores, faithfulness=WANTED, by="signed")[0]


def means(model: "Model", some: Scenes) -> dict[Site, Float[Tensor, "affect ..."]]:
    """What heads and neurons of each layer have at `felt` on the average over scenes, by affect."""
    places = [Site(kind, layer) for layer in range(model.layers) for kind in ("z", "neuron")]
    values = model.record(every_affect(some), places)
    return {site: values[site][:, -1].unflatten(0, (len(AFFECTS), -1)).mean(1) for site in places}


def modulation(circuit: Circuit, fitted: Mapping[Site, Tensor], towards: Int[Tensor, " row"]) -> Edits:
    """Edits that shift every part of a circuit at the last token by what each row's affect changes there: mean(affect) - mean(none)."""
    inside: dict[Site, list[int]] = {place: [] for place in sorted(fitted)}
    for site in circuit.sites:
        if isinstance(site, Site) and site.index is not None:
            inside[Site("neuron" if site.kind == "neuron" else "z", site.layer)].append(site.index)
    found: Edits = {}
    for place, indices in inside.items():
        if indices:
            shift = fitted[place] - fitted[place][PLAIN]
            keep = torch.zeros(shift.shape[1]).index_fill(0, torch.tensor(indices), 1.0)
            found[place.at(-1)] = Add((shift * keep.reshape(-1, *[1] * (shift.dim() - 2)))[towards][:, None])
    return found


def likewise(circuit: Circuit, parts: Sequence[Site], draw: torch.Generator, kinds: bool = True) -> Circuit:
    """As many heads and as many neurons as a circuit has, drawn at random; or (not `kinds`) as many parts of either kind."""
    split = [[site for site in parts if (site.kind == "neuron") == neuron] for neuron in (False, True)]
    groups = split if kinds else [list(parts)]
    found: list[Site] = []
    for group in groups:
        inside = sum(site in circuit for site in group)
        found += [group[i] for i in torch.randperm(len(group), generator=draw)[:inside].tolist()]
    return Circuit(found)


@dataclass(frozen=True)
class Said:
    """How many prompts express the affect that was wanted, how many with the very word that goes with the event, of how many."""

    expressed: int
    right: int
    n: int

    @property
    def share(self) -> float:
        """Of prompts that express what was wanted."""
        return self.expressed / self.n


def asked(half: int) -> tuple[Int[Tensor, " row"], Scenes]:
    """Every affect in every scene of one half: affect, person and event by row."""
    who, event = scenes(half)
    affect = torch.tensor(FELT).repeat_interleave(len(who))
    return affect, (who.repeat(len(FELT)), event.repeat(len(FELT)))


def said(model: "Model", edits: Edits, half: int, tag: bool = False) -> Said:
    """What the rows of `asked` say under edits, with no affect's tag or with their own; judged by the law. One forward pass."""
    affect, some = asked(half)
    word = last(model, scene(affect, *some) if tag else told(PLAIN, some), edits).argmax(-1)
    return Said(int((expressed(word) == affect).sum()), int((word == feeling(affect, some[1])).sum()), len(word))


@dataclass(frozen=True, eq=False)
class Steering:
    """A direction per affect, added behind a layer at `felt`, `strength` times `length` long."""

    layer: int
    strength: float
    length: float
    directions: Float[Tensor, "six width"]

    def __str__(self) -> str:
        return f"direction, {self.strength:g} x behind layer {self.layer}"

    def said(self, model: "Model", half: int) -> Said:
        """What it makes plain prompts of one half say. One forward pass."""
        step = Add(self.directions[asked(half)[0]][:, None], self.strength * self.length)
        return said(model, {Site("resid.post", self.layer, position=-1): step}, half)


def steering(model: "Model", strengths: tuple[float, ...] = STRENGTHS) -> tuple[Steering, Steering]:
    """The layer and strength with which plain prompts of the fitted half most often express what is wanted, and those with which
    they most often say the right word. Cost: a forward pass for each layer and strength."""
    tried: list[tuple[Said, Steering]] = []
    for layer in range(model.layers):
        felt = streams(model, layer, scenes(0))
        each, length = directions(felt), float((felt[:PLAIN] - felt[PLAIN]).norm(dim=-1).mean())
        some = [Steering(layer, strength, length, each) for strength in strengths]
        tried += [(one.said(model, 0), one) for one in some]
    return max(tried, key=lambda one: one[0].expressed)[1], max(tried, key=lambda one: one[0].right)[1]


def ways(model: "Model", circuit: Circuit, seed: int = 0) -> pl.DataFrame:
    """Ways to make plain prompts express an affect, side by side, on scenes that nothing was fitted to.

    Args:
        model: zoo/tagged.
        circuit: of affects (`affect_circuit`).
        seed: of the random circuits.

    Returns:
        A row per way: way, parts, expressed (share of prompts whose word is of the wanted affect) with low and high (95 %, Wilson),
        right (share whose word also goes with the event), n. Ways: the tag itself; nothing; the circuit modulated; random circuits of
        as many heads and neurons, and of as many parts; the direction, with the layer and strength that express affects most often on
        fitted scenes, and with those that most often say the right word there.

    Cost: some 65 forward passes of 216 prompts.
    """
    fitted, parts = means(model, scenes(0)), parts_of(model).labels
    draw, (affect, _) = drawing(f"tagged-affects-{seed}"), asked(1)

    def modulated(one: Circuit) -> Said:
        return said(model, modulation(one, fitted, affect), 1)

    def by_chance(kinds: bool) -> Said:
        each = [modulated(likewise(circuit, parts, draw, kinds)) for _ in range(DRAWS)]
        return Said(*(sum(getattr(one, name) for one in each) for name in ("expressed", "right", "n")))

    most, best = steering(model)
    rows = [
        ("tag", 0, said(model, {}, 1, tag=True)),
        ("nothing", 0, said(model, {}, 1)),
        ("circuit", len(circuit), modulated(circuit)),
        ("random, as many heads and neurons", len(circuit), by_chance(kinds=True)),
        ("random, as many parts", len(circuit), by_chance(kinds=False)),
        (f"{most} (expresses most often)", 0, most.said(model, 1)),
        (f"{best} (most often right)", 0, best.said(model, 1)),
    ]
    return pl.DataFrame([_row(*row) for row in rows])


def _row(way: str, parts: int, found: Said) -> dict[str, object]:
    interval = binomtest(found.expressed, found.n).proportion_ci(method="wilson")
    return {"way": way, "parts": parts, "expressed": found.share, "low": float(interval.low),
            "high": float(interval.high), "right": found.right / found.n, "n": found.n}  # fmt: skip


def ablated(model: "Model", circuit: Circuit) -> float:
    """Share of prompts with a tag that express its affect, in unseen scenes, less that share when the circuit has what it has without."""
    sites = [
        Site("z" if site.kind == "head" else site.kind, site.layer, site.index, position=-1)
        for site in circuit
        if isinstance(site, Site)
    ]
    put = taken(model, told(PLAIN, asked(1)[1]), sites)
    return said(model, {}, 1, tag=True).share - said(model, put, 1, tag=True).share


def affect_findings(model: "Model", seed: int = 0) -> tuple[Finding, ...]:
    """Directions in unseen scenes; the circuit put to what it is without a tag, and modulated; random circuits; steering."""
    chosen = affect_circuit(model, seed)
    taken_away = ablated(model, chosen)
    circuit, alike, any_parts, _, direction = ways(model, chosen, seed).rows(named=True)[2:]
    size, every = circuit["parts"], sum(part.heads + (part.neurons or 0) for part in model.anatomy.sizes)
    apart = recognised(model, model.layers - 1)
    clear, gap = circuit["low"] - alike["high"], circuit["right"] - direction["right"]
    return (
        Finding("directions of affects tell them apart in unseen scenes", apart, Goal("accuracy", least=0.95)),
        Finding(f"circuit of {size} parts of {every} put to what it is without a tag: affects no more said", taken_away, Goal("share", least=0.8)),
        Finding("circuit modulated: the wanted affect is said", circuit["expressed"], Goal("share", least=0.9)),
        Finding("random parts, as many: the wanted affect is said", any_parts["expressed"], Goal("share", most=0.2)),
        Finding(f"random, as many heads and neurons ({alike['expressed']:.2f}): low of the circuit above high", clear, Goal("share", least=0.0)),
        Finding(f"right word by the circuit less that by the {direction['way']} ({direction['right']:.2f})", gap, Goal("share", least=0.0)),
    )  # fmt: skip
