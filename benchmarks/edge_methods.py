"""How near each method comes to the exact effects of all edges, on tasks of the shipped model: the tables of docs/attribution.md.

    python benchmarks/edge_methods.py [--model zoo/small] [--task ioi --task greater_than ...] [--n 16] [--methods gradient,gim] [--out FILE]

A cell: Pearson and Spearman correlation with the exact effects (means over prompts, resample, the task's metric), |score - exact| /
|exact|, and the share of the 20 largest exact effects that are among the method's 20. A method that refuses the task says why. Methods
that take many passes for every edge (`alone`) or for every destination (`segments`) are left out unless they are asked for. Behind it: how many
edges the circuits of each two tasks share, and how many by chance (docs/circuits.md).
"""

import argparse
import json
import time
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchclamp.dependence.network import overlap
from patchclamp.errors import PatchclampError
from patchclamp.methods import effects, method_names
from patchclamp.methods._agreement import against, signed
from patchclamp.models.model import Model
from patchclamp.parts import edges
from patchclamp.tasks import load_task

TASKS = ("ioi", "greater_than", "gendered_pronoun", "induction")
DEAR = ("alone", "segments")
TOP = 20
SEED = 11
SHARE = 0.025
"""Of all edges, how many a task's circuit has."""


def cells(model: Model, name: str, n: int, methods: list[str], kept: dict[str, Any]) -> None:
    """One task: exact effects, then a row of numbers for every method, each put into `kept` once it is known."""
    parts, some = edges(model), load_task(name).examples(model.tokenizer, n, seed=SEED)
    rule = parts.fallback("resample")
    for method in ["exact", *methods]:
        key, begun = f"{name} {method}", time.perf_counter()
        if key in kept:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scores = effects(parts, some, rule, method).double().mean(1).numpy()
        except PatchclampError as error:
            kept[key] = {"refused": str(error)}
            continue
        if method == "exact":
            kept[key] = {"values": scores.tolist(), "edges": list(map(str, parts.labels))}
        else:
            exact = np.array(kept[f"{name} exact"]["values"])
            kept[key] = against(scores, exact if signed(method) else np.abs(exact), TOP)
        kept[key]["seconds"] = time.perf_counter() - begun
        print(key, {one: value for one, value in kept[key].items() if one not in ("values", "edges")}, flush=True)


def table(kept: dict[str, Any], tasks: list[str], methods: list[str]) -> str:
    """The cells as Markdown, methods in the order of their mean correlation."""

    def mean(method: str) -> float:
        return float(np.mean([kept[f"{task} {method}"].get("pearson") or 0.0 for task in tasks]))

    def written(cell: dict[str, Any]) -> str:
        numbers = [cell.get(one) for one in ("pearson", "spearman", "relative_l2")]
        return "refused" if "refused" in cell else f"{' / '.join(f'{one:.3f}' for one in numbers)}, {cell['overlap']:.0%}"

    lines = [f"| method | {' | '.join(tasks)} |", "|---|" + "---|" * len(tasks)]
    for method in sorted(methods, key=mean, reverse=True):
        lines.append(f"| {method} | {' | '.join(written(kept[f'{task} {method}']) for task in tasks)} |")
    return "\n".join(lines)


def shared(kept: dict[str, Any], tasks: list[str], share: float) -> str:
    """What the circuits of each two tasks have in common (the edges of largest exact effect that helps), against chance, as Markdown."""
    circuits: dict[str, list[str]] = {}
    for task in tasks:
        values, names = np.array(kept[f"{task} exact"]["values"]), kept[f"{task} exact"]["edges"]
        circuits[task] = [names[at] for at in np.argsort(-values, kind="stable")[: round(share * len(names))]]
    lines = ["| tasks | shared | chance, p | chance of the same kinds and layers, p |", "|---|---|---|---|"]
    for one, two in combinations(tasks, 2):
        found = overlap(circuits[one], circuits[two], kept[f"{one} exact"]["edges"])
        lines.append(
            f"| {one}, {two} | {found.shared} of {found.one} | {found.expected:.1f}, {found.p:.2g} | {found.matched_expected:.1f}, "
            f"{found.matched_p:.2g} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--model", default="zoo/small")
    given.add_argument("--task", action="append")
    given.add_argument("--n", type=int, default=16)
    given.add_argument("--methods", default=",".join(name for name in method_names() if name not in ("exact", *DEAR)))
    given.add_argument(
        "--out", type=Path, help="also keep the cells here, as JSON; those that are there already are not run again"
    )
    asked = given.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, Any] = json.loads(asked.out.read_text()) if asked.out and asked.out.exists() else {}
    model, tasks, methods = Model.load(asked.model), list[str](asked.task or TASKS), asked.methods.split(",")
    for name in tasks:
        cells(model, name, asked.n, methods, kept)
        if asked.out:
            asked.out.write_text(json.dumps(kept, indent=1))
    print(table(kept, tasks, methods))
    print(shared(kept, tasks, SHARE))


if __name__ == "__main__":
    main()
