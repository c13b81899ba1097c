"""Side effects: what else a change does, on other tasks and on plain text."""

from collections.abc import Sequence

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import MetricError, PatchclampError
from patchclamp.methods import groups_of
from patchclamp.metrics import METRICS, metric_named
from patchclamp.models.inputs import token_batch
from patchclamp.models.model import Model
from patchclamp.scores.statistics import mean_interval
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch


def side_effects(before: Model, after: Model, tasks: Sequence[Examples], batch_size: int = 64, seed: int = 0) -> pl.DataFrame:
    """A row per task: how well both models do it, and the paired change with its interval.

    Returns:
        task, metric, n, accuracy_before, accuracy_after (share of prompts with a positive logit difference, else of answers
        that are the likeliest token), before, after (means of the metric), change, low, high (95 %, over groups).

    Cost: one forward pass over each task's prompts per model.
    """
    rows: list[dict[str, object]] = []
    for examples in tasks:
        metric = metric_named(examples.metric)
        right = "logit_diff" if examples[0].wrong else "top1"
        one, two = (_values(model, examples, [metric.name, right], batch_size) for model in (before, after))
        change = mean_interval((two[0] - one[0]).numpy(), groups_of(examples), seed=seed)
        share = [float((value[1] > (0 if right == "logit_diff" else 0.5)).double().mean()) for value in (one, two)]
        rows.append(
            {"task": examples.task, "metric": metric.name, "n": len(examples), "accuracy_before": share[0], "accuracy_after": share[1],
             "before": float(one[0].mean()), "after": float(two[0].mean()), "change": change.mean, "low": change.low, "high": change.high}
        )  # fmt: skip
    return pl.DataFrame(rows, schema=SCHEMA)


SCHEMA = {
    "task": pl.String, "metric": pl.String, "n": pl.Int64, "accuracy_before": pl.Float64, "accuracy_after": pl.Float64,
    "before": pl.Float64, "after": pl.Float64, "change": pl.Float64, "low": pl.Float64, "high": pl.Float64,
}  # fmt: skip


def _values(model: Model, examples: Examples, names: Sequence[str], batch_size: int) -> Float[Tensor, "metric example"]:
    pieces: list[Tensor] = []
    for batch in examples.batches(batch_size):
        with torch.no_grad():
            logits = model.target_logits(batch)
        here, found = batch.to(model.device), list[Tensor]()
        for name in names:
            metric = METRICS[name]
            if metric.reference:
                raise MetricError(
                    f"{name} compares with the model itself, so two models cannot be compared by it: choose another metric"
                )
            found.append(metric(logits, here)[0].double().cpu())
        pieces.append(torch.stack(found))
    return torch.cat(pieces, 1)


def text_effects(before: Model, after: Model, texts: Batch, batch_size: int = 16, seed: int = 0) -> dict[str, float | int | None]:
    """What a change does to plain text: nats per token of both models, and how far their predictions are apart.

    Args:
        texts: rows of tokens, left-padded; each is a group of its own.

    Returns:
        texts, tokens; nll_before, nll_after (mean over tokens of -log p); change, low, high (mean over texts of what each one's
        nats per token change by, 95 %: short texts count as long ones, so it is not nll_after - nll_before); kl (mean over
        positions of KL(before || after)).

    Cost: one forward pass over the texts per model, with every logit.

    Raises:
        PatchclampError: no text has two tokens.
    """
    sums: list[tuple[float, float, float, int]] = []
    for start in range(0, len(texts.tokens), batch_size):
        some = zip(texts.tokens[start : start + batch_size], texts.mask[start : start + batch_size], strict=True)
        piece = token_batch([row[there].tolist() for row, there in some])
        tokens, mask = piece.tokens, piece.mask
        one, two = (model.run(piece).double().log_softmax(-1).cpu() for model in (before, after))
        here = (mask[:, 1:] & mask[:, :-1]).cpu()
        said = tokens[:, 1:, None].cpu()
        for row in range(len(tokens)):
            where = here[row]
            nll = [-logp[row, :-1].gather(-1, said[row])[where, 0].sum() for logp in (one, two)]
            kl = (one[row, :-1].exp() * (one[row, :-1] - two[row, :-1]))[where].sum()
            sums.append((float(nll[0]), float(nll[1]), float(kl), int(where.sum())))
    count = sum(n for *_, n in sums)
    if not count:
        raise PatchclampError("no text has two tokens, so nothing is predicted in it: give longer texts")
    per_text = torch.tensor([[two - one, n] for one, two, _, n in sums if n], dtype=torch.float64)
    change = mean_interval((per_text[:, 0] / per_text[:, 1]).numpy(), seed=seed)
    return {
        "texts": len(sums), "tokens": count, "nll_before": sum(s[0] for s in sums) / count,
        "nll_after": sum(s[1] for s in sums) / count, "change": change.mean, "low": change.low, "high": change.high,
        "kl": sum(s[2] for s in sums) / count,
    }  # fmt: skip
