"""A transformer said as reads and writes, and a plain numpy forward pass of it: no norm, no module code, no torch.

Everything here lives in an abstract residual stream whose coordinates have names (`Space`). Compiled models (`_compile`)
carry one large constant coordinate, which makes their norms the same number everywhere up to |u|^2 / 2C^2 (about 1e-7), so
that this forward pass is their closed form.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float

Array = np.ndarray
Family = Literal["gpt2", "llama"]
ROPE_BASE = 1e6
HEAD_WIDTH: dict[Family, int] = {"gpt2": 80, "llama": 128}
SHIFTED = 4  # rotary frequencies that carry "the position before"
CONTENT = 16  # the first rotary frequency slow enough to carry content (0.03 radians a position)


class Space:
    """Named blocks of coordinates of the residual stream: `space["vote"]` is a slice."""

    def __init__(self, **blocks: int) -> None:
        self._slices: dict[str, slice] = {}
        start = 0
        for name, size in blocks.items():
            self._slices[name] = slice(start, start + size)
            start += size
        self.width = start

    def __getitem__(self, name: str) -> slice:
        return self._slices[name]

    def size(self, name: str) -> int:
        """How many coordinates a block has."""
        block = self._slices[name]
        return block.stop - block.start

    def basis(self, name: str, scale: float = 1.0) -> Float[Array, "width block"]:
        """The map that reads a block: columns are its unit vectors times `scale`."""
        out = np.zeros((self.width, self.size(name)))
        out[self[name]] = scale * np.eye(self.size(name))
        return out


@dataclass(frozen=True, eq=False)
class Head:
    """One attention head.

    score(i, j) = sum_r (x_i query)_r (x_j key)_r [rotated by r's angle times i - j in llama] + shift * (j is i's predecessor);
    write_i = sum_j softmax_j(score(i, j)) x_j read write.
    """

    query: Float[Array, "width match"]
    key: Float[Array, "width match"]
    read: Float[Array, "width value"]
    write: Float[Array, "value width"]
    shift: float = 0.0


@dataclass(frozen=True, eq=False)
class Mlp:
    """One MLP: act(x read) write, with gelu (tanh form) in gpt2 and silu in llama."""

    read: Float[Array, "width neuron"]
    write: Float[Array, "neuron width"]


@dataclass(frozen=True, eq=False)
class Wiring:
    """A whole model: token rows in, logits out."""

    family: Family
    vocabulary: tuple[str, ...]
    space: Space
    embed: Float[Array, "token width"]
    heads: tuple[tuple[Head, ...], ...]
    mlps: tuple[Mlp, ...]
    unembed: Float[Array, "width token"]

    @property
    def labels(self) -> tuple[str, ...]:
        """Every head and MLP in forward order."""
        return tuple(
            label
            for layer, heads in enumerate(self.heads)
            for label in (*(f"L{layer}.h{h}" for h in range(len(heads))), f"L{layer}.mlp")
        )


@dataclass(frozen=True, eq=False)
class Run:
    """What a forward pass gave: logits, and what each head and MLP wrote."""

    logits: Float[Array, "position token"]
    writes: Mapping[str, Float[Array, "position width"]]


def act(family: Family, z: Array) -> Array:
    """The family's activation function, from its formula."""
    if family == "llama":
        return z / (1 + np.exp(-z))
    return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def angles(first: int, count: int, width: int = HEAD_WIDTH["llama"]) -> Float[Array, " count"]:
    """Rotary angles per position of frequencies first .. first + count."""
    return ROPE_BASE ** (-2 * np.arange(first, first + count) / width)


def pattern_of(wiring: Wiring, head: Head, to_query: Array, to_key: Array, slot: int) -> Float[Array, "query key"]:
    """A head's attention, given what its queries and its keys read: [position, width] each."""
    n = len(to_query)
    apart = np.arange(n)[:, None] - np.arange(n)[None, :]
    if wiring.family == "llama":
        turned = np.cos(apart[..., None] * angles(CONTENT + slot, head.query.shape[1]))
        previous = np.cos((apart[..., None] - 1) * angles(0, SHIFTED)).mean(-1)
    else:
        turned, previous = np.ones((n, n, 1)), (apart == 1).astype(float)
    scores = np.einsum("ir,jr,ijr->ij", to_query @ head.query, to_key @ head.key, turned * np.ones(head.query.shape[1]))
    scores = np.where(apart >= 0, scores + head.shift * previous, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def slots(heads: tuple[Head, ...], group: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where each head's key and value coordinates begin, when `group` neighbouring heads share a key/value head."""
    match, value = [], []
    for h in range(len(heads)):
        before = heads[h - h % group : h]
        match.append(sum(head.query.shape[1] for head in before))
        value.append(sum(head.read.shape[1] for head in before))
    return tuple(match), tuple(value)


GROUP: dict[Family, int] = {"gpt2": 1, "llama": 2}


def run(
    wiring: Wiring,
    tokens: tuple[int, ...],
    gates: Mapping[str, float] | None = None,
    fallback: Mapping[str, Float[Array, "position width"]] | None = None,
) -> Run:
    """One forward pass with gated parts, in float64.

    Args:
        wiring: the model.
        tokens: one prompt's token ids.
        gates: part label -> gate in [0, 1] (1 where not named): the write becomes fallback + gate * (write - fallback).
        fallback: part label -> what it writes when closed: `run(wiring, corrupt).writes` for resample, nothing for zero.
    """
    gates, fallback = gates or {}, fallback or {}
    writes: dict[str, Array] = {}
    x = wiring.embed[list(tokens)]

    def gated(label: str, write: Array) -> Array:
        closed = fallback.get(label, np.zeros_like(write))
        writes[label] = closed + gates.get(label, 1.0) * (write - closed)
        return writes[label]

    for layer, (heads, mlp) in enumerate(zip(wiring.heads, wiring.mlps, strict=True)):
        match, _ = slots(heads, GROUP[wiring.family])
        attention = [
            gated(f"L{layer}.h{h}", pattern_of(wiring, head, x, x, match[h]) @ x @ head.read @ head.write)
            for h, head in enumerate(heads)
        ]
        x = x + sum(attention)
        x = x + gated(f"L{layer}.mlp", act(wiring.family, x @ mlp.read) @ mlp.write)
    return Run(x @ wiring.unembed, writes)


@dataclass(frozen=True, eq=False)
class Truth:
    """What is known of a wired model because it was built so. Metric: logit difference, right minus wrong.

    Attributes:
        roles: part label -> "facilitating", "interfering" or "irrelevant", for every head and MLP.
        effects: fallback ("resample", "zero") -> part label -> metric open minus metric with the part closed, the same for
            every pair of the task, or on average where it has two kinds of prompt (`by_cue`). Idle parts that write nothing
            have exactly 0.
        joint: parts closed together -> fallback -> metric open minus metric with all of them closed.
        open: the metric with every part open.
        alternatives: sets of parts of which any one suffices: learned gates under pressure to close (G-) keep exactly one
            of each set, and which one varies from seed to seed. Each member's role is "facilitating".
        by_cue: where parts are used on one kind of prompt only, each kind's own `effects`, by its cue ("look" of "look-apple").
    """

    roles: Mapping[str, str]
    effects: Mapping[str, Mapping[str, float]]
    joint: Mapping[frozenset[str], Mapping[str, float]]
    open: float
    alternatives: tuple[frozenset[str], ...] = field(default=())
    by_cue: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict[str, Mapping[str, Mapping[str, float]]])

    def cue(self, prompt: str) -> str:
        """Which kind of prompt it is; empty where there is one kind only."""
        return next((cue for cue in self.by_cue if f"{cue}-" in prompt), "")

    def effects_on(self, prompt: str, fallback: str) -> Mapping[str, float]:
        """`effects` of one prompt."""
        return (self.by_cue[self.cue(prompt)] if self.by_cue else self.effects)[fallback]
