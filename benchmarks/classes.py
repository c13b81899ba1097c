"""When classification in context comes, against burstiness and the number of classes; by the weights instead, where classes are few.

Trains the recipe `classes` (one token a class, to be quicker) with its own numbers, and ends a run once accuracy on new classes is at
least .9, or behind `--steps` updates. Half-way is the first evaluation (every 25 updates) at which it is at least half-way between
chance (burst / pairs) and 1. Prints a line a run; one that stands in `--out` is not made again. What was run: docs/zoo.md.

    python benchmarks/classes.py [--burst 1,2,4] [--classes 1024] [--counted last] [--seeds 0,1] [--steps 1500] [--out FILE]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from patchclamp.models.model import Model
from patchclamp.training import train
from patchclamp.zoo.recipes import recipe
from patchclamp.zoo.recipes.classes import Contexts, build, measure

ENOUGH = 0.9


class Reached(Exception):
    """Accuracy on new classes is high enough: the run ends."""


def data(seed: int, settings: Mapping[str, int | str]) -> Contexts:
    """The recipe's rows with other settings, of one token a class."""
    return replace(Contexts(seed, exemplars=1, noise=0.0), **settings)


def curve(seed: int, settings: Mapping[str, int | str], steps: int) -> list[dict[str, float]]:
    """Numbers at every evaluation of one run."""
    rows, found = partial(data, settings=settings), list[dict[str, float]]()

    def tell(step: int, numbers: Mapping[str, float]) -> None:
        found.append({"step": step, **numbers})
        if numbers["icl"] >= ENOUGH:
            raise Reached

    training = replace(recipe("classes").training, steps=steps, checkpoints=(0, steps), save=10**9)
    model = Model.load(build(seed, rows))
    numbers = [lambda model, step: measure(model, seed, rows)]
    with tempfile.TemporaryDirectory() as folder, suppress(Reached):
        train(model, rows(seed), training, folder, measures=numbers, progress=tell)
    return found


def half_way(found: list[dict[str, float]], chance: float) -> float | None:
    """The first evaluation at which accuracy on new classes is half-way between chance and 1; None: at none."""
    return next((at["step"] for at in found if at["icl"] >= (1 + chance) / 2), None)


def main() -> None:
    """Every cell, by burstiness and number of classes."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731 (a type of argparse)
    parse.add_argument("--burst", type=numbers, default=[1, 2, 4])
    parse.add_argument("--classes", type=numbers, default=[1024])
    parse.add_argument("--counted", choices=["again", "last"], default="last")
    parse.add_argument("--seeds", type=numbers, default=[0, 1])
    parse.add_argument("--steps", type=int, default=1500)
    parse.add_argument("--out", type=Path)
    chosen = parse.parse_args()
    runs = json.loads(chosen.out.read_text()) if chosen.out and chosen.out.is_file() else {}
    for seed in chosen.seeds:
        for burst in chosen.burst:
            for classes in chosen.classes:
                settings = {"burst": burst, "classes": classes, "counted": chosen.counted}
                key = f"{chosen.counted} burst {burst} classes {classes} steps {chosen.steps} seed {seed}"
                if key not in runs:
                    at = time.process_time()
                    runs[key] = curve(seed, settings, chosen.steps)
                    runs[key][-1]["seconds"] = time.process_time() - at
                    if chosen.out:
                        chosen.out.write_text(json.dumps(runs, indent=1))
                last, half = runs[key][-1], half_way(runs[key], burst / Contexts().pairs)
                told = ", ".join(f"{name} {last[name]:.3f}" for name in ("icl", "weights", "accuracy"))
                print(
                    f"{key}: half-way {half or 'never'}; at {last['step']:.0f} {told} ({last.get('seconds', 0):.0f} s)",
                    flush=True,
                )


if __name__ == "__main__":
    main()
