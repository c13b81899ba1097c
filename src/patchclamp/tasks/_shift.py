"""Shifting: the same prompts behind random prefixes, to tell content from position."""

import random
from dataclasses import replace

from patchclamp.errors import TaskError
from patchclamp.tasks._examples import Example, Examples


def shifted(examples: Examples, longest: int | None, seed: int = 0, most: int = 6) -> Examples:
    """Each pair behind a prefix of 1 to `most` tokens, the same for clean and corrupt, drawn from the tokens of all prompts.

    A BOS token stays first. Spans move along.

    Args:
        examples: pairs or prompts.
        longest: positions that the model has; None: no limit.
        seed: of the draw.
        most: longest prefix.

    Raises:
        TaskError: plain text, answers inside the prompt, or no room behind the prompts for even one more token.
    """
    if any(example.targets for example in examples):
        raise TaskError(f"{examples.task!r} is plain text: there is no prompt to shift")
    if any(example.read for example in examples):
        raise TaskError(f"{examples.task!r} has answers at every position: behind a prefix, others would be right")
    used = max(len(e.clean) + max(map(len, (*e.answers, *e.wrong))) - 1 for e in examples)
    room = most if longest is None else min(most, longest - used)
    if room < 1:
        raise TaskError(f"the prompts cannot be shifted: they take {used} of the model's {longest} positions")
    bos = getattr(examples.tokenizer, "bos_token_id", None)
    heads = [1 if e.clean[0] == bos and bos is not None else 0 for e in examples]
    pool = sorted({token for e, head in zip(examples, heads, strict=True) for token in e.clean[head:]})
    rng = random.Random(seed)
    items = [_behind(e, head, tuple(rng.choices(pool, k=rng.randint(1, room)))) for e, head in zip(examples, heads, strict=True)]
    return replace(examples, items=tuple(items))


def _behind(example: Example, head: int, prefix: tuple[int, ...]) -> Example:
    def put(tokens: tuple[int, ...]) -> tuple[int, ...]:
        return (*tokens[:head], *prefix, *tokens[head:])

    move = len(prefix)
    spans = {name: (start + move, end + move) if start >= head else (start, end) for name, (start, end) in example.spans.items()}
    return replace(
        example, clean=put(example.clean), corrupt=None if example.corrupt is None else put(example.corrupt), spans=spans
    )
