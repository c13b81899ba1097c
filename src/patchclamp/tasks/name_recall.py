"""Name recall: a story names its hero, and later has to name it again.

"Once upon a time, there was a little cat named Lily. One day, Lily went to the park. Then," -> " Lily". Clean and corrupt
prompts differ in the name alone (every mention of it).

The simplest use of retrieval from the context, which models of a few hundred thousand parameters have learned from stories;
see Eldan & Li 2023, TinyStories, https://arxiv.org/abs/2305.07759.
"""

import random
from collections.abc import Iterator

from patchclamp.tasks._pairs import Pair
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Tokenizer
from patchclamp.tasks._words import NAMES as _NAMES
from patchclamp.tasks._words import endless, fill

NAMES = _NAMES

TEMPLATES = (
    "Once upon a time, there was a {kind} {animal} named {name1}. One day, {name2} went to the {place}. Then,",
    "Once upon a time, there was a {kind} {animal} named {name1}. Everyone near the {place} loved",
    "There was once a {kind} {animal}, and its name was {name1}. Near the {place}, all the children called it",
    "This is the story of a {kind} {animal} named {name1}. One day, {name2} was lost near the {place}, and we all looked for",
    "We have a {kind} {animal} at home, called {name1}. Today I took the {animal2} to the {place}. Come here,",
    "I saw a {kind} {animal} near the {place}. On its collar I read its name, {name1}. So I fed",
)

KINDS = ("little", "big", "happy", "small", "brown", "white", "black", "young", "friendly", "clever")
ANIMALS = ("cat", "dog", "horse", "rabbit", "mouse", "bear", "pig", "fox", "bird", "duck")
PLACES = ("park", "garden", "forest", "house", "school", "farm", "river", "village", "lake", "market")


def task() -> Task:
    """The task."""
    return Task("name_recall", "Name recall: the name of the animal that the story is about", _candidates, single=True)


def _candidates(rng: random.Random, _tokenizer: Tokenizer) -> Iterator[Pair]:
    return endless(lambda: _pair(rng))


def _pair(rng: random.Random) -> Pair:
    template, animal = rng.choice(TEMPLATES), rng.choice(ANIMALS)
    words = {"kind": rng.choice(KINDS), "animal": animal, "animal2": animal, "place": rng.choice(PLACES)}
    name, other = rng.sample(NAMES, 2)
    clean, spans = fill(template, {**words, "name1": name, "name2": name})
    corrupt, _ = fill(template, {**words, "name1": other, "name2": other})
    return Pair(clean, f" {name}", corrupt, f" {other}", spans)
