"""What watching costs: recording 100+ sites (scores and patterns among them) against the plain forward pass.

A GPT-2-small-sized model with random weights, batch 8 x 64, eager attention on both sides, alternating in one process; the minimum
of 20 runs each. Fails where recording costs more than 10 %, or changes the logits.

    python benchmarks/record.py [--runs 20] [--threads 1]
"""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from patchclamp.models.model import Model
from patchclamp.sites import Site

KINDS = ("resid.pre", "q", "k", "v", "scores", "pattern", "z", "attn", "resid.mid", "neuron", "mlp", "resid.post")


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=20)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--most", type=float, default=0.10, help="largest overhead that passes")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(attn_implementation="eager")).eval()
    model = Model.load(hf)
    tokens = torch.randint(0, hf.config.vocab_size, (8, 64))
    mask = torch.ones_like(tokens)
    sites = [Site("embed"), Site("final"), *(Site(kind, layer) for layer in range(model.layers) for kind in KINDS)]

    def plain() -> torch.Tensor:
        with torch.no_grad():
            return hf(input_ids=tokens, attention_mask=mask, use_cache=False).logits

    def record() -> dict[Site, torch.Tensor]:
        return model.record(tokens, sites)

    for _ in range(3):
        plain()
        record()
    pairs = [(seconds(plain), seconds(record)) for _ in range(chosen.runs)]
    walls, cpus = (tuple(min(pair[side][clock] for pair in pairs) for side in (0, 1)) for clock in (0, 1))
    same = torch.equal(plain(), model.record(tokens, Site("logits"))[Site("logits")])
    print(
        f"{len(sites)} sites, batch 8 x 64, {hf.num_parameters() / 1e6:.0f} M parameters, {chosen.threads} threads, torch {torch.__version__}"
    )
    print(f"wall: plain {walls[0] * 1e3:.1f} ms, recording {walls[1] * 1e3:.1f} ms: {walls[1] / walls[0] - 1:+.1%}")
    print(f"processor: plain {cpus[0] * 1e3:.1f} ms, recording {cpus[1] * 1e3:.1f} ms: {cpus[1] / cpus[0] - 1:+.1%}")
    print(f"logits {'equal bit for bit' if same else 'DIFFER'}")
    if not same or cpus[1] / cpus[0] - 1 > chosen.most:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
