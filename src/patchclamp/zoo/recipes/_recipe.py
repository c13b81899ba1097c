"""Recipe: how a model with a known mechanism is made, what it must reach, and how its mechanism is found again."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from patchclamp.errors import ModelError
from patchclamp.training import Clamp, Data, Rows, Trained, Training
from patchclamp.training import train as run_training

if TYPE_CHECKING:
    from patchclamp.models.model import Model

SPECIAL = ("<pad>", "<bos>", "<unk>")
"""The first tokens of every recipe's vocabulary."""
EVALUATED = 512
"""Rows that a measure is taken on: of negative steps, which are never trained on."""


@dataclass(frozen=True)
class Goal:
    """What a number on data that was never trained on must reach: at least `least`, or at most `most`."""

    measure: str
    least: float | None = None
    most: float | None = None

    def __post_init__(self) -> None:
        if (self.least is None) == (self.most is None):
            raise ModelError(f"the goal of {self.measure} has least {self.least} and most {self.most}: give one of them")

    def reached(self, value: float) -> bool:
        """Whether it is reached; never by NaN."""
        return value >= self.least if self.least is not None else value <= self.most if self.most is not None else False

    def __str__(self) -> str:
        return f"{self.measure} >= {self.least:g}" if self.least is not None else f"{self.measure} <= {self.most:g}"


@dataclass(frozen=True)
class Finding:
    """A sentence about a trained model, the number that it stands on, and what that number must be for it to hold."""

    claim: str
    number: float
    goal: Goal

    @property
    def holds(self) -> bool:
        """The verdict."""
        return self.goal.reached(self.number)


@dataclass(frozen=True)
class Recipe:
    """One row of the zoo.

    Args:
        name: as in `patchclamp zoo train NAME` and `Model.load("zoo/NAME")`.
        row: which kind of model, Z1 to Z14.
        about: the data and the model, in a sentence or two.
        known: what its mechanism is known to be.
        paper: where that is shown, with link.
        minutes: what the training takes on 2 shared cores.
        goals: what it must reach; the first one is what it is said to reach.
        build: seed -> transformers model with random weights.
        data: seed -> what it is trained on, a pure function of the step; rows of negative steps are never trained on.
        training: the numbers.
        measure: model, seed of its data -> numbers on data that was never trained on.
        found: model, seed of its data -> its mechanism, found again by interventions and by what is known of it.
        clamps: what is held during training (another kind of attention, for example).
        vocabulary: a word for each token id; None: it has no tokenizer.
        ships: whether trained weights come with the package.
    """

    name: str
    row: str
    about: str
    known: str
    paper: str
    minutes: float
    goals: tuple[Goal, ...]
    build: Callable[[int], Any]
    data: Callable[[int], Data]
    training: Training
    measure: Callable[["Model", int], Mapping[str, float]]
    found: Callable[["Model", int], tuple[Finding, ...]]
    clamps: tuple[Clamp, ...] = ()
    vocabulary: tuple[str, ...] | None = None
    ships: bool = False

    def reached(self, numbers: Mapping[str, float]) -> bool:
        """Whether all goals are."""
        return all(goal.reached(numbers[goal.measure]) for goal in self.goals)


def train(
    recipe: Recipe, out: Path, seed: int = 0, progress: Callable[[int, Mapping[str, float]], None] | None = None
) -> Trained:
    """Train a recipe's model from the start, or go on with a run of it that was cut off, in the folder `out`.

    Measures are the recipe's, on rows of negative steps. Cost: `recipe.minutes`.

    Raises:
        TrainingError: the folder holds another training.
    """
    from patchclamp.models.model import Model

    model = Model.load(recipe.build(seed), tokenizer=tokenizer_of(recipe))
    return run_training(
        model, recipe.data(seed), recipe.training, out, clamps=recipe.clamps,
        measures=[lambda model, step: recipe.measure(model, seed)], progress=progress,
    )  # fmt: skip


def tokenizer_of(recipe: Recipe) -> Any:
    """One token a word, split at blanks; None where the recipe has no words."""
    from patchclamp.zoo._compile import tokenizer

    return None if recipe.vocabulary is None else tokenizer(recipe.vocabulary)


def drawing(name: str, step: int = 0) -> torch.Generator:
    """A generator that depends on these two and on nothing else, the same in every process and on every machine."""
    told = hashlib.blake2b(f"{name}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(told, "big") >> 1)


def held_out(data: Data, count: int = EVALUATED, step: int = -1) -> Rows:
    """Rows that are never trained on."""
    return data.rows(step, count)


def attention_only(hf: Any, layers: Sequence[int] | None = None) -> Any:
    """The same model with MLPs that write nothing and do not learn: exactly attention-only, and every part still has its place.

    Args:
        hf: a transformers model; it is changed.
        layers: which layers' MLPs; None: all.
    """
    from patchclamp.models.model import Model

    found = Model.load(hf).anatomy.layers
    for layer in found if layers is None else [found[i] for i in layers]:
        for weight in layer.mlp.parameters():
            weight.requires_grad_(False)
        if layer.down is None:
            raise ModelError(f"{type(hf).__name__} has experts for MLPs: an attention-only model is made of one with plain MLPs")
        for weight in layer.down.parameters():
            torch.nn.init.zeros_(weight)
    return hf


def table(findings: Sequence[Finding]) -> list[dict[str, object]]:
    """Findings as rows: claim, number, wanted, holds."""
    return [{"claim": one.claim, "number": one.number, "wanted": str(one.goal), "holds": one.holds} for one in findings]
