"""Capitals: "The capital of France is the city of" -> " Paris".

Knowledge in the weights. Each country is matched with another of as many tokens, in all templates; the two form a group, so
that the sets of a split share no country.

Paper: Merullo et al. 2023, Language Models Implement Simple Word2Vec-style Vector Arithmetic, https://arxiv.org/abs/2305.16130.
"""

import random
from collections.abc import Iterator

from patchclamp.tasks._pairs import Pair
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Tokenizer
from patchclamp.tasks._words import count_tokens, fill, partners

TEMPLATES = (
    "The capital of {country} is the city of",
    "The capital city of {country} is called",
    "The name of the capital of {country} is",
    "Q: What is the capital of {country}? A:",
    "In {country}, the capital is the city of",
    "The government of {country} sits in the city of",
    "The parliament of {country} meets in the city of",
    "People who visit the capital of {country} travel to",
    "If you fly to the capital of {country}, you arrive in",
    "The president flew to the capital of {country}, the city of",
    "On the map of {country}, a star marks the capital,",
    "The embassy in {country} is in the capital,",
)

CAPITALS = (
    ("France", "Paris"), ("Germany", "Berlin"), ("Italy", "Rome"), ("Spain", "Madrid"), ("England", "London"),
    ("Japan", "Tokyo"), ("China", "Beijing"), ("Russia", "Moscow"), ("Egypt", "Cairo"), ("Greece", "Athens"),
    ("Portugal", "Lisbon"), ("Ireland", "Dublin"), ("Norway", "Oslo"), ("Sweden", "Stockholm"), ("Denmark", "Copenhagen"),
    ("Finland", "Helsinki"), ("Poland", "Warsaw"), ("Austria", "Vienna"), ("Hungary", "Budapest"), ("Belgium", "Brussels"),
    ("Canada", "Ottawa"), ("Iran", "Tehran"), ("Iraq", "Baghdad"), ("Syria", "Damascus"), ("Thailand", "Bangkok"),
    ("Chile", "Santiago"), ("Scotland", "Edinburgh"), ("Switzerland", "Bern"), ("Cuba", "Havana"),
    ("Turkey", "Ankara"), ("Lebanon", "Beirut"), ("Kenya", "Nairobi"), ("Vietnam", "Hanoi"), ("Peru", "Lima"),
    ("Indonesia", "Jakarta"), ("Serbia", "Belgrade"), ("Croatia", "Zagreb"), ("Romania", "Bucharest"), ("Ghana", "Accra"),
)  # fmt: skip


def task() -> Task:
    """The task."""
    return Task("capitals", "Capitals: the capital of a country", _candidates, single=True)


def _candidates(rng: random.Random, tokenizer: Tokenizer) -> Iterator[Pair]:
    tokens = count_tokens(tokenizer, (word for row in CAPITALS for word in row))

    def kind(row: tuple[str, str]) -> tuple[int, bool]:
        return tokens[row[0]], tokens[row[1]] == 1

    pairs: list[Pair] = []
    for one, two in partners(rng, CAPITALS, kind, lambda row: row[1]):
        for template in TEMPLATES:
            for (country, city), (other, wrong) in ((one, two), (two, one)):
                clean, spans = fill(template, {"country": country})
                corrupt, _ = fill(template, {"country": other})
                group = "/".join(sorted((country, other)))
                pairs.append(Pair(clean, f" {city}", corrupt, f" {wrong}", spans, group))
    rng.shuffle(pairs)
    return iter(pairs)
