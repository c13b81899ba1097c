"""Wired models of parts whose work hangs on another part's: a backup that wakes, and a head that argues against what is said."""

from collections.abc import Callable

import numpy as np

from patchclamp.zoo._designs import (
    A_INTERFERING,
    AGAINST,
    CONCEPTS,
    HELPS,
    HURTS,
    LOOK,
    A,
    Design,
    N,
    embedding,
    idle_mlp,
    layer_of,
    looking,
    plain_space,
    truth_of,
    unembedding,
    vocabulary_of,
)
from patchclamp.zoo._wiring import Family, Head, Wiring

REST = 0.5  # score of the first token, where the backup rests, as a share of that of the cue


def backup(family: Family) -> Design:
    """L0.h1 says the cue's word and leaves a mark that it has spoken; L1.h2 says the same word, but attends to no marked cue.

    The backup's score of a token is LOOK * (cue - mark + REST * bos): with the mark there it rests on the first token, which
    shows nothing; without it attends to the cue. So either alone says the word, and the backup writes nothing until its
    partner is closed.
    """
    space = plain_space(mark=1)
    cues = ("key",)
    vocabulary = vocabulary_of(*cues)
    said, mark = space.basis("said").T, np.ones((N, 1)) @ space.basis("mark").T
    speaker = looking(space, "first", space.basis("concept"), said + mark)
    unless = space.basis("first") - space.basis("mark") + space.basis("bos", REST)
    stand_in = Head(space.basis("one", LOOK), unless, space.basis("concept"), said)
    wiring = Wiring(
        family, vocabulary, space, embedding(space, vocabulary, cues),
        (layer_of(space, h1=speaker), layer_of(space, h2=stand_in)), (idle_mlp(space), idle_mlp(space)),
        unembedding(space, vocabulary, CONCEPTS, A),
    )  # fmt: skip
    pair = ("L0.h1", "L1.h2")
    working = {label: (HELPS, 0.0, 0.0) for label in pair}
    truth = truth_of(wiring, A, working, {pair: (A, A)}, (frozenset(pair),))
    return Design("a head and its backup, which wakes only when the head is silent", wiring, truth)


def suppressor(family: Family) -> Design:
    """L0.h1 says the cue's word; L1.h3 reads at the cue what has been said, and argues against it.

    Where nothing is said there is nothing to argue against: closing L0.h1 makes L1.h3 idle, under any fallback.
    """
    space = plain_space()
    cues = ("key",)
    vocabulary = vocabulary_of(*cues)
    speaker = looking(space, "first", space.basis("concept"), space.basis("said").T)
    against = looking(space, "first", space.basis("said"), -AGAINST / A_INTERFERING * space.basis("said").T)
    wiring = Wiring(
        family, vocabulary, space, embedding(space, vocabulary, cues),
        (layer_of(space, h1=speaker), layer_of(space, h3=against)), (idle_mlp(space), idle_mlp(space)),
        unembedding(space, vocabulary, CONCEPTS, A_INTERFERING),
    )  # fmt: skip
    plus, minus = A_INTERFERING, AGAINST
    kept = plus - minus
    working = {"L0.h1": (HELPS, 2 * kept, kept), "L1.h3": (HURTS, -2 * minus, -minus)}
    truth = truth_of(wiring, kept, working, {("L0.h1", "L1.h3"): (2 * kept, kept)})
    return Design("a head that says a word and a head that argues against whatever has been said", wiring, truth)


RELATED: dict[str, Callable[[Family], Design]] = {"backup": backup, "suppressor": suppressor}
