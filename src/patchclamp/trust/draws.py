"""Random circuits of the same size and shape, and the chance of doing as well as one of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, prod

import numpy as np

from patchclamp.parts import Parts
from patchclamp.scores import Part
from patchclamp.sites import Edge


def kind_of(part: Part) -> str:
    """What parts of a random circuit are matched by: the kind of a site; of an edge, what it leads from and to."""
    return f"{part.source.kind}>{part.target.kind}" if isinstance(part, Edge) else part.kind


@dataclass(frozen=True)
class Shape:
    """Which parts random circuits are drawn from, and how many of each kind.

    Args:
        among: by kind, the parts there are.
        counts: by kind, how many of them are in a circuit.
    """

    among: dict[str, tuple[Part, ...]]
    counts: dict[str, int]

    @classmethod
    def of(cls, parts: Parts, members: Sequence[Part], outside: bool = False) -> "Shape":
        """That of a circuit.

        Args:
            parts: among which circuits are drawn.
            members: the circuit.
            outside: draw from what is not in the circuit only, as many of each kind as there are at most.
        """
        inside, among = set(members), dict[str, list[Part]]()
        for number in parts.counted:
            part = parts.labels[number]
            if not (outside and part in inside):
                among.setdefault(kind_of(part), []).append(part)
        counts = {kind: sum(kind_of(part) == kind for part in inside) for kind in sorted({kind_of(part) for part in inside})}
        held = {kind: tuple(found) for kind, found in among.items()}
        return cls(held, {kind: min(count, len(held.get(kind, ()))) for kind, count in counts.items()})

    @property
    def size(self) -> int:
        """Parts in a circuit."""
        return sum(self.counts.values())

    @property
    def combinations(self) -> int:
        """How many circuits have this shape."""
        return prod(comb(len(self.among[kind]), count) for kind, count in self.counts.items() if count)

    def draw(self, rng: np.random.Generator) -> list[Part]:
        """A circuit of this shape, each as likely as any other."""
        return [part for kind, count in self.counts.items() if count for part in pick(rng, self.among[kind], count)]

    def another(self, rng: np.random.Generator, members: Sequence[Part]) -> list[Part]:
        """One that is not this circuit; itself, where there is no other of its shape."""
        if self.combinations < 2:
            return [*members]
        while True:
            drawn = self.draw(rng)
            if set(drawn) != set(members):
                return drawn


def pick(rng: np.random.Generator, among: Sequence[Part], count: int) -> list[Part]:
    """Some of the parts, without replacement."""
    return [among[int(i)] for i in rng.choice(len(among), size=count, replace=False)]


def chance(better: int, draws: int, combinations: int) -> float:
    """p of a circuit that `better` of `draws` others of its shape equal or exceed, among `combinations` circuits of that shape.

        p = (1 + (N - 1) (better + 1) / (draws + 1)) / N

    Had the circuit itself been drawn at random, p would be at most alpha with probability at most alpha, for any N and any
    number of draws: its rank among the N is then uniform, and `better` is binomial given the rank. With N large it is the usual
    (better + 1) / (draws + 1); with N small it cannot fall below 1 / N, however many draws are made.
    """
    return (1 + (combinations - 1) * (better + 1) / (draws + 1)) / combinations
