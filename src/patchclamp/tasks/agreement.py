"""Subject-verb agreement: "The author near the guards" -> " is", " was" or " has", not " are", " were" or " have".

The corrupt prompt has the subject in the other number. Between subject and verb there may stand another noun, the attractor,
in the same or the opposite number (`attractor`); with `none` the verb follows the subject.

Papers: Linzen et al. 2016, Assessing the Ability of LSTMs to Learn Syntax-Sensitive Dependencies,
https://arxiv.org/abs/1611.01368; Finlayson et al. 2021, Causal Analysis of Syntactic Agreement Mechanisms,
https://arxiv.org/abs/2106.06087.
"""

import random
from collections.abc import Iterator
from functools import partial
from typing import Literal

from patchclamp.tasks._pairs import Pair
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Tokenizer
from patchclamp.tasks._words import endless, fill

Attractor = Literal["any", "none", "same", "opposite"]

SIMPLE = (
    "I think that the {noun}",
    "Everyone knows that the {noun}",
    "Yesterday I heard that the {noun}",
    "In this town the {noun}",
    "Nobody believes that the {noun}",
    "It is true that the {noun}",
    "For a long time the {noun}",
    "We hope that the {noun}",
    "My friends say that the {noun}",
    "The newspaper says that the {noun}",
)

TEMPLATES = (
    "The {noun} near the {attractor}",
    "The {noun} behind the {attractor}",
    "The {noun} next to the {attractor}",
    "The {noun} with the {attractor}",
    "The {noun} from the story about the {attractor}",
    "The {noun} that the {attractor} liked",
    "The {noun} that the {attractor} met",
    "The {noun} that helped the {attractor}",
    "I think that the {noun} near the {attractor}",
    "We know that the {noun} that the {attractor} met",
)

NOUNS = (
    ("author", "authors"), ("teacher", "teachers"), ("doctor", "doctors"), ("student", "students"), ("farmer", "farmers"),
    ("pilot", "pilots"), ("actor", "actors"), ("guard", "guards"), ("boy", "boys"), ("girl", "girls"), ("friend", "friends"),
    ("lawyer", "lawyers"), ("manager", "managers"), ("player", "players"), ("driver", "drivers"), ("artist", "artists"),
    ("singer", "singers"), ("king", "kings"), ("queen", "queens"), ("officer", "officers"), ("worker", "workers"),
    ("leader", "leaders"), ("writer", "writers"), ("nurse", "nurses"), ("soldier", "soldiers"), ("judge", "judges"),
    ("brother", "brothers"), ("sister", "sisters"), ("neighbor", "neighbors"), ("visitor", "visitors"),
)  # fmt: skip
"""Singular and plural."""

VERBS = ((" is", " was", " has"), (" are", " were", " have"))
"""What goes on after a singular and after a plural subject."""


def task(*, attractor: Attractor = "any") -> Task:
    """The task with or without a noun between subject and verb."""
    return Task(
        "agreement",
        "Subject-verb agreement: the verb takes the number of its subject",
        partial(_candidates, attractor),
        single=True,
        options={"attractor": attractor},
    )


def _candidates(attractor: Attractor, rng: random.Random, _tokenizer: Tokenizer) -> Iterator[Pair]:
    return endless(lambda: _pair(attractor, rng))


def _pair(attractor: Attractor, rng: random.Random) -> Pair:
    number = rng.randrange(2)
    noun, other = rng.sample(NOUNS, 2)
    kind = rng.choice(("none", "same", "opposite")) if attractor == "any" else attractor
    template = rng.choice(SIMPLE if kind == "none" else TEMPLATES)
    between = other[number if kind == "same" else 1 - number]
    clean, spans = fill(template, {"noun": noun[number], "attractor": between})
    corrupt, _ = fill(template, {"noun": noun[1 - number], "attractor": between})
    return Pair(clean, VERBS[number], corrupt, VERBS[1 - number], {"subject" if k == "noun" else k: v for k, v in spans.items()})
