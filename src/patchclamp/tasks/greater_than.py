"""Greater than: "The war lasted from the year 1732 to the year 17" -> a number above 32.

Right are all two-digit tokens above the start year's, wrong all those up to it. The corrupt prompt starts in year 01 of the
same century (`corrupt="01"`), after which no answer is ruled out, or in an earlier year (`corrupt="year"`).

Where a tokenizer does not keep two digits in one token, an example has one right and one wrong year, each of several tokens:
the last two digits where digits are split singly, else (in threes) the whole year.

Paper: Hanna et al. 2023, How does GPT-2 compute greater-than?, https://arxiv.org/abs/2305.00586.
"""

import random
from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple

from patchclamp.tasks._pairs import Pair
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Misfit, Tokenizer, ids_of
from patchclamp.tasks._words import endless, fill

Corrupt = Literal["01", "year"]

TEMPLATES = (
    "The {noun} lasted from the year {century}{start} to the year {century}",
    "The {noun} began in the year {century}{start} and ended in the year {century}",
    "The {noun} started in {century}{start} and was over in {century}",
)

NOUNS = (
    "abduction", "accord", "affair", "agreement", "alliance", "appointment", "assault", "attack", "boycott", "campaign",
    "captivity", "case", "ceasefire", "challenge", "collaboration", "conflict", "confrontation", "conquest", "consultation",
    "contest", "controversy", "cooperation", "crisis", "dispute", "domination", "dynasty", "engagement", "enterprise", "escape",
    "expansion", "expedition", "exploration", "feud", "friendship", "invasion", "investigation", "journey", "mission",
    "negotiation", "occupation", "operation", "partnership", "plague", "program", "project", "protest", "pursuit", "raid",
    "rebellion", "reform", "reign", "relationship", "rescue", "restoration", "sanctions", "siege", "strike", "struggle", "study",
    "survey", "test", "trade", "treaty", "trial", "voyage", "war", "warfare", "work",
)  # fmt: skip

CENTURIES = tuple(range(11, 20))
STARTS = tuple(range(5, 96))


class _Century(NamedTuple):
    """What a tokenizer does to the years of a century.

    `ends` are the two digits of its usable years; `tokens` their ids, where they are one token apart from the century's;
    `apart` whether a prompt can end in the century.
    """

    number: int
    ends: tuple[str, ...]
    tokens: dict[str, int]
    apart: bool


def task(*, corrupt: Corrupt = "01") -> Task:
    """The task with one way to corrupt."""
    return Task(
        "greater_than",
        "Greater than: the year in which something ends comes after the year in which it began",
        partial(_candidates, corrupt),
        options={"corrupt": corrupt},
    )


def _candidates(corrupt: Corrupt, rng: random.Random, tokenizer: Tokenizer) -> Iterator[Pair]:
    centuries = [found for number in CENTURIES if (found := _century(tokenizer, number)) is not None]
    single = [century for century in centuries if century.tokens]
    chosen = single or centuries
    return endless(lambda: _pair(corrupt, rng, rng.choice(chosen))) if chosen else iter(())


def _century(tokenizer: Tokenizer, number: int) -> _Century | None:
    """How this tokenizer splits the years of a century; None where most years of it cannot be used."""
    every = [f"{year:02}" for year in range(100)]
    try:
        start, *years = ids_of(tokenizer, [f" {number}", *(f" {number}{end}" for end in every)])
    except Misfit:
        return None
    apart = {end: ids[len(start) :] for end, ids in zip(every, years, strict=True) if ids[: len(start)] == start}
    for count in (1, 2):
        rest = {end: ids for end, ids in apart.items() if len(ids) == count}
        if len(rest) >= 60 and "01" in rest:
            return _Century(number, tuple(rest), {end: ids[0] for end, ids in rest.items()} if count == 1 else {}, True)
    most = max(map(len, years))
    return _Century(number, tuple(end for end, ids in zip(every, years, strict=True) if len(ids) == most), {}, False)


def _pair(corrupt: Corrupt, rng: random.Random, century: _Century) -> Pair:
    frame, noun = rng.choice(TEMPLATES), rng.choice(NOUNS)
    start = rng.choice([end for end in century.ends[:-1] if int(end) in STARTS])
    lower = [end for end in century.ends if 1 < int(end) < int(start)]
    other = rng.choice(lower) if corrupt == "year" and lower else "01"
    right = [end for end in century.ends if end > start]
    wrong = [end for end in century.ends if end <= start]
    words = {"noun": noun, "century": str(century.number), "start": start}
    clean, spans = fill(frame, words)
    changed, _ = fill(frame, {**words, "start": other})
    named = {"noun": spans["noun"], "start": spans["start"]}
    if century.tokens:  # ids, so that a hundred alternatives need not be tokenised with each prompt
        ids = ([(century.tokens[end],) for end in side] for side in (right, wrong))
        return Pair(clean, next(ids), changed, next(ids), named, mirrors=False)
    answer, other_answer = rng.choice(right), rng.choice(wrong)
    if not century.apart:  # the century's digits belong to the answer
        clean, changed = (text.removesuffix(f" {century.number}") for text in (clean, changed))
        answer, other_answer = (f" {century.number}{end}" for end in (answer, other_answer))
    return Pair(clean, answer, changed, other_answer, named, mirrors=False)
