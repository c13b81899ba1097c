"""What in attention is position and what is content: position dependence, recency heads, and attention made simpler at inference.

- `position_dependence`: the share of a head's attention that position alone tells.
- `suppress_recency`: what closing the heads that look at what is near takes, against as many random heads.
- `deconstruct`: attention replaced, per layer or everywhere, by uniform, fixed or no mixing; `cooperation`: what two layers' lose together.

Attention without softmax, or with static queries and keys, is another model: it has to be trained so, and is not made here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.dependence.network.experts import run_benefits
from patchclamp.dependence.network.hubs import Lesion, lesion, matched_sets
from patchclamp.dependence.table import Dependence
from patchclamp.edits import Put
from patchclamp.errors import PatchclampError
from patchclamp.methods import groups_of
from patchclamp.metrics import metric_named
from patchclamp.models.editing import Edits, Seen
from patchclamp.models.model import Model
from patchclamp.parts import Fallback, Parts, benefits, sites_of
from patchclamp.scores.statistics import mean_interval
from patchclamp.sites import Site
from patchclamp.tasks import Examples

NEAR = 2


def position_dependence(model: Model, examples: Examples, *, near: int = NEAR, batch_size: int = 32) -> pl.DataFrame:
    """How much of each head's attention position alone tells, and how much of it goes to what is near.

    With a_p(q, k) the attention from position q to key k in prompt p, and its mean over prompts,

        dependence = 1 - [sum (a - mean)^2 / (N - cells)] / [sum (a - grand mean)^2 / (N - 1)]        (adjusted; 1: position is all)

    over all visible q, k of q >= 1. `recency`: mean attention to the last `near` tokens (the present one among them), less what attention
    spread evenly over visible keys would give them. Prompts must have one length.

    Returns:
        A row per head: `site`, `dependence` (null where a head's attention is the same everywhere), `recency`.

    Cost: one forward pass over the examples.
    """
    patterns = _patterns(model, examples, batch_size)
    rows: list[dict[str, Any]] = []
    for layer, table in enumerate(patterns):
        n = table.shape[-1]
        visible = np.tril(np.ones((n, n), dtype=bool))
        visible[0] = False
        close = np.tril(visible, 0) & ~np.tril(np.ones((n, n), dtype=bool), -near)
        even = float((close / np.maximum(visible.sum(1, keepdims=True), 1)).sum() / (n - 1))
        for head in range(table.shape[1]):
            cells = table[:, head][:, visible]
            prompts, count = cells.shape
            within = ((cells - cells.mean(0)) ** 2).sum() / max(count * (prompts - 1), 1)
            whole = ((cells - cells.mean()) ** 2).sum() / (cells.size - 1)
            told = None if whole <= 1e-18 else float(1 - within / whole)
            recent = float((table[:, head] * close).sum() / (prompts * (n - 1))) - even
            rows.append({"site": f"L{layer}.h{head}", "dependence": told, "recency": recent})
    return pl.DataFrame(rows)


def _patterns(model: Model, examples: Examples, batch_size: int) -> list[Float[np.ndarray, "prompt head query key"]]:
    """Every layer's attention, prompt by prompt."""
    lengths = {len(item.clean) for item in examples}
    if len(lengths) > 1:
        raise PatchclampError(
            f"attention by position needs prompts of one length; these have {min(lengths)} to {max(lengths)} tokens"
        )
    if len(examples) < 2:
        raise PatchclampError("one prompt does not tell position from content: give several")
    length = lengths.pop()
    sites = [Site("pattern", layer) for layer in range(model.layers)]
    out: list[list[np.ndarray]] = [[] for _ in sites]
    for batch in examples.batches(batch_size):
        kept, own = model.record(batch, sites), batch.sign > 0
        first = int((~batch.mask[own]).sum(1).max())
        for pieces, site in zip(out, sites, strict=True):
            pieces.append(kept[site].detach()[own, :, first : first + length, first : first + length].double().cpu().numpy())
    return [np.concatenate(pieces) for pieces in out]


@dataclass(frozen=True, eq=False)
class Suppressed:
    """Closing recency heads: the lesion against random heads, and Cohen's d of the benefits open and closed."""

    heads: tuple[str, ...]
    lesion: Lesion
    cohen_d: float
    random_d: Float[np.ndarray, " draw"]

    def to_record(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**self.lesion.to_record(), "cohen_d": self.cohen_d, "random_d": float(self.random_d.mean())}


def suppress_recency(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    table: pl.DataFrame,
    *,
    heads: int = 2,
    draws: int = 20,
    metric: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Suppressed:
    """Close the heads of largest `recency` at once; and as many random heads, one set after the other.

    Cohen's d = (mean benefit closed - mean benefit open) / sqrt((variance closed + variance open) / 2): negative is damage.

    Args:
        parts: whose gates.
        examples: prompts.
        fallback: what closed heads pass.
        table: of `position_dependence`, on other prompts.
        heads: how many.
        draws: random sets.
        metric: by default the task's.
        seed: of the draws.
        batch_size: examples at once.

    Cost: 2 (draws + 2) passes over the examples at most.
    """
    chosen = table.sort("recency", descending=True, maintain_order=True)["site"][:heads].to_list()
    found = lesion(parts, examples, fallback, chosen, draws=draws, metric=metric, seed=seed, batch_size=batch_size)
    sites = sites_of(parts)
    names = [str(site) for site in sites]
    which = np.array([names.index(name) for name in chosen])
    sets = [which, *matched_sets(sites, which, draws, "kind", seed)]
    gates = torch.cat([parts.open(), *(parts.without([sites[i] for i in one]) for one in sets)])
    values = benefits(parts, examples, gates, fallback, metric_named(metric or examples.metric), batch_size).double().numpy()
    apart = [_cohen(values[0], closed) for closed in values[1:]]
    return Suppressed(tuple(chosen), found, apart[0], np.array(apart[1:]))


def _cohen(opened: Float[np.ndarray, " example"], closed: Float[np.ndarray, " example"]) -> float:
    spread = np.sqrt((opened.var(ddof=1) + closed.var(ddof=1)) / 2)
    change = closed.mean() - opened.mean()
    return float(change / spread) if spread > 1e-12 else (0.0 if abs(change) < 1e-9 else float(np.sign(change) * np.inf))


# --- simpler attention


@dataclass(frozen=True)
class Uniform:
    """Attention spread evenly over the keys that the query sees (those to which some head of the layer gives any)."""

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        visible = (value > 0).any(1, keepdim=True).to(value.dtype)
        return (visible / visible.sum(-1, keepdim=True).clamp(min=1)).expand_as(value)


@dataclass(frozen=True)
class NoMixing:
    """Every token attends to itself alone."""

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        return torch.eye(value.shape[-2], value.shape[-1], dtype=value.dtype, device=value.device).expand_as(value)


VARIANTS = ("uniform", "fixed", "none")


def simpler(model: Model, variant: str, fit: Examples | None = None, batch_size: int = 32) -> dict[int, Edits]:
    """By layer, the edit that replaces its attention: "uniform", "fixed" (mean pattern of the fit prompts, by position) or "none".

    Raises:
        PatchclampError: no such variant, or "fixed" without prompts to take means of.
    """
    if variant not in VARIANTS:
        raise PatchclampError(
            f"attention is replaced by {', '.join(VARIANTS)}, not by {variant!r}: other forms (no softmax, static queries and keys) "
            "are models of their own and have to be trained"
        )
    if variant == "fixed":
        if fit is None:
            raise PatchclampError("fixed attention is the mean of fit prompts: give fit")
        means = [torch.from_numpy(table.mean(0, keepdims=True)) for table in _patterns(model, fit, batch_size)]
        return {layer: {Site("pattern", layer): Put(mean)} for layer, mean in enumerate(means)}
    edit = Uniform() if variant == "uniform" else NoMixing()
    return {layer: {Site("pattern", layer): edit} for layer in range(model.layers)}


def deconstruct(
    model: Model,
    examples: Examples,
    fit: Examples | None = None,
    *,
    variants: Sequence[str] = VARIANTS,
    metric: str | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> pl.DataFrame:
    """What the behaviour loses when attention is made simpler in one layer, and in all.

    Returns:
        A row per variant and layer ("0", "1", ..., "all", and "cooperation": lost in all less the sum over layers): `variant`, `layer`,
        `lost` (benefit open less benefit so), `low`, `high`. Above 0, cooperation says that layers make up for each other.

    Cost: variants x (layers + 1) + 1 forward passes over the examples (and one over `fit`).

    Raises:
        PatchclampError: see `simpler`.
    """
    opened, rows = run_benefits(model, examples, {}, metric, batch_size), list[dict[str, Any]]()
    for variant in variants:
        edits = simpler(model, variant, fit, batch_size)
        alone = {str(layer): opened - run_benefits(model, examples, edit, metric, batch_size) for layer, edit in edits.items()}
        whole: Edits = {site: one for edit in edits.values() for site, one in edit.items()}
        every = opened - run_benefits(model, examples, whole, metric, batch_size)
        lost = {**alone, "all": every, "cooperation": every - np.sum(list(alone.values()), 0)}
        for layer, values in lost.items():
            mean = mean_interval(values, groups_of(examples), seed=seed)
            rows.append({"variant": variant, "layer": layer, "lost": mean.mean, "low": mean.low, "high": mean.high})
    return pl.DataFrame(rows)


def cooperation(
    model: Model, examples: Examples, variant: str, fit: Examples | None = None, *, metric: str | None = None, seed: int = 0,
    batch_size: int = 32,
) -> Dependence:  # fmt: skip
    """Interaction of every two layers' simpler attention: I = lost(i) + lost(j) - lost(both), as for closed parts."""
    edits, opened = simpler(model, variant, fit, batch_size), run_benefits(model, examples, {}, metric, batch_size)
    alone = [opened - run_benefits(model, examples, edits[layer], metric, batch_size) for layer in range(model.layers)]
    pairs = list(combinations(range(model.layers), 2))
    both = [opened - run_benefits(model, examples, {**edits[i], **edits[j]}, metric, batch_size) for i, j in pairs]
    samples = (
        np.stack([alone[i] + alone[j] - both[row] for row, (i, j) in enumerate(pairs)]) if pairs else np.zeros((0, len(opened)))
    )
    about = {
        "method": f"{variant} attention",
        "metric": metric or examples.metric,
        "fallback": variant,
        "model": model.name,
        "seed": seed,
    }
    return Dependence.from_samples(
        [Site("attn", layer) for layer in range(model.layers)], pairs, samples, about, groups_of(examples), seed=seed
    )
