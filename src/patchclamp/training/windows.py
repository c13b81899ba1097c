"""Critical periods: a part is out of order for a while, early or late, and it is seen whether what it costs can be made good.

Paper: Kleinman, Achille and Soatto 2024, Critical Learning Periods Emerge Even in Deep Linear Networks, https://arxiv.org/abs/2308.12221
(P277). There the deficit is in the input (blur, one eye closed) and networks are deep linear ones; here a part of a language model is
ablated, or held by any other clamp.
"""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from patchclamp.errors import TrainingError
from patchclamp.training.clamp import Clamp
from patchclamp.training.clamps.schedule import Schedule
from patchclamp.training.counterfactual import UNCLAMPED, Counterfactual, interval


def windows(deficit: Callable[[Schedule], Clamp], onsets: Sequence[int], length: int, steps: int) -> dict[str, tuple[Clamp, ...]]:
    """Arms of a counterfactual (`counterfactual(..., arms=windows(...))`): the same deficit for `length` updates from each onset on.

        windows(lambda schedule: Ablate("L0.h*", schedule=schedule), onsets=(0, 100, 200), length=100, steps=600)

    Args:
        deficit: a clamp with this schedule.
        onsets: first updates of the windows.
        length: of each, in updates.
        steps: of the whole training. What is left behind a late window is shorter than behind an early one: `steps` should leave all
            of them enough.

    Returns:
        Clamps by arm, called from-NNNNNNN.

    Raises:
        TrainingError: no onsets, one twice, or a window that ends behind the training.
    """
    if not onsets or len(set(onsets)) < len(onsets) or min(onsets) < 0 or length < 1:
        raise TrainingError(
            f"windows of {length} updates from {list(onsets)} were asked: give onsets that differ, and 1 or more updates"
        )
    if max(onsets) + length >= steps:
        raise TrainingError(
            f"a window from {max(onsets)} to {max(onsets) + length} was asked of a training of {steps} steps: it must end before the training "
            "does, so that something is left to recover in"
        )
    return {f"from-{onset:07d}": (deficit(Schedule(onset, onset + length)),) for onset in sorted(onsets)}


def lasting(result: Counterfactual, confidence: float = 0.95) -> pl.DataFrame:
    """What a deficit that is long over still costs: the loss at the end without any clamp, against the same seed's run that had none.

        difference = mean over seeds of (loss of the arm's run - loss of the unclamped run), in nats, at the last step

    Args:
        result: of `counterfactual`.
        confidence: of the interval of the mean, over seeds that are resampled with replacement (see `counterfactual` for how far
            that can be trusted with few seeds).

    Returns:
        arm, seeds, loss, difference, low, high (null with fewer than two seeds), in the order of the arms.

    Raises:
        TrainingError: an arm has a seed that the unclamped runs lack.
    """
    base = dict(result.table.filter(pl.col("arm") == UNCLAMPED).select("seed", "free").iter_rows())
    rows: list[tuple[str, int, float, float, float | None, float | None]] = []
    for arm in result.table["arm"].unique(maintain_order=True):
        own = dict(result.table.filter(pl.col("arm") == arm).select("seed", "free").iter_rows())
        if missing := sorted(set(own) - set(base)):
            raise TrainingError(
                f"the arm {arm} has the seed {missing[0]}, and there is no unclamped run of it: give all arms the same seeds"
            )
        if arm == UNCLAMPED:
            continue
        costs = np.array([loss - base[seed] for seed, loss in own.items()], dtype=np.float64)
        low, high = interval(costs, confidence) if len(costs) > 1 else (None, None)
        rows.append((arm, len(costs), float(np.mean(list(own.values()))), float(costs.mean()), low, high))
    kinds = {
        "arm": pl.String,
        "seeds": pl.Int64,
        "loss": pl.Float64,
        "difference": pl.Float64,
        "low": pl.Float64,
        "high": pl.Float64,
    }
    return pl.DataFrame(rows, schema=kinds, orient="row")
