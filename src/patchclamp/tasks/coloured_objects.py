"""Coloured objects: "I see a brown pencil, a black book and a red cup. What color is the book? The book is" -> " black".

The corrupt prompt asks after another of the objects.

Papers: BIG-bench, Reasoning about Colored Objects, https://arxiv.org/abs/2206.04615; Merullo et al. 2023, Circuit Component
Reuse Across Tasks, https://arxiv.org/abs/2310.08744.
"""

import random
from collections.abc import Iterator

from patchclamp.tasks._pairs import Pair
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Tokenizer
from patchclamp.tasks._words import endless, fill

TEMPLATES = (
    "Q: On the table, I see {list}. What color is the {query1}? A: The {query2} is",
    "Q: On the desk, there is {list}. What color is the {query1}? A: The {query2} is",
    "Q: In the box, I find {list}. What color is the {query1}? A: The {query2} is",
    "On the floor, there is {list}. If you ask me about the {query1}, the color of the {query2} is",
    "In the shop window, I see {list}. I like the {query1}. The color of the {query2} is",
)

LIST = "a {color1} {object1}, a {color2} {object2}, and a {color3} {object3}"

COLORS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink", "purple", "gray", "silver", "gold")

OBJECTS = ("book", "cup", "pen", "pencil", "ball", "box", "bag", "hat", "key", "phone", "watch", "lamp", "chair", "plate",
           "bottle", "knife", "spoon", "fork", "bowl", "shirt", "shoe", "coin", "ring", "card", "toy", "clock", "candle",
           "basket", "ticket", "mug", "brush", "towel", "blanket", "pillow", "scarf", "coat")  # fmt: skip


def task() -> Task:
    """The task."""
    return Task("coloured_objects", "Coloured objects: the colour of the object asked after", _candidates, single=True)


def _candidates(rng: random.Random, _tokenizer: Tokenizer) -> Iterator[Pair]:
    return endless(lambda: _pair(rng))


def _pair(rng: random.Random) -> Pair:
    template = rng.choice(TEMPLATES).replace("{list}", LIST)
    colors, objects = rng.sample(COLORS, 3), rng.sample(OBJECTS, 3)
    asked, other = rng.sample(range(3), 2)
    words = {f"color{i + 1}": color for i, color in enumerate(colors)} | {
        f"object{i + 1}": thing for i, thing in enumerate(objects)
    }
    clean, spans = fill(template, {**words, "query1": objects[asked], "query2": objects[asked]})
    corrupt, _ = fill(template, {**words, "query1": objects[other], "query2": objects[other]})
    spans |= {"color": spans[f"color{asked + 1}"], "object": spans[f"object{asked + 1}"]}
    return Pair(clean, f" {colors[asked]}", corrupt, f" {colors[other]}", spans)
