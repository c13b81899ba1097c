"""An easy and a hard feature that a network computes equally well: how much of its representation each takes up.

A row is `<bos>`, 12 bits (each place has two words of its own) and `=`, and the answer is one of four words, for both features at once: the easy
one is the first bit, the hard one the parity of the next three. So both play the same part. A small Llama (2 layers of 4 heads, width 64)
learns it from rows of random bits, an eighth of which (by a rule) is never trained on; shares of variance are taken at `=` on those.

    both     both features are right from the start
    hard     for the first half the easy feature's part of the answer is a coin; then both
    easy     for the first half the hard feature's part is

    python benchmarks/biases.py [--seeds 0 1 2] [--steps 400]

About half a minute of one core for each training of 400 updates.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from patchclamp.models.model import Model
from patchclamp.training import Rows, Training, train
from patchclamp.units.explained import variances
from patchclamp.zoo.recipes._llama import BOS, last, llama
from patchclamp.zoo.recipes._recipe import SPECIAL, drawing

BITS, PARITY = 12, (1, 2, 3)
FIRST = len(SPECIAL)
EQUALS = FIRST + 2 * BITS
ANSWER = EQUALS + 1
HELD = 8
"""One of so many rows is never trained on."""
ARMS = ("both", "hard", "easy")


@dataclass(frozen=True)
class Bits:
    """Rows of random bits with both features' values; the arm's coin up to update `until`."""

    seed: int
    arm: str
    until: int

    @property
    def name(self) -> str:
        """What the rows depend on besides the step."""
        return f"bits-{self.arm}-{self.until}-seed-{self.seed}"

    def rows(self, step: int, count: int) -> Rows:
        """Of negative steps: those that are never trained on, with both features."""
        draw = drawing(self.name, step)
        bits = torch.randint(0, 2, (4 * HELD * count, BITS), generator=draw)
        held = (bits * 2 ** torch.arange(BITS)).sum(1) * 2654435761 % 2**32 // 2**16 % HELD == 0
        bits = bits[held == (step < 0)][:count]
        easy, hard = features(bits)
        coin = torch.randint(0, 2, (count,), generator=draw)
        if 0 <= step < self.until:
            easy, hard = (coin if self.arm == "hard" else easy), (coin if self.arm == "easy" else hard)
        tokens = torch.cat(
            [torch.full((count, 1), BOS), words(bits), torch.full((count, 1), EQUALS), answer(easy, hard)[:, None]], 1
        )
        weights = torch.zeros(tokens.shape)
        weights[:, -1] = 1.0
        return Rows(tokens, weights, labels={"easy": easy, "hard": hard})


def features(bits: Int[Tensor, "row bit"]) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    """The first bit, and the parity of three others."""
    return bits[:, 0], bits[:, list(PARITY)].sum(1) % 2


def words(bits: Int[Tensor, "row bit"]) -> Int[Tensor, "row bit"]:
    """Bits as tokens."""
    return FIRST + 2 * torch.arange(BITS) + bits


def answer(easy: Int[Tensor, " row"], hard: Int[Tensor, " row"]) -> Int[Tensor, " row"]:
    """The word for both."""
    return ANSWER + 2 * easy + hard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    torch.set_num_threads(1)
    plan = Training(given.steps, batch=128, rate=2e-3, warmup=20, checkpoints=(0,), evaluate=given.steps, save=10**9)
    for seed in given.seeds:
        for arm in given.arms:
            at, data = time.process_time(), Bits(seed, arm, given.steps // 2)
            with tempfile.TemporaryDirectory() as folder:
                model = train(Model.load(llama(ANSWER + 4, seed, layers=2)), data, plan, folder).model
            rows = data.rows(-1, 512)
            assert rows.labels is not None
            said = last(model, rows.tokens[:, :-1]).argmax(-1) - ANSWER
            right = {
                name: float(((said // size) % 2 == rows.labels[name]).float().mean()) for name, size in (("easy", 2), ("hard", 1))
            }
            table = variances(model, rows.tokens[:, :-1], {name: rows.labels[name] for name in right})
            shares = "  ".join(
                f"{part} {name} {value:.3f} [{low:.3f}, {high:.3f}]"
                for part, name, value, low, high, _ in table.rows()
                if value is not None
            )
            accuracy = "  ".join(f"{name} right {value:.3f}" for name, value in right.items())
            print(f"{arm} seed {seed}: {accuracy}  {shares} ({time.process_time() - at:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
