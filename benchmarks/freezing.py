"""What is lost where layers stand still that stood still in a pilot run, and what an optimizer could spare; the world of grasp.py.

The Llama of `grasp.py` (3 layers) learns its new facts with all weights, 150 updates; a pilot of 50 updates comes first, with checkpoints
at 0, 10, 25 and 50. From update 10 on a third or two thirds of the layers are frozen: those that moved least in the pilot's stretch before
(`freezing`); beside them as many that moved most, from the same updates on. New facts right, in style B; the loss of their objects there;
old facts of topics 2 and 3 right; `spared`, the share of AdamW's moments that belongs to frozen layers.

    python benchmarks/freezing.py [--seeds 0 1 2] [--out FOLDER]

The bar, written before anything was run; the paper's claim (P246) is that layers which barely move can be frozen at little loss. In every
seed: a third frozen, new facts right .98 or more; two thirds, .95 or more; and at both shares the loss of the objects is no higher than
with as many layers frozen that moved most.

About 1 minute of one core for each seed beside the base model's half a minute. With the folder of `grasp.py` that is not trained again.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import polars as pl
import torch
from grasp import NEW, TUNE, World, learned, numbers, over_seeds, prompts

from patchclamp.models.model import Model
from patchclamp.training import train
from patchclamp.training.clamps import Freeze
from patchclamp.training.clamps.places import plain
from patchclamp.training.tensors import freezing, spared

AT, SHARES = (0, 10, 25, 50), {"a third": 0.34, "two thirds": 0.67}


def pilot(seed: int, out: Path) -> dict[int, Model]:
    """Checkpoints of a short run with all weights."""
    plan = replace(TUNE, steps=AT[-1], checkpoints=AT, evaluate=AT[-1])
    train(learned(seed, out), World(seed, "new"), plan, out / f"{seed}/freezing, pilot")
    return {step: Model.load(str(out / f"{seed}/freezing, pilot/checkpoints/step-{step:07d}")) for step in AT}


def others(still: Sequence[Freeze], layers: int) -> tuple[Freeze, ...]:
    """In the same updates, the layers that these do not freeze."""
    blocks = tuple(f"L{number}.block" for number in range(layers))
    return tuple(replace(one, parts=tuple(block for block in blocks if block not in plain(one.parts))) for one in still)


def surprise(model: Model, seed: int) -> float:
    """Mean loss of the new facts' objects, in style B, in nats."""
    asked = prompts(seed, NEW[:1], NEW[1:], 1)
    return float(torch.nn.functional.cross_entropy(model.run(asked[:, :4])[:, -1], asked[:, 4]))


def one_seed(seed: int, out: Path) -> list[dict[str, Any]]:
    """Every arm of one world."""
    seen = pilot(seed, out)
    layers = seen[0].layers
    least = {name: freezing(seen, share) for name, share in SHARES.items()}
    arms: dict[str, tuple[Freeze, ...]] = {"nothing": ()}
    arms |= {f"{name}, moved least": clamps for name, clamps in least.items()}
    arms |= {f"{one}, moved most": others(least[two], layers) for one, two in zip(SHARES, reversed(SHARES), strict=True)}
    rows: list[dict[str, Any]] = []
    for arm, clamps in arms.items():
        model = learned(seed, out)
        share = spared(model, clamps, TUNE)
        train(model, World(seed, "new"), TUNE, out / f"{seed}/freezing, {arm}", clamps=clamps)
        which = "; ".join(f"{one.schedule.start}: {' '.join(plain(one.parts))}" for one in clamps).replace(".block", "")
        rows.append(
            {"seed": seed, "arm": arm, **numbers(model, seed), "loss": surprise(model, seed), "spared": share, "which": which}
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """By arm, over seeds."""
    shown: list[dict[str, Any]] = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        shown.append({
            "frozen": arm, "new, style B": " ".join(f"{row['new, style B']:.2f}" for row in mine),
            "their loss": over_seeds([row["loss"] for row in mine], 4), "old": over_seeds([row["old"] for row in mine]),
            "spared": " ".join(f"{row['spared']:.2f}" for row in mine), "from update: layers": " | ".join(row["which"] for row in mine),
        })  # fmt: skip
    return pl.DataFrame(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=None, help="folder of the runs; by default a temporary one")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, pl.Config(tbl_rows=100, tbl_cols=20, tbl_width_chars=300, fmt_str_lengths=120):
        for seed in given.seeds:
            rows += one_seed(seed, given.out or Path(folder))
            print(f"seed {seed}: {process_time():.0f} s of processor time so far", flush=True)
        print(table(rows))


if __name__ == "__main__":
    main()
