"""Every method against compiled programs: how well its scores of edges rank the live ones, and whether ACDC leaves just these.

The truth of each program comes from its blueprint in plain numpy (docs/ground_truth.md). A cell is the area under the receiver's
curve of the absolute mean score of every edge, ties counting half; scores below 1e-9 logits are taken as 0, so that what softmax
leaks (e^-50) ranks nothing. Prints the table of docs/ground_truth.md.

    python benchmarks/ground_truth.py [--programs reverse,hist] [--methods exact,gradient] [--n 32] [--acdc] [--slow 100] [--out FILE]

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
REFUSED = "-"


def area(parts: Edges, examples: Examples, fallback: Fallback, method: str, live: frozenset[str]) -> str:
    """One cell; a dash where the method refuses it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores = attribute(parts, examples, fallback, method)
    except PatchclampError:
        return REFUSED
    values = np.abs(scores.values())
    return f"{rank_auroc(np.where(values < NOTHING, 0.0, values), [str(site) in live for site in scores.sites]):.3f}"


def left(parts: Edges, examples: Examples, fallback: Fallback, live: frozenset[str]) -> str:
    """What ACDC leaves in two orders: how many edges, and whether these are the live ones."""
    found = acdc(parts, examples, fallback, 1e-6, objective="l2", orders=[("backward", 0), ("random", 0)])
    sets = [set(map(str, circuit.sites)) for circuit in found.orders]
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
    options.add_argument("--slow", type=int, default=100, help="most edges of a program for methods of many passes per edge")
    options.add_argument(
        "--out", type=Path, help="also keep the cells here, as JSON; those that are there already are not run again"
    )
    chosen = options.parse_args()
    cells: dict[str, str] = json.loads(chosen.out.read_text()) if chosen.out and chosen.out.exists() else {}
    columns = [*chosen.methods.split(","), *(["acdc"] if chosen.acdc else [])]
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
