"""From a layout to weights, in numpy: what every head and MLP reads and writes.

Scores are 100 for what is selected, 0 for the rest and 50 for the first position (BOS), which holds 0 in every variable: so a
position that selects nothing attends there and gets nothing, and e^-50 leaks elsewhere. The head of a width gives the first
position the score of a selected one, and reads how much attention it keeps, 1 / (1 + w).

An MLP looks a category up (a neuron per value, or per pair of values), adds numbers (relu(z) - relu(-z)), and makes of a number
a step function: between two values where the outcome changes, relu(s(x - m) + 1/2) - relu(s(x - m) - 1/2) is 0 below and 1
above. `one` and `bos` of the residual stream serve as biases, so that what is constant has an edge, too. All weights are
multiples of 1/8: exact in every precision that computes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log2

import numpy as np
from jaxtyping import Float

from patchclamp.errors import ModelError
from patchclamp.zoo._wiring import Array, Head, Mlp, Space
from patchclamp.zoo.compiled.layout import Layout, lay_out, shares
from patchclamp.zoo.compiled.programs import Program
from patchclamp.zoo.compiled.rasp import Aggregated, Linear, Mapped, Number, Predicate, Tokens, Value, Variable, Width, Zipped

SHARPNESS = 100.0  # score of what is selected
SCALE = 10.0  # logits of the category that is said, or of 1 where the output is a number
SPECIAL = ("<pad>", "<bos>", "<unk>")
VALUE, NOTHING = "value", "nothing"
"""Where a program's output is a number: the token whose logit is SCALE times that number. And one whose logit is 0, which is right
where the output is missing."""


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A compiled program in plain arrays. Rows of `embed` and `positions` are written; columns of reads are coordinates.

    Args:
        program: what was compiled.
        vocabulary: special tokens, the alphabet, and what outputs are said with.
        space: the residual stream.
        embed: what each token shows.
        positions: what each position shows; row 0 is the first position's, BOS.
        heads: by layer. A layer without heads has none here, and silent ones in the transformer.
        mlps: by layer; relu.
        unembed: logits.
    """

    program: Program
    vocabulary: tuple[str, ...]
    space: Space
    embed: Float[Array, "token width"]
    positions: Float[Array, "position width"]
    heads: tuple[tuple[Head, ...], ...]
    mlps: tuple[Mlp, ...]
    unembed: Float[Array, "width token"]


def said(value: Value) -> str:
    """The token that stands for a category, or for a missing one."""
    return NOTHING if value is None else str(value).lower()


def compile_program(program: Program) -> Blueprint:
    """Weights whose output is the program's.

    Raises:
        ModelError: the program needs what is not compiled, such as a number among the inputs of `zipped`.
    """
    plan = lay_out(program)
    outcomes = (VALUE,) if program.output.numerical else tuple(map(said, plan.domains[program.output]))
    vocabulary = tuple(dict.fromkeys((*SPECIAL, *program.alphabet, *outcomes, NOTHING)))
    embed, positions = _embeddings(plan, vocabulary)
    unembed = np.zeros((plan.space.width, len(vocabulary)))
    rows = plan.space[plan.names[program.output]]
    for row, word in zip(range(rows.start, rows.stop), outcomes, strict=True):
        unembed[row, vocabulary.index(word)] = SCALE
    heads = tuple(tuple(_head(plan, one) for one in layer) for layer in plan.heads)
    mlps = tuple(_mlp(plan, layer) for layer in plan.mlps)
    return Blueprint(program, vocabulary, plan.space, embed, positions, heads, mlps, unembed)


def _embeddings(plan: Layout, vocabulary: Sequence[str]) -> tuple[Array, Array]:
    embed, positions = np.zeros((len(vocabulary), plan.space.width)), np.zeros((plan.program.longest + 1, plan.space.width))
    embed[:, plan.space["one"]] = 1.0
    embed[vocabulary.index("<bos>"), plan.space["bos"]] = 1.0
    for one in plan.variables:
        name = plan.names[one]
        if isinstance(one, Tokens):
            for column, word in enumerate(plan.domains[one]):
                embed[vocabulary.index(word), plan.space[name].start + column] = 1.0
        elif name.startswith("indices"):
            positions[1:, plan.space[name]] = np.eye(plan.program.longest)
    return embed, positions


def _head(plan: Layout, variable: Aggregated | Width) -> Head:
    """Query and key maps of the selector; what is read where it selects, and where that is written."""
    space, selector = plan.space, variable.selector
    keys, queries = plan.domains[selector.keys], plan.domains[selector.queries]
    table = _table(selector.predicate, keys, queries)
    first = SHARPNESS if isinstance(variable, Width) else SHARPNESS / 2
    query = np.hstack([SHARPNESS * space.basis(plan.names[selector.queries]) @ table, space.basis("one", first)])
    key = np.hstack([space.basis(plan.names[selector.keys]), space.basis("bos")])
    if isinstance(variable, Width):
        return Head(query, key, space.basis("bos"), space.basis(plan.names[variable] + ".share").T)
    return Head(query, key, space.basis(plan.names[variable.values]), space.basis(plan.names[variable]).T)


def _table(predicate: Predicate, keys: Sequence[Value], queries: Sequence[Value]) -> Float[Array, "query key"]:
    return np.array([[float(predicate(key, query)) for key in keys] for query in queries])


def _mlp(plan: Layout, variables: Sequence[Variable]) -> Mlp:
    parts = [_unit(plan, one) for one in variables]
    width = plan.space.width
    read = np.hstack([np.zeros((width, 0)), *(part.read for part in parts)])
    return Mlp(read, np.vstack([np.zeros((0, width)), *(part.write for part in parts)]))


def _unit(plan: Layout, variable: Variable) -> Mlp:
    """The neurons that make one variable."""
    match variable:
        case Width():
            counts = plan.domains[variable]
            return _steps(plan, plan.names[variable] + ".share", dict(zip(shares(counts), counts, strict=True)), variable)
        case Mapped(inner=inner) if inner.numerical:
            return _steps(plan, plan.names[inner], {value: variable.f(value) for value in plan.domains[inner]}, variable)
        case Mapped(inner=inner):
            values = plan.domains[inner]
            return _kept(plan.space.basis(plan.names[inner]), np.stack([_write(plan, variable, variable.f(v)) for v in values]))
        case Zipped(left=left, right=right):
            pairs = [(i, j, a, b) for i, a in enumerate(plan.domains[left]) for j, b in enumerate(plan.domains[right])]
            one, two = plan.space.basis(plan.names[left]), plan.space.basis(plan.names[right])
            read = np.stack([one[:, i] + two[:, j] - plan.space.basis("one")[:, 0] for i, j, _, _ in pairs], 1)
            return _kept(read, np.stack([_write(plan, variable, variable.f(a, b)) for _, _, a, b in pairs]))
        case Linear(left=left, right=right):
            total = variable.a * plan.space.basis(plan.names[left]) + variable.b * plan.space.basis(plan.names[right])
            unit = plan.space.basis(plan.names[variable]).T
            return Mlp(np.hstack([total, -total]), np.vstack([unit, -unit]))
        case _:
            raise ModelError(f"no MLP makes {type(variable).__name__}")


def _write(plan: Layout, variable: Variable, value: Value) -> Float[Array, " width"]:
    """The vector that stands for a value of a variable."""
    basis = plan.space.basis(plan.names[variable])
    return float(value) * basis[:, 0] if variable.numerical else basis[:, plan.domains[variable].index(value)]


def _kept(read: Array, write: Array) -> Mlp:
    """Without the neurons that write nothing."""
    some = np.abs(write).max(1) > 0
    return Mlp(read[:, some], write[some])


def _steps(plan: Layout, block: str, outcomes: Mapping[Number, Value], variable: Variable) -> Mlp:
    """A step function of a number: `outcomes` by its possible values. At the first position every neuron is off."""
    space = plan.space
    one, bos, x = (space.basis(name)[:, 0] for name in ("one", "bos", block))
    values = sorted(outcomes)
    reads, writes = [one - bos], [_write(plan, variable, outcomes[values[0]])]
    for low, high in pairwise(values):
        change = _write(plan, variable, outcomes[high]) - _write(plan, variable, outcomes[low])
        if not np.abs(change).max():
            continue
        slope = 2 ** ceil(log2(2 / (high - low)))  # so that s(x - m) is at least 1 away from the step's middle
        middle = round(4 * slope * (low + high) / 2) / 4  # s m
        off = slope * max(abs(values[0]), abs(values[-1])) + abs(middle) + 1
        for half, sign in ((0.5, 1), (-0.5, -1)):
            reads.append(slope * x + (half - middle) * one - float(ceil(off)) * bos)
            writes.append(sign * change)
    return _kept(np.stack(reads, 1), np.stack(writes))
