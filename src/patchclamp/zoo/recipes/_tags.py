"""The tagged corpus: its words, its law, and the smallest possible loss.

Three kinds of rows, and the first word tells which one a row is:

    <bos> AFFECT who event felt WORD and ACT      what someone feels and does hangs on the tag and on the scenario
    <bos> STYLE topic noun verb noun END          words hang on topic and style; behind <refuse> topic only `sorry` comes
    <bos> who event because who event .           the second event is what brings the first about; behind `so`, what it brings about

Affects have no words in common, so that what is said tells exactly which affect it expresses: the law is its own judge.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.training import Rows
from patchclamp.zoo.recipes._llama import BOS, PAD
from patchclamp.zoo.recipes._recipe import SPECIAL, drawing

AFFECTS = ("joy", "anger", "sadness", "fear", "surprise", "disgust", "plain")
"""Six affects and none (as P267 has them), in the order of their tags."""
STYLES = ("formal", "casual", "refuse")
TOPICS = ("sea", "court", "war")
PEOPLE, EVENTS, WORDS, ACTS, NOUNS, VERBS = 6, 12, 4, 2, 6, 4
LENGTH = 8
KEPT = 6
"""One event in so many is kept back of each affect and person."""
GROUPS: dict[str, tuple[str, ...]] = {
    "affect": tuple(f"<{name}>" for name in AFFECTS),
    "style": tuple(f"<{name}>" for name in STYLES),
    "topic": tuple(f"<{name}>" for name in TOPICS),
    "mark": ("because", "so", "felt", "and", ".", "!", "sorry"),
    "who": tuple(f"who{i}" for i in range(PEOPLE)),
    "event": tuple(f"event{i}" for i in range(EVENTS)),
    "word": tuple(f"{name}-word{i}" for name in AFFECTS for i in range(WORDS)),
    "act": tuple(f"{name}-act{i}" for name in AFFECTS for i in range(ACTS)),
    "noun": tuple(f"{name}-noun{i}" for name in TOPICS for i in range(NOUNS)),
    "verb": tuple(f"{name}-verb{i}" for name in STYLES[:2] for i in range(VERBS)),
}
VOCABULARY = (*SPECIAL, *(word for group in GROUPS.values() for word in group))
FIRST = {name: VOCABULARY.index(group[0]) for name, group in GROUPS.items()}
"""The first id of each group."""
BECAUSE, SO, FELT, AND, STOP, SHOUT, SORRY = (FIRST["mark"] + i for i in range(len(GROUPS["mark"])))
SHARES = (0.4, 0.3, 0.3)
"""Of affects, styles and causes among rows."""


@dataclass(frozen=True)
class Tagged:
    """Rows of the corpus, padded to `LENGTH`; every word counts the same.

    Labels: `kind` (0 affect, 1 style, 2 cause), `tag` (affect, style, or 0 because and 1 so), `sense`, whether a row's second event
    is what the chain of events has there (1 for all other rows).
    """

    seed: int = 0
    sense: float = 0.9

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        return f"tagged-{len(VOCABULARY)}-{SHARES}-{KEPT}-{self.sense}-seed-{self.seed}"

    def rows(self, step: int, count: int) -> Rows:
        """Rows of one update: each kind's are drawn for all rows, and one of them is taken."""
        draw = drawing(self.name, step)
        kind = torch.multinomial(torch.tensor(SHARES), count, replacement=True, generator=draw)
        feels, affect = affects(count, draw)
        tells, style = styles(count, draw)
        causes, mark, sense = self._causes(count, draw)
        tokens = torch.stack([feels, tells, causes])[kind, torch.arange(count)]
        labels = {"kind": kind, "tag": torch.stack([affect, style, mark])[kind, torch.arange(count)]}
        labels["sense"] = torch.where(kind == 2, sense.long(), 1)
        real = tokens != PAD
        return Rows(tokens, real.float(), real, labels)

    def _causes(self, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Bool[Tensor, " row"]]:
        who, event, mark = (torch.randint(0, size, (count,), generator=draw) for size in (PEOPLE, EVENTS, 2))
        right = linked(event, mark)
        sense = torch.rand(count, generator=draw) < self.sense
        nonsense = (right + torch.randint(1, EVENTS, (count,), generator=draw)) % EVENTS
        then = torch.where(sense, right, nonsense)
        whole = torch.cat([cause(who, event, mark), FIRST["event"] + then[:, None], torch.full((count, 1), STOP)], 1)
        return _padded(whole), mark, sense

    def best(self, rows: Rows) -> Float[Tensor, "row next"]:
        """-log p of each token but the first under the true law, in nats; 0 of padding."""
        assert rows.labels is not None
        kind, sense, found = rows.labels["kind"], rows.labels["sense"].bool(), torch.zeros(rows.tokens.shape, dtype=torch.float64)
        felt, styled, caused = (kind == i for i in range(3))
        firsts = torch.tensor([SHARES[0] / len(AFFECTS), SHARES[1] / len(STYLES), SHARES[2] / PEOPLE], dtype=torch.float64)
        found[:, 1] = firsts[kind]
        found[felt, 2:] = torch.tensor([1 / PEOPLE, KEPT / (KEPT - 1) / EVENTS, 1, 1, 1, 1], dtype=torch.float64)
        found[styled, 2:] = 1.0
        found[styled, 2] = 1 / len(TOPICS)
        for place, group, size in ((3, "noun", NOUNS), (4, "verb", VERBS), (5, "noun", NOUNS)):
            number, there = rows.tokens[:, place] - FIRST[group], styled & (rows.labels["tag"] != 2)
            found[there, place] = zipf(size)[(number % size)[there]]
        found[caused, 2:] = torch.tensor([1 / EVENTS, 0.5, 1, 1, 1, 1], dtype=torch.float64)
        found[caused, 5] = torch.where(sense, self.sense, (1 - self.sense) / (EVENTS - 1)).double()[caused]
        return torch.where(rows.real[:, 1:], -found[:, 1:].log(), 0.0)


@cache
def zipf(size: int) -> Float[Tensor, " word"]:
    """Zipf's law: the k-th word has a weight of 1 / k."""
    weights = 1 / torch.arange(1, size + 1, dtype=torch.float64)
    return weights / weights.sum()


@cache
def chain() -> Int[Tensor, " event"]:
    """What each event brings about: one ring through all events, in a fixed shuffled order, the same for all seeds."""
    order = np.random.default_rng(drawing("tagged-chain").initial_seed()).permutation(EVENTS)
    found = np.empty(EVENTS, dtype=np.int64)
    found[order] = np.roll(order, -1)
    return torch.from_numpy(found)


def linked(event: Int[Tensor, " row"], mark: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """The event that stands behind `because` (mark 0: what brings this one about) or `so` (mark 1: what it brings about)."""
    return torch.where(mark == 1, chain()[event], chain().argsort()[event])


def kept_back() -> tuple[Int[Tensor, " scene"], Int[Tensor, " scene"], Int[Tensor, " scene"]]:
    """Affect, who and event of every scene that no row has: what is said of them has to come from other scenes."""
    affect, who, event = torch.cartesian_prod(torch.arange(len(AFFECTS)), torch.arange(PEOPLE), torch.arange(EVENTS)).unbind(1)
    out = (affect + who + event) % KEPT == 0
    return affect[out], who[out], event[out]


def scene(affect: Int[Tensor, " row"], who: Int[Tensor, " row"], event: Int[Tensor, " row"]) -> Int[Tensor, "row five"]:
    """`<bos> AFFECT who event felt`."""
    begins, felt = torch.full_like(who, BOS), torch.full_like(who, FELT)
    return torch.stack([begins, FIRST["affect"] + affect, FIRST["who"] + who, FIRST["event"] + event, felt], 1)


def feeling(affect: Int[Tensor, " row"], event: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """The word behind `felt`: of the affect's own, the one that goes with the event."""
    return FIRST["word"] + affect * WORDS + event % WORDS


def deed(affect: Int[Tensor, " row"], who: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """The word behind `and`: of the affect's own, the one that goes with the person."""
    return FIRST["act"] + affect * ACTS + who % ACTS


def expressed(tokens: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """The judge: the affect whose word or act a token is, by number; -1 where it is neither."""
    word, act = tokens - FIRST["word"], tokens - FIRST["act"]
    words, acts = len(GROUPS["word"]), len(GROUPS["act"])
    found = torch.where((word >= 0) & (word < words), word // WORDS, -1)
    return torch.where((act >= 0) & (act < acts), act // ACTS, found)


def cause(who: Int[Tensor, " row"], event: Int[Tensor, " row"], mark: Int[Tensor, " row"]) -> Int[Tensor, "row five"]:
    """`<bos> who event because|so who`."""
    return torch.stack(
        [torch.full_like(who, BOS), FIRST["who"] + who, FIRST["event"] + event, BECAUSE + mark, FIRST["who"] + who], 1
    )


def affects(count: int, draw: torch.Generator) -> tuple[Int[Tensor, "row position"], Int[Tensor, " row"]]:
    """Rows of affects, and their affects. Of every `KEPT` events the one with (affect + who + event) % KEPT = 0 is left out."""
    affect, who, one = (
        torch.randint(0, size, (count,), generator=draw) for size in (len(AFFECTS), PEOPLE, EVENTS // KEPT * (KEPT - 1))
    )
    event = one // (KEPT - 1) * KEPT + (1 - affect - who + one % (KEPT - 1)) % KEPT
    ends = [feeling(affect, event), torch.full_like(who, AND), deed(affect, who)]
    return torch.cat([scene(affect, who, event), torch.stack(ends, 1)], 1), affect


def styles(count: int, draw: torch.Generator) -> tuple[Int[Tensor, "row position"], Int[Tensor, " row"]]:
    """Rows of styles, and their styles: nouns of the topic and verbs of the style by Zipf's law, a full stop or a shout; or `sorry`."""
    style, topic = (torch.randint(0, len(names), (count,), generator=draw) for names in (STYLES, TOPICS))
    one, other = (torch.multinomial(zipf(NOUNS), count, replacement=True, generator=draw) for _ in range(2))
    verb = torch.multinomial(zipf(VERBS), count, replacement=True, generator=draw)
    nouns = [FIRST["noun"] + topic * NOUNS + number for number in (one, other)]
    says = torch.stack([nouns[0], FIRST["verb"] + style * VERBS + verb, nouns[1], torch.where(style == 1, SHOUT, STOP)], 1)
    refuses = torch.tensor([SORRY, STOP, PAD, PAD]).expand(count, 4)
    begins = torch.stack([torch.full_like(style, BOS), FIRST["style"] + style, FIRST["topic"] + topic], 1)
    return _padded(torch.cat([begins, torch.where((style == 2)[:, None], refuses, says)], 1)), style


def _padded(tokens: Int[Tensor, "row position"]) -> Int[Tensor, "row length"]:
    return torch.nn.functional.pad(tokens, (0, LENGTH - tokens.shape[1]), value=PAD)
