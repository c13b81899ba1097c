"""zoo/tagged (Z13): a corpus whose words hang on a tag at the beginning: affects, styles, topics, a refusal; and because/so.

The law is in `_tags.py`, what is found of affects in `_affects.py`. Here: the model, what it reaches, heads that bring a tag to
the word that hangs on it, and what becomes of `because` and `so` (Lee et al. 2024, https://arxiv.org/abs/2410.21353).
"""

import random
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from patchclamp.errors import TaskError
from patchclamp.patching import patch
from patchclamp.scores import Scores
from patchclamp.sites import Site
from patchclamp.tasks import Pair, Task, Tokenizer
from patchclamp.training import Training
from patchclamp.zoo._compile import tokenizer
from patchclamp.zoo.recipes._affects import affect_findings
from patchclamp.zoo.recipes._llama import BOS, Exchange, carriers, last, llama, put_from_there, share
from patchclamp.zoo.recipes._look import judged, losses, named
from patchclamp.zoo.recipes._recipe import Finding, Goal, Recipe, drawing, held_out
from patchclamp.zoo.recipes._tags import (
    AND,
    EVENTS,
    FIRST,
    NOUNS,
    PEOPLE,
    SORRY,
    TOPICS,
    VERBS,
    VOCABULARY,
    Tagged,
    cause,
    deed,
    feeling,
    kept_back,
    linked,
    scene,
)

if TYPE_CHECKING:
    from patchclamp.models.model import Model

LAYERS = 3
ASKED = ("affect", "style", "refuse", "cause")
MARK = 3
"""Where `because` or `so` stands."""


def build(seed: int = 0) -> Any:
    """3 layers of 4 heads, width 64."""
    return llama(len(VOCABULARY), seed, layers=LAYERS)


def measure(model: "Model", seed: int = 0) -> dict[str, float]:
    """Nats above the smallest possible loss, over all words; accuracy of affects' words and acts in scenes that were kept back, and
    of `sorry`; of causes, the share of most probable events that are the chain's."""
    data = Tagged(seed)
    rows, (affect, who, event) = held_out(data), kept_back()
    assert rows.labels is not None
    logits = model.run(rows.batch)
    above = (losses(logits, rows.tokens) - data.best(rows))[rows.real[:, 1:]]
    kind, tag, place = rows.labels["kind"][:, None], rows.labels["tag"][:, None], torch.arange(rows.tokens.shape[1])[None]

    def right(asked: Tensor) -> float:
        return judged(logits, rows.tokens, asked)["accuracy"]

    word, act, scenes = feeling(affect, event), deed(affect, who), scene(affect, who, event)
    acts = torch.cat([scenes, word[:, None], torch.full_like(who, AND)[:, None]], 1)
    return {
        "excess": float(above.mean()),
        "affect": (share(last(model, scenes), word) + share(last(model, acts), act)) / 2,
        "refuse": right((kind == 1) & (tag == 2) & (place == 3)),
        "cause": right((kind == 2) & (place == 5) & (rows.labels["sense"][:, None] == 1)),
    }


def exchange(fact: str, seed: int, step: int, count: int = 64) -> Exchange:
    """Prompts that differ in one fact alone: the affect; the style (asked for a verb); <refuse> or a style; because or so.

    What is said of styles is the likeliest word by the law: of verbs the style's first one, of nouns the topic's.
    """
    draw = drawing(f"{Tagged(seed).name}-{fact}-exchange", step)

    def any_of(size: int) -> Int[Tensor, " row"]:
        return torch.randint(0, size, (count,), generator=draw)

    who, event, topic, noun, side = any_of(PEOPLE), any_of(EVENTS), any_of(len(TOPICS)), any_of(NOUNS), any_of(2)
    if fact == "affect":
        here = any_of(6)
        there = (here + 1 + any_of(5)) % 6
        return Exchange(scene(here, who, event), scene(there, who, event), feeling(here, event), feeling(there, event))
    if fact == "cause":
        return Exchange(
            cause(who, event, side),
            cause(who, event, 1 - side),
            *(FIRST["event"] + linked(event, one) for one in (side, 1 - side)),
        )
    topics, first = FIRST["topic"] + topic, FIRST["noun"] + topic * NOUNS
    if fact == "style":
        styled = [[FIRST["style"] + one, topics, first + noun] for one in (side, 1 - side)]
        verbs = [FIRST["verb"] + one * VERBS for one in (side, 1 - side)]
        return Exchange(_begun(styled[0]), _begun(styled[1]), verbs[0], verbs[1])
    tags, answers = (side, torch.full_like(side, 2)), (first, torch.full_like(side, SORRY))
    refused = [_begun([FIRST["style"] + one, topics]) for one in tags]
    return Exchange(refused[0], refused[1], answers[0], answers[1])


def _begun(columns: list[Int[Tensor, " row"]]) -> Int[Tensor, "row position"]:
    return torch.stack([torch.full_like(columns[0], BOS), *columns], 1)


def task(fact: str = "affect", seed: int = 0) -> Task:
    """Pairs of prompts that differ in one fact, as token ids: `patchclamp map zoo/tagged patchclamp.zoo.recipes.tagged`.

    Args:
        fact: affect, style, refuse or cause (because or so).
        seed: of the prompts.

    Raises:
        TaskError: a fact that there is not.
    """
    if fact not in ASKED:
        raise TaskError(f"pairs that differ in {fact!r} were asked for: choose from {', '.join(ASKED)}")
    about = f"tagged corpus: what hangs on the {fact}"
    return Task(f"tagged-{fact}", about, partial(_candidates, fact, seed), single=True, options={"fact": fact, "seed": seed})


def _candidates(fact: str, seed: int, rng: random.Random, tokenizer: Tokenizer) -> Iterator[Pair]:
    """Pairs of token ids; because/so names the place of the mark as the span `mark`."""
    spans = {"mark": (MARK, MARK + 1)} if fact == "cause" else {}
    while True:
        pairs = exchange(fact, seed, -1 - rng.randrange(2**31), 32)
        rows = zip(pairs.here.tolist(), pairs.said.tolist(), pairs.there.tolist(), pairs.other.tolist(), strict=True)
        yield from (Pair(here, (said,), there, (other,), spans) for here, said, there, other in rows)


def marks(model: "Model", seed: int = 0, n: int = 64) -> Scores:
    """Causal sentences: what exchanging `because` and `so` takes from the second event, for the residual stream at the mark before
    each layer, and for the output of each layer's heads at the last token (exact; `patchclamp.patching.patch`).

    Paper: Lee et al. 2024, https://arxiv.org/abs/2410.21353 (P168). Cost: a forward pass per part and example.
    """
    examples = task("cause", seed).examples(tokenizer(VOCABULARY), n, seed)
    sites = [f"L*.resid.pre@{MARK}", f"L{model.layers - 1}.resid.post@{MARK}", "L*.z@-1"]
    return patch(model, examples, sites, seed=seed)


def attention_to_mark(model: "Model", seed: int = 0) -> list[float]:
    """By layer: mean attention of the last token of `<bos> who event because|so who` on the mark, heads together."""
    pairs = exchange("cause", seed, -3)
    patterns = model.record(pairs.here, "L*.pattern")
    return [float(patterns[Site("pattern", layer)][:, :, -1, MARK].mean()) for layer in range(model.layers)]


def surprise(model: "Model", seed: int = 0) -> float:
    """Nats by which the second event of nonsense sentences is less expected than that of others: under the law, log(99) = 4.6."""
    data = Tagged(seed)
    rows = held_out(data, 1024, step=-6)
    assert rows.labels is not None
    costs = losses(model.run(rows.batch), rows.tokens)[:, 4]
    causes, sense = rows.labels["kind"] == 2, rows.labels["sense"] == 1
    return float(costs[causes & ~sense].mean() - costs[causes & sense].mean())


def found(model: "Model", seed: int = 0) -> tuple[Finding, ...]:
    """Heads that bring each tag to the word that hangs on it; where because and so are read; circuits of affects."""
    return (*_tags_found(model, seed), *_marks_found(model, seed), *affect_findings(model, seed))


def _tags_found(model: "Model", seed: int) -> Iterator[Finding]:
    for fact in ASKED[:3]:
        heads = carriers(model, exchange(fact, seed, -3))
        own, others, sets = put_from_there(model, exchange(fact, seed, -2), heads)
        which = named({site.at(None) for site in heads})
        yield Finding(f"{fact}: {which} from a prompt of another tag, that tag's word is said", own, Goal("share", least=0.8))
        yield Finding(f"{fact}: as many other heads (or all others), mean of {sets} sets", others, Goal("share", most=0.2))


def _marks_found(model: "Model", seed: int) -> Iterator[Finding]:
    table = marks(model, seed).table
    effect = dict(zip(table["site"], table["score"], strict=True))
    streams = [effect[f"L{layer}.resid.pre@{MARK}"] for layer in range(model.layers)]
    left = [stream / streams[0] for stream in streams[1:]]
    told = ", ".join(f"{share:.2f}" for share in left)
    looked = attention_to_mark(model, seed)
    yield Finding(
        f"because/so exchanged at its token behind layer 0, 1: {told} of the effect are left; behind 1",
        left[-1],
        Goal("share", most=0.2),
    )
    yield Finding(
        f"attention on because/so by layer {', '.join(f'{one:.2f}' for one in looked)}: the most before the last layer less the last one's",
        max(looked[:-1]) - looked[-1], Goal("weight", least=0.0),
    )  # fmt: skip
    yield Finding("nonsense is less expected than sense, nats", surprise(model, seed), Goal("nats", least=3.0))


RECIPES = (
    Recipe(
        name="tagged",
        row="Z13",
        about="3 layers of 4 heads (Llama, width 64) on short rows that hang on a tag: six affects and none, styles, topics, a refusal; "
        "and on chains of events with because and so",
        known="attention brings a tag's effect to the words that hang on it; because/so is read in the first layers; affects have "
        "directions and circuits that do not hang on the scenario",
        paper="Wang et al. 2025, Do LLMs Feel? Emotion Circuits Discovery and Control, https://arxiv.org/abs/2510.11328",
        minutes=2.0,
        goals=(Goal("excess", most=0.05), Goal("affect", least=0.95), Goal("cause", least=0.95)),
        build=build,
        data=Tagged,
        training=Training(400, batch=64, rate=3e-3, warmup=20, betas=(0.9, 0.98), decay=0.01, checkpoints=8, evaluate=100),
        measure=measure,
        found=found,
        vocabulary=VOCABULARY,
        ships=True,
    ),
)
