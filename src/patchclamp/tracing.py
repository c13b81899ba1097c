"""Causal tracing: the subject's embeddings are blurred by noise, and each state is put back in turn (Meng et al. 2022).

P029, https://arxiv.org/abs/2202.05262.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl
import torch
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.methods import groups_of
from patchclamp.metrics import METRICS, Metric, metric_named
from patchclamp.models.model import Model
from patchclamp.parts import gated
from patchclamp.parts.compiling import windows
from patchclamp.parts.fallbacks import Own
from patchclamp.scores import Scores
from patchclamp.scores.statistics import Interval, mean_interval
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch


@dataclass(frozen=True)
class Traced:
    """What causal tracing found.

    Args:
        effects: per state, the indirect effect: benefit with the state put back, minus benefit with the subject blurred.
        clean: the metric on the clean run.
        blurred: the metric with the subject blurred, mean over draws of the noise.
        scale: standard deviation of the noise.
    """

    effects: Scores
    clean: Interval
    blurred: Interval
    scale: float

    @property
    def total(self) -> float:
        """The total effect: what the noise takes."""
        return self.clean.mean - self.blurred.mean

    def grid(self) -> pl.DataFrame:
        """The effects as a table, layer by position."""
        return self.effects.table.with_columns(pl.col("site").str.split("@").list.last().alias("position")).pivot(
            "position", index="layer", values="score"
        )


def trace(
    model: Model,
    examples: Examples,
    sites: Sequence[Site | str] = ("L*.resid.post",),
    positions: Sequence[int | str] = ("subject", "end"),
    *,
    subject: str = "subject",
    window: int = 1,
    deviations: float = 3.0,
    draws: int = 10,
    metric: str | Metric | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Traced:
    """Blur the subject, put states back one by one, see what comes back.

    The embeddings of the span `subject` get Gaussian noise of `deviations` standard deviations of the embedding matrix. Then
    every site at every position gets the clean run's value, alone or in a sliding `window` of layers around its own.

    Args:
        model: the model.
        examples: prompts with a span called `subject`.
        sites: what is put back: `L*.resid.post` (states), `L*.mlp.write`, `L*.attn.write`, `L*.h*.z`; one kind of site.
        positions: where; a part per site and position.
        subject: the span that is blurred.
        window: how many layers are put back together (the paper: 10 for MLPs and attention), centred, cut at the ends; of an even
            window the longer half is below, as in the authors' code.
        deviations: standard deviations of the embedding matrix's entries. A model that multiplies its embeddings (gemma) is
            blurred less by as many: give more.
        draws: of the noise.
        metric: by default the answer's probability.
        batch_size: examples at once.
        seed: of the noise.
        progress: told how many examples of how many are done.

    Returns:
        Effects with intervals over examples, mean over draws.

    Cost: per draw, one replayed run for each site and position and two for the reference.

    Raises:
        GateError: no such span, or several kinds of site with a window.
        SiteError: no such site.
    """
    metric = METRICS["probability"] if metric is None else metric_named(metric) if isinstance(metric, str) else metric
    if any(subject not in example.spans for example in examples):
        raise GateError(f"causal tracing blurs the span {subject!r}, and {examples.task!r} names no such span in every prompt")
    if draws < 1 or window < 1:
        raise GateError(f"{draws} draws and a window of {window} were asked for: choose 1 or more of each")
    parts = gated(model, sites, positions)
    gates = windows(parts.labels, window).to(model.device)
    spread = float(model.hf.get_input_embeddings().weight.detach().float().std())  # type: ignore[operator]
    scale, chance = deviations * spread, torch.Generator().manual_seed(seed)
    restored: list[Tensor] = []
    blurred: list[Tensor] = []
    clean: list[Tensor] = []
    for given in examples.batches(batch_size):
        batch = given.to(model.device)
        own = Own(parts.record, subject)
        clean.append(metric.sign * parts.measure(batch, parts.open(), own, metric)[0])
        found = torch.zeros(len(gates) + 1, len(batch), dtype=clean[-1].dtype, device=clean[-1].device)
        for _ in range(draws):
            under = parts.under(_blur(model, batch, subject, scale, chance))
            found += metric.sign * under.measure(batch, torch.cat([gates, parts.open()]), own, metric)
        restored.append(found[:-1] / draws)
        blurred.append(found[-1] / draws)
        if progress is not None:
            progress(sum(map(len, clean)), len(examples))
    base = torch.cat(blurred)
    effects = (torch.cat(restored, 1) - base).double().cpu().numpy()
    about = {"method": "causal tracing", "metric": metric.name, "fallback": "clean", "seed": seed, "model": model.name,
             "task": examples.task, "window": window, "draws": draws, "noise": scale}  # fmt: skip
    groups = groups_of(examples)
    return Traced(
        Scores.from_samples(parts.labels, effects, about, groups=groups, seed=seed),
        mean_interval(torch.cat(clean).double().cpu().numpy(), groups),
        mean_interval(base.double().cpu().numpy(), groups),
        scale,
    )


def _blur(model: Model, batch: Batch, span: str, scale: float, chance: torch.Generator) -> Tensor:
    """[row, position, width]: noise at the span, zero elsewhere."""
    noise = torch.randn(*batch.tokens.shape, model.width, generator=chance) * scale
    return noise.to(model.device) * batch.columns(span)[..., None]
