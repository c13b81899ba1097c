"""How far methods agree with exact effects, on one task: a row per method, with what each costs."""

import importlib
from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from patchclamp.errors import NumericsError, PatchclampError
from patchclamp.methods import Direction, counted, effects, method_names, passes_of
from patchclamp.metrics import Metric
from patchclamp.parts import Fallback, Parts
from patchclamp.tasks import Examples

COLUMNS = {
    "method": pl.String, "pearson": pl.Float64, "spearman": pl.Float64, "relative_l2": pl.Float64, "overlap": pl.Float64,
    "wrong_signs": pl.Int64, "forward": pl.Int64, "backward": pl.Int64, "refused": pl.String,
}  # fmt: skip


def compare(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    methods: Sequence[str] | None = None,
    *,
    metric: str | Metric | None = None,
    direction: Direction = "noising",
    top: int = 5,
    batch_size: int = 64,
    seed: int = 0,
) -> pl.DataFrame:
    """Each method beside the exact effects of the same parts on the same examples (means over examples).

    Args:
        parts: which parts.
        examples: on which prompts.
        fallback: what a closed gate passes.
        methods: which; by default all.
        metric: by default the task's.
        direction: noising or denoising.
        top: of how many parts of largest |score| the overlap is taken.
        batch_size: examples at once.
        seed: of methods that draw.

    Returns:
        A row per method: `pearson`, `spearman` (empty where a side is constant), `relative_l2` = |score - exact| / |exact|,
        `overlap` (share of the `top` largest |exact| among the method's `top`), `wrong_signs` among those parts, and `forward` and
        `backward`, the passes over a batch that the method says it takes. A method without signs is compared with |exact|. One that
        does not fit the metric, the fallback or the model has an empty row, and why in `refused`.

    Cost: that of exact and of each method.

    Raises:
        NumericsError: every exact effect is zero: there is nothing to agree with.
    """
    if not 0 < top <= len(counted(parts)):
        raise PatchclampError(f"an overlap of the top {top} was asked for, and there are {len(counted(parts))} parts")
    names = [name for name in methods or method_names() if name != "exact"]
    samples = effects(parts, examples, fallback, "exact", metric=metric, direction=direction, batch_size=batch_size, seed=seed)
    exact = samples.double().mean(1).numpy()
    if not np.abs(exact).max():
        raise NumericsError(
            "every exact effect is zero, so no method can be compared with it: do clean and corrupt prompts differ?"
        )
    rows: list[dict[str, str | float | int | None]] = [{"method": "exact"} | against(exact, exact, top) | _cost("exact", parts)]
    for name in names:
        try:
            table = effects(parts, examples, fallback, name, metric=metric, direction=direction, batch_size=batch_size, seed=seed)
        except PatchclampError as error:
            rows.append({"method": name, "refused": str(error)})
            continue
        true = exact if signed(name) else np.abs(exact)
        rows.append({"method": name} | against(table.double().mean(1).numpy(), true, top) | _cost(name, parts))
    return pl.DataFrame(rows, schema=COLUMNS)


def signed(name: str) -> bool:
    """Whether a method's scores have signs."""
    return bool(getattr(importlib.import_module(f"patchclamp.methods.{name}"), "SIGNED", True))


def against(score: NDArray[np.float64], exact: NDArray[np.float64], top: int) -> dict[str, float | int | None]:
    """How far one list of scores agrees with another; see `compare`."""
    from scipy.stats import rankdata

    varies = len(score) > 2 and np.ptp(score) > 0 and np.ptp(exact) > 0
    best, mine = (set(np.argsort(-np.abs(one), kind="stable")[:top].tolist()) for one in (exact, score))
    return {
        "pearson": float(np.corrcoef(score, exact)[0, 1]) if varies else None,
        "spearman": float(np.corrcoef(rankdata(score), rankdata(exact))[0, 1]) if varies else None,
        "relative_l2": float(np.linalg.norm(score - exact) / np.linalg.norm(exact)),
        "overlap": len(best & mine) / top,
        "wrong_signs": sum(bool(score[part] * exact[part] < 0) for part in best),
    }


def _cost(name: str, parts: Parts) -> dict[str, int]:
    forward, backward = passes_of(name, parts.model.layers, len(parts.counted))
    return {"forward": forward, "backward": backward}
