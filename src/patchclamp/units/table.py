"""What every measure gives: numbers per example, and a tidy table of their means with intervals; and runs in pieces that fit memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import isnan

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import MeasureError
from patchclamp.models.editing import Edits
from patchclamp.models.model import Inputs, Model
from patchclamp.scores.statistics import mean_interval
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

SCHEMA = {"part": pl.String, "name": pl.String, "value": pl.Float64, "low": pl.Float64, "high": pl.Float64, "n": pl.Int64}
HELD = 2**26
"""Numbers that one run may keep at once."""


@dataclass(frozen=True, eq=False)
class Numbers:
    """One number per example, of one part.

    Args:
        part: a site (`L3.h1`, `L2.resid.post`), or "model".
        name: what was measured.
        values: by example; NaN where an example does not ask for it (it has no repeated token), which leaves it out.
    """

    part: str
    name: str
    values: Float[np.ndarray, " example"]


def tidy(found: Sequence[Numbers], seed: int = 0, resamples: int = 1000) -> pl.DataFrame:
    """Means over examples, a row per part and name: part, name, value, low, high (95 % bootstrap interval), n.

    Low and high are null with fewer than 2 examples; a number that no example asks for is null, with n = 0.
    """
    rows: list[tuple[str, str, float | None, float | None, float | None, int]] = []
    for one in found:
        values = one.values[~np.isnan(one.values)].astype(np.float64)
        if not len(values):
            rows.append((one.part, one.name, None, None, None, 0))
            continue
        mean = mean_interval(values, resamples=resamples, seed=seed)
        rows.append((one.part, one.name, mean.mean, mean.low, mean.high, mean.n))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def exactly(rows: Sequence[tuple[str, str, float]], n: int = 1) -> pl.DataFrame:
    """The same table of numbers that are no means of a sample (of weights; of all `n` inputs there are): no interval; NaN is null."""
    found = [(part, name, None if isnan(value) else value, None, None, n) for part, name, value in rows]
    return pl.DataFrame(found, schema=SCHEMA, orient="row")


def pieces(model: Model, inputs: Inputs, kept: int) -> Iterator[Batch]:
    """The rows a few at a time, as plain rows of tokens (without targets), on the model's device.

    Args:
        model: what will run.
        inputs: a batch, text, several texts, or token ids.
        kept: numbers per row that a run keeps.
    """
    batch = model.batch(inputs).to(model.device)
    size = max(1, HELD // max(kept, 1))
    for start in range(0, len(batch.tokens), size):
        yield _rows(batch, slice(start, start + size))


def _rows(batch: Batch, some: slice) -> Batch:
    none = torch.zeros(0, dtype=torch.long, device=batch.tokens.device)
    return replace(
        batch, tokens=batch.tokens[some], mask=batch.mask[some], corrupt=None, target_row=none, target_position=none,
        answers=none[:, None], wrong=None, example=torch.arange(len(batch.tokens[some]), device=none.device),
        sign=batch.sign[some], spans={name: span[some] for name, span in batch.spans.items()}, examples=(),
    )  # fmt: skip


def recorded(
    model: Model, inputs: Inputs, kinds: Sequence[str], edits: Edits | None = None
) -> Iterator[tuple[Batch, dict[Site, Tensor]]]:
    """Values of whole layers, of every layer that has them, a few rows at a time.

    Args:
        model: what runs.
        inputs: what it runs on.
        kinds: kinds of site ("pattern", "v", "resid.post"; "embed" and "final", too).
        edits: run with these.

    Raises:
        MeasureError: the model has none of a kind.
    """
    sites = [site for kind in kinds for site in layers_with(model, kind)]
    batch = model.batch(inputs)
    n = batch.tokens.shape[1]
    wide = max(size.heads for size in model.anatomy.sizes)
    per_site = max(n * n * wide if {"pattern", "scores"} & set(kinds) else 0, n * model.width * (wide if "write" in kinds else 1))
    for piece in pieces(model, batch, per_site * len(sites)):
        with torch.no_grad():
            values = model.record(piece, sites, edits)
        yield piece, values


def layers_with(model: Model, kind: str) -> list[Site]:
    """The whole-layer sites of a kind, in forward order.

    Raises:
        MeasureError: there are none, with the reason.
    """
    if kind in ("embed", "final", "logits"):
        return [Site(kind)]
    found = [Site(kind, layer) for layer in range(model.layers)]
    reasons = [model.anatomy.why_not(site) for site in found]
    if all(reasons):
        raise MeasureError(f"{model.name} ({model.family.name}) has no {kind} to measure: {reasons[0]}")
    return [site for site, reason in zip(found, reasons, strict=True) if not reason]
