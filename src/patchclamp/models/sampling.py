"""Choosing the next token, and what a generation gives back."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.errors import GateError


@dataclass(frozen=True)
class Generation:
    """What a model wrote after each prompt.

    Attributes:
        prompts: token ids of the prompts, without padding.
        tokens: token ids that followed, with the one that ended the row.
        texts: these as text, without special tokens; empty where the model has no tokenizer.
        log_probabilities: of each of these tokens, in nats, under the edited model at temperature 1.
        ended: why each row ended: "length", "end" (end-of-sequence token) or "stop".
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    log_probabilities: tuple[tuple[float, ...], ...]
    ended: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __str__(self) -> str:
        return "\n".join(self.texts or (" ".join(map(str, row)) for row in self.tokens))


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from the k likeliest, or from the p nucleus.

    Nucleus sampling is from Holtzman et al. 2020, https://arxiv.org/abs/1904.09751: the smallest set of likeliest tokens whose
    probability is at least `top_p`.

    Raises:
        GateError: a setting out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, range_ in (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not good:
                raise GateError(f"{name}={getattr(self, name)!r} was asked: it must be {range_}")

    def generator(self) -> torch.Generator:
        """The source of chance, on the CPU so that devices draw alike."""
        return torch.Generator().manual_seed(self.seed)

    def __call__(self, logits: Float[Tensor, "row token"], chance: torch.Generator) -> Int[Tensor, " row"]:
        """One token per row."""
        if self.temperature == 0:
            return logits.argmax(-1)
        kept = self._kept(logits / self.temperature)
        drawn = torch.multinomial(kept.softmax(-1).cpu(), 1, generator=chance)
        return drawn[:, 0].to(logits.device)

    def _kept(self, logits: Float[Tensor, "row token"]) -> Float[Tensor, "row token"]:
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.sort(dim=-1, descending=True)
            probability = ordered.softmax(-1)
            outside = probability.cumsum(-1) - probability >= self.top_p  # what comes before has enough
            logits = logits.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)
        return logits
