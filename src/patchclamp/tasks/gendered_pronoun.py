"""Gendered pronoun: "So Mary is a really great friend, isn't" -> " she"; with "John" -> " he".

Clean and corrupt prompts differ in the name. In each template every name is matched with one of the other gender, so that
prompts can be parted into disjoint sets.

Paper: Mathwin et al. 2023, Identifying a Preliminary Circuit for Predicting Gendered Pronouns in GPT-2 Small,
https://cmathw.itch.io/identifying-a-preliminary-circuit-for-predicting-gendered-pronouns-in-gpt-2-smal.
"""

import random
from collections.abc import Iterator

from patchclamp.tasks._pairs import Pair
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Tokenizer
from patchclamp.tasks._words import FEMALE as _FEMALE
from patchclamp.tasks._words import MALE as _MALE
from patchclamp.tasks._words import fill

FEMALE, MALE = _FEMALE, _MALE
ANSWERS = {"female": " she", "male": " he"}

TEMPLATES = (
    "So {name} is a really great friend, isn't",
    "So {name} is such a good cook, isn't",
    "So {name} is a very good athlete, isn't",
    "So {name} is an excellent teacher, isn't",
    "So {name} was at the party last night, wasn't",
    "So {name} will be there in time, won't",
    "When {name} got home from work,",
    "After {name} had finished the book,",
    "While {name} was cooking dinner,",
    "The teacher praised {name} because",
    "Everyone likes {name} because",
    "My neighbour {name} told me that",
    "Yesterday, {name} said that",
    "I know {name} well, and I think that",
    "We waited for {name} until",
    "I asked {name} to stay, but",
)


def task() -> Task:
    """The task."""
    return Task("gendered_pronoun", "Gendered pronoun: she or he, by the name", _candidates, single=True)


def _candidates(rng: random.Random, _tokenizer: Tokenizer) -> Iterator[Pair]:
    pairs: list[Pair] = []
    for template in TEMPLATES:
        women, men = rng.sample(FEMALE, len(FEMALE)), rng.sample(MALE, len(MALE))
        for woman, man in zip(women, men, strict=False):
            sides = [(*fill(template, {"name": name}), ANSWERS[kind]) for name, kind in ((woman, "female"), (man, "male"))]
            rng.shuffle(sides)
            (clean, spans, answer), (corrupt, _, wrong) = sides
            pairs.append(Pair(clean, answer, corrupt, wrong, spans))
    rng.shuffle(pairs)
    return iter(pairs)
