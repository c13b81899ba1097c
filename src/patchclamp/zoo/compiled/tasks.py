"""Tasks of compiled programs: two inputs of one length whose outputs differ, read where they do.

A category (or `nothing`, where it is missing) is right where the clean input has it, and wrong what the corrupt input has there:
the metric, the logit difference at the positions that are read, is the projection of the output on (clean - corrupt). Of a
number, `value` is right and `nothing` wrong where it is positive and larger than the corrupt input's.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial

from patchclamp.tasks import Pair, Task, Tokenizer
from patchclamp.zoo.compiled.programs import Program, Words, program_named
from patchclamp.zoo.compiled.rasp import Value, interpret
from patchclamp.zoo.compiled.weights import NOTHING, VALUE, said

PAIRS = 256


def task(program: str = "reverse", length: int = 0) -> Task:
    """The task of a compiled program.

    Args:
        program: its name.
        length: tokens in a prompt; 0 for the program's own choice, which is less than the longest.

    Raises:
        ModelError: there is no such program.
    """
    found = program_named(program)
    length = length or found.length
    return Task(
        program,
        f"compiled program {program}: {found.about}",
        partial(_candidates, found, length),
        single=True,
        size=min(PAIRS, len(found.alphabet) ** length // 2),
        options={"program": program, "length": length},
    )


def pair_of(program: Program, clean: Words, corrupt: Words) -> Pair | None:
    """The pair of two inputs, read at every position where their outputs differ; None where they do nowhere."""
    sides = [interpret(program.output, words, program.causal) for words in (clean, corrupt)]
    read = [at for at, (one, other) in enumerate(zip(*sides, strict=True)) if _differ(program, one, other)]
    if not read:
        return None
    starts = [len(" ".join(clean[:at])) + (at > 0) for at in range(len(clean))]
    spans = {f"p{at}": (start, start + len(word)) for at, (start, word) in enumerate(zip(starts, clean, strict=True))}
    if program.output.numerical:
        right, wrong = [VALUE] * len(read), [NOTHING] * len(read)
    else:
        right, wrong = ([said(side[at]) for at in read] for side in sides)
    answers, others = ([f" {word}" for word in words] for words in (right, wrong))
    return Pair(" ".join(clean), answers, " ".join(corrupt), others, spans, mirrors=False, read=[f"p{at}" for at in read])


def _differ(program: Program, one: Value, other: Value) -> bool:
    return one > max(other, 0) if program.output.numerical else one != other


def _candidates(program: Program, length: int, rng: random.Random, _: Tokenizer) -> Iterator[Pair]:
    """At most `PAIRS` pairs in which no input occurs twice.

    Inputs with the most frequent output go first: they have the fewest partners.
    """
    drawn = 0
    groups: dict[tuple[Value, ...], list[Words]] = {}
    for words in _shuffled(list(program.inputs(length)), rng):
        groups.setdefault(tuple(interpret(program.output, words, program.causal)), []).append(words)
    while len(groups) > 1 and drawn < PAIRS:
        most = max(groups, key=lambda output: len(groups[output]))
        other = rng.choice([output for output in groups if output is not most])
        both = [groups[output].pop() for output in (most, other)]
        for output in (most, other):
            if not groups[output]:
                del groups[output]
        rng.shuffle(both)
        found = pair_of(program, both[0], both[1]) or pair_of(program, both[1], both[0])
        if found is not None:
            drawn += 1
            yield found


def _shuffled(inputs: Sequence[Words], rng: random.Random) -> list[Words]:
    return rng.sample(inputs, len(inputs))
