"""Induction heads over training: do their effects add up, and what becomes of recall without them?

Reads runs that are there: those of `python examples/09_clamps.py FOLDER 0 1 2 3 4` (FOLDER/unclamped/seed-N), and
`patchclamp zoo train induction --out RUN`, which keeps 20 checkpoints. All four heads of layer 1 are induction heads there. On lists of random
words that are said twice, at each checkpoint:

    additivity  every set of the four heads closed to its mean: share of order 1 (R2 of the best additive law), 2 and 3; what closing all takes
                beside the sum of what each takes; by metric, and with the final norm's scale held at the model's own run
    recall      lists shuffled the second time: attention of layer 1's heads by lag, asymmetry, contiguity (means over heads); serial recall, with the
                four heads closed to their mean, and with one of them (the least and the largest change)

    python benchmarks/induction_heads.py RUN [RUN ...] [--length 14] [--steps 88 249 351 700]

Without --steps the last checkpoint of each run. About 5 s of one core for each.
"""

import argparse
from pathlib import Path

import numpy as np
import polars as pl
import torch

from patchclamp.dependence import additivity
from patchclamp.develop import checkpoints
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.tasks import induction
from patchclamp.units import recall, without
from patchclamp.units.heads import attention_scores, repeated
from patchclamp.units.recall import shuffled
from patchclamp.zoo._compile import tokenizer
from patchclamp.zoo.recipes.induction import VOCABULARY

HEADS = tuple(f"L1.h{head}" for head in range(4))
ASKED, ROWS = 128, 64
WAYS = (("logit_diff", True), ("logit_diff", False), ("log_probability", False))


def interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def added(model: Model, length: int, fallback: str) -> list[dict[str, object]]:
    """Rows of the first table."""
    parts, task = nodes(model), induction.task(length=length)
    some, fit = (task.examples(model.tokenizer, ASKED, seed=seed) for seed in (5, 6))
    rule = parts.fallback(fallback, fit=fit)
    rows: list[dict[str, object]] = []
    for metric, frozen in WAYS:
        found = additivity(parts, some, rule, HEADS, metric=metric, frozen_norm=frozen)
        shares = [interval(*row) for row in found.orders.select("share", "low", "high").head(3).iter_rows()]
        every = found.sets.row(-1, named=True)
        rows.append({
            "metric": metric, "norm": found.about["norm"], "open": round(found.about["open"], 2), "order 1": shares[0], "order 2": shares[1],
            "order 3": shares[2], "all closed": round(every["effect"], 2), "sum of each": round(every["sum"], 2),
            "first": " ".join(f"{x:.2f}" for x in found.alone["first"]), "last": " ".join(f"{x:.2f}" for x in found.alone["last"]),
        })  # fmt: skip
    return rows


def remembered(model: Model, length: int) -> dict[str, object]:
    """A row of the second table."""
    rows = shuffled(model, ROWS, length)
    scores = attention_scores(model, repeated(model, ROWS, length))["induction"].mean(1)
    table = recall(model, rows)
    own = table.filter(pl.col("part").is_in(HEADS))

    def mean(name: str) -> float:
        return float(np.mean(own.filter(name=name)["value"].to_list()))

    def change(*heads: str) -> tuple[float, float | None, float | None]:
        found = without(model, heads, rows, how="mean").filter(name="change")
        return found.select("value", "low", "high").row(0)

    single = sorted(change(head) for head in HEADS)
    serial = table.filter(name="serial").select("value", "low", "high").row(0)
    return {
        "induction": f"{scores[4:].max():.2f}", "lag +1": f"{mean('crp.+1'):.3f}", "lag -1": f"{mean('crp.-1'):.3f}", "lag 0": f"{mean('crp.0'):.3f}",
        "asymmetry": f"{mean('asymmetry'):.2f}", "contiguity": f"{mean('contiguity'):.3f}", "serial": interval(*serial),
        "without all": interval(*change(*HEADS)), "without one": f"{interval(*single[-1])} to {interval(*single[0])}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--length", type=int, default=14, help="of the lists: no longer than those of the training")
    parser.add_argument("--steps", type=int, nargs="+", default=None)
    parser.add_argument("--fallback", default="mean")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sums: list[dict[str, object]] = []
    recalls: list[dict[str, object]] = []
    for run in given.runs:
        there = checkpoints(run)
        for one in [each for each in there if (given.steps is None and each is there[-1]) or each.step in (given.steps or ())]:
            model = Model.load(one.model, tokenizer=tokenizer(VOCABULARY))
            where = {"run": run.name, "step": one.step}
            sums += [{**where, **row} for row in added(model, given.length, given.fallback)]
            recalls.append({**where, **remembered(model, given.length)})
    with pl.Config(tbl_rows=200, tbl_cols=30, tbl_width_chars=400, fmt_str_lengths=80):
        print(pl.DataFrame(sums), pl.DataFrame(recalls), sep="\n")


if __name__ == "__main__":
    main()
