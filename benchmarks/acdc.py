"""ACDC on all edges: circuits of the shipped model and of stories260k, how faithful they are on unseen pairs, and what they took.

    python benchmarks/acdc.py [--model zoo/small] [--task ioi --task greater_than ...] [--n 64] [--share 0.01] [--json out.json]

What it took is counted, not timed: blocks that ran, each for one setting on all select prompts, those of runs that were thrown away
among them. The straightforward loop runs all blocks once for every edge of every order.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from patchclamp.discover import acdc
from patchclamp.methods import groups_of
from patchclamp.models.model import Model
from patchclamp.parts import edges
from patchclamp.study.steps import metric_for
from patchclamp.tasks import load_task
from patchclamp.trust import trust


def one(model: Model, name: str, n: int, share: float, seed: int) -> dict[str, Any]:
    """One task: the circuits of three orders, what they took, and the first one's faithfulness on the confirm set."""
    split = load_task(name).split(model.tokenizer, n, seed=seed)
    parts, some = edges(model), split.select
    fallback = parts.fallback("resample" if some[0].corrupt is not None else "mean", fit=split.fit)
    found = acdc(parts, some, fallback, share=share)
    measured = int(found.trace["growth"].count())
    order = [part for part in found.circuit] + [part for part in parts.labels if part not in found.circuit]
    judged = trust(
        parts, split.confirm, fallback, found.circuit, order, groups=groups_of(split.confirm),
        metric=metric_for(split.confirm, None), random_circuits=20,
    )  # fmt: skip
    return {
        "task": name, "edges": len(parts.labels), "select": len(some), "confirm": len(split.confirm), "threshold": found.threshold,
        "kl closed": found.ends[1], "kl circuit": found.loss[0], "sizes": [len(circuit) for circuit in found.orders],
        "jaccard": found.stability, "common": len(found.common), "any": len(found.ever), "closest": found.closest,
        "faithfulness": [judged.faithfulness.mean, judged.faithfulness.low, judged.faithfulness.high],
        "random": [judged.random.mean, judged.random.low, judged.random.high], "accuracy": judged.accuracy,
        "blocks": found.blocks, "naive": found.naive, "not cut off": measured, "settings": found.settings, "thrown": found.thrown,
        "circuit": [str(edge) for edge in found.circuit],
    }  # fmt: skip


def main() -> None:
    """Print a row per task."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--model", default="zoo/small")
    given.add_argument("--task", action="append")
    given.add_argument("--n", type=int, default=64)
    given.add_argument("--share", type=float, default=0.01)
    given.add_argument("--seed", type=int, default=0)
    given.add_argument("--json", type=Path)
    asked = given.parse_args()
    torch.set_num_threads(1)
    model, rows = Model.load(asked.model), list[dict[str, Any]]()
    for name in asked.task or ["ioi", "greater_than", "gendered_pronoun", "induction"]:
        row = one(model, name, asked.n, asked.share, asked.seed)
        rows.append(row)
        low, high = row["faithfulness"][1:]
        print(
            f"{asked.model} {name}: {row['sizes']} of {row['edges']} edges at {row['threshold']:.4f} nats; Jaccard {row['jaccard']:.2f} "
            f"({row['common']} in all, {row['any']} in any); faithfulness on {row['confirm']} unseen {row['faithfulness'][0]:.2f} "
            f"[{low:.2f}, {high:.2f}], random {row['random'][0]:.2f}; {row['blocks']:.0f} blocks for {row['naive']} "
            f"({row['blocks'] / row['naive']:.3f}), {row['not cut off']} visits not cut off, {row['thrown']} of {row['settings']} runs thrown",
            flush=True,
        )
        if asked.json is not None:
            asked.json.write_text(json.dumps({"model": asked.model, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
