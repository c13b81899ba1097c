"""Multiple choice: the letter of the option that the question itself has given away.

    The box is brown. What color is the box?
    A. gray
    B. black
    C. brown
    D. white
    Answer:

-> " C". Corrupt prompts: the right option and another change places (`position`), or the four letters are others
(`symbols`).

Papers: Wiegreffe et al. 2024, Answer, Assemble, Ace, https://arxiv.org/abs/2407.15018; Mueller et al. 2025, MIB: A Mechanistic
Interpretability Benchmark, https://arxiv.org/abs/2504.13151.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal

from patchclamp.tasks._pairs import Pair, Range
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Tokenizer
from patchclamp.tasks._words import endless, fill

Corrupt = Literal["position", "symbols"]

TEMPLATES = (
    "The {object1} is {color}. What color is the {object2}?\n{options}\nAnswer:",
    "A {object1} is {color}. What color is the {object2}?\n{options}\nAnswer:",
    "Question: The {object1} in the picture is {color}. What is the color of the {object2}?\n{options}\nAnswer:",
    "I bought a {color} {object1}. Which color does the {object2} have?\n{options}\nAnswer:",
)

OPTIONS = "\n".join(f"{{letter{i}}}. {{option{i}}}" for i in range(1, 5))

LETTERS = ("A", "B", "C", "D")
OTHER_LETTERS = ("E", "F", "G", "H", "J", "K", "L", "M", "N", "P", "Q", "R", "S", "T", "U", "V", "W", "X", "Y", "Z")

COLORS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink", "purple", "gray", "silver", "gold")

OBJECTS = ("box", "book", "cup", "pen", "ball", "bag", "hat", "key", "phone", "lamp", "chair", "plate", "bottle", "knife",
           "spoon", "bowl", "shirt", "ring", "card", "toy", "car", "bike", "clock", "candle", "basket", "coat", "towel",
           "blanket", "guitar", "door")  # fmt: skip


def task(*, corrupt: Corrupt = "position") -> Task:
    """The task with one way to corrupt."""
    return Task(
        "multiple_choice",
        "Multiple choice: the letter of the right option",
        partial(_candidates, corrupt),
        single=True,
        options={"corrupt": corrupt},
    )


def _candidates(corrupt: Corrupt, rng: random.Random, _tokenizer: Tokenizer) -> Iterator[Pair]:
    return endless(lambda: _pair(corrupt, rng))


def _pair(corrupt: Corrupt, rng: random.Random) -> Pair:
    template = rng.choice(TEMPLATES).replace("{options}", OPTIONS)
    thing, colors = rng.choice(OBJECTS), rng.sample(COLORS, 4)
    right, other = rng.sample(range(4), 2)
    words = {"object1": thing, "object2": thing, "color": colors[right]}
    clean, spans = _filled(template, words, LETTERS, colors)
    if corrupt == "position":
        swapped = list(colors)
        swapped[right], swapped[other] = colors[other], colors[right]
        changed, _ = _filled(template, words, LETTERS, swapped)
        wrong = LETTERS[other]
    else:
        letters = rng.sample(OTHER_LETTERS, 4)
        changed, _ = _filled(template, words, letters, colors)
        wrong = letters[right]
    spans |= {"right": spans[f"option{right + 1}"], "letter": spans[f"letter{right + 1}"]}
    return Pair(clean, f" {LETTERS[right]}", changed, f" {wrong}", spans)


def _filled(template: str, words: dict[str, str], letters: Sequence[str], colors: Sequence[str]) -> tuple[str, dict[str, Range]]:
    letter = {f"letter{i}": one for i, one in enumerate(letters, 1)}
    option = {f"option{i}": one for i, one in enumerate(colors, 1)}
    return fill(template, {**words, **letter, **option})
