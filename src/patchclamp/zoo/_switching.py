"""Wired models whose parts are each used on one kind of prompt, or in one phase, only: what a gate that looks at the input has to find."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from patchclamp.zoo._designs import (
    CONCEPTS,
    HELPS,
    LOOK,
    A,
    Design,
    embedding,
    idle_mlp,
    layer_of,
    plain_space,
    saturate,
    truth_of,
    unembedding,
    vocabulary_of,
)
from patchclamp.zoo._wiring import Family, Head, Space, Wiring

CUES = ("look", "listen")
"""The two kinds of prompt: the word before the concept in the prompt's one cue, as in "look-apple"."""
REST = 0.5  # score of the first token, where a reader rests on prompts of the other kind, as a share of that of its cue


def _reader(space: Space, kind: str) -> Head:
    """Attends to cues of one kind and votes for the word there; without such a cue it rests on the first token and is silent."""
    return Head(space.basis("one", LOOK), space.basis(kind) + space.basis("bos", REST), space.basis("concept"),
                space.basis("votes").T)  # fmt: skip


def switch(family: Family) -> Design:
    """L1.h1 reads "look" cues, L1.h2 reads "listen" cues, L1.mlp says what either votes for.

    L0.h0 writes to every later token which kind of cue there was. No part of the model reads that; it is there so that one can
    tell from the residual stream between the layers, at the last token, which of the two heads the prompt needs.
    """
    space = plain_space(votes=len(CONCEPTS), kind=2)
    vocabulary = vocabulary_of(*CUES)
    cue = space.basis("first") + space.basis("second")
    informant = Head(space.basis("one", LOOK), cue, np.hstack([space.basis("first"), space.basis("second")]),
                     space.basis("kind").T)  # fmt: skip
    mlp, value = saturate(space, family)
    _, idle, _, silent = layer_of(space)  # of idle heads, one that is not exactly idle (norms see what it writes) and one that is
    wiring = Wiring(
        family, vocabulary, space, embedding(space, vocabulary, CUES),
        ((informant, silent, idle, silent), (silent, _reader(space, "first"), _reader(space, "second"), silent)),
        (idle_mlp(space), mlp), unembedding(space, vocabulary, CONCEPTS, A),
    )  # fmt: skip
    said = A * (value(1.0) - value(0.0))
    both = {"resample": 2 * said, "zero": said}
    parts = ("L1.h1", "L1.h2")
    average = {label: (HELPS, said, said / 2) for label in parts} | {"L1.mlp": (HELPS, 2 * said, said)}
    truth = truth_of(wiring, said, average, {parts: (2 * said, said)})
    by_cue = {
        name: {kind: {**truth.effects[kind], used: size, other: 0.0} for kind, size in both.items()}
        for name, used, other in zip(CUES, parts, reversed(parts), strict=True)
    }
    return Design("one head for what is looked at, another for what is listened to", wiring, replace(truth, by_cue=by_cue))


NOTES = ("key", "note")
"""The two cues of every prompt of `phases`: the answer is the concept of the first, then that of the second."""


def phases(family: Family) -> Design:
    """L1.h1 says the first word of the answer and works on the prompt only, L1.h2 says the second and works on generated words only.

    "... key-apple ... note-bear ..." is followed by "apple bear". A concept by itself stands nowhere in a prompt: it is what the model
    has said. On it L1.h1 rests on the first token and L1.h2 reads the "note" cue; on every other token it is the other way round.
    L1.mlp says what either votes for.
    """
    space = plain_space(votes=len(CONCEPTS), word=1)
    vocabulary = vocabulary_of(*NOTES)
    embed = embedding(space, vocabulary, NOTES)
    for concept in CONCEPTS:
        embed[vocabulary.index(concept), space["word"]] = 1.0
    first, second, bos = space.basis("first"), space.basis("second"), space.basis("bos")
    read, write = space.basis("concept"), space.basis("votes").T
    early = Head(np.hstack([space.basis("one", LOOK), space.basis("word", LOOK)]), np.hstack([first, 2 * bos]), read, write)
    late = Head(np.hstack([space.basis("word", LOOK), space.basis("one", REST * LOOK)]), np.hstack([second, bos]), read, write)
    mlp, value = saturate(space, family)
    _, idle, _, silent = layer_of(space)
    wiring = Wiring(
        family, vocabulary, space, embed, ((silent, silent, idle, silent), (silent, early, late, silent)), (idle_mlp(space), mlp),
        unembedding(space, vocabulary, CONCEPTS, A),
    )  # fmt: skip
    said = A * (value(1.0) - value(0.0))
    truths = {
        phase: truth_of(
            wiring, said, {part: (HELPS, 2 * said, said) for part in (head, "L1.mlp")}, {(head, "L1.mlp"): (2 * said, said)}
        )
        for phase, head in (("prompt", "L1.h1"), ("generation", "L1.h2"))
    }
    about = "one head says the answer's first word, on the prompt; another its second, on what was generated"
    return Design(about, wiring, truths["prompt"], truths)


SWITCHING: dict[str, Callable[[Family], Design]] = {"switch": switch, "phases": phases}
