"""What dynamic gates minimise, and the settings of a fit.

    objective = mean over examples of D(answer distribution; gates) + price * mean over tokens of the number of open gates
                + price * inertia * sum over parts of |U_part|

The last term is what moving costs: without it gates of parts that do nothing drift with whatever the batches show.
D is KL(the model's own answer-position distribution || the gated model's), not the loss of the labels: a controller that reads the
stream can solve the task by itself, by closing what speaks for another answer. Against that, while gates are learned, closed gates
are redrawn: a gate g becomes g + (1 - g) r with r in [0, 1], at random and as the worst of several draws for the whole batch. What
then still holds says "these parts must be open", never "this part must be shut for the answer to come out".
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.gating.dynamic.sight import SCOPES, Scope
from patchclamp.metrics import METRICS, Metric
from patchclamp.tasks._batch import Batch

Relaxation = Literal["sigmoid", "relaxed", "straight"]
Target = Literal["model", "exchanged", "labels"]


@dataclass(frozen=True)
class DynamicSettings:
    """How dynamic gates are learned. Frozen and hashable: part of a study's question.

    Args:
        scope: what gates may hang on (`sight.Sight`).
        site: the residual stream that is read; None for the scopes static and phase.
        places: whether the position is seen beside the stream.
        rank: of U V^T.
        prices: nats per open gate; each is a fit of its own.
        target_open: instead of the prices, so many open gates (per token) are aimed at: the price is learned, by dual ascent.
        seeds: fits per price, each with its own random gates and its own V.
        updates: steps of Adam.
        batch: examples per update; every fit sees the same ones.
        rate: of the biases and U; V's is divided by the root of how many numbers are seen. It falls linearly to a tenth.
        inertia: what moving costs, in prices per unit of |U_part| (V's columns have length 1).
        relaxation: "sigmoid": gates between 0 and 1. "relaxed": sigmoid((logits + logistic noise) / temperature), the relaxed
            Bernoulli gate. "straight": 0 or 1 forward, the sigmoid's slope backward (straight-through).
        temperature: of the relaxed gate.
        redraws: how many draws of closed gates the adversary has, beside the gates as they are: the last opens all of them, those
            before are random (`redraw.redrawn`); 0: closed gates stay closed.
        target: "model": D as above. "exchanged": the same, with the probabilities of right and wrong answer put in the order
            that the examples' labels say. "labels": NLL of the labelled answer (no safeguard).
        seed: of all that is drawn.
    """

    scope: Scope = "example"
    site: str | None = None
    places: bool = False
    rank: int = 4
    prices: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    target_open: tuple[float, ...] = ()
    seeds: int = 2
    updates: int = 120
    batch: int = 32
    rate: float = 0.2
    inertia: float = 0.05
    relaxation: Relaxation = "sigmoid"
    temperature: float = 0.5
    redraws: int = 3
    target: Target = "model"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise GateError(f"there is no scope {self.scope!r}: choose from {', '.join(SCOPES)}")
        if min(self.seeds, self.updates, self.batch, self.rank, len(self.prices) + len(self.target_open)) < 1 or self.redraws < 0:
            raise GateError(
                f"dynamic gates need at least one seed, price, update, example and rank, and no negative redraws: {self}"
            )
        if min((*self.prices, *self.target_open), default=0.0) < 0 or self.temperature <= 0:
            raise GateError(f"prices and wanted numbers of open gates must not be negative, and the temperature above 0: {self}")
        if self.target not in TARGETS:
            raise GateError(f"there is no target {self.target!r}: choose from {', '.join(TARGETS)}")

    def unguarded(self) -> "DynamicSettings":
        """The same without the safeguards: labels instead of the model's distribution, closed gates stay closed."""
        return replace(self, target="labels", redraws=0)


def _exchanged(logits: Float[Tensor, "setting target token"], batch: Batch, reference: Tensor | None) -> Tensor:
    """KL to the model's own distribution in which the labelled answer has the larger of the two answers' probabilities."""
    assert reference is not None and batch.wrong is not None
    log_p = reference.to(logits.dtype).log_softmax(-1)
    right, wrong = batch.answers[:, :1], batch.wrong[:, :1]
    one, other = log_p.gather(-1, right), log_p.gather(-1, wrong)
    log_p = log_p.scatter(-1, right, torch.maximum(one, other)).scatter(-1, wrong, torch.minimum(one, other))
    return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


TARGETS: dict[str, Metric] = {
    "model": METRICS["kl"],
    "exchanged": Metric("kl_exchanged", False, True, True, True, -1, _exchanged),
    "labels": METRICS["nll"],
}
"""What is minimised, by `DynamicSettings.target`."""
