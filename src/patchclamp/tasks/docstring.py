'''Docstring: after `:param load: ... :param size: ... :param`, the name of the next argument of the signature.

    def port(self, load, size, files, last):
        """oil column piece

        :param load: crime population
        :param size: unit dark
        :param

-> " files". The corrupt prompt has another name in its place in the signature; nothing else differs.

Paper: Heimersheim & Janiak 2023, A circuit for Python docstrings in a 4-layer attention-only transformer,
https://www.alignmentforum.org/posts/u6KXXmKFbXfWzoAXn.
'''

import random
from collections.abc import Iterator

from patchclamp.tasks._pairs import Pair
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Tokenizer
from patchclamp.tasks._words import endless, fill

TEMPLATE = '''def {function}(self, {arg1}, {arg2}, {arg3}, {arg4}):
    """{word1} {word2} {word3}

    :param {doc1}: {word4} {word5}
    :param {doc2}: {word6} {word7}
    :param'''

FUNCTIONS = (
    "port",
    "run",
    "load",
    "make",
    "find",
    "check",
    "build",
    "send",
    "update",
    "open",
    "close",
    "render",
    "parse",
    "start",
)

ARGUMENTS = (
    "name", "size", "file", "files", "last", "first", "load", "page", "token", "user", "path", "date", "time", "image", "text",
    "color", "label", "index", "count", "order", "group", "project", "element", "result", "results", "value", "values", "mode",
    "state", "model", "data", "code", "source", "target", "window", "table", "field", "line", "content", "action", "client",
    "option", "section", "title", "version", "password", "shape", "filter", "host", "message",
)  # fmt: skip

WORDS = (
    "oil", "column", "piece", "crime", "population", "unit", "dark", "water", "paper", "light", "green", "music", "river",
    "garden", "market", "summer", "winter", "forest", "metal", "glass", "voice", "street", "animal", "letter", "corner", "north",
    "island", "bridge", "coffee", "dinner", "family", "school", "doctor", "engine", "window", "season", "number", "silver",
)  # fmt: skip


def task() -> Task:
    """The task."""
    return Task("docstring", "Docstring: the next argument of a Python function", _candidates, single=True)


def _candidates(rng: random.Random, _tokenizer: Tokenizer) -> Iterator[Pair]:
    return endless(lambda: _pair(rng))


def _pair(rng: random.Random) -> Pair:
    *arguments, other = rng.sample(ARGUMENTS, 5)
    described = {f"word{i}": word for i, word in enumerate(rng.sample(WORDS, 7), 1)}
    words = {"function": rng.choice(FUNCTIONS), "doc1": arguments[0], "doc2": arguments[1], **described}
    words |= {f"arg{i}": argument for i, argument in enumerate(arguments, 1)}
    clean, spans = fill(TEMPLATE, words)
    corrupt, _ = fill(TEMPLATE, {**words, "arg3": other})
    named = {name: span for name, span in spans.items() if not name.startswith("word")}
    return Pair(clean, f" {arguments[2]}", corrupt, f" {other}", named)
