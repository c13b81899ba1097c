"""A wired model that is told what to do in two formats, an instruction or in-context examples, and does the same with either."""

from collections.abc import Callable

import numpy as np

from patchclamp.zoo._designs import (
    CONCEPTS,
    FILLERS,
    HELPS,
    LOOK,
    SPECIAL,
    A,
    Design,
    N,
    embedding,
    layer_of,
    truth_of,
    unembedding,
)
from patchclamp.zoo._wiring import Array, Family, Head, Mlp, Space, Wiring, act

RULES = ("near", "far")
"""The two maps, as instructions say them ("do-near")."""
SHIFTS = (1, 5)
"""What each map does: word i becomes word i + shift, around the list of 24."""
REST = 0.5  # score of the first token, where a reader rests on prompts of the other format, as a share of what it looks for
SHOTS = 3


def mapped(rule: int, word: int) -> int:
    """What a map makes of a word, both by number."""
    return (word + SHIFTS[rule]) % N


def _table(space: Space, family: Family, first: str, second: Array, write: Array) -> Mlp:
    """A neuron for each column of `second`, on where that is there and the word of `first` that stands beside it: a memory."""
    step = 6.0 if family == "gpt2" else 15.0
    both = np.tile(space.basis(first), (1, len(RULES))) + second - np.repeat(space.basis("one"), N * len(RULES), 1)
    return Mlp(step * both, write / act(family, np.array([step])))


def formats(family: Family) -> Design:
    """Two pathways that bring the rule to the query, one for each format, and one memory that applies it.

    Instruction ("do-near ... apple"): L1.h1 reads the instruction. Examples ("hat ice the ... apple"): L0.h1 writes each token's
    predecessor beside it, L0.mlp knows of every two words which map leads from one to the other, L1.h2 gathers that. Either way
    the rule stands at the last token, and L1.mlp says what it makes of the word there.
    """
    space = Space(one=1, bos=1, concept=N, first=1, second=1, said=N, scratch=4, before=N, told=2, shown=2, rule=2)
    vocabulary = (*SPECIAL, *CONCEPTS, *FILLERS, *(f"do-{rule}" for rule in RULES))
    embed = embedding(space, vocabulary, ("do",))
    for number, rule in enumerate(RULES):
        embed[vocabulary.index(f"do-{rule}"), space["told"].start + number] = 1.0
    nothing, one, bos = space.basis("scratch")[:, :0], space.basis("one", LOOK), space.basis("bos", REST)
    previous = Head(
        nothing, nothing, space.basis("concept"), space.basis("before").T, shift=LOOK if family == "gpt2" else 4 * LOOK
    )
    told = Head(one, space.basis("first") + bos, space.basis("told"), space.basis("rule").T)
    gathers = Head(one, space.basis("shown").sum(1, keepdims=True) + bos, space.basis("shown"), space.basis("rule").T)
    said, seen, rules = space.basis("said"), space.basis("concept"), np.repeat(space.basis("rule"), N, 1)
    after = np.hstack([seen[:, [mapped(rule, word) for word in range(N)]] for rule in range(len(RULES))])
    knows = _table(space, family, "before", after, np.repeat(space.basis("shown"), N, 1).T)
    says = np.hstack([said[:, [mapped(rule, word) for word in range(N)]] for rule in range(len(RULES))])
    first = layer_of(space, h1=previous)
    mute = first[0]
    wiring = Wiring(
        family, vocabulary, space, embed, (first, (mute, told, gathers, mute)),
        (knows, _table(space, family, "concept", rules, says.T)), unembedding(space, vocabulary, CONCEPTS, A),
    )  # fmt: skip
    both = (HELPS, 2 * A, A)
    truths = {
        "instruction": truth_of(wiring, A, {"L1.h1": both, "L1.mlp": both}, {("L1.h1", "L1.mlp"): (2 * A, A)}),
        # the predecessors of the corrupt prompt's examples lead to no word of the clean one's: no rule at all, rather than the other
        "examples": truth_of(
            wiring, A, {"L0.h1": (HELPS, A, A), "L0.mlp": both, "L1.h2": both, "L1.mlp": both}, {("L0.mlp", "L1.h2"): (2 * A, A)}
        ),
    }
    return Design("one rule, told by an instruction or shown by examples", wiring, truths["instruction"], truths)


FORMATS: dict[str, Callable[[Family], Design]] = {"formats": formats}
