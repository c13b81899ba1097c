"""Do circuits of edges come out in the order exact, integrated, gradient, random? Differences of areas on the same prompts.

    python benchmarks/edge_order.py [--case zoo/small:ioi --case zoo/siit_sort_unique:zoo/sort_unique ...] [--n 64] [--fallback resample]

Scores on one set of prompts, circuits of ten sizes (MIB's shares) judged on another. Each method's CPR and CMD have the same bootstrap
draws of prompts, so that the difference of two methods has an interval of its own, narrower than theirs suggest.
"""

import argparse
from itertools import pairwise

import numpy as np
import torch

from patchclamp.discover.evaluation import SHARES, areas
from patchclamp.discover.threshold import Order, ranked
from patchclamp.methods import attribute, groups_of
from patchclamp.metrics import metric_named
from patchclamp.models.model import Model
from patchclamp.parts import Parts, benefits, edges
from patchclamp.scores.ratios import Shares
from patchclamp.tasks import load_task

METHODS = ("exact", "integrated", "gradient", "random")
AREAS: dict[Order, str] = {"signed": "CPR", "magnitude": "CMD"}


def case(model: str, task: str, n: int, kind: str, methods: list[str], seed: int) -> None:
    """Print a line per area: every method's, and each method's less the next one's."""
    loaded = Model.load(model)
    parts: Parts = edges(loaded)
    split, rule = load_task(task).split(loaded.tokenizer, n, seed=seed), parts.fallback(kind)
    some = split.confirm
    metric, sizes = metric_named(some.metric), [max(1, int(share * len(parts.labels) + 1e-9)) for share in SHARES]
    scores = [attribute(parts, split.select, rule, method) for method in methods]
    ends = benefits(parts, some, torch.cat([parts.open(), parts.closed()]), rule, metric).double().numpy()
    shares = Shares.of(ends[0], ends[1], groups_of(some), metric=metric.name, seed=seed)
    for by, name in AREAS.items():
        point, drawn = list[float](), list[np.ndarray]()
        for one in scores:
            order = ranked(one, by)
            values = benefits(parts, some, torch.cat([parts.only(order[:size]) for size in sizes]), rule, metric).double().numpy()
            point.append(float(areas(shares.point(values), np.array(SHARES), by)[name]))
            drawn.append(areas(shares.draws(values), np.array(SHARES), by)[name])
        each = [f"{method} {value:.3f} {_interval(draw)}" for method, value, draw in zip(methods, point, drawn, strict=True)]
        apart = [
            f"{methods[a]} - {methods[b]} {point[a] - point[b]:+.3f} {_interval(drawn[a] - drawn[b])}"
            for a, b in pairwise(range(len(methods)))
        ]
        head = f"{model} {task} {kind}, {len(parts.labels)} edges, {len(some)} prompts, {name}"
        print(f"{head}: {'; '.join(each)} | {'; '.join(apart)}", flush=True)


def _interval(draws: np.ndarray) -> str:
    low, high = np.percentile(draws, [2.5, 97.5])
    return f"[{low:.3f}, {high:.3f}]"


def main() -> None:
    """The command line."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--case", action="append")
    given.add_argument("--n", type=int, default=64)
    given.add_argument("--seed", type=int, default=0)
    given.add_argument("--fallback", default="resample")
    given.add_argument("--methods", default=",".join(METHODS))
    asked = given.parse_args()
    torch.set_num_threads(1)
    for one in asked.case or ["zoo/siit_sort_unique:zoo/sort_unique", "zoo/sort_unique:zoo/sort_unique"]:
        model, _, task = one.partition(":")
        case(model, task, asked.n, asked.fallback, asked.methods.split(","), asked.seed)


if __name__ == "__main__":
    main()
