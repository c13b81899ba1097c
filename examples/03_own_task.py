"""A behaviour of your own, written down as pairs that differ in one fact."""

import patchclamp as pc
from patchclamp.tasks import Pair, Task

model = pc.Model.load("zoo/small")
names = ("Mary", "John", "Tom", "Anna")


def pairs(rng, tokenizer):
    """Who is named twice does not get the gift."""
    while True:
        one, two = rng.sample(names, 2)
        clean = f"When {one} and {two} went to the store, {two} gave a book to"
        corrupt = f"When {one} and {two} went to the store, {one} gave a book to"
        yield Pair(clean, f" {one}", corrupt, f" {two}")


task = Task("gift", "Gift: the one named once gets it", pairs)
examples = task.examples(model.tokenizer, 6)
print(len(examples), "pairs;", dict(examples.dropped))
print(examples.texts(0), examples[0].pair.answer)
