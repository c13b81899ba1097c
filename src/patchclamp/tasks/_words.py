"""What the built-in tasks share: names, filling templates with spans, and matching words that fit each other."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from string import Formatter
from typing import TypeVar

from patchclamp.tasks._pairs import Range
from patchclamp.tasks._tokens import Misfit, Tokenizer, ids_of

T = TypeVar("T")

FEMALE = (
    "Mary", "Alice", "Emma", "Anna", "Sarah", "Laura", "Julia", "Emily", "Lisa", "Linda", "Susan", "Karen", "Nancy", "Betty",
    "Helen", "Ruth", "Maria", "Diana", "Kate", "Jane", "Rachel", "Rebecca", "Amy", "Michelle", "Jessica", "Jennifer", "Amanda",
    "Melissa", "Elizabeth", "Charlotte", "Lucy", "Sophie", "Olivia", "Hannah", "Margaret", "Barbara", "Katherine", "Catherine",
    "Claire", "Clara", "Martha", "Louise", "Carol", "Sandra", "Donna", "Angela", "Heather", "Nicole", "Christina", "Caroline",
    "Natalie", "Megan", "Molly", "Lauren", "Stephanie", "Joan", "Judith", "Ellen", "Deborah", "Patricia",
)  # fmt: skip
"""Names that are read as a woman's; one token with a leading space in GPT-2's and GPT-NeoX's vocabulary."""

MALE = (
    "John", "James", "Robert", "Michael", "William", "David", "Richard", "Joseph", "Thomas", "Charles", "Daniel", "Matthew",
    "Paul", "Steven", "Andrew", "Kevin", "Brian", "George", "Edward", "Ronald", "Timothy", "Jason", "Jeffrey", "Ryan", "Jacob",
    "Gary", "Nicholas", "Eric", "Jonathan", "Stephen", "Larry", "Justin", "Scott", "Brandon", "Benjamin", "Samuel", "Frank",
    "Gregory", "Raymond", "Alexander", "Patrick", "Jack", "Dennis", "Jerry", "Tyler", "Aaron", "Henry", "Adam", "Douglas",
    "Nathan", "Peter", "Kyle", "Walter", "Ethan", "Jeremy", "Harold", "Carl", "Keith", "Roger", "Arthur",
)  # fmt: skip
"""Names that are read as a man's; one token likewise."""

NAMES = FEMALE + MALE


def fill(template: str, words: Mapping[str, str]) -> tuple[str, dict[str, Range]]:
    """A template with its slots filled, and the characters of each slot by the slot's name."""
    text, spans = "", dict[str, Range]()
    for literal, slot, _, _ in Formatter().parse(template):
        text += literal
        if slot is not None:
            spans[slot] = len(text), len(text) + len(words[slot])
            text += words[slot]
    return text, spans


def count_tokens(tokenizer: Tokenizer, words: Iterable[str]) -> dict[str, int]:
    """How many tokens each word takes after a blank; 0 where the tokenizer refuses one of them."""
    words = list(dict.fromkeys(words))
    try:
        return dict(zip(words, map(len, ids_of(tokenizer, [f" {word}" for word in words])), strict=True))
    except Misfit:
        return dict.fromkeys(words, 0)


def endless(make: Callable[[], T]) -> Iterator[T]:
    """What `make` gives, for ever."""
    while True:
        yield make()


def partners(
    rng: random.Random, items: Sequence[T], kind: Callable[[T], object], differ: Callable[[T], object]
) -> list[tuple[T, T]]:
    """Match items of one kind (as many tokens) whose `differ` values differ (their answers), at random; each is used once.

    What is left over is matched across kinds, so that it is tried, dropped and counted instead of vanishing.
    """
    waiting, found = rng.sample(items, len(items)), list[tuple[T, T]]()
    rest: list[T] = []
    for same in (True, False):
        while waiting:
            one = waiting.pop()
            fits = [i for i, two in enumerate(waiting) if differ(two) != differ(one) and (kind(two) == kind(one)) is same]
            if fits:
                found.append((one, waiting.pop(fits[0])))
            else:
                rest.append(one)
        waiting, rest = rest, []
    return found
