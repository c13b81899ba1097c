"""zoo/induction (Z1): two layers of attention alone on random tokens that repeat; induction forms all at once.

A row is `<bos>`, some words, a block of words, and that block again and again; no two of the first words are the same. Where
the block begins and how long it is differs from row to row, so positions alone do not tell what follows. From the second token
of the repeat on the next token is certain: it is the one that followed the last time. So the smallest possible loss there is 0.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from patchclamp.edits import Put
from patchclamp.sites import Site
from patchclamp.training import Rows, Training
from patchclamp.units.heads import attention_scores, looks, mass
from patchclamp.zoo.recipes._look import judged, means, named
from patchclamp.zoo.recipes._recipe import SPECIAL, Finding, Goal, Recipe, attention_only, drawing, held_out

if TYPE_CHECKING:
    from patchclamp.models.model import Model

BOS = SPECIAL.index("<bos>")
LOOKS, PART, LOST, KEPT = 0.5, 0.2, 0.3, 0.8
"""Mean attention of a head that does one thing, and of one that takes part (even attention: .07 and less); accuracy that counts as
lost, as kept."""


@dataclass(frozen=True)
class Repeats:
    """Rows of `<bos>` and `length` tokens: up to `lead` words, a block of `shortest` to `longest` words, and its repeats.

    Labels: `first`, the position of the first repeated token; `period`, the length of the block. From `first` + 1 on a token is
    certain: it is the one `period` positions before.
    """

    seed: int = 0
    words: int = 64
    length: int = 48
    lead: int = 8
    shortest: int = 8
    longest: int = 20

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        return f"repeats-{self.words}-{self.length}-{self.lead}-{self.shortest}-{self.longest}-seed-{self.seed}"

    def rows(self, step: int, count: int) -> Rows:
        """Rows of one update; every token counts the same."""
        draw = drawing(self.name, step)
        words = torch.rand(count, self.words, generator=draw).argsort(1) + len(SPECIAL)
        lead = torch.randint(0, self.lead + 1, (count,), generator=draw)
        period = torch.randint(self.shortest, self.longest + 1, (count,), generator=draw)
        body = words.gather(1, unrolled(lead, period, self.length))
        tokens = torch.cat([torch.full((count, 1), BOS), body], 1)
        return Rows(tokens, torch.ones(tokens.shape), labels={"first": 1 + lead + period, "period": period})


VOCABULARY = (*SPECIAL, *(f"w{i}" for i in range(Repeats.words)))


def unrolled(lead: Int[Tensor, " row"], period: Int[Tensor, " row"], length: int) -> Int[Tensor, "row place"]:
    """Which of a row's words stands at each place: 0, 1, ..., lead + period - 1, and then the block of `period` again."""
    place = torch.arange(length)[None]
    return torch.where(place < (lead + period)[:, None], place, lead[:, None] + (place - lead[:, None]) % period[:, None])


def certain(rows: Rows) -> Tensor:
    """[row, position]: whether that token follows from those before it: from the second token of the repeat on."""
    assert rows.labels is not None
    return torch.arange(rows.tokens.shape[1])[None] > rows.labels["first"][:, None]


def build(seed: int = 0, heads: int = 4, width: int = 64) -> Any:
    """A Llama whose MLPs write nothing: rotary positions, RMS norms, 2 layers of 4 heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=4, num_hidden_layers=2, num_attention_heads=heads,
        max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return attention_only(LlamaForCausalLM(config).eval())


def measure(model: "Model", seed: int = 0) -> dict[str, float]:
    """Loss and accuracy of tokens that are certain, loss of the others, and heads' largest scores by layer."""
    rows = held_out(Repeats(seed), 256)
    numbers = judged(model.run(rows.tokens), rows.tokens, certain(rows))
    scores = mean_scores(model, rows.tokens[:64])
    numbers["other_loss"] = judged(model.run(rows.tokens), rows.tokens, ~certain(rows))["test_loss"]
    return numbers | {f"{name}.L{layer}": max(scores[name][layer]) for name, layer in (("previous", 0), ("induction", 1))}


def mean_scores(model: "Model", tokens: Int[Tensor, "row position"]) -> dict[str, list[list[float]]]:
    """Heads' attention scores by name, layer and head; see `units.heads`."""
    sizes = [size.heads for size in model.anatomy.sizes]
    return {
        name: [part.tolist() for part in torch.from_numpy(values).nanmean(1).split(sizes)]
        for name, values in attention_scores(model, tokens).items()
    }


def found(model: "Model", seed: int = 0) -> tuple[Finding, ...]:
    """Previous-token heads and induction heads by where they look; what is lost without them; how one needs the other."""
    rows = held_out(Repeats(seed), 256, step=-2)
    tokens, asked = rows.tokens, certain(rows)
    scores = mean_scores(model, tokens)
    before = {Site("z", 0, h) for h, score in enumerate(scores["previous"][0]) if score > PART}
    after = {Site("z", 1, h) for h, score in enumerate(scores["induction"][1]) if score > PART}
    heads = set(model.find(["L*.h*.z"]))
    first, second = ({site for site in heads if site.layer == layer} for layer in (0, 1))

    def accuracy(closed: set[Site]) -> float:
        return judged(model.run(tokens, means(model, tokens, closed)), tokens, asked)["accuracy"]

    without = {kind: model.record(tokens, f"L1.{kind}", means(model, tokens, before))[Site(kind, 1)] for kind in ("q", "k")}

    def looked(kind: str) -> float:
        """The best head's induction score when layer 1 has the queries or keys of a run without previous-token heads."""
        pattern = model.record(tokens, "L1.pattern", {Site(kind, 1): Put(without[kind])})[Site("pattern", 1)]
        where = looks(tokens, rows.real)["induction"]
        return float(mass(pattern, where).nanmean(0).max())

    top = {name: max(scores[name][layer]) for name, layer in (("previous", 0), ("induction", 1))}
    claims = [
        Finding(f"layer 0 looks one token back: {named(before)}", top["previous"], Goal("score", least=LOOKS)),
        Finding(f"layer 1 looks behind the last time: {named(after)}", top["induction"], Goal("score", least=LOOKS)),
        Finding("no head of layer 0 looks behind the last time", max(scores["induction"][0]), Goal("score", most=LOOKS / 2)),
        Finding("without the heads that look one token back few are right", accuracy(before), Goal("accuracy", most=LOST)),
        Finding("without the heads that look behind the last time few are right", accuracy(after), Goal("accuracy", most=LOST)),
        Finding("layer 1 finds nothing with keys made without the former", looked("k"), Goal("score", most=LOOKS / 2)),
        Finding("layer 1 finds as much with queries made without them", looked("q"), Goal("score", least=LOOKS)),
    ]
    others = {0: first - before, 1: second - after}
    return (*claims, *(
        Finding(f"without all other heads of layer {layer} ({named(rest)}) most are right", accuracy(rest), Goal("accuracy", least=KEPT))
        for layer, rest in others.items() if rest
    ))  # fmt: skip


RECIPES = (
    Recipe(
        name="induction",
        row="Z1",
        about="2 layers of 4 heads without MLPs (Llama, width 64) on blocks of random words that repeat, at places that differ",
        known="a previous-token head in layer 0 and, by its keys, an induction head in layer 1; both come at once, abruptly",
        paper="Olsson et al. 2022, In-context Learning and Induction Heads, https://arxiv.org/abs/2209.11895",
        minutes=5.0,
        goals=(Goal("accuracy", least=0.99), Goal("test_loss", most=0.05)),
        build=build,
        data=Repeats,
        training=Training(700, batch=32, rate=1e-3, schedule="constant", warmup=50, betas=(0.9, 0.98), decay=0.01, evaluate=25),
        measure=measure,
        found=found,
        vocabulary=VOCABULARY,
        ships=True,
    ),
)
