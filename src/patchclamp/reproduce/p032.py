"""P032: the heads and MLPs of indirect object identification do coloured objects too.

Merullo, Eickhoff and Pavlick 2024, https://arxiv.org/abs/2310.08744: about 78 % of the in-circuit heads are shared (GPT-2 medium). It gives
no chance level; here overlap stands beside what circuits of the same sizes share by chance.
"""

from collections.abc import Callable

import numpy as np
import polars as pl

from patchclamp.circuit import Circuit
from patchclamp.dependence.network import overlap
from patchclamp.discover import discover
from patchclamp.methods import attribute, effects, groups_of
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.reproduce._figures import bars
from patchclamp.reproduce._result import Reproduction, claim, is_called, prompts
from patchclamp.scores.statistics import Interval
from patchclamp.sites import Site
from patchclamp.trust import resampled_circuits

PAPER = "Circuit Component Reuse Across Tasks, https://arxiv.org/abs/2310.08744"
TASKS = ("ioi", "coloured_objects")


def run(model: Model, n: int, seed: int, progress: Callable[[str, int, int], None]) -> Reproduction:
    """A circuit of each task, on its own prompts; what they share, with an interval from resampled prompts."""
    parts, circuits, redrawn = nodes(model), list[Circuit](), list[list[Circuit]]()
    rule = parts.fallback("resample")
    for number, task in enumerate(TASKS):
        progress(task, number, len(TASKS))
        select = prompts(model, task, n, seed).select
        scores = attribute(parts, select, rule, seed=seed)
        found, _ = discover(parts, select, rule, scores)
        circuits.append(found)
        redrawn.append(
            resampled_circuits(scores, effects(parts, select, rule), len(found), groups_of(select), draws=200, seed=seed)
        )
    one, two = circuits
    universe = [parts.labels[i] for i in parts.counted]
    heads = [site for site in universe if site.kind == "head"]
    both = overlap(list(one), list(two), universe, seed=seed)
    drawn = np.array([_shared(first, second, heads) for first, second in zip(*redrawn, strict=True)])
    low, high = (float(end) for end in np.percentile(drawn, [2.5, 97.5]))
    share = Interval(_shared(one, two, heads), low, high, len(drawn))
    same = is_called(model, ("gpt2-medium",))
    rows = (
        claim("share of in-circuit heads that both tasks have", "about 78 % (GPT-2 medium)", share, 0.68, 0.88, same),
        claim(
            f"share of the smaller circuit's heads and MLPs that both have (p by chance {both.p:.2g})",
            "more than half",
            both.share,
            0.5,
            1.0,
            None,
        ),
    )
    table = pl.DataFrame(
        {
            "site": [str(site) for site in universe],
            "ioi": [site in one for site in universe],
            "coloured": [site in two for site in universe],
        }
    )
    counts = [{"set": name, "parts": float(count), "low": None, "high": None} for name, count in
              (("ioi alone", len(one - two)), ("both", len(one & two)), ("coloured objects alone", len(two - one)))]  # fmt: skip
    figure = bars(counts, "set", "parts", "Heads and MLPs in the circuit of one task, of both, and of the other.")
    about = {"tasks": TASKS, "metric": "logit_diff", "fallback": "resample", "n": n, "seed": seed, **both.to_record()}
    return Reproduction("p032", PAPER, model.name, rows, table, figure, about)


def _shared(one: Circuit, two: Circuit, among: list[Site]) -> float:
    first, second = ({site for site in among if site in circuit} for circuit in (one, two))
    return len(first & second) / max(1, min(len(first), len(second)))
