"""What makes a first token extreme: softmax or ReLU attention, AdamW or SGD, with norms and three layers.

The paper (Guo et al. 2024, https://arxiv.org/abs/2410.13835) has it that a sink, a small value and a large residual stream of the first
token come together under softmax and Adam, that ReLU attention has none of the three, and that SGD spares the peak of the stream.
Here Bigram-Backcopy is learned by three layers of one head with RMS norms and rotary positions (width 64), on 128 rows that are never
trained on:

    excess   loss above the smallest possible one, nats; copy: behind triggers
    sink     mean weight on <bos> from queries that are no triggers, in the layer where it is largest (even attention: .10)
    drain    norm of the value of <bos> over the mean of others', in the layer where it is smallest
    peak     norm of the stream at <bos> over the mean of others', behind the block where it is largest

    python benchmarks/extremes.py --out FOLDER [--seeds 0 1] [--arms softmax-adamw relu-adamw softmax-sgd] [--steps 1200] [--layers 3]

About three minutes of one core for each training of 1200 updates.
"""

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from patchclamp.training import Training
from patchclamp.zoo.recipes._llama import llama
from patchclamp.zoo.recipes._recipe import Recipe, train
from patchclamp.zoo.recipes.backcopy import TRAINING, VOCABULARY, measure, recipe

ARMS = ("softmax-adamw", "relu-adamw", "softmax-sgd")
SGD_RATE = 0.3
"""With momentum .9; of .1, .3 and 1.0 the one with the smallest loss after 200 updates of seed 0 (.26, .09, .14 nats above the smallest)."""


def build(seed: int, layers: int) -> object:
    """A Llama with random weights, of one head a layer."""
    return llama(len(VOCABULARY), seed, layers=layers, heads=1)


def plan(arm: str, steps: int, rate: float | None) -> Training:
    """The recipe's numbers, with the arm's optimizer."""
    every = max(steps // 6, 1)
    plain = replace(TRAINING, steps=steps, checkpoints=(0,), evaluate=every, save=10**9)
    if arm.endswith("adamw"):
        return plain if rate is None else replace(plain, rate=rate)
    return replace(plain, optimizer="sgd", rate=rate or SGD_RATE, betas=(0.9, 0.999))


def made(arm: str, layers: int, steps: int, rate: float | None) -> Recipe:
    """Bigram-Backcopy with these blocks, this attention and this optimizer."""
    kind = "relu" if arm.startswith("relu") else None
    return replace(recipe(arm, layers, kind, 3.0, ""), build=partial(build, layers=layers), training=plan(arm, steps, rate))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; what is there is gone on with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, help="another learning rate than the arm's own")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in given.seeds:
        for arm in given.arms:
            at = time.process_time()
            one = made(arm, given.layers, given.steps, given.rate)
            name = f"{arm}-{given.layers}-{given.steps}-{one.training.rate:g}"
            model = train(one, given.out / name / f"seed-{seed}", seed).model
            found = measure(model, seed, "relu" if arm.startswith("relu") else None)
            said = "  ".join(f"{number} {value:.4g}" for number, value in found.items())
            print(f"{name} seed {seed}: {said} ({time.process_time() - at:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
