"""Hard-concrete gates: gates that are exactly 0 or 1 with a probability that is learned (Louizos et al., 1712.01312).

    u ~ U(0, 1),  s = sigmoid((log u - log(1 - u) + a) / beta),  z = min(1, max(0, s (zeta - gamma) + gamma))
    objective(a) = E_u mean over examples of NLL(answer; gates z) + price * sum over parts of P(z > 0)
    P(z > 0) = sigmoid(a - beta log(-gamma / zeta)),   test time: z = min(1, max(0, sigmoid(a) (zeta - gamma) + gamma))

beta = 2/3, gamma = -0.1, zeta = 1.1 (the paper's). The price is in nats per open gate. https://arxiv.org/abs/1712.01312
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from patchclamp.errors import GateError, NumericsError
from patchclamp.gating.descent import Adam, Progress, clipped
from patchclamp.gating.examples import balanced
from patchclamp.gating.objective import GatingSettings, Stage
from patchclamp.metrics import METRICS
from patchclamp.parts import Fallback, Parts, sites_of
from patchclamp.parts.concrete import BETA, GAMMA, ZETA, draw, open_probability
from patchclamp.sites import Site
from patchclamp.tasks import Examples

START = 1.5  # every gate begins mostly open: P(z > 0) = .95


@dataclass(frozen=True, eq=False)
class Hard:
    """Hard-concrete gates of every price and seed.

    Args:
        labels: the gated parts.
        prices: nats per open gate.
        seeds: by number.
        logits: [price, seed, part], a.
        losses: [price, seed, update], the objective on each update's batch and draws.
        warnings: what the reader must know.
    """

    labels: tuple[Site, ...]
    prices: tuple[float, ...]
    seeds: tuple[int, ...]
    logits: Float[np.ndarray, "price seed part"]
    losses: Float[np.ndarray, "price seed update"]
    warnings: tuple[str, ...] = ()

    @property
    def gate(self) -> Float[np.ndarray, "price seed part"]:
        """Test-time gates: exactly 0 and 1 at the ends."""
        return np.clip(1 / (1 + np.exp(-self.logits)) * (ZETA - GAMMA) + GAMMA, 0, 1)

    @property
    def open_probability(self) -> Float[np.ndarray, "price seed part"]:
        """P(z > 0)."""
        return 1 / (1 + np.exp(-(self.logits - BETA * np.log(-GAMMA / ZETA))))

    @property
    def kept(self) -> Bool[np.ndarray, "price seed part"]:
        """The parts whose test-time gate is at least a half open."""
        return self.gate >= 0.5


def fit_hard(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    prices: Sequence[float],
    settings: GatingSettings = GatingSettings(),
    stage: Stage = Stage(120, 0.3, 0.03),
    *,
    progress: Progress | None = None,
) -> Hard:
    """Learn hard-concrete gates at every price and seed, all in one fold. Each example of a batch has its own draws.

    Args:
        parts: what is gated; `embed` stays open.
        examples: to fit on; pairs are read in both directions where they can be mirrored.
        fallback: what a closed gate passes.
        prices: nats per open gate: the sparsity knob.
        settings: seeds, batch, clip, memory and seed are taken.
        stage: updates and learning rates.

    Cost: per update, one forward and one backward pass over the batch per price and seed.

    Raises:
        GateError: a price below 0, or none.
        NumericsError: the NLL is not finite.
    """
    if not prices or min(prices) < 0:
        raise GateError(f"prices are nats per open gate, 0 or more, and there must be one: not {list(prices)}")
    ready, count = balanced(examples, settings), len(parts.counted)
    seeds = tuple(range(settings.seed, settings.seed + settings.seeds))
    price = torch.tensor(prices).double().repeat_interleave(len(seeds))[:, None]
    logits = torch.full((len(price), count), START).double()
    adam, rows = Adam(logits, settings.memory), torch.arange(len(price))
    draws, losses = [np.random.default_rng([seed, 5]) for seed in seeds], list[np.ndarray]()
    batches = ready.batches(settings.batch, settings.seed, 5)
    for update in range(stage.updates):
        batch = next(batches)
        uniform = np.stack([rng.uniform(1e-6, 1 - 1e-6, (len(batch), count)) for rng in draws])
        gate, slope_in = draw(logits, torch.from_numpy(uniform).repeat(len(prices), 1, 1))
        gates = parts.open(len(price)).repeat(1, len(batch), 1, 1)
        gates[:, :, 0, list(parts.counted)] = gate.to(gates)
        values, slopes = parts.gradient(batch, gates, fallback, METRICS["nll"])
        if not bool(torch.isfinite(values).all()):
            raise NumericsError(f"the answers' NLL is not finite while gates are learned under the fallback {fallback.kind}")
        opened = open_probability(logits)
        losses.append((values.mean(1).double().cpu() + (price * opened).sum(1)).numpy())
        slope = (slopes[..., list(parts.counted)].double().cpu() * slope_in).mean(1) + price * opened * (1 - opened)
        rate = stage.rate + (stage.last_rate - stage.rate) * update / max(1, stage.updates - 1)
        logits = adam.step(logits, clipped(slope, settings.clip), rows, rate)
        if progress is not None:
            progress("hard-concrete gates", update + 1, stage.updates)
    shape = (len(prices), len(seeds), -1)
    return Hard(
        tuple(sites_of(parts)), tuple(prices), seeds, logits.numpy().reshape(shape),
        np.stack(losses, 1).reshape(shape), ready.warnings,
    )  # fmt: skip
