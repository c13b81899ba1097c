"""Rich or lazy learning by the rank of the initial weights: alignment of tangent kernels, of representations, change of weights.

The paper (Liu et al. 2023, https://arxiv.org/abs/2310.08513) has it of recurrent networks that initial weights of low rank learn more
richly (less alignment, more change) than those of high rank with the same norm. Here every matrix of every block of a small Llama (2 layers of
4 heads, width 64) keeps its largest singular values alone and is then scaled back to its norm; embeddings stay as drawn. It learns
Bigram-Backcopy; 48 rows that are never trained on, cut behind a trigger, ask what the kernels are taken of.

    python benchmarks/rich_lazy.py [--seeds 0 1 2] [--ranks 64 16 4 1] [--steps 300]

About half a minute of one core for each training of 300 updates and its kernels.
"""

import argparse
import tempfile
import time
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.models.model import Model
from patchclamp.training import train
from patchclamp.units.tangent import richness
from patchclamp.zoo.recipes._llama import llama
from patchclamp.zoo.recipes.backcopy import TRAINING, VOCABULARY, Backcopy, measure

ROWS = 48


def lowered(matrix: Float[Tensor, "row column"], rank: int) -> Float[Tensor, "row column"]:
    """Its largest `rank` singular values alone, at the norm that it had."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    kept = left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]
    return kept * (matrix.norm() / kept.norm())


def build(seed: int, rank: int) -> Model:
    """A Llama whose blocks' matrices have this rank at most."""
    model = Model.load(llama(len(VOCABULARY), seed, layers=2))
    with torch.no_grad():
        for layer in model.anatomy.layers:
            for weight in layer.block.parameters():
                if weight.dim() == 2:
                    weight.copy_(lowered(weight, rank))
    return model


def asked(data: Backcopy) -> tuple[Int[Tensor, "row position"], Int[Tensor, " row"]]:
    """Rows cut behind their first trigger that stands at position 8, and the word that follows."""
    rows = data.rows(-2, 64 * ROWS).tokens
    rows = rows[data.is_trigger(rows)[:, 8]][:ROWS]
    return rows[:, :9], rows[:, 9]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 16, 4, 1])
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    torch.set_num_threads(1)
    plan = replace(TRAINING, steps=given.steps, checkpoints=(0,), evaluate=given.steps, save=10**9)
    for seed in given.seeds:
        for rank in given.ranks:
            at = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                after = train(build(seed, rank), Backcopy(seed), plan, folder).model
            table = richness(build(seed, rank), after, *asked(Backcopy(seed)))
            said = "  ".join(f"{part} {name} {value:.3f}" for part, name, value, *_ in table.rows())
            loss = measure(after, seed)["excess"]
            print(f"rank {rank} seed {seed}: excess {loss:.3f}  {said} ({time.process_time() - at:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
