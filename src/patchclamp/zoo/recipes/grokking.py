"""zoo/grokking (Z3): addition modulo 59 by one layer without norms; memorised first, understood later, in Fourier space.

A row is `a b = c` with c = (a + b) mod 59; only c is predicted. Each update sees the same pairs, all of them; the others are
never trained on. As in the paper: weight decay 1, learned positions, no norms, ReLU, embedding and unembedding apart. Smaller
(59 instead of 113, width 48 instead of 128), with more of the pairs and a higher rate, so that it takes minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.edits import Add
from patchclamp.errors import TrainingError
from patchclamp.sites import Site
from patchclamp.training import Rows, Training
from patchclamp.units.fourier import component, embedded, excluded, fourier, keys_of, logits_of, power, power_of_sums, restricted
from patchclamp.zoo.recipes._recipe import Finding, Goal, Recipe, drawing

if TYPE_CHECKING:
    from patchclamp.models.model import Model

P = 59
"""The modulus. Numbers are tokens 0 to 58, and 59 is "="."""
ABOVE = 1.0
"""A frequency is key that has more than so many times an even share of the logits' power."""


@dataclass(frozen=True)
class Sums:
    """`a b = c` for pairs (a, b) of numbers below p: steps from 0 on, of a fixed share of all pairs; negative steps, of the rest.

    A row's weight is on c alone. Labels: `a`, `b`, `c`.
    """

    seed: int = 0
    p: int = P
    share: float = 0.5

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        return f"sums-{self.p}-{self.share}-seed-{self.seed}"

    def pairs(self, trained: bool) -> Int[Tensor, "pair two"]:
        """The pairs that are trained on, or the others."""
        order = _order(self)
        cut = round(self.share * len(order))
        chosen = (order[:cut] if trained else order[cut:]).sort().values
        return torch.stack([chosen // self.p, chosen % self.p], 1)

    def rows(self, step: int, count: int) -> Rows:
        """All pairs where `count` is as many, or so many of them, drawn anew at every step.

        Raises:
            TrainingError: there are not so many.
        """
        pairs = self.pairs(step >= 0)
        if count > len(pairs):
            raise TrainingError(f"{count} rows were asked for, and there are {len(pairs)} pairs: give a batch of at most so many")
        if count < len(pairs):
            pairs = pairs[torch.randperm(len(pairs), generator=drawing(self.name, step))[:count]]
        return written(pairs, self.p)


def written(pairs: Int[Tensor, "pair two"], p: int = P) -> Rows:
    """Pairs as rows `a b = c`."""
    a, b = pairs.unbind(1)
    c = (a + b) % p
    tokens = torch.stack([a, b, torch.full_like(a, p), c], 1)
    weights = torch.zeros(tokens.shape)
    weights[:, -1] = 1.0
    return Rows(tokens, weights, labels={"a": a, "b": b, "c": c})


@cache
def _order(data: Sums) -> Int[Tensor, " pair"]:
    return torch.randperm(data.p**2, generator=drawing(data.name))


def build(seed: int = 0, width: int = 48, neurons: int = 192) -> Any:
    """One layer of 4 heads and an MLP, without norms; weights drawn with half the paper's deviation, 1 / sqrt(width)."""
    from patchclamp.models.normless import NormlessConfig, NormlessForCausalLM

    torch.manual_seed(seed)
    config = NormlessConfig(
        vocab_size=P + 1, hidden_size=width, intermediate_size=neurons, num_hidden_layers=1, num_attention_heads=4,
        head_dim=width // 4, hidden_act="relu", max_position_embeddings=4, causal=True, initializer_range=width**-0.5 / 2,
        pad_token_id=None, bos_token_id=None,
    )  # fmt: skip
    drawn = NormlessForCausalLM(config).state_dict()
    config.max_position_embeddings = 8  # rows have four; a model is proved at load on longer ones
    model = NormlessForCausalLM(config)
    places = "model.embed_positions.weight"
    model.load_state_dict({**drawn, places: torch.cat([drawn[places], torch.zeros(4, width)])})
    return model.eval()


def all_pairs() -> Int[Tensor, "pair two"]:
    """(0, 0), (0, 1), ..."""
    return torch.cartesian_prod(torch.arange(P), torch.arange(P))


def measure(model: "Model", seed: int = 0) -> dict[str, float]:
    """Loss and accuracy on pairs that were never trained on and on those that were; progress measures (see `units.fourier`)."""
    rows = written(Sums(seed).pairs(True)).tokens
    table = fourier(model, rows, above=ABOVE).filter(pl.col("part") == "model")
    found = dict(zip(table["name"], table["value"], strict=True))
    names = {
        "test.loss": "test_loss",
        "test.accuracy": "accuracy",
        "train.loss": "train_loss",
        "train.accuracy": "train_accuracy",
    }
    names |= {"test.restricted": "restricted", "train.excluded": "excluded", "explained": "explained", "keys": "keys"}
    return {name: float(found[theirs]) for theirs, name in names.items()}


def of_frequencies(numbers: Float[Tensor, "number width"], keys: Sequence[int]) -> Float[Tensor, "number width"]:
    """The part of numbers' vectors that is made of waves of these frequencies."""
    waves = torch.fft.rfft(numbers, dim=0)
    keep = torch.zeros(len(waves), 1).index_fill(0, torch.tensor(list(keys)), 1.0)
    return torch.fft.irfft(waves * keep, n=len(numbers), dim=0)


def without(model: "Model", gone: Float[Tensor, "number width"]) -> Float[Tensor, "a b answer"]:
    """Logits of the numbers behind every `a b =`, with something taken from the embedding of each number."""
    tokens = written(all_pairs()).tokens[:, :3]
    taken = torch.cat([gone, torch.zeros(1, gone.shape[1])])[tokens]
    return model.run(tokens, {Site("embed"): Add(taken, -1.0)})[:, -1, :P].unflatten(0, (P, P)).double()


def found(model: "Model", seed: int = 0) -> tuple[Finding, ...]:
    """Few frequencies: in the logits, in the embedding, and by taking them and all others out of either."""
    logits = logits_of(model, P)
    keys = keys_of(power_of_sums(logits), ABOVE)
    embedding = embedded(model, P)
    centred = embedding - embedding.mean(0)
    kept = of_frequencies(centred, keys)
    held_out = torch.ones(P, P, dtype=torch.bool)
    a, b = Sums(seed).pairs(True).unbind(1)
    held_out[a, b] = False
    right = torch.arange(P)[:, None] + torch.arange(P)

    def accuracy(logits: Tensor) -> float:
        return float((logits.argmax(-1) == right % P)[held_out].float().mean())

    varying = logits - component(logits, [0])
    explained = float(component(logits, keys).square().sum() / varying.square().sum())
    shares = power(embedding)
    embeds = float(shares[[key - 1 for key in keys]].sum() / shares.sum())
    return (
        Finding(f"few frequencies of a + b stand out ({', '.join(map(str, keys))}): how many", float(len(keys)), Goal("number", most=8.0)),
        Finding("they hold the logits: share of their variance", explained, Goal("share", least=0.8)),
        Finding("they hold the embedding: share of its variance", embeds, Goal("share", least=0.7)),
        Finding("only they kept in the logits, sums are right", accuracy(restricted(logits, keys)), Goal("accuracy", least=0.95)),
        Finding("they taken out of the logits, sums are wrong", accuracy(excluded(logits, keys)), Goal("accuracy", most=0.1)),
        Finding("only they kept in the embedding, sums are right", accuracy(without(model, centred - kept)), Goal("accuracy", least=0.9)),
        Finding("they taken out of the embedding, sums are wrong", accuracy(without(model, kept)), Goal("accuracy", most=0.1)),
    )  # fmt: skip


RECIPES = (
    Recipe(
        name="grokking",
        row="Z3",
        about="1 layer of 4 heads with 192 ReLU neurons and no norms (width 48) on half of all sums modulo 59",
        known="memorised first; then sums by rotations of a few key frequencies, cos(2 pi k (a + b - c) / 59)",
        paper="Nanda et al. 2023, Progress Measures for Grokking via Mechanistic Interpretability, https://arxiv.org/abs/2301.05217",
        minutes=9.0,
        goals=(Goal("accuracy", least=0.99),),
        build=build,
        data=Sums,
        training=Training(
            1500,
            batch=len(Sums().pairs(True)),
            rate=7e-3,
            schedule="constant",
            warmup=10,
            betas=(0.9, 0.98),
            decay=1.0,
            clip=None,
            checkpoints=(*range(0, 100, 20), *range(100, 1500, 50)),
            evaluate=50,
        ),
        measure=measure,
        found=found,
        ships=True,
    ),
)
