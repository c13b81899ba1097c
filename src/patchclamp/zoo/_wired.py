"""Hand-wired transformers: real GPT-2 and Llama weights whose every part has a known role and a known effect.

model = wired("redundant")
model.hf, model.tokenizer, model.task     # what any other model has
model.truth.roles["L1.h2"]                # 'facilitating'
model.truth.effects["resample"]["L1.h2"]  # 0.0000...: the other head suffices
model.logits(tokens, {"L1.h2": 0.5})      # the closed form at any gates, in plain numpy
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from patchclamp.errors import ModelError
from patchclamp.tasks import Pair, Task, Tokenizer
from patchclamp.zoo import _compile
from patchclamp.zoo._designs import CONCEPTS, DESIGNS, FILLERS, PEOPLE, RELATIONS, N
from patchclamp.zoo._edges import live
from patchclamp.zoo._formats import FORMATS, RULES, SHIFTS, SHOTS, mapped
from patchclamp.zoo._pairs_of_tasks import PAIRED, TONES
from patchclamp.zoo._relations import RELATED
from patchclamp.zoo._switching import CUES, NOTES, SWITCHING
from patchclamp.zoo._wiring import Family, Truth, Wiring, run

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

ALL = DESIGNS | RELATED | SWITCHING | PAIRED | FORMATS
WIRED = tuple(ALL)
FAMILIES: tuple[Family, ...] = ("gpt2", "llama")


@dataclass(frozen=True, eq=False)
class Wired:
    """A hand-wired model with its task and what is known of it.

    Attributes:
        name: of the mechanism.
        family: "gpt2" or "llama".
        about: the mechanism in one sentence.
        hf: the transformers model, in float64, in evaluation mode.
        tokenizer: one token a word.
        task: pairs with balanced answers.
        truth: roles and exact effects of every head and MLP (see `Truth`).
        wiring: what every part reads and writes.
        tasks: where the model has several tasks, each by name; `task` is the first.
        truths: the truth about each of `tasks`.
    """

    name: str
    family: Family
    about: str
    hf: "GPT2LMHeadModel | LlamaForCausalLM" = field(repr=False)
    tokenizer: "PreTrainedTokenizerFast" = field(repr=False)
    task: Task = field(repr=False)
    truth: Truth = field(repr=False)
    wiring: Wiring = field(repr=False)
    tasks: Mapping[str, Task] = field(repr=False, default_factory=dict[str, Task])
    truths: Mapping[str, Truth] = field(repr=False, default_factory=dict[str, Truth])

    def logits(
        self, tokens: tuple[int, ...], gates: Mapping[str, float] | None = None, corrupt: tuple[int, ...] | None = None
    ) -> Float[np.ndarray, "position token"]:
        """The closed form: logits of one prompt with gated parts, without torch, norms or module code.

        Args:
            tokens: the prompt's ids.
            gates: part label -> gate in [0, 1]; parts that are not named are open.
            corrupt: ids of the prompt whose values a closed gate passes (resample); None: zero.
        """
        fallback = None if corrupt is None else run(self.wiring, corrupt).writes
        return run(self.wiring, tokens, gates, fallback).logits

    def live_edges(self, n: int = 16) -> frozenset[str]:
        """The edges whose closing alone changes the metric of any of `n` pairs, under resample; see `zoo._edges`."""
        return live(self.wiring, self.task.examples(self.tokenizer, n))

    def used_edges(self, n: int = 16) -> frozenset[str]:
        """Those, and the edges that are live once a part is closed that another can stand in for (OR, redundant, backup)."""
        examples = self.task.examples(self.tokenizer, n)
        contexts = [(), *((part,) for parts in self.truth.alternatives for part in parts)]
        return frozenset().union(*(live(self.wiring, examples, closed) for closed in contexts))


def build(name: str, family: str = "gpt2") -> Wired:
    """See `patchclamp.zoo.wired`."""
    if name not in ALL:
        raise ModelError(f"there is no hand-wired model {name!r}: choose from {', '.join(ALL)}")
    if family not in FAMILIES:
        raise ModelError(f"no hand-wired model is of family {family!r}: choose from {', '.join(FAMILIES)}")
    design = ALL[name](family)
    build = {"gpt2": _compile.gpt2, "llama": _compile.llama}[family]
    kinds = [f"{name}-{kind}" for kind in design.truths] or [name]
    tasks = [Task(f"wired-{kind}", design.about, partial(_candidates, kind), options={"mechanism": kind}) for kind in kinds]
    tokenizer = _compile.tokenizer(design.wiring.vocabulary)
    several = dict(zip(design.truths, tasks, strict=False))
    return Wired(name, family, design.about, build(design.wiring), tokenizer, tasks[0], design.truth, design.wiring, several,
                 design.truths)  # fmt: skip


def _candidates(name: str, rng: random.Random, _: Tokenizer) -> Iterator[Pair]:
    """Pairs without end. In each round every answer comes once, and once more where the pair can be read backwards."""
    while True:
        order = rng.sample(range(N), N)
        for right, wrong in zip(order, order[1:] + order[:1], strict=True):
            pair = _PROMPTS[name](rng, right, wrong)
            yield pair
            if pair.mirrors:
                yield pair.mirror()


def _among(rng: random.Random, *cues: str) -> tuple[list[str], list[int]]:
    """Six fillers with cues put among them, in order; and where the cues are. The last word is a filler."""
    words = [rng.choice(FILLERS) for _ in range(6 + len(cues))]
    places = sorted(rng.sample(range(len(words) - 1), len(cues)))
    for place, cue in zip(places, cues, strict=True):
        words[place] = cue
    return words, places


def _induction(rng: random.Random, right: int, wrong: int) -> Pair:
    """Two words before their followers; in the corrupt prompt the two have changed places."""
    after, instead = CONCEPTS[right], CONCEPTS[wrong]
    before, other, *rest = rng.sample([word for word in CONCEPTS if word not in (after, instead)], 6)
    chunks = [[before, after], [other, instead], *([word] for word in rest)]
    rng.shuffle(chunks)
    words = [word for chunk in chunks for word in chunk]
    swap = {before: other, other: before}
    swapped = [swap.get(word, word) for word in words]
    return Pair(" ".join([*words, before]), (" " + after,), " ".join([*swapped, before]), (" " + instead,))


def _cued(rng: random.Random, right: int, wrong: int, cues: tuple[str, ...], against: str | None = None) -> Pair:
    """Cue words for one concept; the corrupt prompt's are for another, or show `against`, which is no concept."""
    said, instead = CONCEPTS[right], CONCEPTS[wrong]
    words, places = _among(rng, *(f"{cue}-{said}" for cue in cues))
    corrupt = list(words)
    for cue, place in zip(cues, places, strict=True):
        corrupt[place] = f"{cue}-{against or instead}"
    return Pair(" ".join(words), (" " + said,), " ".join(corrupt), (" " + instead,), mirrors=against is None)


def _switched(rng: random.Random, right: int, wrong: int) -> Pair:
    """One cue word of either kind; the corrupt prompt's is of the same kind, for another concept."""
    return _cued(rng, right, wrong, cues=(rng.choice(CUES),))


def _phases(rng: random.Random, right: int, wrong: int, said: bool) -> Pair:
    """Two cues; what is asked is the first one's concept or, where that has been said already, the second one's."""
    other = rng.choice([word for word in CONCEPTS if word not in (CONCEPTS[right], CONCEPTS[wrong])])

    def prompt(asked: int) -> list[str]:
        cues = (other, CONCEPTS[asked]) if said else (CONCEPTS[asked], other)
        return [*(f"{note}-{word}" for note, word in zip(NOTES, cues, strict=True)), *([other] if said else [])]

    words, places = _among(rng, *prompt(right)[:2])
    texts: list[str] = []
    for asked in (right, wrong):
        cues = prompt(asked)
        shown = [*words[: places[0]], cues[0], *words[places[0] + 1 : places[1]], cues[1], *words[places[1] + 1 :], *cues[2:]]
        texts.append(" ".join(shown))
    return Pair(texts[0], (" " + CONCEPTS[right],), texts[1], (" " + CONCEPTS[wrong],))


def _formats(rng: random.Random, right: int, _: int, shots: bool) -> Pair:
    """A rule, told or shown, and a word to apply it to; the corrupt prompt is of the other rule, and its examples of other words."""
    rule = rng.randrange(len(RULES))
    query, other = (right - SHIFTS[rule]) % N, 1 - rule
    if shots:
        shown = rng.sample([word for word in range(N) if word != query], SHOTS)
        # no word that the other rule's examples begin with leads to a clean one's end by either rule
        free = [word for word in range(N) if all(mapped(rule, one) not in (mapped(r, word) for r in (0, 1)) for one in shown)]
        begun = rng.sample(free, SHOTS)
        texts = [
            [part for word in some for part in (CONCEPTS[word], CONCEPTS[mapped(by, word)], FILLERS[0])]
            for some, by in ((shown, rule), (begun, other))
        ]
    else:
        words, (place,) = _among(rng, f"do-{RULES[rule]}")
        texts = [words, [*words[:place], f"do-{RULES[other]}", *words[place + 1 :]]]
    clean, corrupt = (" ".join([*text, CONCEPTS[query]]) for text in texts)
    return Pair(clean, (" " + CONCEPTS[right],), corrupt, (" " + CONCEPTS[mapped(other, query)],), mirrors=False)


def _common(rng: random.Random, right: int, wrong: int) -> Pair:
    """A private word of either side, then a cue; the corrupt prompt's cue is for another concept."""
    said, instead = CONCEPTS[right], CONCEPTS[wrong]
    cues = (f"left-{rng.choice(TONES)}", f"right-{rng.choice(TONES)}", f"key-{said}")
    words, _ = _among(rng, *cues)
    corrupt = [word.replace(f"key-{said}", f"key-{instead}") for word in words]
    start = len(" ".join(words[: words.index(f"key-{said}")]))
    cue = (start + (start > 0), start + (start > 0) + len(f"key-{said}"))
    return Pair(" ".join(words), (" " + said,), " ".join(corrupt), (" " + instead,), spans={"cue": cue}, mirrors=False)


def _facts(rng: random.Random, right: int, _: int) -> Pair:
    """A person and a relation; the corrupt prompt is about another person."""
    relation, person = divmod(right, len(PEOPLE))
    other = rng.choice([p for p in range(len(PEOPLE)) if p != person])
    words, (place,) = _among(rng, PEOPLE[person])
    words[-1] = RELATIONS[relation]
    corrupt = [*words[:place], PEOPLE[other], *words[place + 1 :]]
    instead = CONCEPTS[relation * len(PEOPLE) + other]
    return Pair(" ".join(words), (" " + CONCEPTS[right],), " ".join(corrupt), (" " + instead,))


_PROMPTS: dict[str, Callable[[random.Random, int, int], Pair]] = {
    "induction": _induction,
    "redundant": partial(_cued, cues=("key",), against="nothing"),
    "interfering": partial(_cued, cues=("key",)),
    "facts": _facts,
    "and": partial(_cued, cues=("left", "right")),
    "or": partial(_cued, cues=("see", "hear"), against="nothing"),
    "backup": partial(_cued, cues=("key",), against="nothing"),
    "suppressor": partial(_cued, cues=("key",)),
    "switch": _switched,
    "phases-prompt": partial(_phases, said=False),
    "phases-generation": partial(_phases, said=True),
    "formats-instruction": partial(_formats, shots=False),
    "formats-examples": partial(_formats, shots=True),
    "common": _common,
    "shared-see": partial(_cued, cues=("see",)),
    "shared-hear": partial(_cued, cues=("hear",)),
}
