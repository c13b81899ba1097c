"""Activation patching: any sites, any positions, alone or in windows of layers, each patched exactly."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.methods import Direction, attribute
from patchclamp.metrics import Metric
from patchclamp.models.model import Model
from patchclamp.parts import Fallback, Parts, gated
from patchclamp.parts.compiling import windows
from patchclamp.parts.gated import Routing
from patchclamp.scores import Scores
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch


def advice(fallback: str, metric: str, window: int = 1, effects: Scores | None = None) -> tuple[str, ...]:
    """What is known to mislead about a way of patching, in sentences; empty for the way that is recommended.

    Recommended are symmetric token replacement, logit difference and single layers (P089, https://arxiv.org/abs/2309.16042; P107,
    https://arxiv.org/abs/2404.15255).

    Args:
        fallback: what is put in: "resample", "mean", "zero", or "noise" for causal tracing.
        metric: what is measured.
        window: layers patched together.
        effects: what was found, where there is something to look at.
    """
    found: list[str] = []
    if fallback == "noise":
        found.append("noise on embeddings takes the model off its distribution, and what comes back may be of the shock: with pairs, "
                     "exchange tokens instead (patch --direction denoising)")  # fmt: skip
    if fallback == "zero":
        found.append("zero is a value that few parts ever have: effects may be of the shock; with pairs, use resample")
    if metric in ("probability", "probability_diff", "top1"):
        found.append(
            f"{metric} can hardly fall below 0 or rise above 1, so parts that lower the answer go unseen: logit_diff shows them"
        )
    if metric in ("kl", "nll", "log_probability"):
        found.append(
            f"{metric} also moves with tokens that are no answer to the question: logit_diff of right and wrong does not"
        )
    if window > 1:
        found.append(
            f"a window of {window} layers adds up what each does, and more where they work together: look at single layers too"
        )
    if effects is not None and "q" in effects.table.columns and not effects.significant().height:
        found.append("no effect is clear of chance: more prompts, or a larger corruption, before any is told")
    return tuple(found)


def patch(
    model: Model,
    examples: Examples,
    sites: Sequence[Site | str] = ("L*.resid.post",),
    positions: Sequence[int | str] = (),
    *,
    window: int = 1,
    fallback: str = "resample",
    fit: Examples | None = None,
    metric: str | Metric | None = None,
    direction: Direction = "noising",
    routing: Routing = "free",
    batch_size: int = 64,
    seed: int = 0,
    memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Give each site at each position its fallback, one after the other, and say what that takes from the behaviour.

    score = benefit(the model itself) - benefit(patched); in the direction "denoising", the corrupt prompts run, clean values are
    put in, and score = benefit(patched) - benefit(the model itself).

    Args:
        model: the model.
        examples: the prompts.
        sites: sites or patterns, of any kind that can be written: `L*.resid.post`, `L*.h*` (or `.q`, `.pattern`), `L*.kv*.k`,
            `L*.mlp`, `L5.mlp.n*`, `L*.mlp.e*`.
        positions: indices into the prompt (negative from its end) or named spans; a part per site and position. None: each
            site at all positions together.
        window: how many layers are patched together, centred on each site's own, cut at the ends.
        fallback: resample (the other prompt's value), mean (learned on `fit`), zero.
        fit: where the mean is learned.
        metric: by default the task's.
        direction: noising or denoising.
        routing: of a mixture of experts: "free", or "frozen" to that of the model's own run.
        batch_size: examples at once.
        seed: of the bootstrap.
        memory: bytes that one folded pass may take; by default a share of what is free (`models.memory`).
        progress: told how many examples of how many are done.

    Returns:
        A row per part, with intervals over examples.

    Cost: one pass for the model itself and one for the fallback per batch; per part a pass from its block and position on.

    Raises:
        SiteError: a pattern that fits nothing, or a site that cannot be written.
        GateError: a window below 1, a fallback that there is not.
    """
    if window < 1:
        raise GateError(f"a window of {window} layers was asked for: choose 1 or more")
    parts = gated(model, sites, positions, memory, routing)
    rule = parts.fallback(fallback, fit)

    closed = windows(parts.labels, window).to(model.device)

    def samples(parts: Parts, batch: Batch, fallback: Fallback, metric: Metric, seed: int) -> Float[Tensor, "part example"]:
        values = metric.sign * parts.measure(batch, torch.cat([closed, parts.open()]), fallback, metric)
        return values[-1] - values[:-1]

    about = {"window": window} if window > 1 else {}
    about |= {"routing": routing} if routing != "free" else {}
    return attribute(
        parts, examples, rule, "exact" if window == 1 else samples, metric=metric, direction=direction, batch_size=batch_size,
        seed=seed, about=about, progress=progress,
    )  # fmt: skip
