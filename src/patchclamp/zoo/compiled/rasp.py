"""A small language of programs over sequences (after RASP, Weiss et al. 2106.06981), and what its programs mean.

A variable has one value per position. It is the token or the index there, or made of other variables:

    mapped(f, x)            f of each value
    zipped(f, x, y)         f of two variables' values, position by position
    linear(x, a, y, b)      a x + b y, of numbers
    select(keys, queries, p)   a selector: position i selects position j where p(keys[j], queries[i])
    aggregated(selector, x) what x holds where i selects: the mean of numbers; of anything else, the one value that is there
    width(selector)         how many positions i selects

Values are categories (few, each a direction of its own when compiled) or numbers (`numerical`; exact fractions here). Where
nothing is selected a number is 0, and a category is missing: None, and None is whatever is made of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from patchclamp.errors import ModelError

Number = int | Fraction
Value = Any  # a token, a number, a boolean; None where there is none
Predicate = Callable[[Any, Any], bool]


@dataclass(frozen=True, eq=False)
class Tokens:
    """The token at each position."""

    numerical: bool = False


@dataclass(frozen=True, eq=False)
class Indices:
    """0, 1, 2, ..."""

    numerical: bool = False


@dataclass(frozen=True, eq=False)
class Mapped:
    """f(inner)."""

    f: Callable[[Any], Value]
    inner: "Variable"
    numerical: bool


@dataclass(frozen=True, eq=False)
class Zipped:
    """f(left, right), of categories."""

    f: Callable[[Any, Any], Value]
    left: "Variable"
    right: "Variable"
    numerical: bool


@dataclass(frozen=True, eq=False)
class Linear:
    """a left + b right, of numbers."""

    left: "Variable"
    a: int
    right: "Variable"
    b: int
    numerical: bool = True


@dataclass(frozen=True, eq=False)
class Selector:
    """Position i selects position j where predicate(keys[j], queries[i])."""

    keys: "Variable"
    queries: "Variable"
    predicate: Predicate


@dataclass(frozen=True, eq=False)
class Aggregated:
    """What `values` holds where a position selects."""

    selector: Selector
    values: "Variable"

    @property
    def numerical(self) -> bool:
        """Whether the mean of numbers is taken."""
        return self.values.numerical


@dataclass(frozen=True, eq=False)
class Width:
    """How many positions a position selects, as a category."""

    selector: Selector
    numerical: bool = False


Variable = Tokens | Indices | Mapped | Zipped | Linear | Aggregated | Width

TOKENS, INDICES = Tokens(), Indices()


def mapped(f: Callable[[Any], Value], inner: Variable, numerical: bool = False) -> Mapped:
    """f of each value. Of numbers, f is called with fractions."""
    return Mapped(f, inner, numerical)


def zipped(f: Callable[[Any, Any], Value], left: Variable, right: Variable, numerical: bool = False) -> Zipped:
    """f of two categories at each position."""
    if left.numerical or right.numerical:
        raise ModelError("zipped takes two categories, and a number was given: map it to categories first, or use linear")
    return Zipped(f, left, right, numerical)


def linear(left: Variable, a: int, right: Variable, b: int) -> Linear:
    """a left + b right."""
    if not (left.numerical and right.numerical):
        raise ModelError("linear takes two numbers, and a category was given: map it with numerical=True first")
    return Linear(left, a, right, b)


def select(keys: Variable, queries: Variable, predicate: Predicate) -> Selector:
    """The selector that compares two categories."""
    if keys.numerical or queries.numerical:
        raise ModelError("select compares categories, and a number was given: map it to categories first")
    return Selector(keys, queries, predicate)


def aggregated(selector: Selector, values: Variable) -> Aggregated:
    """What `values` holds where a position selects."""
    return Aggregated(selector, values)


def width(selector: Selector) -> Width:
    """How many positions are selected."""
    return Width(selector)


def inputs_of(variable: Variable) -> tuple[Variable, ...]:
    """The variables that a variable is made of."""
    match variable:
        case Mapped():
            return (variable.inner,)
        case Zipped() | Linear():
            return (variable.left, variable.right)
        case Aggregated():
            return (variable.selector.queries, variable.selector.keys, variable.values)
        case Width():
            return (variable.selector.queries, variable.selector.keys)
        case _:
            return ()


def interpret(variable: Variable, tokens: Sequence[str], causal: bool = False) -> list[Value]:
    """The variable's value at each position.

    Args:
        variable: what is asked.
        tokens: the input.
        causal: whether selectors see no later position.

    Raises:
        ModelError: positions with different categories are selected at once.
    """
    known: dict[Variable, list[Value]] = {}

    def chosen(selector: Selector) -> list[list[int]]:
        keys, queries = of(selector.keys), of(selector.queries)
        return [
            [
                j
                for j, key in enumerate(keys)
                if (j <= i or not causal) and None not in (key, query) and selector.predicate(key, query)
            ]
            for i, query in enumerate(queries)
        ]

    def of(one: Variable) -> list[Value]:
        if one not in known:
            known[one] = made(one)
        return known[one]

    def made(one: Variable) -> list[Value]:
        match one:
            case Tokens():
                return list(tokens)
            case Indices():
                return list(range(len(tokens)))
            case Mapped():
                return [None if value is None else typed(one, one.f(value)) for value in of(one.inner)]
            case Zipped():
                both = zip(of(one.left), of(one.right), strict=True)
                return [None if None in (a, b) else typed(one, one.f(a, b)) for a, b in both]
            case Linear():
                return [one.a * a + one.b * b for a, b in zip(of(one.left), of(one.right), strict=True)]
            case Width():
                return [len(places) for places in chosen(one.selector)]
            case Aggregated():
                values = of(one.values)
                return [joined(one, [values[j] for j in places]) for places in chosen(one.selector)]

    return of(variable)


def typed(variable: Variable, value: Value) -> Value:
    """A number as an integer or a fraction; a category as it is."""
    if not variable.numerical:
        return value
    return int(value) if isinstance(value, int) else Fraction(value)


def joined(variable: Aggregated, values: Sequence[Value]) -> Value:
    """The mean of numbers (0 of none); the one category (None of none)."""
    if variable.numerical:
        return Fraction(sum(values), len(values)) if values else Fraction(0)
    if len(set(values)) > 1:
        raise ModelError(f"positions with different values are selected at once: {sorted(set(map(str, values)))}")
    return values[0] if values else None
