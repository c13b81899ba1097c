"""P171: when a part is closed, later parts make up for some of what it said (the Hydra effect).

McGrath et al. 2023, https://arxiv.org/abs/2307.15771: closing an attention layer makes others compensate. The paper is of Chinchilla 7B, whose
weights are not public, so that only the claim can be looked at, and not a number.
"""

from collections.abc import Callable
from math import inf

import polars as pl

from patchclamp.dependence import self_repair
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.reproduce._figures import points
from patchclamp.reproduce._result import Reproduction, claim, prompts
from patchclamp.scores.statistics import mean_interval

PAPER = "The Hydra Effect, https://arxiv.org/abs/2307.15771"


def run(model: Model, n: int, seed: int, progress: Callable[[str, int, int], None]) -> Reproduction:
    """Every head closed in turn; direct effect, and what the parts behind it make up."""
    some, parts = prompts(model, "ioi", n, seed).confirm, nodes(model)
    progress("heads closed in turn", 0, 1)
    heads = [site for site in parts.labels if site.kind == "head"]
    found = self_repair(parts, some, parts.fallback("resample"), closed=heads, seed=seed)
    clear = found.parts.filter(pl.col("direct_low") > 0)
    repaired = [float(value) for value in clear["repaired"].drop_nulls()]
    makes_up = int((clear["compensation_low"] > 0).sum())
    rows = (
        claim("heads that say the answer and are made up for when closed (of those that say it)", "others compensate",
              makes_up / max(1, clear.height), 0.05, 1.0, None),
        claim("backups found", "at least one part compensates", float(found.backups().height), 1, inf, None),
        *([claim("share of the direct effect that is made up for, mean over these heads", "not comparable: Chinchilla 7B",
                 mean_interval(pl.Series(repaired).to_numpy(), seed=seed), 0.0, 1.0, False)] if repaired else []),
    )  # fmt: skip
    drawn = [
        {"site": row["site"], "direct": row["direct"], "total": row["total"], "kind": "head"}
        for row in found.parts.iter_rows(named=True)
    ]
    figure = points(
        drawn,
        "direct",
        "total",
        "kind",
        "Total effect of closing each head against its direct effect: below the line others make up.",
    )
    about = {"task": "ioi", "metric": "logit_diff", "fallback": "resample", "n": len(some), "seed": seed}
    return Reproduction("p171", PAPER, model.name, rows, found.parts, figure, about)
