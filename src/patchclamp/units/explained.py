"""How much of what a representation holds is about a feature: its share of the variance.

Paper: Lampinen et al. 2024, Learned feature representations are biased by complexity, learning order, position, and more,
https://arxiv.org/abs/2405.05847 (P070): features that a network computes equally well, and that do the same for its task, take up very
unlike shares of its representations; so a share says little of what is computed.
"""

from collections.abc import Mapping

import numpy as np
import polars as pl
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.errors import MeasureError
from patchclamp.models.model import Model
from patchclamp.units.table import SCHEMA

RESAMPLES = 500


def explained(
    values: Float[np.ndarray, "row width"], labels: Int[np.ndarray, " row"], weights: Float[np.ndarray, "draw row"]
) -> Float[np.ndarray, " draw"]:
    """Share of the variance of values, over all coordinates together, that the means of labels' groups hold.

    R2 = sum over groups n_g |mean_g - mean|^2 / sum over rows |x - mean|^2          (rows counted by `weights`); NaN without variance
    """
    x = values.astype(np.float64) - values.mean(0)
    sizes, sums = weights.sum(1), weights @ x
    off = (sums**2).sum(1) / sizes
    total = weights @ (x**2).sum(1) - off
    between = -off
    for label in np.unique(labels):
        own = weights * (labels == label)
        count = own.sum(1)
        between = between + np.where(count > 0, ((own @ x) ** 2).sum(1) / np.maximum(count, 1), 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 1e-12 * weights.shape[1], between / total, np.nan)


def variances(
    model: Model, tokens: Int[Tensor, "row position"], features: Mapping[str, Int[Tensor, " row"]], seed: int = 0
) -> pl.DataFrame:
    """Share of the residual stream's variance that each feature explains, at rows' last tokens, layer by layer.

    Args:
        model: any.
        tokens: rows without padding.
        features: by name, a label for each row. Where they are independent of each other over rows, shares may be added.
        seed: of the bootstrap.

    Returns:
        part embed and Li.resid.post, name of the feature, share with its 95 % bootstrap interval over rows, number of rows. A feature
        of k labels explains (k - 1) / (rows - 1) by chance alone.

    Cost: one forward pass.

    Raises:
        MeasureError: fewer than 8 rows, or a feature with one label only.
    """
    if len(tokens) < 8:
        raise MeasureError(f"variance explained was asked for, of {len(tokens)} rows: give 8 or more")
    if alone := [name for name, labels in features.items() if len(labels.unique()) < 2]:
        raise MeasureError(f"feature {alone[0]!r} has one label in all rows: give rows that differ in it")
    count = len(tokens)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)
    weights = np.concatenate([np.ones((1, count)), drawn])
    rows = list[tuple[str, str, float | None, float | None, float | None, int]]()
    for site, value in model.record(tokens, ["embed", "L*.resid.post"]).items():
        ends = value[:, -1].float().cpu().numpy()
        for name, labels in features.items():
            first, *rest = explained(ends, labels.cpu().numpy(), weights)
            known = not np.isnan(first)
            low, high = (float(end) for end in np.nanpercentile(rest, [2.5, 97.5])) if known else (None, None)
            rows.append((str(site), name, float(first) if known else None, low, high, count))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")
