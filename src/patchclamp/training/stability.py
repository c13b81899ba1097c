"""How much the learning rate matters, what grows before a training breaks, and a loss that keeps the output's normaliser small.

Paper: Wortsman et al. 2023, Small-scale proxies for large-scale Transformer training instabilities, https://arxiv.org/abs/2309.14322
(P233). Normed queries and keys are a property of the architecture: compare a family that has them (qwen3, olmo2) with one that has not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import NumericsError, TrainingError
from patchclamp.models.model import Model
from patchclamp.training.data import Data, Rows
from patchclamp.training.loss import Loss, held_out, next_token
from patchclamp.training.plan import Training
from patchclamp.training.trainer import Measure, train
from patchclamp.units.instability import instability, rate_sensitivity

LOSS, SCORE, LOG_Z = "held-out loss", "largest attention logit", "log Z"


@dataclass(frozen=True)
class ZLoss:
    """The loss of the next token and a penalty on the output's normaliser, with the same weights w of predictions:

        next_token + coefficient * sum w (log Z)^2 / sum w,   Z = sum over the vocabulary of exp(logit)

    Args:
        coefficient: 1e-4 in the paper.

    Paper: https://arxiv.org/abs/2309.14322; first in PaLM, https://arxiv.org/abs/2204.02311.
    """

    coefficient: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.coefficient < float("inf"):
            raise TrainingError(f"a z-loss of {self.coefficient} was asked: give a coefficient of 0 or more, such as 1e-4")

    def __call__(self, logits: Float[Tensor, "row position token"], rows: Rows) -> Float[Tensor, ""]:
        """In nats, and squared nats times the coefficient."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        squares, weights = wide[:, :-1].logsumexp(-1).square(), rows.weights[:, 1:].to(wide)
        return next_token(logits, rows) + self.coefficient * (squares * weights).sum() / weights.sum()


def growing(data: Data, rows: int = 32) -> Measure:
    """A measure for `train`: the largest attention logit of any head and the mean log Z, over held-out rows. Cost: two forward passes."""
    kept = data.rows(-1, rows)

    def measure(model: Model, step: int) -> Mapping[str, float]:
        table = instability(model, kept.batch).filter(pl.col("part") == "model")
        found = dict(table.select("name", "value").iter_rows())
        return {name: math.nan if found[of] is None else found[of] for name, of in ((SCORE, "score"), (LOG_Z, "log_z"))}

    return measure


@dataclass(frozen=True, eq=False)
class Sweep:
    """What learning rates end in.

    Args:
        table: rate, loss (held out, at the end; infinite where the training broke), score (largest attention logit over all
            evaluations; of a broken run that is gone on with, over those since it was gone on with), step (of the last evaluation).
        initial: held-out loss before training.
        sensitivity: mean over rates of min(loss, initial) - best (`units.instability.rate_sensitivity`), in nats.
    """

    table: pl.DataFrame
    initial: float
    sensitivity: float


def sweep_rates(
    build: Callable[[], Model], data: Data, training: Training, rates: Sequence[float], out: str | Path, *,
    loss: Loss = next_token, rows: int = 64,
) -> Sweep:  # fmt: skip
    """Train the same model at several learning rates.

    Args:
        build: the model with its first weights, a new object each time.
        data: the same for all.
        training: all but the rate.
        rates: evenly spaced in their logarithm, at least 3.
        out: folder of the runs; those that are there are gone on with.
        loss: trained with; what is reported is the loss of the next token.
        rows: held out.

    Cost: a training for each rate, and three forward passes at each evaluation.

    Raises:
        TrainingError: rates twice, or none; what `train` raises, but for a loss that is not finite: that is what is looked for.
        MeasureError: rates that are not evenly spaced, or none that ends below the loss before training.
    """
    if len(rates) < 3 or len(set(rates)) < len(rates):
        raise TrainingError(f"a sweep over the rates {list(rates)} was asked: give at least 3 that differ")
    found: list[tuple[float, float, float, int]] = []
    starts: list[float] = []
    for rate in sorted(rates):
        seen = _numbers(build(), data, replace(training, rate=rate), Path(out) / f"rate-{rate:g}", loss, rows)
        starts += [seen[0][LOSS]] if 0 in seen else []
        ended = seen.get(training.steps, {}).get(LOSS, math.inf)
        score = max((of[SCORE] for of in seen.values() if not math.isnan(of[SCORE])), default=math.inf)
        found.append((rate, math.inf if math.isnan(ended) else ended, score, max(seen, default=0)))
    kinds = {"rate": pl.Float64, "loss": pl.Float64, "score": pl.Float64, "step": pl.Int64}
    table = pl.DataFrame(found, schema=kinds, orient="row")
    if not starts:
        raise TrainingError(f"all runs in {out} had broken before, and none is whole: delete that folder, or give lower rates")
    return Sweep(table, starts[0], rate_sensitivity(dict(table.select("rate", "loss").iter_rows()), starts[0]))


def _numbers(model: Model, data: Data, training: Training, out: Path, loss: Loss, rows: int) -> dict[int, Mapping[str, float]]:
    """Loss and largest score by step; of a training that broke, up to there."""
    seen: dict[int, Mapping[str, float]] = {}
    try:
        run = train(
            model, data, training, out, loss=loss, measures=[held_out(data, rows, name=LOSS), growing(data)],
            progress=lambda step, numbers: seen.update({step: numbers}),
        )  # fmt: skip
    except NumericsError:
        return seen
    curves = {name: dict(run.curve(name).iter_rows()) for name in (LOSS, SCORE)}
    return {step: {name: curve[step] for name, curve in curves.items()} for step in curves[LOSS]}
