"""Rows of zoo/experts: three languages with bigram laws of their own, and questions, some of which must be refused."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.training import Rows
from patchclamp.zoo.recipes._recipe import SPECIAL, drawing

BOS = SPECIAL.index("<bos>")
ASK, ANSWER, REFUSE, TAG = range(len(SPECIAL), len(SPECIAL) + 4)
LANGUAGES, WORDS, FORBIDDEN = 3, 16, 4
"""Languages; the words that they share, and as many plain words of questions; forbidden words of questions."""
FIRST = TAG + LANGUAGES + 1
PLAIN = FIRST + WORDS
BAD = PLAIN + WORDS
START, QUESTION = 2, 6
"""Where the first word is, behind `<bos>` and a tag; tokens of a question with its reply."""
VOCABULARY = (
    *SPECIAL, "<ask>", "<answer>", "<refuse>", "<a>", "<b>", "<c>", "<questions>", *(f"w{i}" for i in range(WORDS)),
    *(f"q{i}" for i in range(WORDS)), *(f"forbidden{i}" for i in range(FORBIDDEN)),
)  # fmt: skip


@dataclass(frozen=True)
class Domains:
    """Rows of `<bos>`, a tag that says the domain, and 24 tokens: words of languages 0 to 2, or four questions (domain 3).

    Domains are drawn evenly. The languages share their words; rows of each one's bigram law are drawn from a Dirichlet law (concentration
    `even` for each word), first words evenly. Half of all questions hold one forbidden word, at any of three places; other words are
    drawn evenly. Laws and replies depend on nothing but the sizes, so that seeds share them. Weight is on words of languages behind
    the first and on replies. Labels: `domain`.
    """

    seed: int = 0
    questions: int = 4
    even: float = 0.1

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        return f"domains-{LANGUAGES}-{WORDS}-{FORBIDDEN}-{self.questions}-{self.even}-seed-{self.seed}"

    @property
    def laws(self) -> Float[Tensor, "language word next"]:
        """Each language's bigram law."""
        return _laws(self.even)

    def rows(self, step: int, count: int) -> Rows:
        """Rows of one update."""
        draw = drawing(self.name, step)
        domain = torch.randint(0, LANGUAGES + 1, (count,), generator=draw)
        asks = (domain == LANGUAGES)[:, None]
        body = torch.where(asks, self._asked(count, draw), self._said(domain, draw))
        tokens = torch.cat([torch.full((count, 1), BOS), TAG + domain[:, None], body], 1)
        weights = torch.where(asks, replies(tokens), torch.arange(tokens.shape[1]) > START).float()
        return Rows(tokens, weights, labels={"domain": domain})

    def _said(self, domain: Int[Tensor, " row"], draw: torch.Generator) -> Int[Tensor, "row place"]:
        """Words by each row's bigram law (of rows with questions, by the first one's: they are not used)."""
        spoken = domain % LANGUAGES
        words = [torch.randint(0, WORDS, domain.shape, generator=draw)]
        while len(words) < self.questions * QUESTION:
            words.append(torch.multinomial(self.laws[spoken, words[-1]], 1, generator=draw)[:, 0])
        return FIRST + torch.stack(words, 1)

    def _asked(self, count: int, draw: torch.Generator) -> Int[Tensor, "row place"]:
        """Questions with their replies, one behind the other."""
        return questions(count * self.questions, draw).reshape(count, -1)

    def best(self, tokens: Int[Tensor, "row position"]) -> Float[Tensor, "row next"]:
        """-log p under the law, in nats, of each token but the first that has a weight; 0 for replies and elsewhere."""
        spoken, word = tokens[:, 1:2] - TAG, (tokens[:, START:] - FIRST).clamp(0, WORDS - 1)
        told = -self.laws[spoken.clamp(max=LANGUAGES - 1), word[:, :-1], word[:, 1:]].log()
        return torch.cat([torch.zeros(len(tokens), START), torch.where(spoken < LANGUAGES, told, 0.0)], 1)


@cache
def _laws(even: float) -> Float[Tensor, "language word next"]:
    rng = np.random.default_rng(drawing(f"languages-{LANGUAGES}-{WORDS}-{even}").initial_seed())
    laws = torch.from_numpy(rng.dirichlet([even] * WORDS, (LANGUAGES, WORDS))).clamp(min=1e-4)
    return (laws / laws.sum(-1, keepdim=True)).float()


@cache
def reply_of() -> Int[Tensor, " word"]:
    """The reply to each first word, as token ids: all plain words in another order."""
    return PLAIN + torch.randperm(WORDS, generator=drawing(f"replies-{WORDS}"))


def questions(count: int, draw: torch.Generator, share: float = 0.5) -> Int[Tensor, "question place"]:
    """`<ask> a b c <answer> reply`; a share of them holds one forbidden word."""
    asked = PLAIN + torch.randint(0, WORDS, (count, 3), generator=draw)
    bad = BAD + torch.randint(0, FORBIDDEN, (count, 1), generator=draw)
    place = torch.randint(0, 3, (count, 1), generator=draw)
    chosen = (torch.rand(count, 1, generator=draw) < share) & (torch.arange(3) == place)
    asked = torch.where(chosen, bad, asked)
    reply = torch.where(forbidden(asked), REFUSE, reply_of()[asked[:, 0].clamp(max=BAD - 1) - PLAIN])
    ask, answer = (torch.full((count, 1), token) for token in (ASK, ANSWER))
    return torch.cat([ask, asked, answer, reply[:, None]], 1)


def forbidden(asked: Int[Tensor, "question place"]) -> Bool[Tensor, " question"]:
    """Which questions hold a forbidden word."""
    return (asked >= BAD).any(1)


def replies(tokens: Int[Tensor, "row position"]) -> Bool[Tensor, "row position"]:
    """Which tokens are replies: those behind `<answer>`."""
    return torch.cat([torch.zeros(len(tokens), 1, dtype=torch.bool), tokens[:, :-1] == ANSWER], 1)
