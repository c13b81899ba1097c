"""Two languages of one grammar and one world: the law of what is said, its words, and the smallest possible loss."""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.training import Rows
from patchclamp.zoo.recipes._llama import BOS
from patchclamp.zoo.recipes._recipe import SPECIAL, drawing

SUBJECTS, VERBS, OBJECTS = 8, 8, 16
SIZES = (SUBJECTS, VERBS, OBJECTS)
LANGUAGES = ("major", "minor")
STOP, SAME = len(SPECIAL), len(SPECIAL) + 1
FIRST = len(SPECIAL) + 2
EACH = sum(SIZES)
VOCABULARY = (
    *SPECIAL, ".", "=", *(f"{language}-{kind}{word}" for language in LANGUAGES for kind, size in zip("svo", SIZES, strict=True)
                          for word in range(size)),
)  # fmt: skip


@dataclass(frozen=True)
class World:
    """What is said, in either language: the law of sentences.

    Args:
        verbs: [subject, verb], how probable each verb is.
        object: [subject, verb], the usual object.
        unsaid: [subject, verb], pairs that the minor language never says.
    """

    verbs: Float[Tensor, "subject verb"]
    object: Int[Tensor, "subject verb"]
    unsaid: Bool[Tensor, "subject verb"]

    def verb_law(self, minor: bool) -> Float[Tensor, "subject verb"]:
        """Of verbs behind subjects in a language: without what the minor one never says."""
        law = self.verbs.masked_fill(self.unsaid, 0.0) if minor else self.verbs
        return law / law.sum(1, keepdim=True)

    def object_law(self, usual: float) -> Float[Tensor, "subject verb object"]:
        """Of objects: the usual one, or any, evenly."""
        return usual * torch.nn.functional.one_hot(self.object, OBJECTS).double() + (1 - usual) / OBJECTS


@cache
def world() -> World:
    """The one world of all seeds: verbs with weights between 1 and 3, objects drawn evenly, two verbs of each subject unsaid."""
    rng = np.random.default_rng(drawing("languages-world").initial_seed())
    weights = torch.from_numpy(rng.uniform(1, 3, (SUBJECTS, VERBS)))
    unsaid = torch.zeros(SUBJECTS, VERBS, dtype=torch.bool)
    for subject in range(SUBJECTS):  # every verb is left out by two subjects
        unsaid[subject, [subject % VERBS, (subject + 3) % VERBS]] = True
    objects = torch.from_numpy(rng.integers(0, OBJECTS, (SUBJECTS, VERBS)))
    return World(weights / weights.sum(1, keepdim=True), objects, unsaid)


def word(language: Int[Tensor, "*row"], place: int, number: Int[Tensor, "*row"]) -> Int[Tensor, "*row"]:
    """The token of a word: `place` 0 subject, 1 verb, 2 object."""
    return FIRST + language * EACH + sum(SIZES[:place]) + number


def said(language: Int[Tensor, "row word"], meaning: Int[Tensor, "row word"]) -> Int[Tensor, "row word"]:
    """A meaning (or its beginning), each word in its language."""
    return torch.stack([word(language[:, place], place, meaning[:, place]) for place in range(meaning.shape[1])], 1)


@dataclass(frozen=True)
class Languages:
    """Rows `<bos> s v o . s v o` in one language, or (a share `translated`) `<bos> s v o = s v o` with the same in the other, or (a
    share `mixed`) `<bos> s v o . s v o` with each word in either.

    Every word counts the same. Labels: `kind` (0, 1, 2); `language`, [row, 6], 1 where a word is of the minor one; `meaning`,
    [row, 6], by number.
    """

    seed: int = 0
    minor: float = 0.2
    translated: float = 0.2
    usual: float = 0.9
    mixed: float = 0.0

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        mixed = f"-mixed-{self.mixed}" if self.mixed else ""
        return f"languages-{SUBJECTS}-{VERBS}-{OBJECTS}-{self.minor}-{self.translated}-{self.usual}{mixed}-seed-{self.seed}"

    @cached_property
    def _laws(self) -> tuple[Float[Tensor, "language subject verb"], Float[Tensor, "subject verb object"]]:
        return torch.stack([world().verb_law(minor) for minor in (False, True)]), world().object_law(self.usual)

    def rows(self, step: int, count: int) -> Rows:
        """Rows of one update. What is translated or mixed leaves out what the minor language does."""
        draw = drawing(self.name, step)
        language = (torch.rand(count, generator=draw) < self.minor).long()
        which = torch.rand(count, generator=draw)
        same = which < self.translated
        mixed = ~same & (which < self.translated + self.mixed)
        world_of = torch.where(same | mixed, 1, language)
        first = self._drawn(world_of, draw)
        second = torch.where(same[:, None], first, self._drawn(world_of, draw))
        then = torch.where(same, 1 - language, language)
        each = torch.stack([language, then], 1).repeat_interleave(3, 1)
        each = torch.where(mixed[:, None], torch.randint(0, 2, each.shape, generator=draw), each)
        sign = torch.where(same, SAME, STOP)[:, None]
        begins, meaning = torch.full((count, 1), BOS), torch.cat([first, second], 1)
        tokens = torch.cat([begins, said(each[:, :3], first), sign, said(each[:, 3:], second)], 1)
        labels = {"kind": same.long() + 2 * mixed.long(), "language": each, "meaning": meaning}
        return Rows(tokens, torch.ones(tokens.shape), labels=labels)

    def _drawn(self, language: Int[Tensor, " row"], draw: torch.Generator) -> Int[Tensor, "row word"]:
        verbs, objects = self._laws
        subject = torch.randint(0, SUBJECTS, language.shape, generator=draw)
        verb = torch.multinomial(verbs[language, subject], 1, generator=draw)[:, 0]
        return torch.stack([subject, verb, torch.multinomial(objects[subject, verb], 1, generator=draw)[:, 0]], 1)

    def best(self, rows: Rows) -> Float[Tensor, "row next"]:
        """-log p of each token but the first under the true law, given those before it, in nats.

        By Bayes' rule over what a row may be (one language, a translation from either, mixed):
        p(token | before) = sum over kinds of p(kind) p(before and token | kind) / sum over kinds of p(kind) p(before | kind).
        """
        assert rows.labels is not None
        language, meaning = rows.labels["language"], rows.labels["meaning"]
        stops, spoken = rows.tokens[:, 4] == STOP, (1 - self.minor, self.minor)
        again = (meaning[:, :3] == meaning[:, 3:]).double()
        plain, shy = (self._said(meaning, minor) for minor in (0, 1))
        joint = torch.zeros(len(language), 8, dtype=torch.float64)

        def add(prior: float, sign: Tensor, words: Tensor) -> None:
            each = torch.cat([words[:, :3], sign.double()[:, None], words[:, 3:]], 1)
            joint.add_(prior * torch.nn.functional.pad(each.cumprod(1), (1, 0), value=1.0))

        for first, part in enumerate(spoken):
            one, other = (language == first).double(), (language != first).double()
            add((1 - self.translated - self.mixed) * part, stops, one * (shy if first else plain))
            add(self.translated * part, ~stops, torch.cat([(one * shy)[:, :3], other[:, 3:] * again], 1))
        add(self.mixed, stops, shy / 2)
        return -(joint[:, 1:] / joint[:, :-1]).log()

    def _said(self, meaning: Int[Tensor, "row six"], minor: int) -> Float[Tensor, "row six"]:
        """How probable each word's meaning is given those before it in its sentence, by one language's law."""
        verbs, objects = self._laws
        s, v, o = meaning.unflatten(1, (2, 3)).unbind(2)
        return torch.stack(
            [torch.full(s.shape, 1 / SUBJECTS, dtype=torch.float64), verbs[minor, s, v], objects[s, v, o]], 2
        ).flatten(1)


def cells(unsaid: bool | None = None) -> Int[Tensor, "cell two"]:
    """All pairs of subject and verb, or those that the minor language never says, or the others."""
    every = torch.cartesian_prod(torch.arange(SUBJECTS), torch.arange(VERBS))
    return every if unsaid is None else every[world().unsaid.flatten() == unsaid]
