"""Many settings of what destinations read, folded into the rows of few passes."""

import warnings
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.metrics import Metric
from patchclamp.models.editing import Edits
from patchclamp.models.model import Model
from patchclamp.tasks._batch import Batch


def measured(
    model: Model,
    batch: Batch,
    metric: Metric,
    differs: Sequence[bool],
    edits_of: Callable[[Sequence[int]], Edits],
    most: int,
) -> Float[Tensor, "setting example"]:
    """The metric for each setting and example, without gradient.

    Args:
        model: the model.
        batch: on its device.
        metric: what is measured.
        differs: by setting, whether it differs from the model itself.
        edits_of: the edits of a pass of some of the settings, side by side.
        most: how many settings run at once.

    Cost: a pass per setting that differs from the model itself, and one for the model where it is asked for.
    """
    with torch.no_grad():
        moved = [number for number, one in enumerate(differs) if one]
        out, plain = dict[int, Tensor](), None
        if metric.reference or len(moved) < len(differs):
            itself = model.target_logits(batch)
            plain = itself[0] if metric.reference else None
            out = dict.fromkeys(set(range(len(differs))) - set(moved), metric(itself, batch, plain)[0])
        while moved:
            some = moved[:most]
            try:
                logits = model.target_logits(batch, edits_of(some), len(some))
            except RuntimeError as error:
                most = _fewer(error, len(some))
                continue
            out |= zip(some, metric(logits, batch, plain), strict=True)
            moved = moved[len(some) :]
    return torch.stack([out[number] for number in range(len(differs))])


def _fewer(error: RuntimeError, settings: int) -> int:
    """Where memory ran out with several settings at once, half as many, said aloud."""
    if settings == 1 or not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
        raise error
    warnings.warn(f"memory ran out with {settings} settings at once: going on with {settings // 2}", stacklevel=3)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return settings // 2


def at_once(model: Model, batch: Batch, memory: int) -> int:
    """How many settings run side by side where activations may take `memory` bytes; what sources write is kept while they run."""
    anatomy, width = model.anatomy, model.width
    size = max(size.heads * size.head_width for size in anatomy.sizes)
    neurons = max((size.neurons or 4 * width) for size in anatomy.sizes)
    heads = max(size.heads for size in anatomy.sizes)
    rows, length = batch.tokens.shape
    kept = len(anatomy.sizes) * (size + 2 * width)
    per_token = kept + 16 * width + 8 * size + 6 * neurons + 6 * heads * length
    vocabulary = int(anatomy.config.vocab_size) * len(batch.target_row) * 3
    return max(1, memory // (4 * (rows * length * per_token + vocabulary)))
