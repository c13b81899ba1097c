"""Where a program's variables go: which layer makes each, and which directions of the residual stream hold it.

Time runs embedding, attention 0, MLP 0, attention 1, ... What selects (aggregated, and the first half of width) takes the
first attention after all of its inputs are there; everything else, and the second half of width, the first MLP. Every variable
has directions of its own, one per category or one for a number, orthogonal to all others (Lindner et al. 2301.05062).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from patchclamp.errors import ModelError
from patchclamp.zoo._wiring import Space
from patchclamp.zoo.compiled.programs import Program
from patchclamp.zoo.compiled.rasp import (
    Aggregated,
    Indices,
    Linear,
    Mapped,
    Number,
    Tokens,
    Value,
    Variable,
    Width,
    Zipped,
    inputs_of,
    typed,
)

MOST_NUMBERS = 4096  # values that a number may take


@dataclass(frozen=True, eq=False)
class Layout:
    """A program laid out.

    Args:
        program: the program.
        variables: what it is made of, each after its inputs.
        domains: the values that each may take: categories in order of their directions, numbers from small to large.
        names: the block of the residual stream that holds each.
        space: the residual stream. Its block "one" is 1 at every position, "bos" at the first; the block NAME.share, of a
            width w, holds 1 / (1 + w), which its attention head gives.
        heads: by layer, the variables that attention makes (widths: their shares).
        mlps: by layer, the variables that the MLP makes.
    """

    program: Program
    variables: tuple[Variable, ...]
    domains: Mapping[Variable, tuple[Value, ...]]
    names: Mapping[Variable, str]
    space: Space
    heads: tuple[tuple[Aggregated | Width, ...], ...]
    mlps: tuple[tuple[Variable, ...], ...]


def lay_out(program: Program) -> Layout:
    """Order the variables, find their values, and give each its layer and directions."""
    variables = tuple(dict.fromkeys(_post_order(program.output)))
    domains: dict[Variable, tuple[Value, ...]] = {}
    for one in variables:
        domains[one] = _domain(one, domains, program)
    times = _times(variables)
    layers = (max(times.values()) + 1) // 2
    heads = tuple(tuple(one for one in variables if _attends(one) and (times[one] - 1) // 2 == layer) for layer in range(layers))
    mlps = tuple(tuple(one for one in variables if times[one] == 2 * layer + 2) for layer in range(layers))
    names = {one: f"{type(one).__name__.lower()}{number}" for number, one in enumerate(variables)}
    blocks = {"one": 1, "bos": 1}
    for one in variables:
        blocks[names[one]] = 1 if one.numerical else len(domains[one])
        if isinstance(one, Width):
            blocks[names[one] + ".share"] = 1
    return Layout(program, variables, domains, names, Space(**blocks), _typed_heads(heads), mlps)


def shares(counts: Sequence[int]) -> tuple[Fraction, ...]:
    """What a width's head gives for each count: the share of attention that the first position keeps."""
    return tuple(Fraction(1, 1 + count) for count in counts)


def _typed_heads(heads: Sequence[Sequence[Variable]]) -> tuple[tuple[Aggregated | Width, ...], ...]:
    return tuple(tuple(one for one in layer if isinstance(one, Aggregated | Width)) for layer in heads)


def _attends(variable: Variable) -> bool:
    return isinstance(variable, Aggregated | Width)


def _post_order(variable: Variable) -> Iterator[Variable]:
    for one in inputs_of(variable):
        yield from _post_order(one)
    yield variable


def _times(variables: Sequence[Variable]) -> dict[Variable, int]:
    """When each variable is there: 0 in the embedding, 2 l + 1 behind attention l, 2 l + 2 behind MLP l."""
    times: dict[Variable, int] = {}
    for one in variables:
        ready = max((times[other] for other in inputs_of(one)), default=0)
        if isinstance(one, Tokens | Indices):
            times[one] = 0
        elif isinstance(one, Aggregated):
            times[one] = ready + 1 + ready % 2
        elif isinstance(one, Width):
            times[one] = ready + 2 + ready % 2
        else:
            times[one] = ready + 2 - ready % 2
    return times


def _domain(variable: Variable, domains: Mapping[Variable, tuple[Value, ...]], program: Program) -> tuple[Value, ...]:
    match variable:
        case Tokens():
            found = list(program.alphabet)
        case Indices():
            found = list(range(program.longest))
        case Width():
            found = list(range(program.longest + 1))
        case Mapped():
            found = [typed(variable, variable.f(value)) for value in domains[variable.inner]]
        case Zipped():
            left, right = domains[variable.left], domains[variable.right]
            found = [typed(variable, variable.f(a, b)) for a in left for b in right]
        case Linear():
            left, right = domains[variable.left], domains[variable.right]
            found = [variable.a * a + variable.b * b for a in left for b in right]
        case Aggregated():
            values = domains[variable.values]
            found = sorted(_means(values, program.longest)) if variable.numerical else list(values)
    unique = tuple(sorted(set(found)) if variable.numerical else dict.fromkeys(found))
    if len(unique) > MOST_NUMBERS:
        raise ModelError(
            f"a number of the program {program.name!r} takes {len(unique)} values: at most {MOST_NUMBERS} are compiled"
        )
    return unique


def _means(values: Sequence[Number], most: int) -> set[Number]:
    """Every mean of up to `most` of these values, with repeats; and 0, the mean of none."""
    sums: set[Number] = {0}
    means: set[Number] = {0}
    for count in range(1, most + 1):
        sums = {total + value for total in sums for value in values}
        means |= {Fraction(total, count) for total in sums}
    return means
