"""Loss: a mean over examples of minus the benefit, for many settings on the same prompts; of edges, on one run of the model itself."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from patchclamp.errors import NumericsError
from patchclamp.metrics import Metric
from patchclamp.parts import Edges, Fallback, Parts
from patchclamp.parts.edge_replay import Replay
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch


@dataclass(frozen=True, eq=False)
class Loss:
    """The mean over examples of -benefit: what is to stay small.

    Args:
        parts: whose gates.
        batches: the examples; the same objects each time, so that what the fallback has of them is kept.
        fallback: what a closed gate passes.
        metric: whose benefit.
        replays: of edges, the model's own run of each batch, kept for all settings.
    """

    parts: Parts
    batches: tuple[Batch, ...]
    fallback: Fallback
    metric: Metric
    replays: tuple[Replay, ...] = ()

    @classmethod
    def of(cls, parts: Parts, examples: Examples, fallback: Fallback, metric: Metric, batch_size: int) -> "Loss":
        """On some examples."""
        batches = tuple(examples.batches(batch_size))
        edges = parts if isinstance(parts, Edges) else None
        kept = () if edges is None else tuple(edges.replay(batch, fallback, metric) for batch in batches)
        return cls(parts, batches, fallback, metric, kept)

    @property
    def blocks(self) -> float | None:
        """Blocks that have run, each for one setting on all examples: batches count by their examples."""
        if not self.replays:
            return None
        examples = [len(batch) for batch in self.batches]
        return sum(one.blocks * many for one, many in zip(self.replays, examples, strict=True)) / sum(examples)

    def _measured(self, gates: torch.Tensor) -> list[torch.Tensor]:
        if self.replays:
            return [one.measure(gates) for one in self.replays]
        return [self.parts.measure(one, gates, self.fallback, self.metric) for one in self.batches]

    def __call__(self, gates: torch.Tensor) -> list[float]:
        """One number per setting."""
        pieces = [self.metric.sign * one.double().cpu() for one in self._measured(gates)]
        found = -torch.cat(pieces, 1).mean(1)
        if not bool(torch.isfinite(found).all()):
            raise NumericsError(
                f"{self.metric.name} is not finite under the fallback {self.fallback.kind}: try float32, or another"
            )
        return found.tolist()

    def without(self, closed: Sequence[Collection[int]]) -> list[float]:
        """With some parts closed, by number."""
        if not closed:  # all of the next parts are cut off
            return []
        gates = self.parts.open(len(closed))
        for setting, numbers in enumerate(closed):
            gates[setting, ..., list(numbers)] = 0
        return self(gates)
