"""zoo/needle (Z14): needles in a long row; a key is asked at the end, and its value stands somewhere in the text, or is known by heart.

A row is `<bos>`, words of a text, and eight questions. Between the words stand six needles, each a key and its value: keys differ,
values are drawn with replacement. Six questions `find key value` ask for needles of the row, each for any of the six
(were they to ask for different ones, which is left would tell something of the last ones); two, `know key value`, for what a key's
value is by a fixed table, whatever the row says.
So the same key can be asked of the text and of the weights (the paper's closed book), and the words' law needs neither. That law
is a random one of which word comes two places behind which token, key or value or word: so that from every place in the text the
model must look one token back, at values, too. Without such a law no head came to look back in 1000 updates.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.models.editing import Edits
from patchclamp.sites import Site
from patchclamp.training import Rows, Training
from patchclamp.zoo.recipes import _lookup
from patchclamp.zoo.recipes._look import judged, losses, means, named
from patchclamp.zoo.recipes._recipe import SPECIAL, Finding, Goal, Recipe, drawing

if TYPE_CHECKING:
    from patchclamp.models.model import Model

KEYS, VALUES, WORDS = 32, 32, 32
NEEDLES, FOUND, KNOWN = 6, 6, 2
"""Needles of a row; questions that ask for one of them; questions that ask for what is known by heart."""
LENGTH, SHORTER = 96, (64, 80)
"""Tokens of a row; of training rows, in two updates of three."""
FIXED = 1 + 2 * NEEDLES + 3 * (FOUND + KNOWN)
"""Tokens of a row that are no words of the text."""
FIND, KNOW = len(SPECIAL), len(SPECIAL) + 1
KEY = KNOW + 1
VALUE, WORD = KEY + KEYS, KEY + KEYS + VALUES
VOCABULARY = (
    *SPECIAL, "find", "know", *(f"k{i}" for i in range(KEYS)), *(f"v{i}" for i in range(VALUES)), *(f"w{i}" for i in range(WORDS)),
)  # fmt: skip
WEIGHT = 0.2
"""What a word of the text counts in training; an answer counts 1."""
SHARED = 0.4
"""What all tokens' embeddings begin with in common."""
COPIES, FEW, SETS = 0.1, 4, 20
"""The paper's threshold of a retrieval head; how many of 16 heads are few; other sets of heads that are tried, at most."""


@dataclass(frozen=True)
class Needles:
    """Rows of `length` tokens with six needles and six questions; steps from 0 on have shorter ones in turn with these.

    With `again` a needle may be asked for more than once, as in training; without, the six are different.

    Labels: `needle` [row, 6], the places of the needles' keys, in order; `target` [row, 6], which needle each `find` asks for, in
    the order of questions; `find` [row, 6] and `know` [row, 2], the places of the keys that are asked about.
    """

    seed: int = 0
    length: int = LENGTH
    shorter: tuple[int, ...] = SHORTER
    again: bool = True

    def __post_init__(self) -> None:
        least = min((self.length, *self.shorter))
        if least - FIXED < NEEDLES:
            raise TrainingError(f"rows of {least} tokens have no room for {NEEDLES} needles: give at least {FIXED + NEEDLES}")

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        return f"needles-{KEYS}-{VALUES}-{WORDS}-{NEEDLES}-{FOUND}-{KNOWN}-{self.length}-{self.shorter}-{self.again}-seed-{self.seed}"

    @property
    def law(self) -> Float[Tensor, "token next"]:
        """Which word comes two places behind which key, value or word, in rows of every length: drawn evenly and sharpened."""
        return _law(self.seed)

    @property
    def known(self) -> Int[Tensor, " key"]:
        """Each key's value by heart, as a token."""
        return VALUE + torch.randint(0, VALUES, (KEYS,), generator=drawing(f"needles-known-seed-{self.seed}"))

    def rows(self, step: int, count: int) -> Rows:
        """Rows of one update."""
        draw = drawing(self.name, step)
        length = self.length if step < 0 else (*self.shorter, self.length)[step % (len(self.shorter) + 1)]
        gaps = torch.rand(count, length - FIXED, generator=draw).argsort(1)[:, :NEEDLES].sort(1).values
        keys = KEY + torch.rand(count, KEYS, generator=draw).argsort(1)[:, :NEEDLES]
        values = VALUE + torch.randint(0, VALUES, keys.shape, generator=draw)
        needle = 1 + gaps + 2 * torch.arange(NEEDLES)
        tokens = torch.full((count, length), SPECIAL.index("<bos>")).scatter(1, needle, keys).scatter(1, needle + 1, values)
        free = torch.ones_like(tokens, dtype=torch.bool).scatter(1, needle, False).scatter(1, needle + 1, False)
        first = length - 3 * (FOUND + KNOWN)
        even = torch.full((count, WORDS), 1 / WORDS)
        for place in range(1, first):
            shares = self.law[tokens[:, place - 2] - KEY] if place > 2 else even
            word = WORD + torch.multinomial(shares, 1, generator=draw)[:, 0]
            tokens[:, place] = torch.where(free[:, place], word, tokens[:, place])
        weights = torch.zeros(tokens.shape)
        weights[:, 3:first] = WEIGHT * free[:, 3:first]
        return self._asked(Rows(tokens, weights, labels={"needle": needle}), draw)

    def _asked(self, rows: Rows, draw: torch.Generator) -> Rows:
        """The questions put in, in random order, and weight on their answers."""
        assert rows.labels is not None
        tokens, weights, needle = rows.tokens.clone(), rows.weights.clone(), rows.labels["needle"]
        count = len(tokens)
        any_of = torch.randint(0, NEEDLES, (count, FOUND), generator=draw)
        target = any_of if self.again else torch.rand(count, NEEDLES, generator=draw).argsort(1)[:, :FOUND]
        known = torch.randint(0, KEYS, (count, KNOWN), generator=draw)
        place = needle.gather(1, target)
        asks = torch.tensor([FIND] * FOUND + [KNOW] * KNOWN).expand(count, -1)
        keys = torch.cat([tokens.gather(1, place), KEY + known], 1)
        answers = torch.cat([tokens.gather(1, place + 1), self.known[known]], 1)
        order = torch.rand(count, FOUND + KNOWN, generator=draw).argsort(1)
        questions = torch.stack([asks, keys, answers], 2).gather(1, order[:, :, None].expand(-1, -1, 3))
        first = tokens.shape[1] - 3 * (FOUND + KNOWN)
        tokens[:, first:] = questions.flatten(1)
        weights[:, first + 2 :: 3] = 1.0
        places = first + 1 + 3 * torch.arange(FOUND + KNOWN).expand(count, -1)
        finds = order < FOUND
        labels = {"needle": needle, "target": target.gather(1, order[finds].reshape(count, FOUND))}
        labels |= {"find": places[finds].reshape(count, FOUND), "know": places[~finds].reshape(count, KNOWN)}
        return Rows(tokens, weights, labels=labels)


@cache
def _law(seed: int) -> Float[Tensor, "token next"]:
    return (3 * torch.rand(KEYS + VALUES + WORDS, WORDS, generator=drawing(f"needles-law-seed-{seed}"))).pow(2).softmax(-1)


def behind(rows: Rows, name: str) -> Bool[Tensor, "row position"]:
    """The answers of the questions `find` or `know`."""
    assert rows.labels is not None
    return torch.zeros(rows.tokens.shape, dtype=torch.bool).scatter(1, rows.labels[name] + 1, True)


def build(seed: int = 0) -> Any:
    """A Llama of 2 layers of 8 heads of 16, width 64, for rows of up to 256 tokens.

    Rotary frequencies fall to about 1 / 3200 a token: four of eight turn by less than a radian over the row, so that a key matches
    itself from afar (falling to 1 / 56, only one or two do). One coordinate of the embedding begins the same for all tokens (four
    deviations of the others, as in zoo/classes): a head that looks one token back needs something that all tokens share.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8, head_dim=16,
        max_position_embeddings=256, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = SHARED
    return model


def worded(tokens: Int[Tensor, "row position"]) -> Bool[Tensor, "row next"]:
    """Of all tokens but the first: words that the law tells, all but the row's first two."""
    return (tokens[:, 1:] >= WORD) & (torch.arange(1, tokens.shape[1]) > 2)


def excess(logits: Float[Tensor, "row position token"], rows: Rows, data: Needles) -> float:
    """How far the loss of words is above their law's own, in nats."""
    chosen = worded(rows.tokens)
    before, after = rows.tokens[:, :-2][chosen[:, 1:]] - KEY, rows.tokens[:, 1:][chosen] - WORD
    return float((losses(logits, rows.tokens)[chosen] + data.law[before, after].log()).mean())


def measure(model: "Model", seed: int = 0) -> dict[str, float]:
    """Of needles: loss, `accuracy`, and `longer`, accuracy in rows twice as long; `know`, accuracy by heart; `excess` of words, in nats."""
    data, twice = Needles(seed, again=False), Needles(seed, 2 * LENGTH, again=False)
    rows, more = data.rows(-1, 256), twice.rows(-1, 64)
    logits = model.run(rows.tokens)
    numbers = judged(logits, rows.tokens, behind(rows, "find")) | {"excess": excess(logits, rows, data)}
    numbers["know"] = judged(logits, rows.tokens, behind(rows, "know"))["accuracy"]
    return numbers | {"longer": judged(model.run(more.tokens), more.tokens, behind(more, "find"))["accuracy"]}


def lookup(rows: Rows) -> _lookup.Lookup:
    """Where answers stand. Exchanged are the keys of needles 1 and 2, 3 and 4, 5 and 6 (at their values' places)."""
    assert rows.labels is not None
    needle, target, find = (rows.labels[name] for name in ("needle", "target", "find"))
    count, width = rows.tokens.shape
    value, row = needle + 1, torch.arange(count)[:, None]
    before, after = (torch.zeros(count, width, width, dtype=torch.bool) for _ in range(2))
    before[row, value, needle] = True
    after[row, find, value.gather(1, target)] = True
    partner = torch.arange(NEEDLES) ^ 1
    exchange = torch.arange(width).repeat(count, 1).scatter(1, value, value[:, partner])
    other = rows.tokens.scatter(1, find + 1, rows.tokens.gather(1, value.gather(1, partner[target])))
    return _lookup.Lookup(rows.tokens, behind(rows, "find"), before, after, exchange, other, 1 / NEEDLES)


def retrieval(model: "Model", rows: Rows) -> dict[Site, float]:
    """Each head's retrieval score: share of needles that are said while the head's largest attention is on their value.

    score(h) = |{questions that are answered rightly, and argmax_j A_h[asking, j] is the value's place}| / |questions|

    (https://arxiv.org/abs/2404.15574; there over all generated tokens of an answer, here answers have one.) One forward pass.
    """
    assert rows.labels is not None
    needle, target, find = (rows.labels[name] for name in ("needle", "target", "find"))
    row, value = torch.arange(len(find))[:, None], needle.gather(1, target) + 1
    right = model.run(rows.tokens).argmax(-1)[row, find] == rows.tokens[row, value]
    patterns = model.record(rows.tokens, "L*.pattern")
    scores = dict[Site, float]()
    for site, pattern in patterns.items():
        most = pattern.argmax(-1)
        for head in range(most.shape[1]):
            scores[Site("z", site.layer, head)] = float(((most[:, head][row, find] == value) & right).float().mean())
    return scores


def heads(model: "Model", rows: Rows) -> set[Site]:
    """Retrieval heads: those of a score of `COPIES` and more."""
    return {site for site, score in retrieval(model, rows).items() if score >= COPIES}


def closings(model: "Model", rows: Rows, sets: list[set[Site]]) -> list[dict[str, float]]:
    """For each set of heads, held at their mean over rows and positions: accuracy of `find` and `know`, and the mean loss of words.

    Cost: two forward passes a set.
    """
    chosen, found = worded(rows.tokens), list[dict[str, float]]()
    for some in sets:
        edits: Edits = means(model, rows.tokens, some)
        logits = model.run(rows.tokens, edits)
        numbers = {name: judged(logits, rows.tokens, behind(rows, name))["accuracy"] for name in ("find", "know")}
        found.append(numbers | {"words": float(losses(logits, rows.tokens)[chosen].mean())})
    return found


def others(among: set[Site], size: int) -> list[set[Site]]:
    """Sets of so many of these heads (all of them, where there are fewer): all there are, or `SETS` drawn at random."""
    sets = [set(some) for some in combinations(sorted(among), min(size, len(among)))]
    return (
        sets if len(sets) <= SETS else [sets[i] for i in torch.randperm(len(sets), generator=drawing("needles"))[:SETS].tolist()]
    )


def found(model: "Model", seed: int = 0) -> tuple[Finding, ...]:
    """Few heads copy; without them needles are lost, and nothing else is; and the lookup's two steps (`_lookup`)."""
    rows = Needles(seed, again=False).rows(-2, 192)
    place = lookup(rows)
    scores, copy = retrieval(model, rows), heads(model, rows)
    back = {Site("z", 0, head) for head, score in enumerate(_lookup.attention(model, place)["before"]) if score > _lookup.PART}
    rest = others(set(scores) - copy - back, max(len(copy), 1))
    whole, without, *controls = closings(model, rows, [set(), copy, *rest])
    control = sum(one["find"] for one in controls) / len(controls)
    few = len(copy) if copy else len(scores)
    return (
        Finding(f"few of {len(scores)} heads copy needles ({named(copy)}): how many", float(few), Goal("number", most=float(FEW))),
        Finding("share of needles said while the first of them looks at the value", max(scores.values()), Goal("score", least=_lookup.LOOKS)),
        Finding("without them needles are lost", without["find"], Goal("accuracy", most=place.chance + _lookup.ABOVE)),
        Finding(f"without as many that neither copy nor look one token back they are not, mean of {len(controls)} sets",
                control, Goal("accuracy", least=_lookup.KEPT)),
        Finding("without them what is known by heart stays", without["know"], Goal("accuracy", least=0.9)),
        Finding("without them words cost hardly more, nats", without["words"] - whole["words"], Goal("nats", most=0.05)),
        *_lookup.found(model, place),
    )  # fmt: skip


RECIPES = (
    Recipe(
        name="needle",
        row="Z14",
        about="2 layers of 8 heads (Llama, width 64) on rows of 96 tokens: six keys with values among random words, asked for at the end",
        known="few heads copy the value that is asked for; without them it is lost, and what is known by heart and the words' law are not",
        paper="Wu et al. 2024, Retrieval Head Mechanistically Explains Long-Context Factuality, https://arxiv.org/abs/2404.15574",
        minutes=10.0,
        goals=(Goal("accuracy", least=0.95), Goal("know", least=0.95), Goal("excess", most=0.1)),
        build=build,
        data=Needles,
        training=Training(
            600,
            batch=64,
            rate=5e-3,
            schedule="wsd",
            cooldown=200,
            warmup=50,
            betas=(0.9, 0.98),
            decay=0.01,
            evaluate=50,
            checkpoints=8,
            states="last",
        ),
        measure=measure,
        found=found,
        vocabulary=VOCABULARY,
    ),
)
