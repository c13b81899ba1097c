"""zoo/functions (Z6): the same words mapped in four ways, told by a word for the task or shown by examples.

Shown: `<bos> x1 y1 x2 y2 ... x5 y5`, all pairs of one function f: y = f(x). Told: `<bos> do-f x y`. Functions have the same
inputs and no output in common (a word's antonym, capital, plural and translation are different words), so that one output
says which function it is, and no input does. The law is known: a first output that is shown has four values of the same
probability (loss log 4), every later one and every one that is told is certain (loss 0).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.edits import Add
from patchclamp.errors import TaskError
from patchclamp.sites import Site
from patchclamp.tasks import Pair, Task, Tokenizer
from patchclamp.training import Rows, Training
from patchclamp.zoo.recipes._llama import BOS, PAD, Exchange, carriers, last, llama, put_from_there, share
from patchclamp.zoo.recipes._look import judged, named
from patchclamp.zoo.recipes._recipe import SPECIAL, Finding, Goal, Recipe, drawing, held_out

if TYPE_CHECKING:
    from patchclamp.models.model import Model

KINDS = ("antonym", "capital", "plural", "french")
WORDS = 16
FORMS = ("shown", "told")
DO, IN = len(SPECIAL), len(SPECIAL) + len(KINDS)
OUT = IN + WORDS
VOCABULARY = (
    *SPECIAL, *(f"do-{kind}" for kind in KINDS), *(f"w{word}" for word in range(WORDS)),
    *(f"{kind}-w{word}" for kind in KINDS for word in range(WORDS)),
)  # fmt: skip


@dataclass(frozen=True)
class Functions:
    """Rows of one function each: shown by `shots` examples, or (a share `told` of rows) told by its word, and padded.

    Weights are on outputs alone, for inputs are drawn evenly. Labels: `kind`, the function; `told`, 0 or 1.
    """

    seed: int = 0
    shots: int = 5
    told: float = 0.3

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        return f"functions-{len(KINDS)}-{WORDS}-{self.shots}-{self.told}-seed-{self.seed}"

    def rows(self, step: int, count: int) -> Rows:
        """Rows of one update."""
        draw = drawing(self.name, step)
        kind = torch.randint(0, len(KINDS), (count,), generator=draw)
        words = torch.rand(count, WORDS, generator=draw).argsort(1)[:, : self.shots]
        told = torch.rand(count, generator=draw) < self.told
        shown = torch.cat([torch.full((count, 1), BOS), examples(kind, words)], 1)
        brief = torch.full_like(shown, PAD)
        brief[:, 0], brief[:, 1], brief[:, 2] = BOS, DO + kind, IN + words[:, 0]
        brief[:, 3] = answer(kind, words[:, 0])
        tokens = torch.where(told[:, None], brief, shown)
        return Rows(tokens, (tokens >= OUT).float(), tokens != PAD, {"kind": kind, "told": told.long()})


def answer(kind: Int[Tensor, "..."], word: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The token that a function makes of a word, both by number."""
    return OUT + kind * WORDS + word


def kind_of(output: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """The function that an output is one of."""
    return (output - OUT) // WORDS


def examples(kind: Int[Tensor, " row"], words: Int[Tensor, "row shot"]) -> Int[Tensor, "row place"]:
    """`x1 y1 x2 y2 ...` as tokens."""
    return torch.stack([IN + words, answer(kind[:, None], words)], 2).flatten(1)


def prompts(form: str, kind: Int[Tensor, " row"], words: Int[Tensor, "row word"]) -> Int[Tensor, "row position"]:
    """Prompts that ask what a function makes of each row's last word; those before are its examples (told: they are left out)."""
    told = [DO + kind[:, None]] if form == "told" else [examples(kind, words[:, :-1])]
    return torch.cat([torch.full((len(kind), 1), BOS), *told, IN + words[:, -1:]], 1)


def build(seed: int = 0) -> Any:
    """2 layers of 4 heads, width 64."""
    return llama(len(VOCABULARY), seed, layers=2)


def measure(model: "Model", seed: int = 0) -> dict[str, float]:
    """Shown, from the second output on: test_loss and accuracy; of the first output and of those that are told: accuracy."""
    rows = held_out(Functions(seed), 256)
    logits, asked = model.run(rows.batch), rows.weights > 0
    assert rows.labels is not None
    told, first = rows.labels["told"].bool()[:, None], torch.arange(rows.tokens.shape[1])[None] == 2
    numbers = judged(logits, rows.tokens, asked & ~told & ~first)
    numbers["told"] = judged(logits, rows.tokens, asked & told)["accuracy"]
    return numbers | {"first": judged(logits, rows.tokens, asked & ~told & first)["accuracy"]}


def exchange(form: str, seed: int, step: int, count: int = 96) -> Exchange:
    """Prompts of one form, drawn for two functions each."""
    data = Functions(seed)
    draw = drawing(f"{data.name}-{form}-exchange", step)
    kind = torch.randint(0, len(KINDS), (count,), generator=draw)
    other = (kind + torch.randint(1, len(KINDS), (count,), generator=draw)) % len(KINDS)
    words = torch.rand(count, WORDS, generator=draw).argsort(1)[:, : data.shots]
    here, there = (prompts(form, one, words) for one in (kind, other))
    return Exchange(here, there, answer(kind, words[:, -1]), answer(other, words[:, -1]))


def averages(
    model: "Model", tokens: Int[Tensor, "row position"], kind: Int[Tensor, " row"], heads: set[Site]
) -> dict[Site, Float[Tensor, "function width"]]:
    """Heads' mean output at the last token of prompts of each function; zero where there are none."""
    values = model.record(tokens, sorted({site.at(None) for site in heads})) if heads else {}
    chosen = torch.nn.functional.one_hot(kind, len(KINDS)).float()
    weights = chosen / chosen.sum(0).clamp(min=1)
    return {site: weights.T @ values[site.at(None)][:, -1] for site in heads}


def vectors(model: "Model", form: str, heads: set[Site], seed: int = 0) -> dict[Site, Float[Tensor, "function width"]]:
    """Function vectors: the heads' mean outputs at the last token of prompts of each function, over all words."""
    pairs = exchange(form, seed, -4)
    return averages(model, pairs.there, kind_of(pairs.other), heads)


def found(model: "Model", seed: int = 0) -> tuple[Finding, ...]:
    """Heads that carry the function, in each form, against all other sets of as many; their mean put into prompts without any."""
    claims, mean = list[Finding](), dict[str, dict[Site, Tensor]]()
    for form in FORMS:
        heads = carriers(model, exchange(form, seed, -3))
        own, others, sets = put_from_there(model, exchange(form, seed, -2), heads)
        mean[form] = vectors(model, form, heads, seed)
        which = named({site.at(None) for site in heads})
        claims += [
            Finding(f"{form}: {which} from another function's prompt, that function is applied", own, Goal("share", least=0.8)),
            Finding(f"{form}: as many other heads (or all others), mean of {sets} sets", others, Goal("share", most=0.2)),
        ]
    return (*claims, *_put_in(model, mean, seed))


def _put_in(model: "Model", mean: dict[str, dict[Site, Tensor]], seed: int) -> Iterator[Finding]:
    """Function vectors in prompts of a word alone, and of each form in prompts of the other form that ask for another function."""
    shown, told = (exchange(form, seed, -5) for form in FORMS)

    def says(tokens: Tensor, asked: Tensor, values: dict[Site, Tensor], pairs: Exchange, blind: bool = False) -> float:
        """Each head's output shifted from its mean on prompts that are `asked` alike to its mean on prompts of the wanted function."""
        here, wanted = averages(model, tokens, asked, set(values)), kind_of(pairs.other)
        there = {site: value.mean(0, keepdim=True).expand_as(value) if blind else value for site, value in values.items()}
        edits = {site: Add((value[wanted] - here[site][asked])[:, None]) for site, value in there.items()}
        return share(last(model, tokens, edits), pairs.other)

    bare, none = torch.cat([shown.here[:, :1], shown.here[:, -1:]], 1), torch.zeros_like(shown.said)
    vector, blind = says(bare, none, mean["shown"], shown), says(bare, none, mean["shown"], shown, blind=True)
    across = says(shown.here, kind_of(shown.said), mean["told"], shown)
    back = says(told.here, kind_of(told.said), mean["shown"], told)
    yield Finding(
        "shifted to their mean over shown prompts, a word alone: that function is applied", vector, Goal("share", least=0.8)
    )
    yield Finding("the mean of all functions instead", blind, Goal("share", most=0.4))
    yield Finding("shifted to means of told prompts, shown prompts of another function", across, Goal("share", least=0.5))
    yield Finding("shifted to means of shown prompts, told prompts of another function", back, Goal("share", least=0.5))


def task(form: str = "shown", seed: int = 0) -> Task:
    """Pairs of prompts of one form that differ in the function: `patchclamp gate zoo/functions patchclamp.zoo.recipes.functions`.

    Raises:
        TaskError: a form that there is not.
    """
    if form not in FORMS:
        raise TaskError(f"functions of the form {form!r} were asked for: choose from {', '.join(FORMS)}")
    about = f"which of four functions is {form}, and what it makes of a word"
    return Task(f"functions-{form}", about, partial(_candidates, form, seed), single=True, options={"form": form, "seed": seed})


def _candidates(form: str, seed: int, rng: random.Random, tokenizer: Tokenizer) -> Iterator[Pair]:
    """Pairs as token ids: they are the recipe's, whatever the tokenizer."""
    while True:
        pairs = exchange(form, seed, -1 - rng.randrange(2**31), 32)
        rows = zip(pairs.here.tolist(), pairs.said.tolist(), pairs.there.tolist(), pairs.other.tolist(), strict=True)
        yield from (Pair(here, (said,), there, (other,)) for here, said, there, other in rows)


RECIPES = (
    Recipe(
        name="functions",
        row="Z6",
        about="2 layers of 4 heads (Llama, width 64) on four functions of 16 words, shown by examples or told by a word for the task",
        known="a few heads carry to the last token which function it is; their mean, put elsewhere, has it applied there",
        paper="Todd et al. 2023, Function Vectors in Large Language Models, https://arxiv.org/abs/2310.15213",
        minutes=5.0,
        goals=(Goal("accuracy", least=0.95), Goal("told", least=0.95)),
        build=build,
        data=Functions,
        training=Training(250, batch=64, rate=3e-3, warmup=20, betas=(0.9, 0.98), decay=0.01, checkpoints=8, evaluate=100),
        measure=measure,
        found=found,
        vocabulary=VOCABULARY,
        ships=True,
    ),
)
