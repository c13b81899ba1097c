"""Experts forced on or off at inference, and which experts a behaviour calls for (MoTE, fTRI: https://arxiv.org/abs/2502.11096)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.methods import groups_of
from patchclamp.metrics import metric_named
from patchclamp.models.editing import Edits, Seen
from patchclamp.models.model import Model
from patchclamp.models.recording import Recorder
from patchclamp.scores.statistics import mean_interval
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

How = Literal["on", "off"]


@dataclass(frozen=True)
class Force:
    """An edit of router logits: `off` experts get minus infinity, `on` experts come above every other expert's logit.

    An expert forced on so has the weight of the token's favourite expert, up to the margin that keeps the order in any dtype.
    """

    on: tuple[int, ...] = ()
    off: tuple[int, ...] = ()

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        rest = value.clone()
        rest[..., list(self.off)] = -torch.inf
        if self.on:
            highest = rest.amax(-1, keepdim=True)
            above = torch.maximum(
                highest + 1e-3 * (1 + highest.abs()), torch.nextafter(highest, torch.full_like(highest, torch.inf))
            )
            rest[..., list(self.on)] = above.expand(*above.shape[:-1], len(self.on))
        return rest


def force(model: Model, how: Mapping[str | Site, How | int]) -> Edits:
    """Experts off or on, as edits for `run`, `generate` and training: `force(model, {"L3.mlp.e5": "off", "L3.mlp.e1": "on"})`.

    Off (or 0): the router cannot choose the expert. On (or 1): every token's top-k holds it, in place of the least liked of those
    it would have chosen. What is behind the router (softmax, renormalisation) follows as the model does it.

    Raises:
        SiteError: the model has no such expert.
        GateError: what is asked is neither on nor off, too few experts would be left, or more are forced on than are chosen.
    """
    by_layer: dict[int, dict[str, list[int]]] = {}
    for given, state in how.items():
        site = Site.parse(given) if isinstance(given, str) else given
        model.anatomy.require(site)
        if site.kind != "expert" or site.index is None or site.sub is not None or site.position is not None or site.layer is None:
            raise GateError(f"experts are forced whole, at every position, and {site} is not one: write L3.mlp.e5")
        if state not in ("on", "off", 0, 1):
            raise GateError(f"{site} was to be {state!r}: say 'on' or 'off'")
        by_layer.setdefault(site.layer, {"on": [], "off": []})["on" if state in ("on", 1) else "off"].append(site.index)
    edits: dict[Site, Force] = {}
    for layer, sides in by_layer.items():
        chosen, experts = chosen_at_once(model), model.anatomy.sizes[layer].experts or 0
        if len(sides["on"]) > chosen:
            raise GateError(f"{len(sides['on'])} experts of layer {layer} were to be on, and a token has {chosen}: force fewer")
        if experts - len(sides["off"]) < chosen:
            raise GateError(
                f"with {len(sides['off'])} experts of layer {layer} off fewer than the {chosen} that a token has are left"
            )
        edits[Site("router", layer)] = Force(tuple(sides["on"]), tuple(sides["off"]))
    return edits


def chosen_at_once(model: Model) -> int:
    """How many experts a token has; raises `GateError` for a model without experts."""
    count = getattr(model.anatomy.config, "num_experts_per_tok", None)
    if count is None or all(size.experts is None for size in model.anatomy.sizes):
        raise GateError(f"{model.name} ({model.family.name}) has no experts to force")
    return int(count)


def choices(model: Model, batch: Batch, where: Literal["end", "all"] = "end") -> dict[int, Float[Tensor, "example expert"]]:
    """Which experts each prompt's last token chooses (or the share of its tokens that choose each), by layer. One forward pass."""
    batch = batch.to(model.device)
    sites = [Site("expert", layer) for layer, size in enumerate(model.anatomy.sizes) if size.experts]
    recorder = Recorder(model.anatomy, sites)
    with torch.no_grad(), recorder.session().open():
        model.forward(batch, columns=torch.zeros(1, dtype=torch.long, device=model.device))
    rows = (batch.sign > 0).nonzero()[:, 0]
    found: dict[int, Tensor] = {}
    for site in sites:
        chosen = (recorder.kept[site] != 0).float()[rows]
        if where == "end":
            chosen = chosen[torch.arange(len(rows), device=rows.device), batch.spans["end"][rows, 1] - 1]
        else:
            mask = batch.mask[rows][..., None].to(chosen)
            chosen = (chosen * mask).sum(1) / mask.sum(1)
        found[site.layer or 0] = chosen
    return found


def relevance(
    model: Model, eliciting: Examples, control: Examples, *, where: Literal["end", "all"] = "end", seed: int = 0
) -> pl.DataFrame:
    """Experts by how much more often prompts that elicit a behaviour choose them than control prompts do (fTRI).

    relevance(expert) = share of eliciting prompts whose last token (or share of tokens that) has the expert, less that of
    control prompts, so that the place in the prompt is the same.

    Returns:
        A row per expert, the most relevant first: site, layer, expert, eliciting, control, relevance, low, high (95 % bootstrap over
        groups, both sets drawn), n.

    Cost: one forward pass over both sets.
    """
    chosen_at_once(model)
    sides = [[choices(model, batch, where) for batch in some.batches(64)] for some in (eliciting, control)]
    chance = np.random.default_rng(seed)
    counts = [_draws(groups_of(some), chance) for some in (eliciting, control)]
    rows: list[dict[str, object]] = []
    for layer in sides[0][0]:
        both = [torch.cat([one[layer] for one in side]).double().cpu().numpy() for side in sides]
        drawn = [count @ side / count.sum(1, keepdims=True) for count, side in zip(counts, both, strict=True)]
        low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5], axis=0)
        for expert in range(both[0].shape[1]):
            one, other = (float(side[:, expert].mean()) for side in both)
            rows.append(
                {"site": f"L{layer}.mlp.e{expert}", "layer": layer, "expert": expert, "eliciting": one, "control": other,
                 "relevance": one - other, "low": float(low[expert]), "high": float(high[expert]), "n": len(eliciting) + len(control)}
            )  # fmt: skip
    return pl.DataFrame(rows).sort("relevance", "site", descending=[True, False])


def _draws(groups: Sequence[str], chance: np.random.Generator, resamples: int = 1000) -> Float[np.ndarray, "draw example"]:
    """How often each example is drawn, group by group."""
    names, member = np.unique(groups, return_inverse=True)
    times = chance.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return times[:, member].astype(float)


def forced_effect(
    model: Model,
    sites: Sequence[str],
    examples: Examples,
    how: How = "off",
    *,
    metric: str | None = None,
    draws: int = 20,
    seed: int = 0,
) -> pl.DataFrame:
    """What forcing experts does to a behaviour, beside as many random experts of the same layers.

    Args:
        model: a mixture of experts.
        sites: experts, such as the first of `relevance`.
        examples: prompts with answers.
        how: off or on.
        metric: by default the task's.
        draws: random sets, of other experts where a layer has enough of them.
        seed: of the sets.

    Returns:
        A row per set: kind ("ranked", "random"), sites, effect = benefit forced - benefit of the model itself, low, high, n, and for the
        ranked set p = (1 + random sets whose effect is as large) / (1 + draws).

    Cost: one forward pass over the examples per set, and one more.
    """
    chosen, chance = metric_named(metric or examples.metric), np.random.default_rng([seed, 41])
    sets = [tuple(sites), *(_like(model, sites, chance) for _ in range(draws))]
    edits = [force(model, dict.fromkeys(one, how)) for one in sets]
    pieces: list[np.ndarray] = []
    for batch in (one.to(model.device) for one in examples.batches(64)):
        with torch.no_grad():
            own = model.target_logits(batch)
            plain = own[0] if chosen.reference else None
            values = [chosen(model.target_logits(batch, edit), batch, plain)[0] for edit in edits]
            pieces.append((chosen.sign * (torch.stack(values) - chosen(own, batch, plain))).double().cpu().numpy())
    effects, groups = np.concatenate(pieces, 1), groups_of(examples)
    size = np.abs(effects.mean(1))
    p = float((1 + (size[1:] >= size[0]).sum()) / (1 + draws))
    rows: list[dict[str, object]] = []
    for number, (one, values) in enumerate(zip(sets, effects, strict=True)):
        found = mean_interval(values, groups, seed=seed)
        rows.append(
            {"kind": "random" if number else "ranked", "sites": list(one), "effect": found.mean, "low": found.low, "high": found.high,
             "n": found.n, "p": None if number else p}
        )  # fmt: skip
    return pl.DataFrame(rows, infer_schema_length=None)


def _like(model: Model, sites: Sequence[str], chance: np.random.Generator) -> tuple[str, ...]:
    """As many random experts of the same layers, others than `sites` where there are enough."""
    by_layer: dict[int, list[int]] = {}
    for site in map(Site.parse, sites):
        by_layer.setdefault(site.layer or 0, []).append(site.index or 0)
    found: list[str] = []
    for layer, taken in by_layer.items():
        every = range(model.anatomy.sizes[layer].experts or 0)
        others = [expert for expert in every if expert not in taken]
        pool = others if len(others) >= len(taken) else list(every)
        found += [f"L{layer}.mlp.e{expert}" for expert in sorted(chance.permutation(pool)[: len(taken)].tolist())]
    return tuple(found)
