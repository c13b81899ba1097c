"""The grid: the same localisation under several corruptions, metrics and windows, and what changes from one to the next.

P089, Zhang and Nanda 2023, https://arxiv.org/abs/2309.16042; P107, Heimersheim and Nanda 2024, https://arxiv.org/abs/2404.15255. Each
site gets its clean value back in a corrupted run, score = benefit(restored) - benefit(corrupted):

    corruption   "replacement": the other prompt of the pair; "noise": Gaussian noise on the embeddings of a span
    metric       logit_diff, probability, kl (to the clean run's prediction; negative, so that more is better)
    window       layers restored together

What is reported agrees with the reference, symmetric token replacement and logit difference one layer at a time, or it does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import PatchclampError
from patchclamp.metrics import Metric, metric_named
from patchclamp.models.model import Model
from patchclamp.patching import patch
from patchclamp.scores import Scores
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch
from patchclamp.tracing import trace

METRICS = ("logit_diff", "probability", "kl")
REFERENCE = ("replacement", "logit_diff", 1)


@dataclass(frozen=True, eq=False)
class Grid:
    """What each way of localising says.

    Attributes:
        scores: by (corruption, metric, window).
        table: a row per way: spearman with the reference, top (share of the reference's five largest among its own five), signs
            (clear effects of the reference that point the other way), negative (clear negative effects that it finds), largest.
        about: n, sites, positions, seed.
    """

    scores: dict[tuple[str, str, int], Scores]
    table: pl.DataFrame
    about: dict[str, Any]

    def row(self, corruption: str, metric: str, window: int) -> dict[str, Any]:
        """One way's row."""
        which = (pl.col("corruption") == corruption) & (pl.col("metric") == metric) & (pl.col("window") == window)
        return self.table.filter(which).row(0, named=True)

    def __str__(self) -> str:
        return "\n".join(
            f"{row['corruption']}, {row['metric']}, window {row['window']}: "
            + ("rank correlation undefined" if row["spearman"] is None else f"Spearman {row['spearman']:+.2f}")
            + f", {row['top']:.0%} of the top five, {row['negative']} clear negative effects"
            for row in self.table.iter_rows(named=True)
        )


def grid(
    model: Model,
    examples: Examples,
    sites: Sequence[Site | str] = ("L*.mlp.write",),
    positions: Sequence[int | str] = ("subject", "end"),
    *,
    subject: str = "subject",
    corruptions: Sequence[str] = ("replacement", "noise"),
    metrics: Sequence[str] = METRICS,
    windows: Sequence[int] = (1, 3),
    draws: int = 3,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Grid:
    """Localise in every way, and compare with the reference, which is always among them.

    Args:
        model: the model.
        examples: pairs with the span `subject`.
        sites: what is restored; one kind of site.
        positions: where.
        subject: the span that noise is put on.
        corruptions: "replacement", "noise".
        metrics: by name; kl is to the clean run.
        windows: layers restored together.
        draws: of the noise.
        batch_size: examples at once.
        seed: of the noise and the intervals.
        progress: told which way runs, and how many are done.

    Cost: per way, a forward pass per site and position (times `draws` for noise).

    Raises:
        PatchclampError: a corruption that there is not.
        GateError: prompts without the span.
    """
    if unknown := [name for name in corruptions if name not in ("replacement", "noise")]:
        raise PatchclampError(f"there is no corruption {unknown[0]!r}: choose from replacement, noise")
    ways = [(corruption, metric, window) for corruption in corruptions for metric in metrics for window in windows]
    ways = list(dict.fromkeys([REFERENCE, *ways]))
    chosen = {name: against_clean(model, examples) if name == "kl" else metric_named(name) for name in {way[1] for way in ways}}
    found: dict[tuple[str, str, int], Scores] = {}
    for number, (corruption, metric, window) in enumerate(ways):
        if progress is not None:
            progress(f"{corruption}, {metric}, window {window}", number, len(ways))
        if corruption == "replacement":
            scores = patch(
                model, examples, sites, positions, window=window, metric=chosen[metric], direction="denoising", batch_size=batch_size,
                seed=seed,
            )  # fmt: skip
        else:
            scores = trace(
                model, examples, sites, positions, subject=subject, window=window, metric=chosen[metric], draws=draws,
                batch_size=batch_size, seed=seed,
            ).effects  # fmt: skip
        found[corruption, metric, window] = scores
    about = {"n": len(examples), "sites": list(map(str, sites)), "positions": list(map(str, positions)), "seed": seed, "model": model.name,
             "task": examples.task}  # fmt: skip
    return Grid(found, pl.DataFrame([_row(way, scores, found[REFERENCE]) for way, scores in found.items()]), about)


def _row(way: tuple[str, str, int], scores: Scores, reference: Scores) -> dict[str, Any]:
    same = scores.agreement(reference)
    mine, theirs = (set(one.top(5)["site"]) for one in (scores, reference))
    known = "high" in scores.table.columns and scores.table["high"].null_count() == 0
    negative = int((scores.table["high"] < 0).sum()) if known else 0
    largest = scores.top(1).row(0, named=True)
    return {"corruption": way[0], "metric": way[1], "window": way[2], "spearman": same.spearman, "top": len(mine & theirs) / len(theirs),
            "signs": same.wrong_signs, "negative": negative, "largest": largest["score"], "where": largest["site"]}  # fmt: skip


def against_clean(model: Model, examples: Examples) -> Metric:
    """Divergence from what the model predicts on each example's clean prompt, whatever runs. Cost: one forward pass over the examples."""
    kept: dict[tuple[int, ...], Float[Tensor, "target token"]] = {}
    for batch in examples.batches(32):
        with torch.no_grad():
            logits = model.target_logits(batch)[0].float().log_softmax(-1)
        rows = batch.example[batch.target_row.to(batch.example.device)]
        for number, example in enumerate(batch.examples):
            kept[example.clean] = logits[(rows == number).to(logits.device)]

    def divergence(logits: Tensor, batch: Batch, _: Tensor | None) -> Tensor:
        clean = torch.cat([kept[example.clean] for example in batch.examples]).to(logits)
        return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)

    return Metric("kl", False, True, True, False, -1, divergence)
