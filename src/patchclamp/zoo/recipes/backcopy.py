"""zoo/backcopy (Z7): Bigram-Backcopy; a head that copies behind a trigger and rests on the first token elsewhere.

A row is `<bos>` and words. Behind a word comes a word by the bigram law, a fixed random one; but behind one of three triggers
comes the word before the trigger again. The law is known, so the smallest possible loss is, too: at every token the entropy
of the law's row, and 0 behind a trigger. Losses are told as what is above it, on the same tokens.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.edits import Zero
from patchclamp.models.editing import Edit, Edits, Seen
from patchclamp.sites import Site
from patchclamp.training import Rows, Training
from patchclamp.zoo.recipes._attention import Attention, Kind
from patchclamp.zoo.recipes._look import losses
from patchclamp.zoo.recipes._recipe import SPECIAL, Finding, Goal, Recipe, drawing, held_out

if TYPE_CHECKING:
    from patchclamp.models.model import Model

BOS, FIRST = SPECIAL.index("<bos>"), len(SPECIAL)


@dataclass(frozen=True)
class Backcopy:
    """Rows of `<bos>` and `length` words; the last `triggers` of the words are triggers.

    The bigram law's rows are drawn from a Dirichlet law (concentration `even` for each word), the first word evenly from those
    that are no triggers. It depends on nothing but the sizes, so that seeds share it.
    """

    seed: int = 0
    words: int = 64
    triggers: int = 3
    length: int = 24
    even: float = 0.1

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        return f"{self._law_name}-{self.length}-seed-{self.seed}"

    @property
    def _law_name(self) -> str:
        return f"backcopy-{self.words}-{self.triggers}-{self.even}"

    @property
    def law(self) -> Float[Tensor, "word next"]:
        """The bigram law, of words that are no triggers; the triggers together have a probability of .1 behind each."""
        return _law(self._law_name, self.words, self.triggers, self.even)

    def rows(self, step: int, count: int) -> Rows:
        """Rows of one update; every word counts the same."""
        draw = drawing(self.name, step)
        plain, law = self.words - self.triggers, self.law
        words = [torch.randint(0, plain, (count,), generator=draw)]
        words.append(torch.multinomial(law[words[0]], 1, generator=draw)[:, 0])
        while len(words) < self.length:
            last, before = words[-1], words[-2]
            trigger = last >= plain
            drawn = torch.multinomial(law[torch.where(trigger, 0, last)], 1, generator=draw)[:, 0]
            words.append(torch.where(trigger, before, drawn))
        tokens = torch.cat([torch.full((count, 1), BOS), FIRST + torch.stack(words, 1)], 1)
        return Rows(tokens, torch.ones(tokens.shape))

    def is_trigger(self, tokens: Int[Tensor, "row position"]) -> Bool[Tensor, "row position"]:
        """Which tokens are triggers."""
        return tokens >= FIRST + self.words - self.triggers

    def best(self, tokens: Int[Tensor, "row position"]) -> Float[Tensor, "row next"]:
        """-log p of each token but the first under the true law, in nats."""
        plain = self.words - self.triggers
        now, then = tokens[:, 1:-1] - FIRST, tokens[:, 2:] - FIRST
        drawn = -self.law[now.clamp(max=plain - 1), then].log()
        later = torch.where(now >= plain, 0.0, drawn)
        first = torch.full((len(tokens), 1), float(torch.tensor(plain).log()))
        return torch.cat([first, later], 1)


@cache
def _law(name: str, words: int, triggers: int, even: float) -> Float[Tensor, "word next"]:
    plain = words - triggers
    rng = np.random.default_rng(drawing(name).initial_seed())
    rows = torch.from_numpy(rng.dirichlet([even] * plain, plain)).clamp(min=1e-4)
    rows = 0.9 * rows / rows.sum(1, keepdim=True)
    return torch.cat([rows, torch.full((plain, triggers), 0.1 / triggers, dtype=rows.dtype)], 1)


def build(seed: int = 0, layers: int = 1, width: int = 64, gated: bool = False) -> Any:
    """A transformer without norms, of `layers` layers with one head each; `gated`: with a gate on what each head gives.

    With norms there is another way to be dormant: words with a large residual stream hardly feel what attention adds (docs/zoo.md).
    """
    from patchclamp.models.normless import NormlessConfig, NormlessForCausalLM

    torch.manual_seed(seed)
    more: dict[str, Any] = {"gated": True} if gated else {}
    config = NormlessConfig(
        vocab_size=len(VOCABULARY), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=1,
        head_dim=width, hidden_act="gelu", max_position_embeddings=64, causal=True, initializer_range=width**-0.5 / 2,
        bos_token_id=BOS, pad_token_id=0, **more,
    )  # fmt: skip
    return NormlessForCausalLM(config).eval()


VOCABULARY = (
    *SPECIAL,
    *(f"w{i}" for i in range(Backcopy.words - Backcopy.triggers)),
    *(f"T{i}" for i in range(Backcopy.triggers)),
)


def kept(model: "Model", rows: Rows, kind: Kind | None) -> Edits:
    """The kind of attention that the model was trained with."""
    return {} if kind is None else Attention(kind).edits(model, 0, rows)


def measure(model: "Model", seed: int = 0, kind: Kind | None = None) -> dict[str, float]:
    """Loss above the smallest possible one, behind triggers and elsewhere, and the three extremes of the first token."""
    data = Backcopy(seed)
    rows = held_out(data, 128)
    logits = model.run(rows.tokens, kept(model, rows, kind))
    above = losses(logits, rows.tokens) - data.best(rows.tokens)
    copied = data.is_trigger(rows.tokens)[:, :-1]
    found = {"excess": float(above.mean()), "copy": float(above[copied].mean()), "bigram": float(above[~copied].mean())}
    return found | extremes(model, rows, data, kind)


def extremes(model: "Model", rows: Rows, data: Backcopy, kind: Kind | None = None) -> dict[str, float]:
    """What is extreme about the first token, by the layer where it is most so.

    sink: mean weight on the first token, from queries that are no triggers (even attention: .10). active: mean weight on the
    token before, from triggers. drain: norm of the first token's value over the mean of the others'. peak: the same of the
    residual stream behind each block.
    """
    kinds = ("pattern", "v", "resid.post")
    values = model.record(rows.tokens, [f"L*.{name}" for name in kinds], kept(model, rows, kind))
    rests = ~data.is_trigger(rows.tokens)
    rests[:, :2] = False  # the first token and the one behind it have nowhere else to look
    found: dict[str, list[float]] = {"sink": [], "active": [], "drain": [], "peak": []}
    for layer in range(model.layers):
        pattern, value, stream = (values[Site(name, layer)] for name in kinds)
        found["sink"].append(float(pattern[:, 0, :, 0][rests].mean()))
        back = pattern[:, 0].diagonal(-1, 1, 2)
        found["active"].append(float(back[data.is_trigger(rows.tokens)[:, 1:]].mean()))
        for name, norms in (("drain", value.flatten(2).norm(dim=-1)), ("peak", stream.norm(dim=-1))):
            found[name].append(float(norms[:, 0].mean() / norms[:, 1:].mean()))
    return {name: min(by_layer) if name == "drain" else max(by_layer) for name, by_layer in found.items()}


@dataclass(frozen=True, eq=False)
class At:
    """An edit at some queries only."""

    edit: Edit
    where: Bool[Tensor, "row position"]

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        where = self.where.reshape(*self.where.shape, *[1] * (value.dim() - 2))
        return torch.where(where, self.edit(value, seen), value)


def found(model: "Model", seed: int = 0, kind: Kind | None = None, gated: bool = False) -> tuple[Finding, ...]:
    """Active behind triggers, dormant elsewhere, by attention and by closing; the first token's sink, value and norm."""
    data = Backcopy(seed)
    rows = data.rows(-2, 256)
    seen = extremes(model, rows, data, kind)
    triggers = data.is_trigger(rows.tokens)
    best = data.best(rows.tokens)

    def above(where: Bool[Tensor, "row position"] | None) -> Float[Tensor, "row next"]:
        """Loss above the smallest with all heads' outputs zero at some queries."""
        base = kept(model, rows, kind)
        closed = {} if where is None else {Site("z", layer): At(Zero(), where) for layer in range(model.layers)}
        return losses(model.run(rows.tokens, {**base, **closed}), rows.tokens) - best

    plain = above(None)
    copied = triggers[:, :-1]
    active = float((above(triggers) - plain)[copied].mean())
    idle = float((above(~triggers) - plain)[~copied].mean())
    soft = kind is None and not gated
    extreme = [
        Finding(
            "rests on <bos> elsewhere: mean weight", seen["sink"], Goal("sink", least=0.5) if soft else Goal("sink", most=0.3)
        ),
        Finding(
            "<bos> has a small value, against others",
            seen["drain"],
            Goal("drain", most=0.5) if soft else Goal("drain", least=0.5),
        ),
    ]
    return (
        Finding("a trigger looks at the token before it: mean weight", seen["active"], Goal("active", least=0.5)),
        *extreme,
        Finding("attention closed at triggers costs the copy, nats", active, Goal("nats", least=1.0)),
        Finding("attention closed at all others costs little, nats", idle, Goal("nats", most=0.1)),
    )


KNOWN = "attention is active at triggers and dormant elsewhere: it rests on <bos>, whose value is small"
PAPER = "Guo et al. 2024, Active-Dormant Attention Heads, https://arxiv.org/abs/2410.13835"
NOTHING = "Bondarenko et al. 2023, Quantizable Transformers, https://arxiv.org/abs/2306.12929"
TRAINING = Training(1200, batch=64, rate=4e-3, warmup=50, betas=(0.9, 0.98), evaluate=100)


def recipe(
    name: str, layers: int, kind: Kind | None, minutes: float, known: str, ships: bool = False, gated: bool = False
) -> Recipe:
    """Bigram-Backcopy with so many layers and this attention."""
    said = "gated" if gated else kind or "softmax"
    return Recipe(
        name=name, row="Z7",
        about=f"{layers} layer{'s' * (layers > 1)} of one head and an MLP (no norms, width 64), {said} attention, on bigrams "
        "with triggers that copy",
        known=known, paper=NOTHING if gated or kind == "clipped" else PAPER, minutes=minutes,
        goals=(Goal("excess", most=0.05), Goal("copy", most=0.1)), build=partial(build, layers=layers, gated=gated), data=Backcopy,
        training=TRAINING, measure=partial(measure, kind=kind), found=partial(found, kind=kind, gated=gated),
        clamps=() if kind is None else (Attention(kind),), vocabulary=VOCABULARY, ships=ships,
    )  # fmt: skip


RECIPES = (
    recipe("backcopy", 1, None, 6.0, KNOWN, ships=True),
    recipe("backcopy_sigmoid", 1, "sigmoid", 5.0, "no sink: sigmoid attention can attend to nothing"),
    recipe("backcopy_relu", 1, "relu", 6.0, "no sink: ReLU attention can attend to nothing"),
    recipe("backcopy_clipped", 1, "clipped", 6.0, "no sink: clipped softmax gives a weight of exactly 0"),
    recipe("backcopy_gated", 1, None, 6.0, "no sink: a gate shuts the head", gated=True),
)
