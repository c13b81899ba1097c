"""Neuron paths: one neuron (or a few) per layer that matter together, chosen layer by layer.

The joint influence of a set of neurons is the integral, along the line on which all of them are scaled from their fallback to their
value, of the sum of their slopes (Wang et al. 2025, Discovering Influential Neuron Path in Vision Transformers). In the gates,

    J(S) = integral over a from 0 to 1 of sum over i in S of d benefit / d gate_i at gate_S = a  =  benefit(S open) - benefit(S closed)

by the fundamental theorem of calculus: so J(S) is measured by closing the set, exactly and in one pass, where the published
quadrature takes 20 passes and has an error. From the first layer to the last, the path takes the neuron that adds most to J, among
those whose slope in the company of the path is largest.

The path is judged by what closing it takes (removal) and what doubling it adds (enhancement), against the neurons of largest
activation, of largest slope by themselves (chosen on the same prompts), and random ones of the same layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Float

from patchclamp.circuit import Circuit
from patchclamp.errors import PatchclampError
from patchclamp.methods import effects
from patchclamp.metrics import Metric, metric_named
from patchclamp.parts import Fallback, Gated, benefits
from patchclamp.sites import Site
from patchclamp.tasks import Examples

CANDIDATES = 16
"""Neurons of a layer, those of largest slope, whose joint influence is measured."""
DRAWS = 50
"""Random paths."""
DOUBLE = 2.0
"""The gate of an enhanced neuron."""


@dataclass(frozen=True, eq=False)
class NeuronPath:
    """A path and how it compares.

    Args:
        path: its neurons, by layer.
        influence: J of the path up to each layer.
        judged: a row per choice (path, activation, slope, random): removal (benefit lost with it closed), enhancement (benefit won
            with it doubled), both as means over examples; of random, means over draws.
        p: share of random paths (the path itself counted in) whose removal takes as much.
        circuit: the path's neurons.
    """

    path: tuple[Site, ...]
    influence: tuple[float, ...]
    judged: pl.DataFrame
    p: float
    circuit: Circuit


def neuron_path(
    parts: Gated,
    examples: Examples,
    fallback: Fallback,
    unseen: Examples | None = None,
    *,
    width: int = 1,
    candidates: int = CANDIDATES,
    draws: int = DRAWS,
    metric: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> NeuronPath:
    """Choose a path of neurons by their joint influence, and judge it.

    Args:
        parts: neurons (`gated(model, ["L*.mlp.n*"])`).
        examples: prompts to choose on.
        fallback: what a closed gate passes; zero is the published one.
        unseen: prompts to judge on; by default the same.
        width: neurons per layer.
        candidates: of a layer, how many are measured.
        draws: random paths.
        metric: by default the task's.
        seed: of the draws.
        batch_size: examples at once.
        progress: told (layers done, layers).

    Cost: per layer and neuron of the path, one forward and one backward pass and a forward pass per candidate over the examples;
    then a forward pass per random path and six more over the unseen ones.

    Raises:
        PatchclampError: parts that are not neurons, or a layer with fewer than are asked for.
    """
    chosen = metric_named(metric or examples.metric)
    layers: dict[int, list[int]] = {}
    for number in parts.counted:
        site = parts.labels[number]
        if site.kind != "neuron" or site.layer is None:
            raise PatchclampError(f"a path of neurons was asked for, and {site} is none: give gated(model, ['L*.mlp.n*'])")
        layers.setdefault(site.layer, []).append(number)
    if width < 1 or candidates < 1 or any(len(numbers) < width for numbers in layers.values()):
        raise PatchclampError(
            f"{width} neurons per layer of {candidates} candidates were asked for: layers have {[len(n) for n in layers.values()]}"
        )
    path, influence, value = list[int](), list[float](), 0.0
    for done, numbers in enumerate(layers.values()):
        for _ in range(width):
            best, value = _next(parts, examples, fallback, chosen, path, numbers, candidates, batch_size)
            path.append(best)
        influence.append(value)
        if progress is not None:
            progress(done + 1, len(layers))
    sets = _others(parts, examples, fallback, chosen, layers, width, draws, seed, batch_size)
    judged, p = _judged(parts, unseen or examples, fallback, chosen, [path, *sets], batch_size)
    sites = tuple(parts.labels[number] for number in path)
    about = {"method": "neuron path", "metric": chosen.name, "fallback": fallback.kind, "n": len(examples), "width": width,
             "influence": influence[-1], "model": parts.model.name, "task": examples.task}  # fmt: skip
    return NeuronPath(sites, tuple(influence), judged, p, Circuit(sites, about))


def _next(
    parts: Gated, examples: Examples, fallback: Fallback, metric: Metric, path: Sequence[int], numbers: Sequence[int], candidates: int,
    batch_size: int,
) -> tuple[int, float]:  # fmt: skip
    """The neuron that adds most to the joint influence, and what that is then."""
    here = parts.open()
    here[..., list(path)] = 0
    slopes, count = torch.zeros(len(parts.labels), dtype=torch.float64), 0
    for batch in examples.batches(batch_size):
        found = metric.sign * parts.gradient(batch, here, fallback, metric)[1][0].double().cpu()
        slopes, count = slopes + found.sum(0), count + len(batch)
    left = [number for number in numbers if number not in path]
    few = sorted(left, key=lambda number: -float(slopes[number]))[:candidates]
    gates = here.repeat(len(few) + 1, 1, 1, 1)
    gates[torch.arange(len(few)), ..., few] = 0
    gates[-1] = 1
    values = benefits(parts, examples, gates, fallback, metric, batch_size).double().mean(1)
    gained = values[-1] - values[:-1]
    best = int(gained.argmax())
    return few[best], float(gained[best])


def _others(
    parts: Gated, examples: Examples, fallback: Fallback, metric: Metric, layers: dict[int, list[int]], width: int, draws: int, seed: int,
    batch_size: int,
) -> list[list[int]]:  # fmt: skip
    """What a path is compared with: the neurons of largest activation, of largest slope, and random ones; as many of each layer."""
    slopes = effects(parts, examples, fallback, "gradient", metric=metric, batch_size=batch_size).double().mean(1).numpy()
    place = {number: at for at, number in enumerate(parts.counted)}
    active = _active(parts, examples, batch_size)
    by_slope = [n for numbers in layers.values() for n in sorted(numbers, key=lambda n: -slopes[place[n]])[:width]]
    by_size = [n for numbers in layers.values() for n in sorted(numbers, key=lambda n: -active[n])[:width]]
    rng = np.random.default_rng([seed, 23])
    drawn = [[int(n) for numbers in layers.values() for n in rng.choice(numbers, width, replace=False)] for _ in range(draws)]
    return [by_size, by_slope, *drawn]


def _judged(
    parts: Gated, examples: Examples, fallback: Fallback, metric: Metric, sets: Sequence[Sequence[int]], batch_size: int
) -> tuple[pl.DataFrame, float]:
    """What closing and doubling take and give, for the path and for what it is compared with."""
    gates = parts.open(2 * len(sets) + 1)
    for at, members in enumerate(sets):
        gates[at, ..., list(members)] = 0
        gates[len(sets) + at, ..., list(members)] = DOUBLE
    values = benefits(parts, examples, gates, fallback, metric, batch_size).double().mean(1).numpy()
    removal, more = values[-1] - values[: len(sets)], values[len(sets) : -1] - values[-1]
    rows = [{"choice": name, "removal": float(removal[at]), "enhancement": float(more[at])}
            for at, name in enumerate(("path", "activation", "slope"))]  # fmt: skip
    rows.append({"choice": "random", "removal": float(removal[3:].mean()), "enhancement": float(more[3:].mean())})
    return pl.DataFrame(rows), float((1 + (removal[3:] >= removal[0]).sum()) / (1 + len(sets) - 3))


def _active(parts: Gated, examples: Examples, batch_size: int) -> Float[np.ndarray, " part"]:
    """Mean size of each neuron's value over real tokens."""
    total, count = torch.zeros(len(parts.labels), dtype=torch.float64), 0
    for batch in examples.batches(batch_size):
        kept, mask = parts.record(batch), batch.mask.to(parts.model.device)
        for place, numbers in parts.by_place.items():
            value = (kept[place].abs().double() * mask[..., None]).sum((0, 1)).cpu()
            for number in numbers:
                total[number] += value[parts.labels[number].index or 0]
        count += int(mask.sum())
    return (total / count).numpy()
