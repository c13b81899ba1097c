"""Wired models of parts that go together without acting on each other, and of two tasks that share half of their parts."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from patchclamp.zoo._designs import (
    CONCEPTS,
    HELPS,
    LOOK,
    STEP,
    A,
    Design,
    N,
    embedding,
    idle_mlp,
    layer_of,
    looking,
    truth_of,
    unembedding,
    vocabulary_of,
)
from patchclamp.zoo._wiring import Array, Family, Head, Mlp, Space, Wiring, act

TONES = ("pa", "pe", "pi", "po", "pu", "ka", "ke", "ki", "ko", "ku")
"""Private words of each side ("left-pa", "right-ku"): all that they carry is how loud they are."""
SIDES = ("left", "right")
RAMP, REST = 0.8, 0.5


def loudness() -> tuple[Array, Array]:
    """How loud each concept and each tone is: evenly spread over 0 to 1 in a fixed, shuffled order, mean .5."""
    order = np.random.default_rng(7).permutation(N)
    return order / (N - 1), np.arange(len(TONES)) / (len(TONES) - 1)


def common(family: Family) -> Design:
    """L1.h1 and L1.h2 both read the cue, each together with a private word of its own side. Neither acts on the other.

    L0.h1 and L0.h2 bring to every token how loud the private words are. L1.h1 says the cue's word, and writes how loud the cue
    and its private word are; L1.h2 writes only the like of it, where nobody reads. Their outputs go together because they have
    an input in common: with S the cue's loudness and P, Q the private ones, they write (S + P) / 2 and (S + Q) / 2, whose
    correlation is var S / sqrt((var S + var P) (var S + var Q)), about a half. Given the cue they have nothing in common.
    """
    space = Space(one=1, bos=1, concept=N, first=1, second=1, said=N, scratch=4, left=1, right=1, loud=1, near=2, heard=2)
    private = tuple(f"{side}-{tone}" for side in SIDES for tone in TONES)
    plain = embedding(space, vocabulary_of("key"), ("key",))
    embed = np.vstack([plain, np.repeat(space.basis("one").T, len(private), 0)])
    vocabulary = (*vocabulary_of("key"), *private)
    words, tones = loudness()
    for token, word in enumerate(vocabulary):
        kind, _, name = word.rpartition("-")
        if kind == "key" and name in CONCEPTS:
            embed[token, space["loud"]] = words[CONCEPTS.index(name)]
        elif name in TONES:
            embed[token, space[kind]], embed[token, space["loud"]] = 1.0, tones[TONES.index(name)]
    loud, near, heard = (space.basis(name) for name in ("loud", "near", "heard"))
    brings = [looking(space, side, loud, near[:, [i]].T) for i, side in enumerate(SIDES)]
    hums = [looking(space, "first", 0.5 * (loud + near[:, [i]]), heard[:, [i]].T) for i in range(2)]
    says = looking(space, "first", np.hstack([space.basis("concept"), hums[0].read]),
                   np.vstack([space.basis("said").T, hums[0].write]))  # fmt: skip
    mute = layer_of(space)[0]
    wiring = Wiring(
        family, vocabulary, space, embed, ((mute, *brings, mute), (mute, says, hums[1], mute)),
        (idle_mlp(space), idle_mlp(space)), unembedding(space, vocabulary, CONCEPTS, A),
    )  # fmt: skip
    truth = truth_of(wiring, A, {"L1.h1": (HELPS, 2 * A, A)}, {("L1.h1", "L1.h2"): (2 * A, A)})
    return Design("two heads that hear the same word, and neither hears the other", wiring, truth)


def _stage(space: Space, family: Family, source: str, target: str) -> tuple[Mlp, Callable[[float], float]]:
    """An MLP that puts into `target` what `source` holds, on a ramp that is full at 0.8; and its value as a function."""
    step = STEP[family]
    held, one = space.basis(source), np.repeat(space.basis("one"), N, 1)
    write = space.basis(target).T / (step * RAMP)

    def value(amount: float) -> float:
        low, high = act(family, step * np.array([amount, amount - RAMP]))
        return float((low - high) / (step * RAMP))

    return Mlp(np.hstack([step * held, step * (held - RAMP * one)]), np.vstack([write, -write])), value


def shared(family: Family) -> Design:
    """Two tasks of four parts each, two of them the same: what is seen, and what is heard, is to be named.

    Seeing: L0.h1 reads "see" cues, L0.mlp makes what was read a topic, L1.h1 brings the topic from the cue, L1.mlp says it.
    Hearing: L0.h2 and L1.h2 instead of L0.h1 and L1.h1, for "hear" cues; the MLPs are the same. On prompts of the other task a
    reader rests on the first token, where there is nothing to read.
    """
    space = Space(one=1, bos=1, concept=N, first=1, second=1, said=N, raw=N, topic=N, votes=N)
    cues = ("see", "hear")
    vocabulary = vocabulary_of(*cues)
    silent = Head(space.basis("one", LOOK), space.basis("bos"), space.basis("concept"), np.zeros((N, space.width)))

    def reader(kind: str, source: str, target: str) -> Head:
        return Head(space.basis("one", LOOK), space.basis(kind) + space.basis("bos", REST), space.basis(source),
                    space.basis(target).T)  # fmt: skip

    layers = tuple(
        (silent, reader("first", source, target), reader("second", source, target), silent)
        for source, target in (("concept", "raw"), ("topic", "votes"))
    )
    (make, value), (say, spoken) = (_stage(space, family, *ends) for ends in (("raw", "topic"), ("votes", "said")))
    wiring = Wiring(
        family, vocabulary, space, embedding(space, vocabulary, cues), layers, (make, say),
        unembedding(space, vocabulary, CONCEPTS, A),
    )  # fmt: skip
    said = A * (spoken(value(1.0)) - spoken(value(0.0)))
    truths = {}
    for cue, heads in (("see", ("L0.h1", "L1.h1")), ("hear", ("L0.h2", "L1.h2"))):
        working = {part: (HELPS, 2 * said, said) for part in (*heads, "L0.mlp", "L1.mlp")}
        truths[cue] = truth_of(wiring, said, working, {heads: (2 * said, said), ("L0.mlp", "L1.mlp"): (2 * said, said)})
    design = Design("two tasks that share half of their parts", wiring, truths["see"])
    return replace(design, truths=truths)


PAIRED: dict[str, Callable[[Family], Design]] = {"common": common, "shared": shared}
