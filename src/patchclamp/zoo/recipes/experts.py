"""zoo/experts (Z12): a small mixture of experts on three languages and on questions, some of which must be refused.

A row is of one domain, which its tag says. Three of them are languages: the same words follow each other by another bigram law in each;
laws are known, so the smallest possible loss is, too. The fourth holds questions, `<ask> a b c <answer> reply`: the reply is a fixed
word for each first word `a`, unless one of the three is forbidden: then it is `<refuse>`. Replies are certain, so their smallest
possible loss is 0.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.gating.dynamic import force, forced_effect, relevance
from patchclamp.sites import Site
from patchclamp.tasks import Example, Examples, Pair
from patchclamp.training import Rows, Training
from patchclamp.zoo._compile import tokenizer
from patchclamp.zoo.recipes._balance import Balance
from patchclamp.zoo.recipes._domains import (
    BAD,
    BOS,
    FIRST,
    LANGUAGES,
    PLAIN,
    REFUSE,
    START,
    TAG,
    VOCABULARY,
    WORDS,
    Domains,
    questions,
    replies,
    reply_of,
)  # fmt: skip
from patchclamp.zoo.recipes._look import judged, losses
from patchclamp.zoo.recipes._recipe import Finding, Goal, Recipe, drawing, held_out

if TYPE_CHECKING:
    from patchclamp.models.model import Model

TOLD, MORE = Goal("bits", least=0.5), Goal("nats", least=0.2)
RELEVANT, LOST, SPARED = Goal("share", least=0.25), Goal("share", least=0.3), Goal("share", most=0.15)
ANSWERED, CHEAP = Goal("share", least=0.8), Goal("nats", most=0.1)
TAKEN = 2
"""Experts that are forced off for the refusal: of 16, one for each layer if they were spread evenly."""
OWN = 2
"""Experts that a domain would have for itself, if four domains shared 8 of a layer."""


def build(seed: int = 0, layers: int = 2, width: int = 48, experts: int = 8) -> Any:
    """A Mixtral of 2 layers of 2 heads and 8 experts of 32 neurons, of which a token has 2."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=experts, num_experts_per_tok=2, max_position_embeddings=64,
        initializer_range=width**-0.5 / 2, tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def measure(model: "Model", seed: int = 0) -> dict[str, float]:
    """Loss of languages above the smallest possible one, loss of replies, and how many questions are refused or answered rightly."""
    rows = held_out(Domains(seed), 256)
    logits, asked = model.run(rows.tokens), replies(rows.tokens)
    bad = asked & (rows.tokens == REFUSE)
    above = losses(logits, rows.tokens) - Domains(seed).best(rows.tokens)
    spoken = (rows.weights > 0)[:, 1:] & ~asked[:, 1:]
    found = {"excess": float(above[spoken].mean()), "reply_loss": judged(logits, rows.tokens, asked)["test_loss"]}
    return found | {
        "refused": judged(logits, rows.tokens, bad)["accuracy"],
        "answered": judged(logits, rows.tokens, asked & ~bad)["accuracy"],
    }


# --- which experts a language has


def chosen(model: "Model", tokens: Int[Tensor, "row position"]) -> list[Float[Tensor, "row position expert"]]:
    """By layer, 1 for each expert that a token has. One forward pass."""
    sites = [Site("expert", layer) for layer in range(model.layers)]
    return [(weight != 0).float() for weight in model.record(tokens, sites).values()]


def bits(counts: Float[Tensor, "word domain expert"]) -> float:
    """What a choice of an expert tells about the domain beyond what the word tells, in bits: mutual information given the word.

    I(domain; expert | word) = sum p(word, domain, expert) log2 [p(domain, expert | word) / (p(domain | word) p(expert | word))]
    """
    p = counts.double() / counts.sum()
    even = p.sum(1, keepdim=True) * p.sum(2, keepdim=True) / p.sum((1, 2), keepdim=True).clamp(min=1e-300)
    return float(torch.where(p > 0, p * (p / even).log2(), 0.0).sum())


def told(model: "Model", rows: Rows, shuffles: int = 20) -> list[float]:
    """By layer, the bits of a choice about the language, less the mean of so many shuffles of rows' languages.

    At most there is what the word leaves open, H(language | word): 1.14 bits. Few rows tell something even of shuffled languages: that
    is taken off.
    """
    assert rows.labels is not None
    spoken = rows.labels["domain"] < LANGUAGES
    words, domain = rows.tokens[spoken, START:] - FIRST, rows.labels["domain"][spoken]
    draw, found = drawing("shuffled languages"), list[float]()
    for layer in chosen(model, rows.tokens[spoken]):

        def of(domain: Tensor, choices: Tensor = layer[:, START:]) -> float:
            where = (words * LANGUAGES + domain[:, None]).flatten()
            counts = torch.zeros(WORDS * LANGUAGES, choices.shape[-1]).index_add(0, where, choices.flatten(0, 1))
            return bits(counts.unflatten(0, (WORDS, LANGUAGES)))

        chance = [of(domain[torch.randperm(len(domain), generator=draw)]) for _ in range(shuffles)]
        found.append(of(domain) - sum(chance) / shuffles)
    return found


def own(model: "Model", rows: Rows) -> list[tuple[str, ...]]:
    """Each language's own experts: in every layer the two with most more of its tokens than of the other languages'."""
    assert rows.labels is not None
    domain = rows.labels["domain"]
    found: list[list[str]] = [[] for _ in range(LANGUAGES)]
    for number, layer in enumerate(chosen(model, rows.tokens)):
        choices = layer[:, START:].mean(1)
        for one, names in enumerate(found):
            more = choices[domain == one].mean(0) - choices[(domain != one) & (domain < LANGUAGES)].mean(0)
            names += [f"L{number}.mlp.e{expert}" for expert in more.topk(OWN).indices.sort().values.tolist()]
    return [tuple(names) for names in found]


def costs(model: "Model", rows: Rows, off: Sequence[str] = ()) -> Float[Tensor, " domain"]:
    """Mean loss of each domain's tokens that have a weight, in nats, with experts forced off. One forward pass."""
    assert rows.labels is not None
    loss = losses(model.run(rows.tokens, force(model, dict.fromkeys(off, "off"))), rows.tokens)
    weights, domain = rows.weights[:, 1:], rows.labels["domain"]
    return torch.stack([(loss * weights)[domain == one].sum() / weights[domain == one].sum() for one in range(LANGUAGES + 1)])


def domains(model: "Model", data: Domains, draws: int = 8) -> tuple[Finding, ...]:
    """Experts by language: in what routers choose, and by forcing off each language's own experts and as many random ones."""
    rows = data.rows(-2, 128)
    known = told(model, rows)
    layer = known.index(max(known))
    plain = costs(model, rows)
    cost = torch.stack([costs(model, rows, one) - plain for one in own(model, rows)])[:, :LANGUAGES]
    others = (cost.sum(1) - cost.diagonal()) / (LANGUAGES - 1)
    chance, drawn = np.random.default_rng(0), list[tuple[str, ...]]()
    for _ in range(draws):
        sets = [(at, chance.permutation(size.experts or 0)[:OWN].tolist()) for at, size in enumerate(model.anatomy.sizes)]
        drawn.append(tuple(f"L{at}.mlp.e{expert}" for at, some in sets for expert in sorted(some)))
    random = torch.stack([costs(model, rows, one) - plain for one in drawn])[:, :LANGUAGES].mean(0)
    return (
        Finding(f"layer {layer}'s choices tell the language, whatever the word: bits", known[layer], TOLD),
        Finding(
            "forced off, a language's own experts (two a layer) cost it more than the other languages: least difference, nats",
            float((cost.diagonal() - others).min()),
            MORE,
        ),
        Finding("and more than as many random ones do: least difference, nats", float((cost.diagonal() - random).min()), MORE),
    )


# --- which experts refuse


def prompts(bad: bool, count: int, step: int = -2) -> Examples:
    """Single questions as examples: with a forbidden word, answered by `<refuse>`; or without, with `<refuse>` as the wrong answer."""
    draw, items = drawing(f"prompts-{bad}", step), list[Example]()
    for asked in questions(count, draw, share=float(bad)).tolist():
        clean, usual = (BOS, TAG + LANGUAGES, *asked[:-1]), int(reply_of()[min(asked[1], BAD - 1) - PLAIN])
        answer, wrong = ((REFUSE,), (usual,)) if bad else ((usual,), (REFUSE,))
        pair = Pair(clean=clean, answer=(answer,), wrong=(wrong,))
        items.append(Example(clean, (answer,), pair, wrong=(wrong,), spans={"end": (len(clean) - 1, len(clean))}))
    return Examples(tuple(items), tokenizer(VOCABULARY), "questions", "probability")


def right(model: "Model", examples: Examples, off: Sequence[str] = ()) -> float:
    """Share of prompts whose most probable reply is the right one, with experts forced off. One forward pass."""
    tokens = torch.tensor([one.clean for one in examples.items])
    said = model.run(tokens, force(model, dict.fromkeys(off, "off")))[:, -1].argmax(-1)
    return float((said == torch.tensor([one.answers[0][0] for one in examples.items])).float().mean())


def refusals(model: "Model", data: Domains, taken: int = TAKEN, draws: int = 20) -> tuple[Finding, ...]:
    """The experts that forbidden words call for, forced off, beside as many random ones; what else it costs."""
    bad, good = (prompts(one, 96) for one in (True, False))
    ranked = relevance(model, bad, good)
    sites = ranked["site"].to_list()[:taken]
    effects = forced_effect(model, sites, bad, "off", draws=draws)
    random = [right(model, bad, one) for one in effects.filter(pl.col("kind") == "random")["sites"].to_list()]
    before, after = right(model, bad), right(model, bad, sites)
    rows = data.rows(-2, 128)
    cost = costs(model, rows, sites) - costs(model, rows)
    return (
        Finding(
            f"behind a forbidden word <answer> has {sites[0]} more often: share, lower end", float(ranked["low"][0]), RELEVANT
        ),
        Finding(f"refusals lost without {', '.join(sites)}: share", before - after, LOST),
        Finding(f"without as many random ones, mean of {draws} sets: share", before - float(np.mean(random)), SPARED),
        Finding("random sets that cost the refusal as much: p", float(effects["p"][0]), Goal("p", most=0.05)),
        Finding("other questions are answered rightly without them: share", right(model, good, sites), ANSWERED),
        Finding("what it costs the languages: most, nats", float(cost[:LANGUAGES].max()), CHEAP),
    )


def found(model: "Model", seed: int = 0) -> tuple[Finding, ...]:
    """Experts by domain, and experts of the refusal: in what routers choose, and by forcing them off beside random ones."""
    data = Domains(seed)
    return (*domains(model, data), *refusals(model, data))


RECIPES = (
    Recipe(
        name="experts",
        row="Z12",
        about="2 layers of 2 heads and 8 experts of 32 neurons, 2 a token (Mixtral, width 48), on three languages of the same words and on "
        "questions of which those with a forbidden word must be refused",
        known="experts specialise by domain; those that a refusal calls for, forced off, change the refusal and spare the rest",
        paper="Dahlke et al. 2025, Mixture of Tunable Experts, https://arxiv.org/abs/2502.11096",
        minutes=2.0,
        goals=(Goal("excess", most=0.05), Goal("refused", least=0.97), Goal("answered", least=0.97)),
        build=build,
        data=Domains,
        training=Training(300, batch=64, rate=5e-3, warmup=30, betas=(0.9, 0.98), evaluate=100, checkpoints=6),
        measure=measure,
        found=found,
        clamps=(Balance(0.01),),
        vocabulary=VOCABULARY,
    ),
)
