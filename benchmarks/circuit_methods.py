"""What circuits.md says besides ACDC: verified recall of screens, codes, neuron paths, signals, and what heads bring over texts.

    python benchmarks/circuit_methods.py [--model zoo/small] [--task ioi] [--n 64] [--texts stories.jsonl] [--only recall,codes,...]

`--texts` is a file of one text per line (or JSON lines with a `text`), for `flow`. Nothing is timed.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import torch

from patchclamp.discover import screened, verified_recall
from patchclamp.discover.codes import codes
from patchclamp.discover.flow import flow_heads
from patchclamp.discover.neuron_paths import neuron_path
from patchclamp.discover.pruning import rank_auroc
from patchclamp.discover.signals import removed, signals, trace
from patchclamp.methods import attribute
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Parts, edges, gated, nodes
from patchclamp.tasks import Examples, load_task


def recall(model: Model, some: Examples, _: argparse.Namespace) -> None:
    """Cost of verified recall of slopes and of integrated slopes, and what screening stops at, on neurons and on edges."""
    kinds: dict[str, Parts] = {"neurons": gated(model, ["L*.mlp.n*"]), "edges": edges(model)}
    for name, parts in kinds.items():
        fallback = parts.fallback("resample")
        exact = attribute(parts, some, fallback)
        found = verified_recall(attribute(parts, some, fallback, "gradient"), exact, most=50)
        print(
            f"{name}: all of the 5 / 10 / 50 largest of {found.of} exact effects are among the first {found.cost(5)} / {found.cost(10)} / "
            f"{found.cost(50)} by slope ({found.cost(5) / found.of:.1%}, {found.cost(10) / found.of:.1%}, {found.cost(50) / found.of:.1%}); "
            f"{found.relative:.2f} times a perfect order's cost, random {found.table['chance'][4]:.0f} for 5",
            flush=True,
        )
        stopped = screened(parts, some, fallback, top=5)
        top = set(exact.top(5)["site"]) == set(stopped.scores.top(5)["site"])
        rest = [abs(exact[site]["score"]) for site in exact.table["site"] if site not in set(stopped.scores.table["site"])]
        print(f"  {stopped}")
        print(
            f"  its five largest are {'' if top else 'not '}the exact ones; the largest left out is {max(rest, default=0.0):.3g}",
            flush=True,
        )


def coded(model: Model, some: Examples, _: argparse.Namespace) -> None:
    """Heads by codes of eight pairs, against their exact effects."""
    few = some.take(range(min(8, len(some))))
    found = codes(model, few)
    parts = nodes(model, mlps=False)
    exact = attribute(parts, some, parts.fallback("resample"))
    large = [abs(value) >= 0.1 * abs(exact.values()).max() for value in exact.values(found.scores.sites)]
    print(f"codes of {len(few)} pairs: {len(found.circuit())} heads; AUROC against heads above a tenth of the largest effect "
          f"({sum(large)} of {len(large)}): {rank_auroc(found.scores.values(), large):.2f}", flush=True)  # fmt: skip


def path(model: Model, some: Examples, _: argparse.Namespace) -> None:
    """A path of neurons on half of the prompts, judged on the others."""
    parts, half = gated(model, ["L*.mlp.n*"]), len(some) // 2
    found = neuron_path(parts, some.take(range(half)), parts.fallback("zero"), some.take(range(half, len(some))))
    print(f"neuron path {', '.join(map(str, found.path))}: p {found.p:.2f}", found.judged, flush=True)


def read(model: Model, some: Examples, _: argparse.Namespace) -> None:
    """Signals of the heads that attend from the last token, on eight prompts: how few, who wrote them, what taking them out does."""
    metric, rows = METRICS["logit_diff"], list[dict[str, object]]()
    for at in range(min(8, len(some))):
        batch = some.batch([at])
        ids, plain = batch.tokens[0], float(metric(model.target_logits(batch).detach(), batch)[0, 0])
        for one in (one for one in signals(model, ids) if one.query == len(ids) - 1 and one.key > 0 and one.count):
            after, control = (
                float(metric(model.target_logits(batch, removed(model, ids, one, other=other)).detach(), batch)[0, 0])
                for other in (False, True)
            )
            table = trace(model, ids, one)
            writer = table.filter((table["side"] == "key") & (table["part"] != "constant")).row(0, named=True)
            rows.append({"head": str(one.head), "terms": one.count, "of": len(one.terms), "writer": writer["part"], "share": writer["share"],
                         "lost": plain - after, "control": plain - control})  # fmt: skip
    table = pl.DataFrame(rows)
    print(table.group_by("head").agg(pl.len(), pl.col("terms", "of", "lost", "control").mean(), pl.col("writer").mode().first(),
                                     pl.col("share").median()).sort("lost", descending=True).head(8), flush=True)  # fmt: skip


def brought(model: Model, _: Examples, asked: argparse.Namespace) -> None:
    """What each head brings most, over texts."""
    if asked.texts is None:
        return
    lines = [line for line in asked.texts.read_text().splitlines() if len(line) > 200][: asked.count]
    texts = [json.loads(line)["text"] if line.startswith("{") else line for line in lines]
    table = flow_heads(model, texts, length=48)
    print(f"{len(texts)} texts, {table.group_by('class').agg(pl.col('tokens').first())['tokens'].sum()} tokens")
    for relation in ("previous", "duplicate", "induction"):
        mean = (pl.col("share") * pl.col("tokens")).sum() / pl.col("tokens").sum()
        by = table.filter(pl.col("relation") == relation).group_by("site").agg(mean.alias("share")).sort("share", descending=True)
        print(relation, by.head(3).rows())
    subwords = table.filter((pl.col("class") == "continuation") & (pl.col("relation") == "previous"))
    print(
        "continuations from the token before",
        subwords.sort("share", descending=True).head(3).select("site", "share", "low", "high").rows(),
        flush=True,
    )


ALL: dict[str, Callable[[Model, Examples, argparse.Namespace], None]] = {
    "recall": recall, "codes": coded, "path": path, "signals": read, "flow": brought,
}  # fmt: skip


def main() -> None:
    """Print what was asked for."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--model", default="zoo/small")
    given.add_argument("--task", default="ioi")
    given.add_argument("--n", type=int, default=64)
    given.add_argument("--texts", type=Path)
    given.add_argument("--count", type=int, default=24)
    given.add_argument("--only", default=",".join(ALL))
    asked = given.parse_args()
    torch.set_num_threads(1)
    model = Model.load(asked.model)
    some = load_task(asked.task).split(model.tokenizer, asked.n, seed=0).select
    for name in asked.only.split(","):
        print(f"-- {name}: {asked.model}, {asked.task}, {len(some)} prompts")
        ALL[name](model, some, asked)


if __name__ == "__main__":
    main()
