"""Interactions: all pairs of heads and MLPs through replay, against plain forward passes one by one and the arithmetic limit.

    small   all pairs of the shipped model (36 parts, 630 pairs), 128 prompts: seconds; numbers against one pair run alone
    gpt2    a random tenth of the 12,090 pairs of a model of GPT-2's shape (156 parts), 8 prompts of 16 tokens, random weights

The limit is the multiply-adds that the chosen settings need at least, at the rate of the model's own forward pass (2,048 tokens
at once, the faster of one before and one after): what settings share runs once (one part closed, up to the block of the first
partner), a head closed leaves its own block's queries, keys and values as they are, and in the last block queries, output
projection and MLP run at the answer position alone. One by one: the same settings, each a forward pass from the embeddings with
all logits.

    python benchmarks/pairs.py [--rows small,gpt2] [--share 0.1] [--repeats 3] [--alone 40] [--threads 2]
"""

import argparse
import time
from collections.abc import Sequence
from itertools import combinations

import torch
from replay import SHAPES, block, examples, rate
from torch import Tensor

from patchclamp.dependence import close_pairs
from patchclamp.dependence.closings import closed_gates
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Nodes, nodes
from patchclamp.tasks import load_task
from patchclamp.tasks._batch import Batch

TOLERANCE = 1e-4
Setting = tuple[int, ...]


def limit(parts: Nodes, settings: Sequence[Setting], rows: int, length: int) -> float:
    """Multiply-adds that these settings need at least, on so many rows of so many tokens."""
    model, cost = parts.model, block(parts.model, length)
    labels = [parts.labels[number] for number in parts.counted]
    head, last = model.anatomy.sizes[0].head_width * model.width, model.layers - 1
    total, seen, read = 0.0, set[tuple[int, tuple[Setting, ...]]](), set[tuple[int, tuple[Setting, ...]]]()
    for setting in settings:
        stages = [tuple(part for part in setting if labels[part].layer == layer) for layer in range(model.layers)]
        first = next(layer for layer, shut in enumerate(stages) if shut)
        for layer in range(first, model.layers):
            known = (layer, tuple(stages[: layer + 1]))  # what is the same up to here has run
            if known in seen:
                continue
            seen.add(known)
            wide = length if layer < last else 1
            shut = stages[layer]
            heads = [part for part in shut if labels[part].kind == "head"]
            if layer == first:  # queries, keys and values are the model's own
                total += wide * (len(heads) * head + (cost["mlp"] if heads and len(heads) == len(shut) else 0))
                continue
            below = (layer, tuple(stages[:layer]))
            if below not in read:  # attention reads what is the same for settings that differ in this block alone
                read.add(below)
                total += length * cost["kv"] + wide * (cost["q"] + cost["attention"])
            total += wide * (cost["o"] + (0 if len(heads) < len(shut) else cost["mlp"]))
    return rows * total


def plainly(parts: Nodes, batch: Batch, gates: Tensor) -> tuple[float, Tensor]:
    """Seconds, and the metric, of settings run one by one with all logits."""
    fallback = parts.fallback("resample")
    fallback.at(batch)
    found: list[Tensor] = []
    start = time.perf_counter()
    with torch.no_grad():
        for one in gates:
            logits = parts.model.forward(batch, parts.edits(one[None], fallback, batch))
            found.append(
                METRICS["logit_diff"](parts.model.at_targets(batch, logits[:, batch.target_position.unique()]), batch)[0]
            )
    return time.perf_counter() - start, torch.stack(found)


def gpt2(share: float, repeats: int, alone: int) -> None:
    torch.manual_seed(0)
    model = Model.load(SHAPES["gpt2"]().eval())
    parts = nodes(model)
    tokens = torch.randint(3, 50000, (2, 8, 16))
    some = examples(tokens[0], tokens[1])
    batch, count = some.batch(), len(parts.counted)
    every = list(combinations(range(count), 2))
    draw = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[: round(share * len(every))].tolist()
    pairs = sorted(every[number] for number in draw)
    settings: list[Setting] = sorted([*((part,) for part in sorted({part for pair in pairs for part in pair})), *pairs])
    gates = closed_gates(parts, [(), *settings])
    fallback = parts.fallback("resample")
    fallback.at(batch)
    parts.measure(batch, gates[:3], fallback)
    least = limit(parts, settings, 8, 16)
    print(
        f"gpt2 shape: {len(pairs)} of {len(every)} pairs, {len(settings)} settings, 8 prompts of 16 tokens; at least {least:.3g} multiply-adds"
    )
    chosen = torch.randperm(len(gates), generator=torch.Generator().manual_seed(1))[:alone]
    for _ in range(repeats):
        before = rate(model)
        start = time.perf_counter()
        values = parts.measure(batch, gates, fallback)
        ours = time.perf_counter() - start
        bound = least / max(before, rate(model))
        seconds, found = plainly(parts, batch, gates[chosen])
        theirs = seconds * len(gates) / alone
        apart = float((values[chosen] - found).abs().max())
        print(f"  replay {ours:.1f} s; one by one {theirs:.1f} s ({ours / theirs:.2f} of it); limit {bound:.1f} s ({bound / ours:.0%} of it)"
              f"; differs from whole runs by {apart:.1e}", flush=True)  # fmt: skip
        if apart > TOLERANCE:
            raise SystemExit("the numbers differ")


def small() -> None:
    model = Model.load("zoo/small")
    parts, some = nodes(model), load_task("ioi").examples(model.tokenizer, 128, seed=0)
    start = time.perf_counter()
    found = close_pairs(parts, some, parts.fallback("resample"))
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    close_pairs(parts, some, parts.fallback("resample"), frozen_norm=True)
    frozen = time.perf_counter() - start
    print(
        f"zoo/small: {len(found.pairs)} pairs of {len(found.parts)} parts, {len(some)} prompts: {seconds:.1f} s; norm held {frozen:.1f} s"
    )
    chosen = torch.randperm(len(found.pairs), generator=torch.Generator().manual_seed(0))[:10].tolist()
    batch = some.batch()
    _, alone = plainly(parts, batch, closed_gates(parts, [found.pairs[number] for number in chosen]))
    print(f"  differs from whole runs by {float((torch.tensor(found.both[chosen]) - alone).abs().max()):.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="small,gpt2")
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, torch {torch.__version__}")
    for row in options.rows.split(","):
        if row == "small":
            small()
        else:
            gpt2(options.share, options.repeats, options.alone)


if __name__ == "__main__":
    main()
