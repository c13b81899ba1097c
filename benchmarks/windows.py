"""Critical periods of an induction circuit: a deficit for 100 updates, early, in the middle or late, and what it still costs at the end.

The model of the zoo's induction recipe (2 layers of 4 heads without MLPs, width 64) on rows as in `examples/09_clamps.py`, half as many an
update; there copying comes all at once near update 150. Deficit: all attention of layer 0 gives nothing, so that no previous-token head
can work or learn. Loss: of tokens that repeat, without the clamp, on 64 held-out rows; each arm beside the same seed's run without a
deficit.

    python benchmarks/windows.py [--seeds 0 1 2] [--out FOLDER]

The bar, written before anything was run. Paper's claim (P277: early deficits last, late ones can be made good), by the loss at the end:
in every seed the window from 0 costs more than the last one, and the mean cost of the former is above .05 nats with a t interval
above 0. Besides, since a late window leaves fewer updates behind it: the loss 200 updates behind each window's end, beside the run without
a deficit at that step.

About 3 minutes of one core.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import process_time

import polars as pl
import torch
from grasp import over_seeds

from patchclamp.models.model import Model
from patchclamp.training import Training
from patchclamp.training.clamps import Ablate
from patchclamp.training.counterfactual import UNCLAMPED, Counterfactual, counterfactual, repeated
from patchclamp.training.windows import lasting, windows
from patchclamp.zoo.recipes.induction import Repeats, build

ONSETS, LENGTH, BEHIND = (0, 100, 200), 100, 200
PLAN = Training(
    500, batch=16, rate=3e-3, schedule="constant", warmup=20, betas=(0.9, 0.98), decay=0.01, evaluate=50, checkpoints=(0,)
)


def data(seed: int) -> Repeats:
    """Blocks of 12 to 16 words, said again."""
    return Repeats(seed, length=34, lead=2, shortest=12, longest=16)


def run(seeds: Sequence[int], out: Path) -> Counterfactual:
    """All arms."""
    arms = windows(lambda schedule: Ablate("L0.attn", schedule=schedule), ONSETS, LENGTH, PLAN.steps)

    def told(arm: str, seed: int, done: int, whole: int) -> None:
        print(f"{done} of {whole}: {arm}, seed {seed}, {process_time():.0f} s of processor time so far", flush=True)

    def made(seed: int) -> Model:
        return Model.load(build(seed))

    return counterfactual(made, data, PLAN, arms, out, seeds=seeds, weights=repeated, rows=64, told=told)


def losses(found: Counterfactual, arm: str, step: int) -> dict[int, float]:
    """By seed, the loss without clamps."""
    rows = found.curves.filter((pl.col("arm") == arm) & (pl.col("step") == step))
    return dict(rows.select("seed", "free").iter_rows())


def table(found: Counterfactual) -> pl.DataFrame:
    """By arm: the loss at the end and `BEHIND` updates behind the window, and what they lie above the run without a deficit."""
    base = losses(found, UNCLAMPED, PLAN.steps)
    shown = [
        {"arm": UNCLAMPED, "loss at the end": over_seeds([*base.values()], 3), "costs at the end": "", "behind the window": ""}
    ]
    for arm in lasting(found)["arm"]:
        own, at = losses(found, arm, PLAN.steps), int(arm.removeprefix("from-")) + LENGTH + BEHIND
        soon, then = losses(found, arm, at), losses(found, UNCLAMPED, at)
        shown.append({
            "arm": arm, "loss at the end": over_seeds([*own.values()], 3),
            "costs at the end": over_seeds([own[seed] - base[seed] for seed in own], 3),
            "behind the window": over_seeds([soon[seed] - then[seed] for seed in soon], 3),
        })  # fmt: skip
    return pl.DataFrame(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=None, help="folder of the runs; by default a temporary one")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.seeds, given.out or Path(folder))
    with pl.Config(tbl_rows=100, tbl_cols=20, tbl_width_chars=300, fmt_str_lengths=80):
        print(found.table.select("arm", "seed", "step", "crossing", "free"), lasting(found), table(found), sep="\n")


if __name__ == "__main__":
    main()
