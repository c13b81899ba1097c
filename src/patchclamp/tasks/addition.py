"""Addition: "23 + 45 =" -> " 68". The corrupt prompt has another second addend.

Forms: `symbols` ("23 + 45 ="), `words` ("What is 23 plus 45? The answer is") and `reversed` (digits without blanks, the sum
with its last digit first: "2345" -> "860", as minGPT's adder has it). Sums stay within as many digits as the addends, except in
`reversed`, which has room for one more. Where a tokenizer keeps most sums in one token, only those are used; else sums are
answers of several tokens.

Papers: Stolfo et al. 2023, A Mechanistic Interpretation of Arithmetic Reasoning, https://arxiv.org/abs/2305.15054;
https://github.com/karpathy/minGPT/tree/master/projects/adder.
"""

import random
from collections.abc import Iterator, Set
from functools import partial
from typing import Literal

from patchclamp.errors import TaskError
from patchclamp.tasks._pairs import Pair
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Misfit, Tokenizer, ids_of
from patchclamp.tasks._words import endless, fill

Form = Literal["symbols", "words", "reversed"]

TEMPLATES = {
    "symbols": ("{a} + {b} =", "Sum: {a} + {b} =", "Q: {a} + {b} = A:", "Add the numbers. {a} + {b} ="),
    "words": ("What is {a} plus {b}? The answer is", "The sum of {a} and {b} is", "{a} plus {b} is equal to"),
    "reversed": ("{a}{b}",),
}


def task(*, form: Form = "symbols", digits: int = 2) -> Task:
    """The task in one form, with addends of up to `digits` digits."""
    if not 1 <= digits <= 6:
        raise TaskError(f"addends of {digits} digits were asked for: give 1 to 6")
    return Task(
        "addition",
        "Addition: the sum of two numbers",
        partial(_candidates, form, digits),
        options={"form": form, "digits": digits},
    )


def _candidates(form: Form, digits: int, rng: random.Random, tokenizer: Tokenizer) -> Iterator[Pair]:
    sums = None if form == "reversed" or digits > 3 else _whole(tokenizer, 10**digits)
    return endless(lambda: _pair(form, digits, sums, rng))


def _whole(tokenizer: Tokenizer, top: int) -> Set[int] | None:
    """The numbers below `top` that are one token; None where they are not the most."""
    try:
        rows = ids_of(tokenizer, [f" {number}" for number in range(top)])
    except Misfit:
        return None
    whole = frozenset(number for number, row in enumerate(rows) if len(row) == 1)
    return whole if 2 * len(whole) >= top else None


def _pair(form: Form, digits: int, sums: Set[int] | None, rng: random.Random) -> Pair:
    template, top = rng.choice(TEMPLATES[form]), 10**digits
    lowest = 0 if form == "reversed" or digits == 1 else top // 10
    while True:
        a, b, other = rng.randrange(lowest, top), *rng.sample(range(lowest, top), 2)
        fits = form == "reversed" or all(a + addend < top and (sums is None or a + addend in sums) for addend in (b, other))
        if fits:
            break
    clean, spans = fill(template, {"a": _number(form, digits, a), "b": _number(form, digits, b)})
    corrupt, _ = fill(template, {"a": _number(form, digits, a), "b": _number(form, digits, other)})
    return Pair(clean, _sum(form, digits, a + b), corrupt, _sum(form, digits, a + other), spans)


def _number(form: Form, digits: int, number: int) -> str:
    return f"{number:0{digits}}" if form == "reversed" else str(number)


def _sum(form: Form, digits: int, number: int) -> str:
    return f"{number:0{digits + 1}}"[::-1] if form == "reversed" else f" {number}"
