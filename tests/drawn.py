"""Rows of random tokens, for tests that train."""

from dataclasses import dataclass

import torch

from patchclamp.training import Rows


@dataclass(frozen=True)
class Drawn:
    """Rows of eight tokens from `lowest` to 19, others at each step."""

    lowest: int = 1
    name: str = "random"

    def rows(self, step: int, count: int) -> Rows:
        """Rows of one update; every token counts the same."""
        draw = torch.Generator().manual_seed(1000 + step)
        return Rows(torch.randint(self.lowest, 20, (count, 8), generator=draw), torch.ones(count, 8))
