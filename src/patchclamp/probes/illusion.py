"""Illusion test: does patching a direction act through what it correlates with, or through a pathway that is otherwise asleep?

P063, Makelov, Lange and Nanda 2023, https://arxiv.org/abs/2311.17030. A direction v at a site that a linear map W reads splits into its
part in W's row space and its part in W's null space. The null part cannot act. Where it is the null part that tells the prompts apart,
and the row part hardly varies (it is dormant), patching v carries the null part's difference over into the row part and drives a pathway
that the model does not use: an effect of the patch, and not of the model.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.edits import Put
from patchclamp.errors import GateError
from patchclamp.methods import groups_of
from patchclamp.metrics import metric_named
from patchclamp.models.editing import Edit
from patchclamp.models.model import Model
from patchclamp.probes.subspace import Swap, orthonormal, reader_of, split, values_at
from patchclamp.scores.statistics import mean_interval
from patchclamp.sites import Site
from patchclamp.tasks import Examples

Verdict = Literal["genuine", "illusory", "no effect"]
PATCHES = ("direction", "row space", "null space", "whole site")


@dataclass(frozen=True, eq=False)
class Illusion:
    """What patching a direction and its two parts does.

    Attributes:
        verdict: "no effect" where patching the direction takes less than `least` of what patching the whole site takes; "illusory" where
            its row-space part alone takes less than half of what the direction takes; else "genuine".
        null_share: share of the direction's squared length in the null space.
        table: a row per patch (direction, row space, null space, whole site): effect (benefit of the clean run minus patched) with low
            and high, and moved: mean size of the clean-to-corrupt difference along it.
        dormant: how little the row-space part varies between the prompts, against the null-space part: moved(row) / moved(null);
            small is dormant, infinite where there is no null part.
        about: site, metric, n.
    """

    verdict: Verdict
    null_share: float
    table: pl.DataFrame
    dormant: float
    about: dict[str, Any]

    def effect(self, patch: str) -> float:
        """The mean effect of one patch."""
        return float(self.table.filter(pl.col("patch") == patch)["effect"][0])

    def __str__(self) -> str:
        rows = ", ".join(f"{row['patch']} {row['effect']:+.2f}" for row in self.table.iter_rows(named=True))
        return (
            f"{self.verdict}: patching takes {rows}; {self.null_share:.0%} of the direction is in the null space of what reads it, and "
            f"the rest varies {self.dormant:.2g} times as much between the prompts"
        )


def illusion(
    model: Model,
    examples: Examples,
    site: Site | str,
    direction: Float[Tensor, " width"],
    *,
    reader: Float[Tensor, "out width"] | None = None,
    metric: str | None = None,
    least: float = 0.1,
    batch_size: int = 64,
    seed: int = 0,
) -> Illusion:
    """Patch a direction, and its parts in the row and null space of what reads it, from corrupt into clean prompts.

    Args:
        model: the model.
        examples: pairs.
        site: where: neurons (`L3.mlp.n@end`), a head's z (`L9.h6.z@end`); another site with a reader.
        direction: at that site; its length does not matter.
        reader: the linear map that reads the site next, [out, width]; by default the down or output projection.
        metric: by default the task's.
        least: share of the whole site's effect from which the direction has one.
        batch_size: examples at once.
        seed: of the intervals.

    Cost: seven forward passes over the examples.

    Raises:
        GateError: a direction of another width or of length 0, or prompts without corrupt ones.
        SiteError: no such site, or one that no single map reads, and no reader.
    """
    place = Site.parse(site) if isinstance(site, str) else site
    model.anatomy.require(place)
    matrix = reader_of(model, place) if reader is None else reader
    if direction.shape != matrix.shape[1:] or not float(direction.norm()):
        raise GateError(
            f"a direction of shape {tuple(direction.shape)} was given for {place}, which has width {matrix.shape[1]}: not 0"
        )
    if not len(examples) or examples[0].corrupt is None:
        raise GateError("the illusion test exchanges a direction between clean and corrupt prompts: give pairs")
    chosen, unit = metric_named(metric or examples.metric), direction / direction.norm()
    inside, outside = split(unit.to(matrix), matrix)
    parts = {"direction": unit, "row space": inside, "null space": outside}
    bases = {name: orthonormal(part[None].to(matrix)) for name, part in parts.items() if float(part.norm()) > 1e-6}
    effects: dict[str, list[Tensor]] = {name: [] for name in PATCHES}
    moved: dict[str, list[Tensor]] = {name: [] for name in PATCHES}
    for given in examples.batches(batch_size):
        batch = given.to(model.device)
        own, other = values_at(model, batch, place), values_at(model, batch.swapped(), place)
        where = batch.mask if place.position is None else batch.columns(place.position)
        plain = model.target_logits(batch).detach()
        base = chosen.sign * chosen(plain, batch, plain[0])[0]
        edits: dict[str, Edit] = {name: Swap(basis, other) for name, basis in bases.items()}
        edits["whole site"] = Put(other)
        for name in PATCHES:
            if name not in edits:
                effects[name].append(torch.zeros_like(base))
                moved[name].append(torch.zeros(1))
                continue
            with torch.no_grad():
                patched = chosen.sign * chosen(model.target_logits(batch, {place: edits[name]}), batch, plain[0])[0]
            effects[name].append(base - patched)
            apart = (other - own)[where.to(own.device)]
            moved[name].append((apart @ bases[name].to(apart).T if name in bases else apart).norm(dim=-1).cpu())
    return _judged(effects, moved, float(outside.norm() ** 2), examples, least, {"site": str(place), "metric": chosen.name}, seed)


def _judged(
    effects: dict[str, list[Tensor]], moved: dict[str, list[Tensor]], null: float, examples: Examples, least: float, about: dict[str, Any],
    seed: int,
) -> Illusion:  # fmt: skip
    groups, rows = groups_of(examples), list[dict[str, Any]]()
    for name in PATCHES:
        found = mean_interval(torch.cat(effects[name]).double().cpu().numpy(), groups, seed=seed)
        rows.append({"patch": name, "effect": found.mean, "low": found.low, "high": found.high,
                     "moved": float(torch.cat(moved[name]).double().mean())})  # fmt: skip
    by = {row["patch"]: row for row in rows}
    whole, mine, inside = (by[name]["effect"] for name in ("whole site", "direction", "row space"))
    if abs(mine) < least * abs(whole):
        verdict: Verdict = "no effect"
    else:
        verdict = "genuine" if inside * np.sign(mine) >= 0.5 * abs(mine) else "illusory"
    quiet = by["null space"]["moved"]
    dormant = by["row space"]["moved"] / quiet if quiet > 0 else float("inf")
    return Illusion(verdict, null, pl.DataFrame(rows), dormant, {**about, "n": len(examples), "least": least, "seed": seed})
