"""Induction: random tokens, repeated; the answer is what followed the current token the first time.

    A B C D E A B C -> D

Prompts are token ids, drawn from the tokenizer's ordinary tokens (no special ones; no two alike in a prompt), after the
special tokens that the tokenizer puts before a text. The corrupt prompt has another token in the place of the answer's first
occurrence, so that it asks for that one: the two differ in one token.

Paper: Olsson et al. 2022, In-context Learning and Induction Heads, https://arxiv.org/abs/2209.11895.
"""

import random
from collections.abc import Iterator
from functools import partial

from patchclamp.errors import TaskError
from patchclamp.tasks._pairs import Pair, Tokens
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Misfit, Tokenizer, id_named, ids_of, special_prefix
from patchclamp.tasks._words import endless

LENGTH = 20
SHORTEST = 4


def task(*, length: int = LENGTH) -> Task:
    """The task with `length` random tokens before the repetition, which stops after between a quarter and all but one."""
    if length < SHORTEST:
        raise TaskError(f"induction over {length} tokens was asked for: give at least {SHORTEST}")
    return Task(
        "induction",
        "Induction: after repeated random tokens, what followed the first time",
        partial(_candidates, length),
        single=True,
        options={"length": length},
    )


def ordinary(tokenizer: Tokenizer) -> Tokens:
    """Ids that stand for text: not special, not unknown, and not broken pieces of a character."""
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else getattr(tokenizer, "vocab_size", 0)  # type: ignore[arg-type]
    special = {*getattr(tokenizer, "all_special_ids", ()), id_named(tokenizer, "unk_token_id")}
    texts = ((token, str(tokenizer.decode([token]))) for token in range(size) if token not in special)
    return tuple(token for token, text in texts if text.strip() and "\ufffd" not in text)


def _candidates(length: int, rng: random.Random, tokenizer: Tokenizer) -> Iterator[Pair]:
    words = ordinary(tokenizer)
    if len(words) <= length:
        raise TaskError(f"induction over {length} different tokens needs more than the {len(words)} that this tokenizer has")
    try:
        text = str(tokenizer.decode([words[0]]))
        prefix = special_prefix(tokenizer, text, ids_of(tokenizer, [text])[0], None)
    except Misfit:
        prefix = ()
    return endless(lambda: _pair(prefix, words, length, rng))


def _pair(prefix: Tokens, words: Tokens, length: int, rng: random.Random) -> Pair:
    *line, other = rng.sample(words, length + 1)
    again = rng.randrange(max(1, length // 4), length)  # tokens of the second time
    changed = [*line[:again], other, *line[again + 1 :]]
    at = len(prefix) + again
    spans = {"first": (at - 1, at), "target": (at, at + 1)}
    clean, corrupt = ((*prefix, *first, *line[:again]) for first in (line, changed))
    return Pair(clean, (line[again],), corrupt, (other,), spans)
