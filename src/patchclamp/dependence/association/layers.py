"""What layers keep of the input and know of the output, how alike the tokens become, and which dimensions carry them.

- `layer_dependence`: HSIC or COCO of each layer's state with what went in and with what is to come out
  (https://arxiv.org/abs/2206.05483, bilateral dependency).
- `rank_curve`: how far the tokens of a prompt are from being all alike, by depth, with and without skips and MLPs
  (https://arxiv.org/abs/2103.03404).
- `dimension_use`: dimensions that all tokens share, and those of single tokens (https://arxiv.org/abs/2412.05644, mixture of hidden
  dimensions).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.dependence.association.contract import Pairs
from patchclamp.dependence.association.kernels import COCO, HSIC
from patchclamp.dependence.association.measuring import null_of, p_values
from patchclamp.dependence.association.units import units_of
from patchclamp.edits import Zero
from patchclamp.errors import PatchclampError
from patchclamp.methods import groups_of
from patchclamp.models.editing import Edits, Seen
from patchclamp.models.model import Model
from patchclamp.scores.statistics import mean_interval
from patchclamp.sites import Site
from patchclamp.tasks import Examples


def layer_dependence(
    model: Model, examples: Examples, *, kind: str = "hsic", permutations: int = 99, seed: int = 0, batch_size: int = 32
) -> pl.DataFrame:
    """Dependence of every layer's state at the last prompt token with the input and with the answer.

    Input: the prompt as a bag of its tokens' embeddings (their mean). Output: the right answer's first token, as an indicator. Both by
    Gaussian kernels, normalised: HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)), COCO likewise.

    Returns:
        A row per site ("embed", then the residual stream after each block): `site`, `input`, `input_null` (95 %), `input_p`, `output`,
        `output_null`, `output_p`.

    Cost: one forward pass over the examples; permutations of groups of prompts.

    Raises:
        PatchclampError: neither hsic nor coco, a task without answers, or too few groups.
    """
    measures = {"hsic": HSIC, "coco": COCO}
    if kind not in measures or any(not item.answers for item in examples):
        raise PatchclampError(
            f"dependence of layers is hsic or coco, of prompts with answers; {kind!r} of {examples.task!r} was asked for"
        )
    sites = [Site("embed"), *(Site("resid.post", layer) for layer in range(model.layers))]
    states, bags = _last_states(model, examples, sites, batch_size)
    answers = np.array([item.answers[0][0] for item in examples])
    label = (answers[:, None] == np.unique(answers)[None]).astype(float)
    names = groups_of(examples)
    units = units_of(names, [names[:row].count(name) for row, name in enumerate(names)])
    table: dict[str, Any] = {"site": [str(site) for site in sites]}
    pairs: Pairs = [(i, 0) for i in range(len(sites))]
    for name, other in (("input", bags), ("output", label)):
        ready = measures[kind].prepare(states, [other], pairs, 1, seed)
        own = [measures[kind].prepare([one], [one], [(0, 0)], 1, seed).statistic()[0] for one in (*states, other)]
        scale = np.sqrt(np.maximum(np.array(own[:-1]) * own[-1], 1e-300))
        null = null_of(ready, units, permutations, seed) / scale
        seen = ready.statistic() / scale
        table |= {name: seen, f"{name}_null": np.quantile(null, 0.95, axis=0), f"{name}_p": p_values(seen, null, False)}
    return pl.DataFrame(table)


def _last_states(
    model: Model, examples: Examples, sites: Sequence[Site], batch_size: int
) -> tuple[list[Float[np.ndarray, "example width"]], Float[np.ndarray, "example width"]]:
    pieces: list[list[np.ndarray]] = [[] for _ in sites]
    bags: list[np.ndarray] = []
    for batch in examples.batches(batch_size):
        kept = model.record(batch, list(sites))
        own = (batch.sign > 0).nonzero()[:, 0]
        end = batch.spans["end"][own, 0]
        for number, site in enumerate(sites):
            pieces[number].append(kept[site][own, end].detach().double().cpu().numpy())
        inside = (batch.mask[own] & (torch.arange(batch.tokens.shape[1])[None] <= end[:, None])).double()
        embed = kept[Site("embed")][own].detach().double().cpu()
        bags.append(((embed * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)).numpy())
    return [np.concatenate(piece) for piece in pieces], np.concatenate(bags)


# --- rank


def rank_residual(tokens: Float[np.ndarray, "token width"]) -> float:
    """||X - 1 x'|| / ||X||, x' the mean token: 0 where all tokens are alike (rank one), in sqrt(|.|_1 |.|_inf) as in the paper."""
    return _composite(tokens - tokens.mean(0)) / max(_composite(tokens), 1e-300)


def _composite(matrix: Float[np.ndarray, "row column"]) -> float:
    """sqrt(largest column sum x largest row sum of absolute values)."""
    return float(np.sqrt(np.abs(matrix).sum(0).max() * np.abs(matrix).sum(1).max()))


@dataclass(frozen=True)
class _NoSkip:
    """What a block returns less what came in: the block without its skip connection."""

    source: Site

    @property
    def reads(self) -> tuple[Site, ...]:
        """The block's input."""
        return (self.source,)

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        return value - seen.values[self.source]


VARIANTS = ("whole", "without skips", "without MLPs", "attention alone")


def rank_curve(model: Model, examples: Examples, *, seed: int = 0, batch_size: int = 32) -> pl.DataFrame:
    """Distance of the residual stream to rank one, by depth, in four variants of the model at inference.

    "whole"; "without skips": each block's output less its input; "without MLPs": MLPs add nothing; "attention alone": both. Blocks
    are otherwise as they are (norms too), so a stream without skips starts each block from what attention alone has made.

    Returns:
        A row per variant and depth (0: the embedding): `variant`, `depth`, `residual` (mean over prompts), `low`, `high`.

    Cost: four forward passes over the examples.
    """
    depth = range(model.layers)
    sites = [Site("resid.pre", 0), *(Site("resid.post", layer) for layer in depth)]
    skips: Edits = {Site("resid.post", layer): _NoSkip(Site("resid.pre", layer)) for layer in depth}
    mlps: Edits = {Site("mlp.write", layer): Zero() for layer in depth}
    edits: tuple[Edits, ...] = ({}, skips, mlps, {**skips, **mlps})
    rows: list[dict[str, Any]] = []
    for variant, edit in zip(VARIANTS, edits, strict=True):
        samples: list[list[float]] = [[] for _ in sites]
        for batch in examples.batches(batch_size):
            kept = model.record(batch, sites, edit)
            for number, site in enumerate(sites):
                values = kept[site].detach().double().cpu().numpy()
                samples[number] += [rank_residual(values[row, batch.mask[row].numpy()]) for row in _own_rows(batch.sign)]
        for number, values in enumerate(samples):
            mean = mean_interval(np.array(values), groups_of(examples), seed=seed)
            rows.append({"variant": variant, "depth": number, "residual": mean.mean, "low": mean.low, "high": mean.high})
    return pl.DataFrame(rows)


def _own_rows(sign: Float[Tensor, " row"]) -> list[int]:
    return [int(row) for row in (sign > 0).nonzero()[:, 0]]


# --- dimensions


@dataclass(frozen=True, eq=False)
class DimensionUse:
    """Which dimensions of a state carry its tokens.

    Args:
        active: [dimension], share of tokens in which the dimension is among the fewest that hold `share` of the squared length.
        needed: mean share of dimensions that a token needs for that.
        shared: dimensions active in at least `often` of tokens.
        special: dimensions active in some tokens and no more than 1 - `often` of them.
        energy_shared: share of all squared length in the shared ones.
    """

    active: Float[np.ndarray, " dimension"]
    needed: float
    shared: Int[np.ndarray, " common"]
    special: Int[np.ndarray, " own"]
    energy_shared: float

    def to_record(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"needed": self.needed, "shared": len(self.shared), "special": len(self.special), "dimensions": len(self.active),
                "energy_shared": self.energy_shared}  # fmt: skip


def dimension_use(states: Float[np.ndarray, "token dimension"], share: float = 0.9, often: float = 0.9) -> DimensionUse:
    """Shared and token-specific dimensions of states (of one layer, over the tokens of many prompts).

    A token's active dimensions are the fewest whose squares sum to `share` of its squared length.

    Raises:
        PatchclampError: shares that are not between 0 and 1.
    """
    if not 0 < share < 1 or not 0.5 < often <= 1:
        raise PatchclampError(f"share {share} must lie between 0 and 1, and often {often} between .5 and 1")
    square = states**2
    order = np.argsort(-square, 1)
    summed = np.cumsum(np.take_along_axis(square, order, 1), 1)
    count = (summed < share * summed[:, -1:] * (1 - 1e-12)).sum(1) + 1
    active = np.zeros(states.shape, dtype=bool)
    np.put_along_axis(active, order, np.arange(states.shape[1])[None] < count[:, None], 1)
    often_active = active.mean(0)
    shared = np.flatnonzero(often_active >= often)
    special = np.flatnonzero((often_active > 0) & (often_active <= 1 - often + 1e-9))
    return DimensionUse(
        often_active, float(count.mean() / states.shape[1]), shared, special, float(square[:, shared].sum() / square.sum())
    )
