"""What grows before a training breaks: attention logits, the output's normaliser, activations; and how much the rate matters.

Paper: Wortsman et al. 2023, Small-scale proxies for large-scale Transformer training instabilities,
https://arxiv.org/abs/2309.14322 (P233).
"""

import math
from collections.abc import Mapping

import numpy as np
import polars as pl
import torch
from torch import Tensor

from patchclamp.errors import MeasureError
from patchclamp.models.model import Inputs, Model
from patchclamp.units.table import Numbers, pieces, recorded, tidy

KINDS = ("attn", "mlp", "resid.post")


def instability(model: Model, inputs: Inputs, seed: int = 0) -> pl.DataFrame:
    """Largest attention logits, the output's log-normaliser and the size of activations.

    Args:
        model: any.
        inputs: rows.
        seed: of the intervals.

    Returns:
        part `Li.hj`: `score` (largest attention logit of a row, as it goes into the softmax: scaled, not masked).
        part `Li.attn`, `Li.mlp`, `Li.resid.post`: `rms` = sqrt(mean x^2) over a row's real tokens.
        part "model": `score` (largest of all heads), `log_z` and `log_z2`: mean over tokens of log Z and of (log Z)^2, with
        Z = sum over the vocabulary of exp(logit); the paper's z-loss is 1e-4 log_z2. Means over rows, with intervals.

    Cost: two forward passes.
    """
    found: dict[tuple[str, str], list[Tensor]] = {}
    for batch, values in recorded(model, inputs, ["scores", *KINDS]):
        real = batch.mask[:, :, None].double()
        for site, value in values.items():
            if site.kind == "scores":
                seen = (batch.mask[:, :, None] & batch.mask[:, None, :]).tril()[:, None]
                finite = value.double().masked_fill(~seen | (value < torch.finfo(value.dtype).min / 4), -torch.inf)
                for h, largest in enumerate(finite.amax((2, 3)).unbind(1)):
                    found.setdefault((f"L{site.layer}.h{h}", "score"), []).append(largest.cpu())
            else:
                square = (value.double().square() * real).sum((1, 2)) / (real.sum((1, 2)) * value.shape[2])
                found.setdefault((str(site), "rms"), []).append(square.sqrt().cpu())
    for batch in pieces(model, inputs, model.batch(inputs).tokens.shape[1] * int(model.anatomy.config.vocab_size)):
        log_z, real = model.run(batch).double().logsumexp(-1), batch.mask.double()
        for name, value in (("log_z", log_z), ("log_z2", log_z.square())):
            found.setdefault(("model", name), []).append(((value * real).sum(1) / real.sum(1)).cpu())
    numbers = {key: torch.cat(some).numpy() for key, some in found.items()}
    largest = np.max([values for (_, name), values in numbers.items() if name == "score"], axis=0)
    return tidy(
        [*(Numbers(part, name, values) for (part, name), values in numbers.items()), Numbers("model", "score", largest)], seed
    )


def rate_sensitivity(losses: Mapping[float, float], initial: float) -> float:
    """How much the final loss depends on the learning rate: mean over rates of min(loss, initial) - best.

    Args:
        losses: final loss by learning rate; rates evenly spaced in their logarithm, over the range that is asked about. A
            training that diverged has any large number, infinity or NaN: it counts as `initial`.
        initial: loss before any training.

    Returns:
        Nats; 0: every rate is as good as the best.

    Raises:
        MeasureError: fewer than 3 rates, rates that are not evenly spaced (the mean would weigh some more), or none below `initial`.
    """
    rates = sorted(losses)
    if len(rates) < 3 or rates[0] <= 0:
        raise MeasureError(f"sensitivity is a mean over learning rates above 0: {len(rates)} were given, give at least 3")
    steps = np.diff(np.log(rates))
    if steps.max() > 1.25 * steps.min():
        raise MeasureError(f"rates {rates} are not evenly spaced in their logarithm: between neighbours there are factors of "
                           f"{math.exp(steps.min()):.3g} to {math.exp(steps.max()):.3g}")  # fmt: skip
    capped = [initial if math.isnan(losses[rate]) else min(losses[rate], initial) for rate in rates]
    best = min(capped)
    if best >= initial:
        raise MeasureError(f"no rate of {rates} ends below the loss before training ({initial:g}): give lower rates")
    return float(np.mean(capped) - best)


def foreseen(sizes: Mapping[float, float], at: float) -> float:
    """A number of larger models from small ones (the largest attention logit, say): log value = a + b log size, by least squares.

    Args:
        sizes: value by size (weights, or width), all above 0.
        at: the size that is asked about.

    Raises:
        MeasureError: fewer than 3 sizes, or values that are not above 0.
    """
    if len(sizes) < 3 or min(*sizes, *sizes.values(), at) <= 0:
        raise MeasureError(f"a power law takes at least 3 sizes with values above 0; there are {len(sizes)}")
    slope, start = np.polyfit(np.log(list(sizes)), np.log(list(sizes.values())), 1)
    return float(np.exp(start + slope * math.log(at)))
