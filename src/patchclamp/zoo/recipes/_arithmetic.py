"""Arithmetic's rows: two numbers, what is asked of them, and the answer; and pairs of prompts that stand one by one for each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from patchclamp.training import Rows
from patchclamp.zoo.recipes._recipe import SPECIAL, drawing

if TYPE_CHECKING:
    from patchclamp.models.model import Model

N = 60
"""Operands are numbers below N; results are between 1 - N and 2 N - 2."""
LOWEST, HIGHEST = 1 - N, 2 * N - 2
ASKS = ("+", "-", "first", "second")
SUMS, NUMBERS = (0, 1), (2, 3)
"""What is asked: arithmetic, and one of the two numbers itself."""
SHARES = (0.4, 0.4, 0.1, 0.1)
"""How often each is trained on."""
ASK = len(SPECIAL)
EQUALS = ASK + len(ASKS)
ZERO = EQUALS + 1 - LOWEST
"""The token of 0; that of n is n further."""
VOCABULARY = (*SPECIAL, *ASKS, "=", *map(str, range(LOWEST, HIGHEST + 1)))
A, OP, B, END = 1, 2, 3, 4
"""Places in a prompt."""
KEPT_BACK = 0.15


@dataclass(frozen=True)
class Arithmetic:
    """`<bos> a op b = c`. Negative steps have the pairs of numbers that are kept back; these are not trained on, whatever is asked.

    Which pairs are kept back hangs on no seed, and (b, a) is kept back with (a, b): so a sum that is asked of them was never seen
    in the other order either. Weight is on c alone. Labels: `a`, `b`, `ask` (a number of `ASKS`), `c`.
    """

    seed: int = 0

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        return f"arithmetic-{N}-{KEPT_BACK}-seed-{self.seed}"

    def rows(self, step: int, count: int) -> Rows:
        """Rows of one update: pairs drawn evenly, what is asked by `SHARES`."""
        draw = drawing(self.name, step)
        pairs = (kept_back() if step < 0 else ~kept_back()).nonzero()
        a, b = pairs[torch.randint(0, len(pairs), (count,), generator=draw)].unbind(1)
        return written(a, torch.multinomial(torch.tensor(SHARES), count, replacement=True, generator=draw), b)


@cache
def kept_back() -> Bool[Tensor, "a b"]:
    """The pairs that are never trained on: about .15 of all, the same both ways round."""
    drawn = torch.rand(N, N, generator=drawing("arithmetic-kept-back")).triu()
    return (drawn + drawn.triu(1).T) < KEPT_BACK


def result(a: Int[Tensor, " row"], ask: Int[Tensor, " row"], b: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """The answer, as a number."""
    return torch.stack([a + b, a - b, a, b], 1).gather(1, ask[:, None])[:, 0]


def written(a: Int[Tensor, " row"], ask: Int[Tensor, " row"], b: Int[Tensor, " row"]) -> Rows:
    """Rows of these numbers."""
    c = result(a, ask, b)
    begin, equals = torch.full_like(a, SPECIAL.index("<bos>")), torch.full_like(a, EQUALS)
    tokens = torch.stack([begin, ZERO + a, ASK + ask, ZERO + b, equals, ZERO + c], 1)
    weights = torch.zeros(tokens.shape)
    weights[:, -1] = 1.0
    return Rows(tokens, weights, labels={"a": a, "b": b, "ask": ask, "c": c})


def all_pairs(ask: int) -> Rows:
    """(0, 0), (0, 1), ...: all pairs, those that are kept back among them."""
    a, b = torch.cartesian_prod(torch.arange(N), torch.arange(N)).unbind(1)
    return written(a, torch.full_like(a, ask), b)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Prompts with other operands: `here` and `there` stand one by one for each other, and have other answers."""

    here: Int[Tensor, "row position"]
    there: Int[Tensor, "row position"]
    said: Int[Tensor, " row"]
    other: Int[Tensor, " row"]

    @classmethod
    def of(cls, model: "Model", asks: Sequence[int], data: Arithmetic, count: int = 256, step: int = -2) -> "Pairs":
        """Pairs of numbers that were never trained on, whose answers differ and are both said rightly; at most `count`."""
        draw = drawing(f"{data.name}-{asks}-pairs", step)
        pairs = kept_back().nonzero()
        a, b = pairs[torch.randint(0, len(pairs), (2, count), generator=draw)].unbind(-1)
        ask = torch.tensor(list(asks))[torch.randint(0, len(asks), (count,), generator=draw)]
        here, there = (written(a[i], ask, b[i]).tokens for i in (0, 1))
        right = torch.stack([model.run(one[:, :-1])[:, -1].argmax(-1) == one[:, -1] for one in (here, there)]).all(0)
        chosen = (right & (here[:, -1] != there[:, -1])).nonzero()[:, 0]
        return cls(here[chosen, :-1], there[chosen, :-1], here[chosen, -1], there[chosen, -1])
