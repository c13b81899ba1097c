"""Attention that can do nothing: softmax, clipped softmax and gated attention on Bigram-Backcopy; outliers, and what eight bits cost.

The paper (Bondarenko et al. 2023, https://arxiv.org/abs/2306.12929) has it that a head which wants to change nothing can do so under
softmax only by ever larger scores, which makes outliers, which eight bits do not hold; clipped softmax reaches exactly 0, and a gate
shuts the head. Here each kind is trained by the recipe (1 layer, or more, of one head, no norms, width 64, 1200 updates), on 128 rows that are never
trained on:

    excess      loss above the smallest possible one, nats
    sink        mean weight on <bos> from queries that are no triggers (the gate, where there is one, is part of the weight)
    gate        mean of the gates at triggers / elsewhere
    inf norm    largest magnitude of a block's output, mean over rows, and of what attention adds
    kurtosis    of the same
    int8        loss with weights and inputs of all linear maps at eight bits, less the loss in floats, nats; paired by row

    python benchmarks/nothing.py --out FOLDER [--seeds 0 1] [--kinds softmax clipped gated] [--layers 1] [--steps 1200]

About 45 s of one core for each training of 1200 updates.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import torch
from jaxtyping import Bool
from torch import Tensor

from patchclamp.models.editing import Edits
from patchclamp.models.model import Model
from patchclamp.training import Rows
from patchclamp.units import int8, outliers
from patchclamp.zoo.recipes._recipe import held_out, train
from patchclamp.zoo.recipes.backcopy import Backcopy, extremes, kept, measure, recipe

KINDS = ("softmax", "clipped", "gated")


def trained(kind: str, layers: int, steps: int, seed: int, out: Path) -> Model:
    """The recipe's model with this attention, after so many updates (the rate falls to 0 over them)."""
    clamp = "clipped" if kind == "clipped" else None
    one = recipe(kind, layers, clamp, 2.0, "", gated=kind == "gated")
    one = replace(one, training=replace(one.training, steps=steps, checkpoints=(0,)))
    return train(one, out / f"{kind}-{layers}-{steps}/seed-{seed}", seed).model


def gates(model: Model, rows: Rows, at: Bool[Tensor, "row position"]) -> dict[str, float]:
    """Mean gate (what a row of the pattern sums to) at triggers and elsewhere, in the layer where the latter is largest."""
    rests = ~at
    rests[:, :2] = False
    open_ = [pattern[:, 0].sum(-1) for pattern in model.record(rows.tokens, "L*.pattern").values()]
    idle, active = max((float(gate[rests].mean()), float(gate[at].mean())) for gate in open_)
    return {"gate at triggers": active, "gate elsewhere": idle}


def numbers(model: Model, kind: str, seed: int) -> dict[str, Any]:
    """A row of the table."""
    data, clamp = Backcopy(seed), "clipped" if kind == "clipped" else None
    rows = held_out(data, 128)
    edits: Edits = kept(model, rows, clamp)
    found = measure(model, seed, clamp)
    row: dict[str, Any] = {name: found[name] for name in ("excess", "copy")}
    row |= {name: value for name, value in extremes(model, rows, data, clamp).items() if name in ("sink", "drain")}
    if kind == "gated":
        row |= gates(model, rows, data.is_trigger(rows.tokens))
    far = {(part, name): value for part, name, value, *_ in outliers(model, rows.tokens, edits=edits).rows()}
    for part, said in (("model", ""), (f"L{model.layers - 1}.attn", "attn ")):
        row |= {f"{said}inf norm": far[part, "inf_norm"], f"{said}kurtosis": far[part, "kurtosis"]}
    eight = int8(model, rows.tokens, calibration=data.rows(-3, 128).tokens, edits=edits)
    value, low, high = eight.filter(pl.col("name") == "change.int8").select("value", "low", "high").row(0)
    return row | {"int8": value, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; what is there is gone on with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1200)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in given.seeds:
        for kind in given.kinds:
            row = numbers(trained(kind, given.layers, given.steps, seed, given.out), kind, seed)
            said = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
            print(f"{kind} seed {seed}: {said}", flush=True)


if __name__ == "__main__":
    main()
