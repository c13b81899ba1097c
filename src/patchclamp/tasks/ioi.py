"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> " Mary".

The answer is the name that occurs once (IO), not the one that occurs twice (S1, S2). In template order ABBA the indirect
object comes first, in BABA the subject.

Counterfactuals: `s2_io_flip` (the second mention of the subject becomes the indirect object, so that the answer flips),
`s1_io_flip` (the two names of the first clause change places: the answer stays, its position does not) and `abc` (three new
names, so that no answer can be told).

Paper: Wang et al. 2022, Interpretability in the Wild, https://arxiv.org/abs/2211.00593.
"""

import random
from collections.abc import Iterator
from functools import partial
from typing import Literal

from patchclamp.tasks._pairs import Pair
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Tokenizer
from patchclamp.tasks._words import NAMES as _NAMES
from patchclamp.tasks._words import endless, fill

Order = Literal["both", "ABBA", "BABA"]
Counterfactual = Literal["s2_io_flip", "s1_io_flip", "abc"]

NAMES = _NAMES

TEMPLATES = (
    "When {A} and {B} went to the {place}, {S2} gave {object} to",
    "After {A} and {B} went to the {place}, {S2} gave {object} to",
    "Then, {A} and {B} went to the {place}. {S2} gave {object} to",
    "Then, {A} and {B} had a lot of fun at the {place}. {S2} gave {object} to",
    "Then, {A} and {B} were working at the {place}. {S2} decided to give {object} to",
    "Then, {A} and {B} were thinking about going to the {place}. {S2} wanted to give {object} to",
    "The {place} was almost empty when {A} and {B} arrived. {S2} handed {object} to",
    "While {A} and {B} were at the {place}, {S2} offered {object} to",
    "Two old friends, {A} and {B}, met at the {place}. {S2} showed {object} to",
    "On the way to the {place}, {A} and {B} stopped to talk. {S2} passed {object} to",
    "At the {place}, {A} and {B} sat down together. {S2} lent {object} to",
    "Yesterday, {A} and {B} spent an hour at the {place}, and {S2} brought {object} to",
    "The day {A} and {B} visited the {place}, {S2} sent {object} to",
    "As {A} and {B} left the {place}, {S2} handed {object} to",
)

PLACES = ("store", "park", "school", "office", "house", "garden", "station", "hospital", "restaurant", "library", "beach",
          "market", "museum", "zoo", "farm", "church", "hotel", "shop", "airport", "castle")  # fmt: skip

OBJECTS = ("a book", "a drink", "a ring", "a letter", "a ticket", "a map", "a hat", "a coin", "a flower", "a key", "a pen",
           "a camera", "a basket", "a watch", "a toy", "a present", "an apple", "an envelope", "an umbrella")  # fmt: skip


def task(*, template: Order = "both", counterfactual: Counterfactual = "s2_io_flip") -> Task:
    """The task with one order of names or both, and one way to corrupt."""
    return Task(
        "ioi",
        "Indirect object identification: which of two names the object goes to",
        partial(_candidates, template, counterfactual),
        single=True,
        options={"template": template, "counterfactual": counterfactual},
    )


def _candidates(order: Order, counterfactual: Counterfactual, rng: random.Random, _tokenizer: Tokenizer) -> Iterator[Pair]:
    return endless(lambda: _pair(order, counterfactual, rng))


def _pair(order: Order, counterfactual: Counterfactual, rng: random.Random) -> Pair:
    frame, place, thing = rng.choice(TEMPLATES), rng.choice(PLACES), rng.choice(OBJECTS)
    io, subject, *others = rng.sample(NAMES, 5)
    io_first = order == "ABBA" or (order == "both" and rng.random() < 0.5)
    names = (io, subject) if io_first else (subject, io)
    other = {
        "s2_io_flip": (*names, io),
        "s1_io_flip": (names[1], names[0], subject),
        "abc": (others[0], others[1], others[2]),
    }[counterfactual]
    rest = {"place": place, "object": thing}
    clean, spans = fill(frame, {**rest, "A": names[0], "B": names[1], "S2": subject})
    corrupt, _ = fill(frame, {**rest, "A": other[0], "B": other[1], "S2": other[2]})
    spans["IO"], spans["S1"] = (spans["A"], spans["B"]) if io_first else (spans["B"], spans["A"])
    named = {name: span for name, span in spans.items() if name not in "AB"}
    return Pair(clean, f" {io}", corrupt, f" {subject}", named, mirrors=counterfactual == "s2_io_flip")
