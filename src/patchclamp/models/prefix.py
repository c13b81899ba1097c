"""Keys and values that settings share: one copy for all of them, joined with each setting's own when attention reads them."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class SharedLayer(DynamicLayer):
    """A cache layer whose first columns are the same for `settings` copies of the rows, and are not copied until they are read."""

    def __init__(self, keys: Tensor, values: Tensor, settings: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys.expand(settings, *keys.shape), values.expand(settings, *values.shape)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of every column. The layer is for one call: it does not grow."""
        return _joined(self.keys, key_states), _joined(self.values, value_states)


def _joined(shared: Tensor | None, own: Tensor) -> Tensor:
    assert shared is not None
    return torch.cat([shared, own.unflatten(0, shared.shape[:2])], -2).flatten(0, 1)


def shared_prefix(pairs: list[tuple[Tensor, Tensor, int]]) -> Cache:
    """A cache of keys, values and how many settings read them, by layer."""
    return Cache(layers=[SharedLayer(*pair) for pair in pairs])
