"""Massive activations: a few coordinates of the stream, at a few tokens, that are far above all others; and what they are for.

Paper: Sun et al. 2024, Massive Activations in Large Language Models, https://arxiv.org/abs/2402.17762 (P031).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchclamp.errors import MeasureError
from patchclamp.models.editing import Seen
from patchclamp.models.model import Inputs, Model
from patchclamp.sites import Site
from patchclamp.units.context import losses
from patchclamp.units.table import Numbers, recorded, tidy

ABOVE, TIMES = 100.0, 1000.0
"""The paper's: larger than 100, and than 1000 times the median."""
STREAM = ("embed", "resid.post")


def massive(
    model: Model, inputs: Inputs, *, above: int | float = ABOVE, times: int | float = TIMES, seed: int = 0
) -> pl.DataFrame:
    """How far the largest activation of the residual stream stands above the median, by layer.

    Of |h| over a row's real tokens and all coordinates:

    Args:
        model: any.
        inputs: rows.
        above: an activation is massive that is larger than this,
        times: and than so many times the median of its row and layer.
        seed: of the intervals.

    Returns:
        part embed and `Li.resid.post`: `top`, `median`, `ratio` = top / median, `massive` (how many activations of a row are).
        part "model": `ratio`, the largest of any layer. Means over rows, with intervals.

    Cost: one forward pass.
    """
    found: dict[tuple[str, str], list[Tensor]] = {}
    for batch, values in recorded(model, inputs, STREAM):
        for site, value in values.items():
            size = _sizes(value, batch.mask)
            top, median = size.nan_to_num(nan=-1).amax((1, 2)), _median(size)
            counted = _is_massive(size, median, above, times).double().sum((1, 2))
            ratio = top / median.clamp(min=1e-30)
            for name, each in (("top", top), ("median", median), ("ratio", ratio), ("massive", counted)):
                found.setdefault((str(site), name), []).append(each.cpu())
    numbers = {key: torch.cat(some).numpy() for key, some in found.items()}
    largest = np.max([values for (_, name), values in numbers.items() if name == "ratio"], axis=0)
    return tidy(
        [*(Numbers(part, name, values) for (part, name), values in numbers.items()), Numbers("model", "ratio", largest)], seed
    )


def places(model: Model, inputs: Inputs, top: int = 3) -> pl.DataFrame:
    """The largest activations of every layer and row: where they stand, at which token, in which coordinate.

    Returns:
        part, row, position (counted from the row's first token), token (id), coordinate, value, ratio (|value| / median), `top`
        rows per layer and row of tokens, the largest first.

    Cost: one forward pass.
    """
    rows: list[tuple[str, int, int, int, int, float, float]] = []
    done = 0
    for batch, values in recorded(model, inputs, STREAM):
        for site, value in values.items():
            size = _sizes(value, batch.mask)
            median = _median(size)
            for row, best in enumerate(size.nan_to_num(nan=-1).flatten(1).topk(min(top, value[0].numel())).indices.tolist()):
                for place in best:
                    column, coordinate = divmod(place, value.shape[2])
                    at = float(value[row, column, coordinate])
                    position = int(batch.position_ids[row, column])
                    token = int(batch.tokens[row, column])
                    rows.append(
                        (str(site), done + row, position, token, coordinate, at, abs(at) / max(float(median[row]), 1e-30))
                    )
        done += len(batch.tokens)
    names = ("part", "row", "position", "token", "coordinate", "value", "ratio")
    return pl.DataFrame(rows, schema=names, orient="row").sort("row", maintain_order=True)


def _sizes(value: Float[Tensor, "row position width"], mask: Bool[Tensor, "row position"]) -> Float[Tensor, "row position width"]:
    return value.double().abs().masked_fill(~mask[:, :, None], torch.nan)


def _median(size: Float[Tensor, "row position width"]) -> Float[Tensor, " row"]:
    return size.flatten(1).nanmedian(1).values


def _is_massive(
    size: Float[Tensor, "row position width"], median: Float[Tensor, " row"], above: int | float, times: int | float
) -> Bool[Tensor, "row position width"]:
    return (size > above) & (size > times * median[:, None, None])


# --- set to something else


@dataclass(frozen=True)
class Held:
    """An edit: massive activations are set, coordinate by coordinate, to given values; everything else stays.

    Args:
        values: by coordinate.
        above: see `massive`.
        times: see `massive`.
    """

    values: tuple[tuple[int, float], ...]
    above: int | float
    times: int | float

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        size = _sizes(value, seen.mask)
        found = _is_massive(size, _median(size), self.above, self.times)
        for coordinate, new in self.values:
            put = torch.where(found[:, :, coordinate], torch.full_like(value[:, :, coordinate], new), value[:, :, coordinate])
            value = torch.cat([value[:, :, :coordinate], put[:, :, None], value[:, :, coordinate + 1 :]], 2)
        return value


def intervene(
    model: Model,
    inputs: Inputs,
    *,
    above: int | float = ABOVE,
    times: int | float = TIMES,
    layer: int | None = None,
    ways: Sequence[str] = ("zero", "mean"),
    seed: int = 0,
) -> pl.DataFrame:
    """What massive activations are worth: they are set to zero, or to their mean, in the layer where they first are.

    The paper's finding: zero destroys the model, the mean (over rows, coordinate by coordinate) changes nothing: they are biases.

    Args:
        model: any.
        inputs: rows; the means are taken over the same.
        above: see `massive`.
        times: see `massive`.
        layer: behind which block (its resid.post); by default the first that has massive activations.
        ways: "zero", "mean", "others" (as many other activations of each row, drawn by chance, at zero: a control).
        seed: of intervals, and of the control's draw.

    Returns:
        part `Li.resid.post`: `massive` (how many a row), `loss`, and for each way `loss.WAY` and `change.WAY` (loss so less loss,
        nats per token, paired by row).

    Cost: two forward passes and one per way.

    Raises:
        MeasureError: no activation is massive at these thresholds, or a way is unknown.
    """
    if unknown := set(ways) - {"zero", "mean", "others"}:
        raise MeasureError(
            f"massive activations are set to zero, mean or (as a control) others are; not {', '.join(sorted(unknown))}"
        )
    site, counts, means = _first(model, inputs, above, times, layer)
    before = np.nanmean(losses(model, inputs), 1)
    found = [Numbers(str(site), "massive", counts), Numbers(str(site), "loss", before)]
    for way in ways:
        new = tuple((c, mean if way == "mean" else 0.0) for c, mean in means)
        edit = Others(above, times, seed) if way == "others" else Held(new, above, times)
        after = np.nanmean(losses(model, inputs, {site: edit}), 1)
        found += [Numbers(str(site), f"loss.{way}", after), Numbers(str(site), f"change.{way}", after - before)]
    return tidy(found, seed)


@dataclass(frozen=True)
class Others:
    """The control: in each row, as many activations as are massive, drawn among the others, are set to zero."""

    above: int | float
    times: int | float
    seed: int

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        size = _sizes(value, seen.mask)
        found = _is_massive(size, _median(size), self.above, self.times)
        draw = torch.rand(value.shape, generator=torch.Generator().manual_seed(self.seed)).to(value.device)
        draw = draw.masked_fill(found | ~seen.mask[:, :, None], -1.0).flatten(1)
        closed = torch.zeros_like(draw, dtype=torch.bool)
        for row, count in enumerate(found.sum((1, 2)).tolist()):
            closed[row, draw[row].topk(count).indices] = True
        return value.masked_fill(closed.view(value.shape), 0.0)


def _first(
    model: Model, inputs: Inputs, above: int | float, times: int | float, layer: int | None
) -> tuple[Site, Float[np.ndarray, " example"], list[tuple[int, float]]]:
    """Where massive activations first are, how many each row has there, and their mean by coordinate."""
    counts: dict[int, list[Tensor]] = {}
    sums: dict[int, Tensor] = {}
    hits: dict[int, Tensor] = {}
    for batch, values in recorded(model, inputs, ["resid.post"]):
        for site, value in values.items():
            at = site.layer or 0
            size = _sizes(value, batch.mask)
            found = _is_massive(size, _median(size), above, times)
            counts.setdefault(at, []).append(found.double().sum((1, 2)).cpu())
            sums[at] = sums.get(at, torch.zeros(1)) + (value.double() * found).sum((0, 1)).cpu()
            hits[at] = hits.get(at, torch.zeros(1)) + found.double().sum((0, 1)).cpu()
    have = [at for at in sorted(hits) if bool(hits[at].sum() > 0) and layer in (None, at)]
    if not have:
        where = "in any layer" if layer is None else f"behind block {layer}"
        raise MeasureError(
            f"no activation of {model.name} is above {above:g} and {times:g} times the median {where}: `massive` says how large "
            "they are; give above= and times= that the largest pass"
        )
    at = have[0]
    means = [(int(c), float(sums[at][c] / hits[at][c])) for c in hits[at].nonzero()[:, 0]]
    return Site("resid.post", at), torch.cat(counts[at]).numpy(), means
