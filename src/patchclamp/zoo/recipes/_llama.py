"""A small Llama for rows of whole words, and what recipes on it share: values of other rows put in, answers counted."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.edits import Put
from patchclamp.models.editing import Edits
from patchclamp.sites import Site
from patchclamp.zoo.recipes._recipe import SPECIAL, drawing

if TYPE_CHECKING:
    from patchclamp.models.model import Model

ENOUGH = 0.9
"""Share of prompts that heads which carry a fact bring to the other answer."""
SETS = 6
"""Other sets of heads that are tried, at most."""
PAD, BOS = SPECIAL.index("<pad>"), SPECIAL.index("<bos>")


def llama(words: int, seed: int, layers: int, heads: int = 4, width: int = 64) -> Any:
    """A Llama with random weights: rotary positions, RMS norms, gated MLPs of 2 `width` neurons, at most 32 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=None, pad_token_id=PAD,
        initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def taken(model: "Model", tokens: Int[Tensor, "row position"], sites: Iterable[Site]) -> Edits:
    """Edits that put at each site what it has on these rows, which stand one by one for those of the run; one forward pass.

    A site with a position is edited there alone.
    """
    chosen = sorted(sites)
    if not chosen:
        return {}
    values = model.record(tokens, sorted({site.at(None) for site in chosen}))
    return {site: Put(values[site.at(None)]) for site in chosen}


def last(model: "Model", tokens: Int[Tensor, "row position"], edits: Edits | None = None) -> Float[Tensor, "row token"]:
    """Logits of what follows each row; one forward pass."""
    return model.run(tokens, edits)[:, -1].float()


def share(logits: Float[Tensor, "row token"], answer: Int[Tensor, " row"]) -> float:
    """Share of rows whose most probable token is the answer."""
    return float((logits.argmax(-1) == answer).float().mean())


def moved(
    patched: Float[Tensor, "row token"], plain: Float[Tensor, "row token"], other: Float[Tensor, "row token"],
    here: Int[Tensor, " row"], there: Int[Tensor, " row"],
) -> float:  # fmt: skip
    """How far an intervention brings the logit difference of two answers from what it is here (0) to what it is there (1).

    Ratio of means over rows of logit[there] - logit[here]; NaN where the two runs do not differ.
    """

    def gap(logits: Tensor) -> Tensor:
        return (logits.gather(1, there[:, None]) - logits.gather(1, here[:, None])).double().mean()

    return float((gap(patched) - gap(plain)) / (gap(other) - gap(plain)))


@dataclass(frozen=True, eq=False)
class Exchange:
    """Prompts that stand one by one for each other and differ in one fact; what follows those `here`, and those `there`."""

    here: Int[Tensor, "row position"]
    there: Int[Tensor, "row position"]
    said: Int[Tensor, " row"]
    other: Int[Tensor, " row"]


def effects(model: "Model", pairs: Exchange) -> dict[Site, float]:
    """How much of the other fact each head's output brings, put in at the last token alone: 0 nothing, 1 all of it.

    Cost: one forward pass for each head and three more.
    """
    plain, there = last(model, pairs.here), last(model, pairs.there)
    heads = [site.at(-1) for site in model.find(["L*.h*.z"])]
    put = taken(model, pairs.there, heads)
    return {site: moved(last(model, pairs.here, {site: put[site]}), plain, there, pairs.said, pairs.other) for site in heads}


def carriers(model: "Model", pairs: Exchange, enough: float = ENOUGH) -> set[Site]:
    """The heads that carry the fact to the last token: the fewest, by their effects, that bring `enough` of prompts to the other
    answer (all heads, where none do). Cost: one forward pass for each head and for each size up to the one that is enough."""
    found = sorted((effect, site) for site, effect in effects(model, pairs).items())
    order = [site for _, site in reversed(found)]
    put = taken(model, pairs.there, order)
    for size in range(1, len(order)):
        if share(last(model, pairs.here, {site: put[site] for site in order[:size]}), pairs.other) >= enough:
            return set(order[:size])
    return set(order)


def put_from_there(model: "Model", pairs: Exchange, heads: set[Site]) -> tuple[float, float, int]:
    """Share of prompts that say the other answer with these heads' outputs from the other prompts, all at the last token.

    Returns:
        That share; the mean share of other sets of as many heads (all others together where there are fewer), and how many such
        sets: all there are, or `SETS` drawn at random.

    Cost: one forward pass for each set.
    """
    put = taken(model, pairs.there, (site.at(-1) for site in model.find(["L*.h*.z"])))

    def says(sites: Iterable[Site]) -> float:
        return share(last(model, pairs.here, {site: put[site] for site in sites}), pairs.other)

    others = sorted(site for site in put if site not in heads)
    sets = list(combinations(others, min(len(heads), len(others))))
    if len(sets) > SETS:
        sets = [sets[i] for i in torch.randperm(len(sets), generator=drawing("sets"))[:SETS].tolist()]
    rest = [says(some) for some in sets]
    return says(heads), sum(rest) / len(rest), len(rest)
