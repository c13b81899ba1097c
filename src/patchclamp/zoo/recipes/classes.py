"""zoo/classes (Z2): classification in context; by the context or by the weights, as burstiness and the number of classes have it.

A row is eight pairs of an item and its label, a ninth item, and its label. Items are tokens whose embeddings are frozen: the mean
of their class plus noise (one token a class in the recipe; `exemplars` makes more). In training a class always has the same label.
The same rows can so be solved in two ways: by the context (the ninth item's class is among the eight) or by the weights (which
label a class has). Which of them was learned shows on classes that were never trained on, with labels drawn anew in each row
(`icl`), and on classes that are not among the eight (`weights`).

One coordinate of the embedding is the same for all tokens. Without it no head can look one token back: rotary positions turn what
tokens share, and vectors drawn from a Gaussian share nothing. (The paper's tokens have coordinates of their own for positions.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.training import Rows, Training
from patchclamp.zoo.recipes import _lookup
from patchclamp.zoo.recipes._look import judged
from patchclamp.zoo.recipes._recipe import SPECIAL, Finding, Goal, Recipe, attention_only, drawing

if TYPE_CHECKING:
    from patchclamp.models.model import Model

Ask = Literal["trained", "icl", "weights"]
Counted = Literal["again", "last"]
WIDTH = 64
SHARED = 4.0
"""The coordinate that all tokens share; the others are standard normal."""


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
        counted: which labels count in training: the "last" one, as in the paper, or every label of a class that was there before
            ("again"): the same question, asked more often of a row.
    """

    seed: int = 0
    classes: int = 1024
    labels: int = 16
    pairs: int = 8
    burst: int = 2
    bursty: float = 1.0
    zipf: float = 0.0
    exemplars: int = 1
    noise: float = 0.1
    novel: int = 64
    counted: Counted = "again"

    def __post_init__(self) -> None:
        if self.burst < 1 or self.pairs % self.burst or self.pairs // self.burst > min(self.classes, self.novel, self.labels):
            raise TrainingError(
                f"rows of {self.pairs} pairs with each class {self.burst} times, of {self.classes} classes ({self.novel} new ones) and "
                f"{self.labels} labels: burst must divide pairs, and there must be as many classes and labels as a row has"
            )

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        return "-".join(["classes", *(f"{key}={value}" for key, value in vars(self).items())])

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
        if ask == "trained" and self.counted == "again":
            weights[:, 1::2] = (every[:, :, None] == every[:, None]).tril(-1).any(-1).float()
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
        """What is frozen: labels and class means drawn alone, an exemplar the mean of its class plus noise; all share one."""
        draw = drawing(f"{self.name}-embedding")
        inner, items = WIDTH - 1, self.classes + self.novel
        fixed = torch.randn(len(SPECIAL) + self.labels, inner, generator=draw)
        mean = torch.randn(items, 1, inner, generator=draw)
        apart = torch.randn(items, self.exemplars, inner, generator=draw)
        drawn = (mean + self.noise * apart) / (1 + self.noise**2) ** 0.5
        return torch.nn.functional.pad(torch.cat([fixed, drawn.flatten(0, 1)]), (0, 1), value=SHARED)


def build(seed: int = 0, data: Callable[[int], Contexts] = Contexts, neurons: int = 0) -> Any:
    """A Llama of 2 layers of one head, as in the paper; frozen embedding; weights drawn with deviation 1 / sqrt(width).

    Rotary frequencies fall to 1 / 100 a token, not to 1 / 10000: half of them tell neighbours apart in rows of 18 tokens.

    Args:
        seed: of the weights.
        data: whose vocabulary and embedding it has.
        neurons: of the second layer's MLP; 0: no MLP writes anything. The first layer's never does.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    rows = data(seed)
    config = LlamaConfig(
        vocab_size=len(rows.vocabulary), hidden_size=WIDTH, intermediate_size=neurons or 4, num_hidden_layers=2, num_attention_heads=1,
        max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 100.0}, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=WIDTH**-0.5,
    )  # fmt: skip
    model: Any = attention_only(LlamaForCausalLM(config).eval(), layers=(0,) if neurons else (0, 1))
    embedding = model.get_input_embeddings().weight.requires_grad_(False)
    embedding.data.copy_(rows.embedding())
    return model


def right(model: "Model", rows: Rows) -> dict[str, float]:
    """Loss and accuracy of the ninth item's label."""
    last = torch.zeros(rows.tokens.shape, dtype=torch.bool)
    last[:, -1] = True
    return judged(model.run(rows.tokens), rows.tokens, last)


def measure(model: "Model", seed: int = 0, data: Callable[[int], Contexts] = Contexts) -> dict[str, float]:
    """Loss and accuracy as trained; accuracy by the context alone (`icl`, and its loss) and by the weights alone (`weights`).

    Chance, for who knows the labels of the row but not which is whose: `icl` burst / pairs.
    """
    rows = data(seed)
    found = right(model, rows.rows(-1, 256))
    by = {ask: right(model, rows.asking(ask, -1, 256)) for ask in ("icl", "weights")}
    return found | {ask: numbers["accuracy"] for ask, numbers in by.items()} | {"icl_loss": by["icl"]["test_loss"]}


def lookup(data: Contexts, rows: Rows) -> _lookup.Lookup:
    """Where the ninth item's label stands in the context; exchanged are the places of its class and of another class of the row."""
    assert rows.labels is not None
    target, classes = rows.labels["target"], rows.labels["classes"]
    count, width = rows.tokens.shape
    place = 1 + 2 * torch.arange(data.pairs)
    before, after = (torch.zeros(count, width, width, dtype=torch.bool) for _ in range(2))
    before[:, place, place - 1] = True
    own = classes == target[:, None]
    after[:, 2 * data.pairs, place] = own
    chosen = torch.where(own, -1, classes).max(1, keepdim=True).values
    theirs = classes == chosen
    exchange = torch.arange(width).repeat(count, 1)
    mine, others = (which.nonzero()[:, 1].reshape(count, data.burst) for which in (own, theirs))
    exchange = exchange.scatter(1, place[mine], place[others]).scatter(1, place[others], place[mine])
    other = rows.tokens.clone()
    other[:, -1] = rows.tokens.gather(1, place[others[:, :1]])[:, 0]
    asked = torch.zeros(rows.tokens.shape, dtype=torch.bool)
    asked[:, -1] = True
    return _lookup.Lookup(rows.tokens, asked, before, after, exchange, other, data.burst / data.pairs)


def found(model: "Model", seed: int = 0, data: Callable[[int], Contexts] = Contexts) -> tuple[Finding, ...]:
    """The lookup's two steps, on classes that were never trained on, with labels drawn anew in each row."""
    rows = data(seed)
    return _lookup.found(model, lookup(rows, rows.asking("icl", -2, 256)))


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        name="classes",
        row="Z2",
        about="2 layers of one head without MLPs (Llama, width 64, frozen embedding) on items of 1024 classes with labels",
        known="layer 0 tells each label which item is before it, layer 1 finds the label behind an item of the same class; it comes at "
        "once, and not where classes are few",
        paper="Reddy 2023, The mechanistic basis of data dependence and abrupt learning, https://arxiv.org/abs/2312.03002",
        minutes=6.0,
        goals=(Goal("icl", least=0.9),),
        build=build,
        data=Contexts,
        training=Training(
            1000,
            batch=64,
            rate=6e-3,
            schedule="constant",
            warmup=50,
            betas=(0.9, 0.98),
            decay=0.01,
            evaluate=25,
            checkpoints=tuple(range(0, 1000, 100)),
            states="last",
        ),
        measure=measure,
        found=found,
        ships=True,
    ),
)
