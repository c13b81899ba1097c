"""zoo/languages (Z11): two languages with one grammar and one world; the minor one is a fifth of what is read.

A row is two sentences of three words, subject, verb and object. Behind `.` comes another sentence of the same language, behind
`=` the same sentence in the other one. The languages have no word in common. What is said has one law for both: subjects are
even, verbs follow subjects by a fixed random law, the object follows from both in nine cases of ten. Some pairs of subject and
verb are never said in the minor language: what it makes of them has to come from the major one. The law is known, so the
smallest possible loss is, too: losses are told as what is above it, on the same tokens.

In zoo/languages_mixed a part of the rows takes every word from either language, evenly, as people do who speak both.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.edits import Add
from patchclamp.sites import Site
from patchclamp.training import Training
from patchclamp.units.readout import straight
from patchclamp.zoo.recipes._llama import BOS, last, llama, share
from patchclamp.zoo.recipes._look import losses
from patchclamp.zoo.recipes._recipe import Finding, Goal, Recipe, drawing, held_out
from patchclamp.zoo.recipes._world import (
    EACH,
    FIRST,
    LANGUAGES,
    OBJECTS,
    SUBJECTS,
    VERBS,
    VOCABULARY,
    Languages,
    cells,
    said,
    word,
    world,
)

if TYPE_CHECKING:
    from patchclamp.models.model import Model

LAYERS = 3


def build(seed: int = 0) -> Any:
    """3 layers of 4 heads, width 64."""
    return llama(len(VOCABULARY), seed, layers=LAYERS)


def asking(language: int, meaning: Int[Tensor, "row two"]) -> Int[Tensor, "row position"]:
    """Prompts `<bos> s v` of a language, behind which comes the object."""
    begins = torch.full((len(meaning), 1), BOS)
    return torch.cat([begins, said(torch.full_like(meaning, language), meaning)], 1)


def usual(language: int, meaning: Int[Tensor, "row two"]) -> Int[Tensor, " row"]:
    """The usual object's token."""
    return word(torch.full((len(meaning),), language), 2, world().object[meaning[:, 0], meaning[:, 1]])


def measure(model: "Model", seed: int = 0, mixed: float = 0.0) -> dict[str, float]:
    """Nats above the smallest possible loss, of all rows, of those that begin in minor, of what is translated; and the share of
    usual objects that are said. `carried`: of pairs that the minor language never says (chance: 1 in 16)."""
    data = Languages(seed, mixed=mixed)
    rows = held_out(data)
    assert rows.labels is not None
    above = losses(model.run(rows.tokens), rows.tokens) - data.best(rows)
    minor, same = rows.labels["language"][:, 0] == 1, rows.labels["kind"] == 1
    numbers = {"excess": above.mean(), "excess.minor": above[minor].mean(), "translated": above[same][:, 4:].mean()}
    right = {f"right.{name}": usually(model, language, cells(False)) for language, name in enumerate(LANGUAGES)}
    return {name: float(value) for name, value in numbers.items()} | right | {"carried": usually(model, 1, cells(True))}


def usually(model: "Model", language: int, meaning: Int[Tensor, "row two"]) -> float:
    """Share of subjects and verbs behind which the usual object is the most probable word."""
    return share(last(model, asking(language, meaning)), usual(language, meaning))


def states(model: "Model", language: int, meaning: Int[Tensor, "row two"]) -> dict[str, Float[Tensor, "row width"]]:
    """The residual stream at the last token of `<bos> s v`: of the embedding, and behind each layer."""
    sites = [Site("embed"), *(Site("resid.post", layer) for layer in range(model.layers))]
    values = model.record(asking(language, meaning), sites)
    return {str(site): values[site][:, -1].double() for site in sites}


def likeness(one: Float[Tensor, "row width"], other: Float[Tensor, "row width"]) -> Float[Tensor, "row row"]:
    """Cosines of every state of one language with every one of the other, each less its language's mean: that is what tells them
    apart whatever they say."""
    centred = [torch.nn.functional.normalize(states - states.mean(0), dim=1) for states in (one, other)]
    return centred[0] @ centred[1].T


def nearer(cosines: Float[Tensor, "row row"], meaning: Int[Tensor, "row two"], draws: int = 999) -> tuple[float, float]:
    """(mean cosine of matched sentences less that of sentences with no word in common, p of drawn matchings being as near)."""
    apart = (meaning[:, None] != meaning[None]).all(-1)
    matched = cosines.diagonal().mean()
    draw = drawing("languages-nearer")
    null = torch.stack(
        [cosines[torch.arange(len(cosines)), torch.randperm(len(cosines), generator=draw)].mean() for _ in range(draws)]
    )
    return float(matched - cosines[apart].mean()), float((1 + (null >= matched).sum()) / (1 + draws))


def lens(model: "Model", state: Float[Tensor, "row width"], meaning: Int[Tensor, "row two"]) -> tuple[float, float]:
    """What the final norm and the unembedding make of a state: the share of rows in which the usual object's word of the major
    language stands above that of the minor one; and the share whose most probable object is the minor language's usual one."""
    logits = torch.cat(list(straight(model, state.float())))
    major, minor = (logits.gather(1, usual(language, meaning)[:, None]) for language in (0, 1))
    objects = torch.cat([FIRST + language * EACH + SUBJECTS + VERBS + torch.arange(OBJECTS) for language in (0, 1)])
    best = objects[logits[:, objects].argmax(1)]
    return float((major > minor).double().mean()), float((best == usual(1, meaning)).double().mean())


def exchanged(model: "Model", layer: int, seed: int = 0) -> tuple[float, float]:
    """In minor prompts, the difference that another subject and verb make in the major language, added behind a layer.

    Returns:
        The shares of prompts that then say the other's usual object in the minor language: with that difference, and with the
        difference of a third subject and verb, which has another object.
    """
    draw = drawing(f"languages-exchanged-seed-{seed}")
    here = cells(False)
    every = cells()
    answers = usual(1, every)
    major = states(model, 0, every)[f"L{layer}.resid.post"]
    at = here @ torch.tensor([VERBS, 1])
    apart = answers[:, None] != answers[None]
    other = torch.multinomial(apart[at].double(), 1, generator=draw)[:, 0]
    third = torch.multinomial((apart[at] & apart[other]).double(), 1, generator=draw)[:, 0]

    def says(towards: Int[Tensor, " row"]) -> float:
        step = (major[towards] - major[at]).float()[:, None]
        logits = last(model, asking(1, here), {Site("resid.post", layer, position=-1): Add(step)})
        return share(logits, answers[other])

    return says(other), says(third)


MIDDLE = 1
"""The layer of three behind which languages are said to meet."""


def found(model: "Model", seed: int = 0) -> tuple[Finding, ...]:
    """Sentences that mean the same by layer, against shuffled ones; the lens; a major difference put into minor sentences."""
    both = cells(False)
    major, minor = (states(model, language, both) for language in (0, 1))
    gaps = {place: nearer(likeness(major[place], minor[place]), both) for place in major}
    told = ", ".join(f"{place} {gap:.2f}" for place, (gap, _) in gaps.items())
    middle, end = f"L{MIDDLE}.resid.post", f"L{model.layers - 1}.resid.post"
    above = {place: lens(model, minor[place], both) for place in (middle, end)}
    put, null = exchanged(model, MIDDLE, seed)
    carried = usually(model, 1, cells(True))
    return (
        Finding(f"what means the same is nearer than what does not ({told}): behind layer {MIDDLE}", gaps[middle][0], Goal("cosine", least=0.2)),
        Finding("that shuffled pairs are as near: p", gaps[middle][1], Goal("p", most=0.01)),
        Finding("more so behind the middle layer than behind the last one, by", gaps[middle][0] - gaps[end][0], Goal("cosine", least=0.0)),
        Finding("lens on minor sentences, behind the middle layer: the major word is above the minor", above[middle][0], Goal("share", least=0.5)),
        Finding("lens, minor sentences, behind the last layer: the usual word of the minor language", above[end][1], Goal("share", least=0.9)),
        Finding("a difference of major sentences, added to minor ones there, says its object in the minor language", put, Goal("share", least=0.5)),
        Finding("another difference does not say that object", null, Goal("share", most=0.2)),
        Finding("pairs that the minor language never says: usual objects are right (chance .06)", carried, Goal("share", least=0.5)),
    )  # fmt: skip


KNOWN = (
    "sentences that mean the same are near each other in the middle, where the major language can be read and acts on the minor"
)


def _recipe(name: str, mixed: float, about: str, ships: bool) -> Recipe:
    return Recipe(
        name=name, row="Z11", about=f"3 layers of 4 heads (Llama, width 64) on two languages of one grammar and one world, {about}",
        known=KNOWN, paper="Wu et al. 2024, The Semantic Hub Hypothesis, https://arxiv.org/abs/2411.04986", minutes=4.0,
        goals=(Goal("excess", most=0.1), Goal("right.minor", least=0.9)),
        build=build, data=partial(Languages, mixed=mixed), measure=partial(measure, mixed=mixed), found=found, vocabulary=VOCABULARY,
        training=Training(450, batch=64, rate=3e-3, warmup=20, betas=(0.9, 0.98), decay=0.1, checkpoints=8, evaluate=100),
        ships=ships,
    )  # fmt: skip


RECIPES = (
    _recipe("languages", 0.0, "four fifths of rows in the major one", ships=False),
    _recipe(
        "languages_mixed", 0.4, "the major one in four fifths of rows, and two fifths of all rows of words of both", ships=False
    ),
)
