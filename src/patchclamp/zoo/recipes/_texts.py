"""What a small model reads: prompts of the built-in tasks with their answers, a fifth of all word combinations kept aside,
and the lessons that lead up to a task that is not learned from its prompts alone.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import NamedTuple

from patchclamp.tasks import Examples, Pair, Task, Tokenizer, load_task
from patchclamp.tasks._pairs import Prompt
from patchclamp.tasks.coloured_objects import COLORS, OBJECTS
from patchclamp.tasks.induction import ordinary
from patchclamp.zoo.recipes._words import BOS, EOS, Listener, pieces, vocabulary

FOLDS = 5
PROMPT_WEIGHT, ANSWER_WEIGHT = 0.1, 1.0
OPEN_ENDED = ("agreement", "gendered_pronoun")  # their answers do not end a sentence


class Row(NamedTuple):
    """One line to read: its tokens, and how much each counts when it is to be predicted."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


def unseen(prompt: Prompt) -> bool:
    """Whether a prompt belongs to the fifth that is never trained on.

    Decided by a hash of the set of its words: the same words in another order are the same combination, so that both
    directions of an indirect object, or all questions about one set of coloured objects, are on one side.
    """
    words = sorted({piece.strip() for piece in pieces(prompt)} if isinstance(prompt, str) else map(str, set(prompt)))
    return int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:8]) % FOLDS == 0


def heard(names: Sequence[str], seed: int) -> tuple[str, ...]:
    """The vocabulary: every word that many draws of the tasks named bring."""
    listener = Listener()
    for name in names:
        if name == "induction":  # its words are the others'
            continue
        for pair in islice(_endless(load_task(name), random.Random(f"{seed}/words/{name}"), listener), 4000):
            texts = (pair.clean, *pair.answer, pair.corrupt or "", *pair.wrong)
            listener([text for text in texts if isinstance(text, str)])
    return vocabulary(listener.heard)


def unseen_examples(name: str, tokenizer: Tokenizer, n: int = 200, seed: int = 1) -> Examples:
    """Up to `n` examples of a task whose clean prompts are never trained on."""
    task = load_task(name)
    finite = name in ("capitals", "gendered_pronoun")  # these two name all their pairs once
    kept = replace(task, candidates=lambda rng, tok: (pair for pair in task.candidates(rng, tok) if unseen(pair.clean)))
    if finite:
        n = min(n, sum(1 for _ in kept.candidates(random.Random(seed), tokenizer)))
    return kept.examples(tokenizer, n, seed)


Text = list[tuple[str | tuple[int, ...], float]]  # pieces of a row with their weights


def rows(shares: Mapping[str, int], tokenizer: Tokenizer, seed: str) -> list[Row]:
    """So many rows of each task and lesson, shuffled."""
    rng = random.Random(seed)
    texts: list[Text] = []
    for name, count in shares.items():
        source = LESSONS[name](rng, tokenizer) if name in LESSONS else _task_rows(load_task(name), rng, tokenizer)
        texts.extend(islice(source, count))
    rng.shuffle(texts)
    strings = [piece for text in texts for piece, _ in text if isinstance(piece, str)]
    encoded: Iterator[list[int]] = iter(tokenizer(strings, add_special_tokens=False)["input_ids"] if strings else [])
    return [_row(text, encoded) for text in texts]


def _row(text: Text, encoded: Iterator[list[int]]) -> Row:
    tokens, weights = [BOS], [0.0]
    for piece, weight in text:
        ids = next(encoded) if isinstance(piece, str) else piece
        tokens.extend(ids)
        weights.extend([weight] * len(ids))
    return Row((*tokens, EOS), (*weights, PROMPT_WEIGHT))


def _endless(task: Task, rng: random.Random, tokenizer: Tokenizer) -> Iterator[Pair]:
    while True:
        yield from task.candidates(rng, tokenizer)


def _task_rows(task: Task, rng: random.Random, tokenizer: Tokenizer) -> Iterator[Text]:
    """Seen prompts with an answer: clean ones, and corrupt ones where they have an answer of their own."""
    for pair in _endless(task, rng, tokenizer):
        sides = [(pair.clean, pair.answer)]
        if pair.invertible and pair.corrupt is not None:
            sides.append((pair.corrupt, pair.wrong))
        for prompt, answers in sides:
            if unseen(prompt):
                continue
            answer = rng.choice(answers)
            if isinstance(prompt, str):
                end = "" if task.name in OPEN_ENDED else "."
                yield [(prompt, PROMPT_WEIGHT), (answer, ANSWER_WEIGHT), (end, PROMPT_WEIGHT)]
            else:
                yield _repeated(tuple(token for token in prompt if isinstance(token, int)))


def _repeated(prompt: tuple[int, ...]) -> Text:
    """Random tokens, repeated to the end: only the second time can be predicted, and all of it counts."""
    line = prompt[1:]
    first = line[: line.index(line[0], 1)]
    return [(first, 0.0), (first[:1], 0.0), (first[1:], ANSWER_WEIGHT / 4)]


def _pairs_lesson(rng: random.Random, tokenizer: Tokenizer, linked: bool) -> Iterator[Text]:
    """Random pairs of tokens, then each second one again, to be followed by its first: "A B, C D. D C, B A", or "D is C".

    Coloured objects without colours and objects: up to ten answers a row among up to twenty tokens, where the task asks for one
    among three. It breaks the plateau at which any colour of the list is said.
    """
    words = ordinary(tokenizer)
    comma, dot, verb = (tuple(ids) for ids in tokenizer([",", ".", " is"], add_special_tokens=False)["input_ids"])
    while True:
        count = rng.randint(2, 10)
        drawn = rng.sample(words, 2 * count)
        pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
        lesson: Text = [((*[token for pair in pairs for token in (*pair, *comma)][:-1], *dot), 0.0)]
        for before, after in rng.sample(pairs, count):
            asked = (after, *verb) if linked else (after,)
            lesson += [(asked, 0.0), ((before,), ANSWER_WEIGHT / 2), (comma, PROMPT_WEIGHT)]
        yield lesson


def _colours_lesson(rng: random.Random, _: Tokenizer, linked: bool) -> Iterator[Text]:
    """Things are seen, then the colour of each is named: "I see a red cup, and a blue pen. The pen blue. The cup red." """
    while True:
        count = rng.randint(2, 6)
        colors, objects = rng.sample(COLORS, count), rng.sample(OBJECTS, count)
        things = [f"a {color} {thing}" for color, thing in zip(colors, objects, strict=True)]
        lesson: Text = [(f"I see {', '.join(things[:-1])}, and {things[-1]}.", PROMPT_WEIGHT)]
        for color, thing in rng.sample(list(zip(colors, objects, strict=True)), count):
            lesson += [
                (f" The {thing} is" if linked else f" The {thing}", PROMPT_WEIGHT),
                (f" {color}", ANSWER_WEIGHT),
                (".", PROMPT_WEIGHT),
            ]
        yield lesson


LESSONS: dict[str, Callable[[random.Random, Tokenizer], Iterator[Text]]] = {
    "pairs": partial(_pairs_lesson, linked=False),
    "colours": partial(_colours_lesson, linked=False),
    "pairs linked": partial(_pairs_lesson, linked=True),
    "colours linked": partial(_colours_lesson, linked=True),
}
"""The steps that lead to coloured objects, in order; without them a model of this size stays at chance."""
