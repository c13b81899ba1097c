"""Every method against compiled programs: how well its scores of edges rank the live ones, and whether ACDC leaves just these.

The truth of each program comes from its blueprint in plain numpy (docs/ground_truth.md). A cell is the area under the receiver's
curve of the absolute mean score of every edge, ties counting half; scores below 1e-9 logits are taken as 0, so that what softmax
leaks (e^-50) ranks nothing. Prints the table of docs/ground_truth.md.

    python benchmarks/ground_truth.py [--programs reverse,hist] [--methods exact,gradient] [--n 32] [--acdc] [--slow 100] [--out FILE]
    python benchmarks/ground_truth.py --wired [--out FILE]

With `--wired`, of the hand-wired models instead (both families; their tables have no cells of zero, which is far from their inputs).

Methods that take many passes per edge are left out, with a dash, where a program has more than `--slow` edges.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np

from patchclamp import zoo
from patchclamp.discover import acdc, rank_auroc
from patchclamp.errors import PatchclampError
from patchclamp.methods import attribute, method_names
from patchclamp.models.model import Model
from patchclamp.parts import Edges, Fallback, edges
from patchclamp.tasks import Examples

NOTHING = 1e-9
HARD = ("reverse", "xproportion", "hist", "sort_unique", "pair_balance")
ELEVEN = (*((name, kind) for name in HARD for kind in ("resample", "zero")), ("shuffle_dyck", "zero"))
"""The cells that published tables have."""
PER_EDGE = ("alone",)
WIRED = ("induction", "and", "interfering", "facts", "or", "redundant", "suppressor", "backup")
SEEN_BY_NORMS = 1e-2
"""Logits: of hand-wired models, what norms see of everything; live edges carry at least half of one."""
REFUSED = "-"


def area(
    parts: Edges, examples: Examples, fallback: Fallback, method: str, live: frozenset[str], nothing: float = NOTHING
) -> str:
    """One cell; a dash where the method refuses it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores = attribute(parts, examples, fallback, method)
    except PatchclampError:
        return REFUSED
    values = np.abs(scores.values())
    return f"{rank_auroc(np.where(values < nothing, 0.0, values), [str(site) in live for site in scores.sites]):.3f}"


def wired(chosen: argparse.Namespace, cells: dict[str, str]) -> None:
    """Rows of the hand-wired models."""
    for name in WIRED:
        for family in ("gpt2", "llama"):
            one = zoo.wired(name, family)
            parts, live = edges(Model.load(one.hf, tokenizer=one.tokenizer)), frozenset(one.live_edges(chosen.n))
            examples, fallback = one.task.examples(one.tokenizer, chosen.n), parts.fallback("resample")
            cells[f"{name} {family} edges"] = f"{len(live)} of {len(parts.labels)}"
            for column in chosen.methods.split(","):
                if (key := f"{name} {family} {column}") not in cells:
                    slow = column in PER_EDGE and len(parts.labels) > chosen.slow
                    cells[key] = REFUSED if slow else area(parts, examples, fallback, column, live, SEEN_BY_NORMS)
                    print(f"{key}: {cells[key]}", flush=True)
            if chosen.out:
                chosen.out.write_text(json.dumps(cells, indent=1))


def left(parts: Edges, examples: Examples, fallback: Fallback, live: frozenset[str]) -> str:
    """What ACDC leaves in two orders: how many edges, and whether these are the live ones."""
    found = acdc(parts, examples, fallback, 1e-6, objective="l2", orders=[("backward", 0), ("random", 0)])
    sets = [frozenset(map(str, circuit.sites)) for circuit in found.orders]
    same = " = truth" if all(one == live for one in sets) else f" (truth {len(live)})"
    return "/".join(str(len(one)) for one in sets) + same


def main() -> None:
    """The command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--programs", default=",".join(zoo.program_names()))
    options.add_argument("--methods", default=",".join(method_names()))
    options.add_argument("--kinds", default="resample,zero")
    options.add_argument("--n", type=int, default=32)
    options.add_argument("--acdc", action="store_true")
    options.add_argument("--wired", action="store_true", help="the hand-wired models instead")
    options.add_argument("--slow", type=int, default=100, help="most edges of a program for methods of many passes per edge")
    options.add_argument(
        "--out", type=Path, help="also keep the cells here, as JSON; those that are there already are not run again"
    )
    chosen = options.parse_args()
    cells: dict[str, str] = json.loads(chosen.out.read_text()) if chosen.out and chosen.out.exists() else {}
    columns = [*chosen.methods.split(","), *(["acdc"] if chosen.acdc else [])]
    if chosen.wired:
        wired(chosen, cells)
        print(table(cells, columns).rpartition("\n")[0])  # without the mean of programs
        return
    for name in chosen.programs.split(","):
        one = zoo.program(name)
        parts, examples = edges(Model.load(one.hf, tokenizer=one.tokenizer)), one.task.examples(one.tokenizer, chosen.n)
        for kind in chosen.kinds.split(","):
            live, fallback = frozenset(getattr(one.truth, kind)), parts.fallback(kind)
            cells[f"{name} {kind} edges"] = f"{len(live)} of {len(parts.labels)}"
            for column in columns:
                key, begun = f"{name} {kind} {column}", time.perf_counter()
                if key in cells:
                    continue
                if column in PER_EDGE and len(parts.labels) > chosen.slow:
                    cells[key] = REFUSED
                elif column == "acdc":
                    cells[key] = left(parts, examples, fallback, live)
                else:
                    cells[key] = area(parts, examples, fallback, column, live)
                print(f"{key}: {cells[key]} ({time.perf_counter() - begun:.1f} s)", flush=True)
                if chosen.out:
                    chosen.out.write_text(json.dumps(cells, indent=1))
    print(table(cells, columns))


def table(cells: dict[str, str], columns: list[str]) -> str:
    """The cells as Markdown, with each method's mean over the published eleven where it has them all."""
    rows = list(dict.fromkeys(key.rsplit(" ", 1)[0] for key in cells))
    lines = [f"| program | live | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    lines += [
        f"| {row} | {cells.get(f'{row} edges', '')} | {' | '.join(cells.get(f'{row} {column}', '') for column in columns)} |"
        for row in rows
    ]
    means: list[str] = []
    for column in columns:
        found = [cells.get(f"{name} {kind} {column}", REFUSED) for name, kind in ELEVEN]
        means.append(REFUSED if column == "acdc" or REFUSED in found else f"{np.mean([float(cell) for cell in found]):.3f}")
    return "\n".join([*lines, f"| mean of eleven | | {' | '.join(means)} |"])


if __name__ == "__main__":
    main()
