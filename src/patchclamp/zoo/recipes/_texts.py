"""What a small model reads: prompts of the built-in tasks with their answers, a fifth of all word combinations kept aside."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from patchclamp.tasks import Examples, Pair, Task, Tokenizer, load_task
from patchclamp.tasks._pairs import Prompt
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
    """So many rows of each task, shuffled."""
    rng = random.Random(seed)
    texts: list[Text] = []
    for name, count in shares.items():
        texts.extend(islice(_task_rows(load_task(name), rng, tokenizer), count))
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
