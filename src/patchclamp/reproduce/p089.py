"""P089: corruption, metric and window change what activation patching localises.

Zhang and Nanda 2023, https://arxiv.org/abs/2309.16042: Gaussian noise and token replacement disagree; probability misses parts that lower
the answer; a window of layers finds larger effects than single layers do.
"""

from collections.abc import Callable
from math import inf

import polars as pl

from patchclamp.models.model import Model
from patchclamp.reproduce._figures import heat
from patchclamp.reproduce._result import Reproduction, claim, prompts
from patchclamp.study.grid import grid

PAPER = "Towards Best Practices of Activation Patching, https://arxiv.org/abs/2309.16042"
TASK, SUBJECT = "ioi", "S2"


def run(model: Model, n: int, seed: int, progress: Callable[[str, int, int], None]) -> Reproduction:
    """The grid over heads and over windows of MLPs, at the second subject and at the end."""
    some = prompts(model, TASK, n, seed).confirm
    heads = grid(model, some, ["L*.h*"], ["end"], subject=SUBJECT, windows=(1,), seed=seed, progress=progress)
    window = max(3, model.layers // 4)
    layers = grid(
        model, some, ["L*.attn.write"], [SUBJECT, "end"], subject=SUBJECT, metrics=("logit_diff",), windows=(1, window), seed=seed,
        progress=progress,
    )  # fmt: skip
    reference = heads.row("replacement", "logit_diff", 1)
    noise, chance = heads.row("noise", "logit_diff", 1), heads.row("replacement", "probability", 1)
    single, wide = (abs(layers.row("replacement", "logit_diff", size)["largest"]) for size in (1, window))
    rows = (
        claim("Spearman of noise with replacement", "they disagree", float(noise["spearman"] or 0.0), -1.0, 0.9, None),
        claim("clear negative heads that probability finds, of those that logit difference finds", "probability misses them",
              chance["negative"] / max(1, reference["negative"]), 0.0, 0.9, None),
        claim(f"largest effect of a window of {window} layers over that of one", "windows inflate effects", wide / max(single, 1e-9), 1.0,
              inf, None),
    )  # fmt: skip
    table = pl.concat(
        [heads.table.with_columns(pl.lit("heads").alias("what")), layers.table.with_columns(pl.lit("attention").alias("what"))]
    )
    cells = [{**row, "way": f"{row['corruption']}, window {row['window']}"} for row in heads.table.iter_rows(named=True)]
    figure = heat(
        cells,
        "metric",
        "way",
        "spearman",
        "Rank agreement of each way of patching heads with token replacement and logit difference.",
    )
    return Reproduction("p089", PAPER, model.name, rows, table, figure, {"task": TASK, "subject": SUBJECT, **heads.about})
