"""Rows for classification in context (Z2); by the context or by the weights, as burstiness and the number of classes have it.

A row is eight pairs of an item and its label, a ninth item, and its label, which is all that is predicted. Items are tokens whose
embeddings are frozen: the mean of their class plus noise, so a class is not one token. In training a class always has the same
label. The same rows can so be solved in two ways: by the context (the ninth item's class is among the eight) or by the weights
(which label a class has). Which of them was learned shows on classes that were never trained on, with labels drawn anew in each
row (`icl`), and on classes that are not among the eight (`weights`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.training import Rows
from patchclamp.zoo.recipes._look import judged
from patchclamp.zoo.recipes._recipe import SPECIAL, Recipe, attention_only, drawing

if TYPE_CHECKING:
    from patchclamp.models.model import Model

Ask = Literal["trained", "icl", "weights"]
WIDTH = 64


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
    burst: int = 2
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


RECIPES: tuple[Recipe, ...] = ()
"""None yet: no training of these rows has reached a goal (docs/zoo.md); data, model and measures are for trainings of one's own."""
