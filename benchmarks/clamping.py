"""What clamping costs: an update with clamps against the same update without, eager attention on both sides.

Two models, the small one of the induction recipe and one of 6 layers and width 384, on rows of 64 tokens; forward, backward, clipping and
AdamW. Both sides alternate in one process, each time in another order; the least of all runs each, since machines are busy.
Fails where a clamp costs more than 10 % of the update and more than 1 ms.

    python benchmarks/clamping.py [--runs 30] [--threads 1]
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from record import seconds
from transformers import LlamaConfig, LlamaForCausalLM

from patchclamp.edits import Scale
from patchclamp.models.model import Model
from patchclamp.training import Clamp, Rows, Training, next_token
from patchclamp.training.clamps import Ablate, Forbid, Force, Freeze, Hold, Schedule
from patchclamp.training.update import Update

SIZES = {"small": (2, 64, 4, 32), "middle": (6, 384, 6, 8)}
"""Layers, width, heads, rows."""
CLAMPS: dict[str, Sequence[Clamp]] = {
    "one head's output to zero": [Ablate("L1.h0")],
    "a head's output in every layer, half": [Ablate("L*.h1", schedule=Schedule(strength=0.5))],
    "every MLP scaled": [Hold("L*.mlp", Scale(0.9))],
    "one pattern, previous": [Force("L0.h0.pattern", "previous")],
    "a pattern in every layer, induction": [Force("L*.h0.pattern", "induction")],
    "every pattern kept from the token before": [Forbid("L*.pattern", "previous")],
    "one head frozen": [Freeze("L1.h0")],
    "pattern, output and weights together": [Force("L0.h0.pattern", "previous"), Ablate("L1.h1"), Freeze("L0.mlp")],
}


@dataclass(frozen=True)
class Random:
    """Random tokens, the same at each step."""

    count: int
    name: str = "random"

    def rows(self, step: int, count: int) -> Rows:
        """Rows of 64 tokens out of 64, so that some come again."""
        tokens = torch.randint(0, 64, (count, 64), generator=torch.Generator().manual_seed(0))
        return Rows(tokens, torch.ones(tokens.shape))


def model_of(layers: int, width: int, heads: int) -> Model:
    """A Llama with random weights and eager attention."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                         num_attention_heads=heads, max_position_embeddings=64, attn_implementation="eager")  # fmt: skip
    return Model.load(LlamaForCausalLM(config).eval())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=30)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--sizes", default="small,middle")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    failed = False
    for size in chosen.sizes.split(","):
        layers, width, heads, rows = SIZES[size]
        training = Training(1000, batch=rows)
        updates = {name: Update(model_of(layers, width, heads), Random(rows), training, clamps, next_token)
                   for name, clamps in {"none": (), **CLAMPS}.items()}  # fmt: skip
        best = {name: (float("inf"), float("inf")) for name in updates}
        for run in range(chosen.runs + 2):
            for name in random.Random(run).sample(list(updates), len(updates)):
                found = seconds(lambda: updates[name](run))  # noqa: B023 (called at once)
                if run >= 2:
                    best[name] = (min(best[name][0], found[0]), min(best[name][1], found[1]))
        wall, cpu = best.pop("none")
        print(
            f"\n{size}: {layers} layers, width {width}, {heads} heads, {rows} x 64 tokens, {chosen.threads} threads, torch {torch.__version__}"
        )
        print(f"  {'without clamps':42} {wall * 1e3:8.2f} ms wall {cpu * 1e3:8.2f} ms of processor time")
        for name, (w, c) in best.items():
            over = c - cpu > max(0.1 * cpu, 1e-3)
            failed |= over
            more = f"{(c - cpu) * 1e3:+8.2f} ms {c / cpu - 1:+6.1%}"
            print(f"  {name:42} {(w - wall) * 1e3:+8.2f} ms wall {more} of processor time{'   OVER' if over else ''}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
