"""zoo/classes (Z2): classification in context; by the context or by the weights, as burstiness and the number of classes have it.

A row is eight pairs of an item and its label, a ninth item, and its label, which is all that is predicted. Items are tokens whose
embeddings are frozen: the mean of their class plus noise, so a class is not one token. In training a class always has the same
label. The same rows can so be solved in two ways: by the context (the ninth item's class is among the eight) or by the weights
(which label a class has). Which of them was learned shows on classes that were never trained on, with labels drawn anew in each
row (`icl`), and on classes that are not among the eight (`weights`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from patchclamp.edits import Put
from patchclamp.errors import TrainingError
from patchclamp.sites import Site
from patchclamp.training import Rows, Training
from patchclamp.zoo.recipes._look import judged, means, named
from patchclamp.zoo.recipes._recipe import SPECIAL, Finding, Goal, Recipe, attention_only, drawing

if TYPE_CHECKING:
    from patchclamp.models.model import Model

Ask = Literal["trained", "icl", "weights"]
WIDTH = 64
LOOKS, LOST = 0.5, 0.6


@dataclass(frozen=True)
class Contexts:
    """Rows of `pairs` items with labels, an item, and its label.

    Args:
        seed: of rows and of what class has which label.
        classes: classes that are trained on; class k has frequency proportional to k^-zipf.
        labels: how many labels there are; class k has label k mod `labels`.
        pairs: items with labels in a row.
        burst: how often each class of a bursty row is in its context, the asked one's among them.
        bursty: share of rows that are; in the others all classes are drawn alone, so that the asked one is there by chance.
        zipf: exponent of the classes' frequencies.
        exemplars: tokens a class has.
        noise: size of what tells exemplars of a class apart, against the class's own size 1.
        novel: classes that are never trained on.
    """

    seed: int = 0
    classes: int = 256
    labels: int = 16
    pairs: int = 8
    burst: int = 4
    bursty: float = 1.0
    zipf: float = 0.0
    exemplars: int = 4
    noise: float = 0.1
    novel: int = 64

    def __post_init__(self) -> None:
        if self.burst < 1 or self.pairs % self.burst or self.pairs // self.burst > min(self.classes, self.novel, self.labels):
            raise TrainingError(
                f"rows of {self.pairs} pairs with each class {self.burst} times, of {self.classes} classes ({self.novel} new ones) and "
                f"{self.labels} labels: burst must divide pairs, and there must be as many classes and labels as a row has"
            )

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        return "-".join(["classes", *(f"{key}={value:g}" for key, value in vars(self).items())])

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Special tokens, labels, exemplars class by class (the new ones last)."""
        items = (f"c{k}.{m}" for k in range(self.classes + self.novel) for m in range(self.exemplars))
        return (*SPECIAL, *(f"label{i}" for i in range(self.labels)), *items)

    def rows(self, step: int, count: int) -> Rows:
        """Rows of one update, as trained."""
        return self.asking("trained", step, count)

    def asking(self, ask: Ask, step: int, count: int) -> Rows:
        """Rows that ask for more: "icl": new classes with labels of their row, bursty; "weights": known ones, not in the context.

        Labels: `target`, the ninth item's class; `classes` [row, pair], those of the context.
        """
        draw = drawing(f"{self.name}-{ask}", step)
        kinds = self.pairs // self.burst
        target, context = self._classes(ask, count, kinds, draw)
        bursty = torch.rand(count, generator=draw) < (self.bursty if ask == "trained" else float(ask == "icl"))
        if ask != "icl":
            alone = self._drawn((count, self.pairs), draw)
            if ask == "weights":
                alone = torch.where(alone == target[:, None], (alone + 1) % self.classes, alone)
            context = torch.where(bursty[:, None], context, alone)
        order = torch.rand(count, self.pairs, generator=draw).argsort(1)
        context = context.gather(1, order)
        every = torch.cat([context, target[:, None]], 1)
        said = self._labels(ask, every, draw)
        item = torch.randint(0, self.exemplars, every.shape, generator=draw) + every * self.exemplars
        first = len(SPECIAL)
        tokens = torch.stack([first + self.labels + item, first + said], 2).flatten(1)
        weights = torch.zeros(tokens.shape)
        weights[:, -1] = 1.0
        return Rows(tokens, weights, labels={"target": target, "classes": context})

    def _classes(
        self, ask: Ask, count: int, kinds: int, draw: torch.Generator
    ) -> tuple[Int[Tensor, " row"], Int[Tensor, "row pair"]]:
        """Classes of bursty rows: different ones, each `burst` times, and one of them asked for."""
        if ask == "icl":
            chosen = self.classes + torch.rand(count, self.novel, generator=draw).argsort(1)[:, :kinds]
        else:
            noise = torch.rand(count, self.classes, generator=draw).log() / self.frequencies
            chosen = noise.argsort(1, descending=True)[:, :kinds]  # drawn by frequency, without putting back
        return chosen[:, 0], chosen.repeat_interleave(self.burst, 1)

    @property
    def frequencies(self) -> Float[Tensor, " class"]:
        """How frequent each class is."""
        power = torch.arange(1, self.classes + 1, dtype=torch.float64) ** -self.zipf
        return power / power.sum()

    def _drawn(self, shape: tuple[int, int], draw: torch.Generator) -> Int[Tensor, "row pair"]:
        found = torch.multinomial(self.frequencies, shape[0] * shape[1], replacement=True, generator=draw)
        return found.reshape(shape)

    def _labels(self, ask: Ask, classes: Int[Tensor, "row place"], draw: torch.Generator) -> Int[Tensor, "row place"]:
        """A class's own label; of new classes, a label drawn for this row, different ones for different classes."""
        if ask != "icl":
            return classes % self.labels
        rank = torch.stack([row.unique(return_inverse=True)[1] for row in classes])
        return torch.rand(len(classes), self.labels, generator=draw).argsort(1).gather(1, rank)

    def embedding(self) -> Float[Tensor, "token width"]:
        """What is frozen: labels and class means drawn alone, an exemplar the mean of its class plus noise; all of norm about 1."""
        draw = drawing(f"{self.name}-embedding")
        fixed = torch.randn(len(SPECIAL) + self.labels, WIDTH, generator=draw)
        mean = torch.randn(self.classes + self.novel, 1, WIDTH, generator=draw)
        apart = torch.randn(self.classes + self.novel, self.exemplars, WIDTH, generator=draw)
        items = (mean + self.noise * apart) / (1 + self.noise**2) ** 0.5
        return torch.cat([fixed, items.flatten(0, 1)]) / WIDTH**0.5


def build(seed: int = 0, data: Callable[[int], Contexts] = Contexts) -> Any:
    """A Llama of 2 layers of 4 heads; the first layer's MLP writes nothing, the second's tells classes apart; frozen embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    rows = data(seed)
    config = LlamaConfig(
        vocab_size=len(rows.vocabulary), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model: Any = attention_only(LlamaForCausalLM(config).eval(), layers=(0,))
    embedding = model.get_input_embeddings().weight.requires_grad_(False)
    embedding.data.copy_(rows.embedding())
    return model


def right(model: "Model", rows: Rows) -> dict[str, float]:
    """Loss and accuracy of the ninth item's label."""
    return judged(model.run(rows.tokens), rows.tokens, rows.weights > 0)


def measure(model: "Model", seed: int = 0, data: Callable[[int], Contexts] = Contexts) -> dict[str, float]:
    """Loss and accuracy as trained; accuracy by the context alone (`icl`) and by the weights alone (`weights`)."""
    rows = data(seed)
    found = right(model, rows.rows(-1, 512))
    return found | {ask: right(model, rows.asking(ask, -1, 512))["accuracy"] for ask in ("icl", "weights")}


def hits(rows: Rows) -> Bool[Tensor, "row pair"]:
    """Which pairs of the context are of the ninth item's class."""
    assert rows.labels is not None
    return rows.labels["classes"] == rows.labels["target"][:, None]


def in_context(model: "Model", seed: int = 0, data: Callable[[int], Contexts] = Contexts) -> tuple[Finding, ...]:
    """Labels look at their item, the ninth item at labels of its class; by keys; and without these heads nothing is right."""
    rows = data(seed).asking("icl", -2, 512)
    tokens, end = rows.tokens[:, :-1], rows.tokens.shape[1] - 2
    patterns = [value for _, value in sorted(model.record(tokens, "L*.pattern").items())]
    back = patterns[0][:, :, range(1, end, 2), range(0, end - 1, 2)].mean((0, 2))

    def matched(pattern: Tensor) -> Tensor:
        return (pattern[:, :, end, 1:end:2] * hits(rows)[:, None]).sum(-1).mean(0)

    found = matched(patterns[1])
    before = {Site("z", 0, int(h)) for h in (back > LOOKS).nonzero()}
    after = {Site("z", 1, int(h)) for h in (found > LOOKS).nonzero()}

    def accuracy(closed: set[Site]) -> float:
        logits = model.run(tokens, means(model, tokens, closed))[:, -1]
        return float((logits.argmax(-1) == rows.tokens[:, -1]).float().mean())

    def looked(kind: str) -> float:
        edited = model.record(tokens, f"L1.{kind}", means(model, tokens, before))[Site(kind, 1)]
        return float(matched(model.record(tokens, "L1.pattern", {Site(kind, 1): Put(edited)})[Site("pattern", 1)]).max())

    return (
        Finding(f"labels look at their item in layer 0: {named(before)}", float(back.max()), Goal("weight", least=LOOKS)),
        Finding(f"the ninth item looks at labels of its class in layer 1: {named(after)}", float(found.max()), Goal("weight", least=LOOKS)),
        Finding("without the former few are right", accuracy(before), Goal("accuracy", most=LOST)),
        Finding("without the latter few are right", accuracy(after), Goal("accuracy", most=LOST)),
        Finding("layer 1 finds less with keys made without the former", looked("k"), Goal("weight", most=LOOKS)),
        Finding("layer 1 finds as much with queries made without them", looked("q"), Goal("weight", least=LOOKS)),
    )  # fmt: skip


def in_weights(model: "Model", seed: int = 0, data: Callable[[int], Contexts] = Contexts) -> tuple[Finding, ...]:
    """What is right does not need the context: attention closed at the ninth item; new classes are guessed."""
    rows = data(seed)
    asked = rows.asking("weights", -2, 512)
    tokens = asked.tokens[:, :-1]
    alone = model.run(tokens[:, -1:].repeat(1, 2))[:, -1]
    said = float((alone.argmax(-1) == asked.tokens[:, -1]).float().mean())
    kinds = rows.pairs // rows.burst
    return (
        Finding("classes that are not in the context are known", right(model, asked)["accuracy"], Goal("accuracy", least=0.9)),
        Finding("they are known without any context", said, Goal("accuracy", least=0.8)),
        Finding(
            f"new classes are not learned from the context (a label of it: {1 / kinds:.2f})",
            right(model, rows.asking("icl", -2, 512))["accuracy"], Goal("accuracy", most=1.2 / kinds),
        ),
    )  # fmt: skip


def few(seed: int = 0) -> Contexts:
    """Few classes in rows that are not bursty: only the weights can tell."""
    return replace(Contexts(seed), classes=32, bursty=0.0, burst=1)


PAPER = "Reddy 2023, The mechanistic basis of data dependence and abrupt learning in an in-context classification task, https://arxiv.org/abs/2312.03002"
TRAINING = Training(1000, batch=64, rate=2e-3, warmup=50, betas=(0.9, 0.98), decay=0.01, checkpoints=10, evaluate=100)


def recipe(
    name: str, about: str, known: str, data: Callable[[int], Contexts], goal: Goal, found: Callable[..., tuple[Finding, ...]]
) -> Recipe:
    """Classification in context with this data."""
    return Recipe(
        name=name, row="Z2", about=f"2 layers of 4 heads and one MLP (Llama, width 64, frozen embedding) on pairs of items and labels, {about}",
        known=known, paper=PAPER, minutes=6.0, goals=(goal, Goal("accuracy", least=0.9)), build=partial(build, data=data), data=data,
        training=TRAINING, measure=partial(measure, data=data), found=partial(found, data=data), vocabulary=data(0).vocabulary,
    )  # fmt: skip


RECIPES = (
    recipe(
        "classes", "bursty, of 256 classes", "learned in context, abruptly: a previous-token head and, by its keys, an induction head",
        Contexts, Goal("icl", least=0.9), in_context,
    ),
    recipe(
        "classes_weights", "not bursty, of 32 classes", "learned in weights: which label each class has; new classes are not learned",
        few, Goal("weights", least=0.9), in_weights,
    ),
)  # fmt: skip
