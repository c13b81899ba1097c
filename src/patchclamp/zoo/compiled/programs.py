"""The programs: what each computes, on which inputs, and how long these may be."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from patchclamp.errors import ModelError
from patchclamp.zoo.compiled.rasp import (
    INDICES,
    TOKENS,
    Aggregated,
    Linear,
    Variable,
    Width,
    aggregated,
    linear,
    mapped,
    select,
    width,
    zipped,
)

Words = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A program with its inputs.

    Args:
        name: what it is called.
        about: what it computes, in a sentence.
        output: the variable that is read at every position.
        alphabet: the tokens that inputs are made of.
        longest: how many tokens an input may have.
        length: how many tokens the task's prompts have. Fewer than `longest`: with inputs of full length alone, what tells how
            long they are would be constant, and parts that compute it would be dead.
        causal: whether it is compiled for attention that sees no later position.
    """

    name: str
    about: str
    output: Variable
    alphabet: Words
    longest: int
    length: int
    causal: bool = False

    def inputs(self, length: int | None = None) -> Iterator[Words]:
        """Every input of a length (by default, the task's), in alphabetical order."""
        return itertools.product(self.alphabet, repeat=self.length if length is None else length)


def length() -> Width:
    """How many tokens there are."""
    return width(select(TOKENS, TOKENS, lambda key, query: True))


def frac_prevs(number: Variable) -> Aggregated:
    """The mean of a number so far."""
    return aggregated(select(INDICES, INDICES, lambda key, query: key <= query), number)


def share_of(token: str) -> Aggregated:
    """Which share of the tokens so far are `token`."""
    return frac_prevs(mapped(lambda word: word == token, TOKENS, numerical=True))


def reverse() -> Aggregated:
    """The tokens from behind. As published: length - index, then - 1, then select."""
    opposite = mapped(lambda n: n - 1, zipped(lambda n, i: n - i, length(), INDICES))
    return aggregated(select(INDICES, opposite, lambda key, query: key == query), TOKENS)


def hist() -> Width:
    """How often a position's token occurs."""
    return width(select(TOKENS, TOKENS, lambda key, query: key == query))


def sort_unique() -> Aggregated:
    """The tokens in order: each goes where the index says how many are smaller. Like ones go to one place, and leave gaps."""
    place = width(select(TOKENS, TOKENS, lambda key, query: key < query))
    return aggregated(select(place, INDICES, lambda key, query: key == query), TOKENS)


def pair_balance() -> Linear:
    """Share of opening brackets so far, less that of closing ones."""
    return linear(share_of("("), 1, share_of(")"), -1)


def shuffle_dyck() -> Variable:
    """Whether brackets are balanced: the balance is 0 at the end, and negative nowhere."""
    balance = pair_balance()
    negative = mapped(lambda below: below, mapped(lambda x: x < 0, balance), numerical=True)
    anywhere = aggregated(select(INDICES, INDICES, lambda key, query: True), negative)
    last = select(INDICES, mapped(lambda n: n - 1, length()), lambda key, query: key == query)
    closed = aggregated(last, mapped(lambda x: x == 0, balance))
    return zipped(lambda a, b: a and b, closed, mapped(lambda share: share == 0, anywhere))


def rotate() -> Aggregated:
    """The token one further on; the last position gets the first token."""
    after = zipped(lambda n, i: (i + 1) % n if n else 0, length(), INDICES)
    return aggregated(select(INDICES, after, lambda key, query: key == query), TOKENS)


def palindrome() -> Variable:
    """Whether a position's token is the one that mirrors it."""
    return zipped(lambda one, other: one == other, TOKENS, reverse())


def duplicates() -> Variable:
    """Whether a position's token occurs anywhere else."""
    return mapped(lambda count: count > 1, hist())


def often() -> Variable:
    """Whether more than half of the tokens so far are x."""
    return mapped(lambda share: share > Fraction(1, 2), share_of("x"))


_FOUR, _XS = ("a", "b", "c", "d"), ("w", "x", "y", "z")
PROGRAMS: dict[str, Program] = {
    program.name: program
    for program in (
        Program("reverse", "the tokens from behind", reverse(), _FOUR, 6, 5),
        Program("xproportion", "which share of the tokens so far are x (a number)", share_of("x"), _XS, 6, 5),
        Program("hist", "how often a position's token occurs", hist(), _FOUR, 6, 5),
        Program("sort_unique", "the tokens in order, like ones in one place", sort_unique(), _FOUR, 6, 5),
        Program("pair_balance", "share of ( so far, less that of ) (a number)", pair_balance(), ("(", ")", "a", "b"), 6, 5),
        Program("shuffle_dyck", "whether brackets are balanced", shuffle_dyck(), ("(", ")", "x"), 8, 7),
        Program("rotate", "the next token; at the end, the first", rotate(), _FOUR, 6, 5),
        Program("palindrome", "whether a position's token is the one that mirrors it", palindrome(), _FOUR, 6, 5),
        Program("duplicates", "whether a position's token occurs anywhere else", duplicates(), _FOUR, 6, 5),
        Program("often", "whether more than half of the tokens so far are x", often(), _XS, 6, 5),
    )
}


def program_named(name: str) -> Program:
    """The program called `name`; raises `ModelError` naming those there are."""
    if name not in PROGRAMS:
        raise ModelError(f"there is no compiled program {name!r}: choose from {', '.join(PROGRAMS)}")
    return PROGRAMS[name]
