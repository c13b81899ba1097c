"""Many settings of what destinations read, folded into the rows of few passes, each from the block where it first differs."""

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
    firsts: Sequence[int | None],
    edits_of: Callable[[Sequence[int]], Edits],
    most: int,
) -> Float[Tensor, "setting example"]:
    """The metric for each setting and example, without gradient.

    Args:
        model: the model.
        batch: on its device.
        metric: what is measured.
        firsts: by setting, the first block that differs from the model's own run (behind the last one: how many there are);
            None: none does.
        edits_of: the edits of a pass of some settings, which stand in the order of their first blocks.
        most: how many settings run at once.

    Cost: one pass for the model itself, one more where several settings start behind the first block; per setting, one pass from
    its first block on.
    """
    with torch.no_grad():
        moved = sorted((number for number, first in enumerate(firsts) if first is not None), key=lambda n: firsts[n] or 0)
        out, plain = dict[int, Tensor](), None
        if metric.reference or len(moved) < len(firsts):
            itself = model.target_logits(batch)
            plain = itself[0] if metric.reference else None
            out = dict.fromkeys(set(range(len(firsts))) - set(moved), metric(itself, batch, plain)[0])
        while moved:
            some = moved[:most]
            try:
                logits = model.target_logits(batch, edits_of(some), len(some))
            except RuntimeError as error:
                most = _fewer(error, len(some))
                continue
            out |= zip(some, metric(logits, batch, plain), strict=True)
            moved = moved[len(some) :]
    return torch.stack([out[number] for number in range(len(firsts))])


def _fewer(error: RuntimeError, settings: int) -> int:
    """Where memory ran out with several settings at once, half as many, said aloud."""
    if settings == 1 or not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
        raise error
    warnings.warn(f"memory ran out with {settings} settings at once: going on with {settings // 2}", stacklevel=3)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return settings // 2
