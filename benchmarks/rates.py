"""How much the learning rate matters: two widths, with normed queries and keys and without.

A Llama and a Qwen3 (the same but for norms of queries and keys) of 2 layers, 4 heads and width 32 or 128 learn rows of words that are
said again (as the zoo's induction recipe, blocks of 4 to 8 words) for 80 updates of 16 rows, at rates of .002, .02 and .2. Reported:
sensitivity, the mean over rates of min(loss, loss before) less the best; loss and largest attention logit at each rate.

    python benchmarks/rates.py [--seeds 0 1 2] [--out FOLDER]

The bar, written before anything was run; claims of the paper (P233), each in every seed and at both widths: the sensitivity is lower with
normed queries and keys than without; the largest logit at the highest rate is smaller with them. Besides: without them the wide model is
more sensitive than the narrow one.

What is cut short here, 80 updates, is cut for its cost: at width 32 hardly anything is learned by then.

About 3 minutes of one core.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import Any

import polars as pl
import torch
from grasp import over_seeds

from patchclamp.models.model import Model
from patchclamp.training import Training, begin
from patchclamp.training.stability import sweep_rates
from patchclamp.zoo.recipes.induction import BOS, VOCABULARY, Repeats

RATES = (0.002, 0.02, 0.2)
ARMS = {"as it is": "llama", "normed queries and keys": "qwen3"}
WIDTHS = (32, 128)
PLAN = Training(80, batch=16, warmup=8, betas=(0.9, 0.98), evaluate=40, checkpoints=(80,), save=10**6)


def model(family: str, width: int, seed: int) -> Model:
    """Random weights."""
    config = {"model_type": family, "vocab_size": len(VOCABULARY), "hidden_size": width, "intermediate_size": 2 * width,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": width // 4,
              "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": BOS, "pad_token_id": 0}  # fmt: skip
    return begin(config, seed=seed)


def runs(seeds: Sequence[int], out: Path) -> list[dict[str, Any]]:
    """A sweep for each arm, width and seed."""
    found: list[dict[str, Any]] = []
    for seed in seeds:
        for arm, family in ARMS.items():
            for width in WIDTHS:
                sweep = sweep_rates(
                    lambda family=family, width=width, seed=seed: model(family, width, seed),
                    Repeats(seed, length=34, lead=2, shortest=4, longest=8), PLAN, RATES, out / f"{seed}/{arm}/{width}",
                )  # fmt: skip
                losses, scores = (sweep.table[name].to_list() for name in ("loss", "score"))
                found.append({"seed": seed, "arm": arm, "width": width, "sensitivity": sweep.sensitivity, "losses": losses,
                              "scores": scores})  # fmt: skip
                print(f"seed {seed}, {arm}, width {width}: {process_time():.0f} s of processor time so far", flush=True)
    return found


def table(rows: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """By arm and width, over seeds; losses and logits are means over seeds, by rate."""
    shown: list[dict[str, Any]] = []
    for arm, width in dict.fromkeys((row["arm"], row["width"]) for row in rows):
        mine = [row for row in rows if (row["arm"], row["width"]) == (arm, width)]
        means = {
            name: [sum(row[name][i] for row in mine) / len(mine) for i in range(len(RATES))] for name in ("losses", "scores")
        }
        shown.append({
            "arm": arm, "width": width, "sensitivity": over_seeds([row["sensitivity"] for row in mine]),
            "loss by rate": ", ".join(f"{value:.2f}" for value in means["losses"]),
            "largest logit by rate": ", ".join(f"{value:.0f}" for value in means["scores"]),
            "at the highest, by seed": ", ".join(f"{row['scores'][-1]:.0f}" for row in mine),
        })  # fmt: skip
    return pl.DataFrame(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=None, help="folder of the runs; by default a temporary one")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, pl.Config(tbl_rows=100, tbl_cols=20, tbl_width_chars=300, fmt_str_lengths=80):
        print(table(runs(given.seeds, given.out or Path(folder))))


if __name__ == "__main__":
    main()
