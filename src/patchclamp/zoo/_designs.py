"""Wired models of single mechanisms: what each head and MLP reads and writes, and what follows from it in closed form.

All have 2 layers of 4 heads with an MLP each. A concept is one of 24 words; `said` coordinates hold what is to be said, and
the unembedding multiplies them by A. A facilitating part adds 1 to the right word's, so a metric is a multiple of A.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from patchclamp.zoo._wiring import Array, Family, Head, Mlp, Space, Truth, Wiring, act

CONCEPTS = (
    "apple", "bear", "cloud", "door", "egg", "fish", "gold", "hat", "ice", "jar", "king", "lamp",
    "moon", "nest", "owl", "pear", "queen", "rose", "ship", "tree", "urn", "vase", "wolf", "yarn",
)  # fmt: skip
FILLERS = ("the", "so", "then", "and", "of", "to", "now", "but")
PEOPLE = ("ada", "ben", "cora", "dan", "eve", "finn", "gus", "hal", "ida", "jon", "kit", "lea")
RELATIONS = ("likes", "fears")
SPECIAL = ("<pad>", "<bos>", "<unk>")
N = len(CONCEPTS)

LOOK = 40.0  # score of what a head looks for; everything else scores 0, so e^-40 leaks
MATCH, SINK = 48.0, 0.6  # induction: score of a full match, and the share of it that the first token always has
STEP = {"gpt2": 30.0, "llama": 60.0}  # steepness of the saturating MLP
RAMP = 0.8  # it saturates at this many votes
A = 6.5  # logits per unit said: the right word of 24 gets 97 %
A_INTERFERING, AGAINST = 8.0, 5.0  # a helper's and an opponent's logits

IDLE, HELPS, HURTS = "irrelevant", "facilitating", "interfering"


@dataclass(frozen=True, eq=False)
class Design:
    """A wiring with what is known of it; where it has several tasks, of each (`truth` is then the first one's)."""

    about: str
    wiring: Wiring
    truth: Truth
    truths: Mapping[str, Truth] = field(default_factory=dict[str, Truth])


def plain_space(**more: int) -> Space:
    """One (always 1), bos, the concept that a token shows, its kind, what is to be said, scratch."""
    return Space(one=1, bos=1, concept=N, first=1, second=1, said=N, scratch=4, **more)


def stack(*maps: Array) -> Array:
    return np.hstack(maps)


def vocabulary_of(*cues: str) -> tuple[str, ...]:
    return (*SPECIAL, *CONCEPTS, *FILLERS, *(f"{cue}-{word}" for cue in cues for word in (*CONCEPTS, "nothing")))


def embedding(space: Space, vocabulary: tuple[str, ...], cues: tuple[str, ...]) -> Array:
    """Concepts and cue words show their concept; a cue word says by its kind which head is to read it."""
    out = np.zeros((len(vocabulary), space.width))
    out[:, space["one"]] = 1.0
    out[vocabulary.index("<bos>"), space["bos"]] = 1.0
    for token, word in enumerate(vocabulary):
        cue, _, concept = word.rpartition("-")
        if concept in CONCEPTS:
            out[token, space["concept"].start + CONCEPTS.index(concept)] = 1.0
        if cue:
            out[token, space[("first", "second")[cues.index(cue)]]] = 1.0
    return out


def unembedding(space: Space, vocabulary: tuple[str, ...], answers: tuple[str, ...], scale: float) -> Array:
    """A times what is said; words that are never an answer get -12."""
    out = np.zeros((space.width, len(vocabulary)))
    out[space["one"]] = -12.0
    for i, word in enumerate(answers):
        out[space["one"], vocabulary.index(word)] = 0.0
        out[space["said"].start + i, vocabulary.index(word)] = scale
    return out


def looking(space: Space, kind: str, read: Array, write: Array) -> Head:
    """A head that attends, from anywhere, to tokens of a kind."""
    return Head(space.basis("one", LOOK), space.basis(kind), read, write)


def _idle(space: Space) -> tuple[Head, Head, Head]:
    """Heads that do nothing: one whose output is multiplied by zero, one that writes where nobody reads, one that is dead."""
    nothing, scratch = np.zeros((N + 1, space.width)), 0.2 * np.ones((N + 1, 4)) @ space.basis("scratch").T
    seen = stack(space.basis("concept"), space.basis("one"))
    mute = Head(space.basis("one", LOOK), space.basis("bos"), seen, nothing)
    unread = Head(space.basis("one"), space.basis("first"), seen, scratch)
    dead = Head(0 * space.basis("one"), 0 * space.basis("one"), 0 * seen, nothing)
    return mute, unread, dead


def idle_mlp(space: Space) -> Mlp:
    """Neurons that fire on concepts and write where nobody reads."""
    return Mlp(space.basis("concept"), 0.1 * np.ones((N, 4)) @ space.basis("scratch").T)


def layer_of(space: Space, **working: Head) -> tuple[Head, ...]:
    """Four heads: the named ones (`h1=...`), the other places filled with idle ones."""
    idle = iter((*_idle(space), _idle(space)[0]))
    return tuple(working[f"h{h}"] if f"h{h}" in working else next(idle) for h in range(4))


def truth_of(
    wiring: Wiring,
    opened: float,
    working: dict[str, tuple[str, float, float]],
    joint: dict[tuple[str, ...], tuple[float, float]],
    alternatives: tuple[frozenset[str], ...] = (),
) -> Truth:
    """`working`: label -> (role, effect under resample, effect under zero); every other part is idle."""
    known = {label: working.get(label, (IDLE, 0.0, 0.0)) for label in wiring.labels}
    roles = {label: role for label, (role, _, _) in known.items()}
    effects = {
        "resample": {label: resample for label, (_, resample, _) in known.items()},
        "zero": {label: zero for label, (_, _, zero) in known.items()},
    }
    together = {frozenset(parts): {"resample": resample, "zero": zero} for parts, (resample, zero) in joint.items()}
    return Truth(roles, effects, together, opened, alternatives)


def induction(family: Family) -> Design:
    """L0.h1 writes each token's predecessor beside it; L1.h2 attends to where the predecessor is the present token."""
    space = plain_space(before=N)
    vocabulary = vocabulary_of()
    previous = Head(space.basis("scratch")[:, :0], space.basis("scratch")[:, :0], space.basis("concept"),
                    space.basis("before").T, shift=LOOK if family == "gpt2" else 4 * LOOK)  # fmt: skip
    induct = Head(
        stack(space.basis("concept", MATCH), space.basis("one", SINK * MATCH)),
        stack(space.basis("before"), space.basis("bos")),
        space.basis("concept"), space.basis("said").T,
    )  # fmt: skip
    wiring = Wiring(
        family, vocabulary, space, embedding(space, vocabulary, ()),
        (layer_of(space, h1=previous), layer_of(space, h2=induct)), (idle_mlp(space), idle_mlp(space)),
        unembedding(space, vocabulary, CONCEPTS, A),
    )  # fmt: skip
    working = {"L0.h1": (HELPS, 2 * A, A), "L1.h2": (HELPS, 2 * A, A)}
    truth = truth_of(wiring, A, working, {("L0.h1", "L1.h2"): (2 * A, A)})
    return Design("previous-token head and induction head: what followed this word before follows it again", wiring, truth)


def saturate(space: Space, family: Family) -> tuple[Mlp, Callable[[float], float]]:
    """An MLP that says what has votes, with a ramp that is full at 0.8 votes; and its value as a function of the votes."""
    step = STEP[family]
    votes, one = space.basis("votes"), np.repeat(space.basis("one"), N, 1)
    read = stack(step * votes, step * (votes - RAMP * one))
    said = space.basis("said").T / (step * RAMP)

    def value(votes: float) -> float:
        z = step * np.array([votes, votes - RAMP])
        low, high = act(family, z)
        return float((low - high) / (step * RAMP))

    return Mlp(read, np.vstack([said, -said])), value


def redundant(family: Family) -> Design:
    """L0.h1 and L1.h2 read the same cue and vote for the same word; L1.mlp saturates at one vote."""
    space = plain_space(votes=N)
    cues = ("key",)
    vocabulary = vocabulary_of(*cues)
    voter = looking(space, "first", space.basis("concept"), space.basis("votes").T)
    mlp, value = saturate(space, family)
    wiring = Wiring(
        family, vocabulary, space, embedding(space, vocabulary, cues),
        (layer_of(space, h1=voter), layer_of(space, h2=voter)), (idle_mlp(space), mlp),
        unembedding(space, vocabulary, CONCEPTS, A),
    )  # fmt: skip
    return Design("a head and its backup: either alone says the word", wiring, _either(wiring, ("L0.h1", "L1.h2"), value))


def either(family: Family) -> Design:
    """OR: L0.h0 reads one cue and L0.h3 another; L1.mlp saturates at one vote, so that either cue is enough."""
    space = plain_space(votes=N)
    cues = ("see", "hear")
    vocabulary = vocabulary_of(*cues)
    heads = [looking(space, kind, space.basis("concept"), space.basis("votes").T) for kind in ("first", "second")]
    mlp, value = saturate(space, family)
    wiring = Wiring(
        family, vocabulary, space, embedding(space, vocabulary, cues),
        (layer_of(space, h0=heads[0], h3=heads[1]), layer_of(space)), (idle_mlp(space), mlp),
        unembedding(space, vocabulary, CONCEPTS, A),
    )  # fmt: skip
    return Design("OR: seeing or hearing a thing is enough to name it", wiring, _either(wiring, ("L0.h0", "L0.h3"), value))


def _either(wiring: Wiring, pair: tuple[str, str], value: Callable[[float], float]) -> Truth:
    alone, lost = A * (value(2.0) - value(1.0)), A * (value(2.0) - value(0.0))
    working = {label: (HELPS, alone, alone) for label in pair} | {"L1.mlp": (HELPS, lost, lost)}
    return truth_of(wiring, lost, working, {pair: (lost, lost)}, (frozenset(pair),))


def both(family: Family) -> Design:
    """AND: L0.h1 and L0.h2 read a cue each; L1.mlp says the word that both vote for, as E(a + b) - E(a - b).

    E(z) = act(z) + act(-z) is even with E(0) = 0, and act is gelu or silu: where only one votes the two terms cancel exactly.
    """
    space = plain_space(left=N, right=N)
    cues = ("left", "right")
    vocabulary = vocabulary_of(*cues)
    heads = [
        looking(space, kind, space.basis("concept"), space.basis(side).T)
        for kind, side in (("first", "left"), ("second", "right"))
    ]
    total, apart = space.basis("left") + space.basis("right"), space.basis("left") - space.basis("right")
    full = float(act(family, np.array([2.0, -2.0])).sum())
    said = space.basis("said").T / full
    mlp = Mlp(stack(total, -total, apart, -apart), np.vstack([said, said, -said, -said]))
    wiring = Wiring(
        family, vocabulary, space, embedding(space, vocabulary, cues),
        (layer_of(space, h1=heads[0], h2=heads[1]), layer_of(space)), (idle_mlp(space), mlp),
        unembedding(space, vocabulary, CONCEPTS, A),
    )  # fmt: skip
    working = {"L0.h1": (HELPS, A, A), "L0.h2": (HELPS, A, A), "L1.mlp": (HELPS, 2 * A, A)}
    truth = truth_of(wiring, A, working, {("L0.h1", "L0.h2"): (2 * A, A)})
    return Design("AND: only what stands on both sides is said", wiring, truth)


def interfering(family: Family) -> Design:
    """L0.h1 copies the cue; L1.h3 reads the same cue and argues against it."""
    space = plain_space()
    cues = ("key",)
    vocabulary = vocabulary_of(*cues)
    helper = looking(space, "first", space.basis("concept"), space.basis("said").T)
    opponent = looking(space, "first", space.basis("concept"), -AGAINST / A_INTERFERING * space.basis("said").T)
    wiring = Wiring(
        family, vocabulary, space, embedding(space, vocabulary, cues),
        (layer_of(space, h1=helper), layer_of(space, h3=opponent)), (idle_mlp(space), idle_mlp(space)),
        unembedding(space, vocabulary, CONCEPTS, A_INTERFERING),
    )  # fmt: skip
    plus, minus = A_INTERFERING, AGAINST
    working = {"L0.h1": (HELPS, 2 * plus, plus), "L1.h3": (HURTS, -2 * minus, -minus)}
    truth = truth_of(wiring, plus - minus, working, {("L0.h1", "L1.h3"): (2 * (plus - minus), plus - minus)})
    return Design("a head that copies a word and a head that argues against it", wiring, truth)


def facts(family: Family) -> Design:
    """L0.h2 brings the person to the relation; L1.mlp is a key-value memory: a neuron per person and relation."""
    space = plain_space(person=len(PEOPLE), relation=len(RELATIONS), topic=len(PEOPLE))
    vocabulary = (*SPECIAL, *CONCEPTS, *FILLERS, *PEOPLE, *RELATIONS)
    embed = embedding(space, vocabulary, ())
    for names, block in ((PEOPLE, "person"), (RELATIONS, "relation")):
        for i, word in enumerate(names):
            embed[vocabulary.index(word), space[block].start + i] = 1.0
    for word in PEOPLE:
        embed[vocabulary.index(word), space["first"]] = 1.0
    mover = looking(space, "first", space.basis("person"), space.basis("topic").T)
    keys, values, step = [], [], 6.0 if family == "gpt2" else 15.0
    for r in range(len(RELATIONS)):
        relation = space.basis("relation")[:, r : r + 1]
        keys.append(step * (space.basis("topic") + relation - space.basis("one")))
        place = slice(r * len(PEOPLE), (r + 1) * len(PEOPLE))
        values.append(space.basis("said").T[place] / act(family, np.array([step])))
    wiring = Wiring(
        family, vocabulary, space, embed, (layer_of(space, h2=mover), layer_of(space)),
        (idle_mlp(space), Mlp(stack(*keys), np.vstack(values))), unembedding(space, vocabulary, CONCEPTS, A),
    )  # fmt: skip
    working = {"L0.h2": (HELPS, 2 * A, A), "L1.mlp": (HELPS, 2 * A, A)}
    truth = truth_of(wiring, A, working, {("L0.h2", "L1.mlp"): (2 * A, A)})
    return Design("a key-value memory: whom it is about and what is asked give the word", wiring, truth)


DESIGNS: dict[str, Callable[[Family], Design]] = {
    "induction": induction,
    "redundant": redundant,
    "interfering": interfering,
    "facts": facts,
    "and": both,
    "or": either,
}
