"""Exact sweeps by replay: against TransformerLens, against our own whole runs one by one, and against the arithmetic limit.

GPT-2-small shape (or a Llama shape with grouped queries), random weights, float32. TransformerLens runs in an environment of
its own (made in --env, used again) on the same checkpoint, a random sample of the cells in turn with ours; its time is scaled
to all cells. Results must agree to 1e-4.

The limit is the arithmetic that a sweep needs at least, divided by the rate at which the model's own blocks run 128 x 16
tokens: in the patched layer only what changed; later layers from the first changed position on; in the layer right behind the
patch no queries of unchanged positions; in the last layer queries, output projection and MLP at the answer position alone.

    python benchmarks/replay.py [--env FOLDER] [--shape gpt2|llama] [--rows 1,2,3,4,5] [--sample 40]
"""

import argparse
import json
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from patching_vs_transformerlens import VOCABULARY, environment, save
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Gated, gated
from patchclamp.tasks import Example, Examples, Pair

TOLERANCE = 1e-4

THEIRS = """
import json, sys, time
import torch
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge

folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
model = TransformerBridge.boot_transformers(folder, device="cpu")
loaded = load_file(folder + "/tokens.safetensors")
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    batch = job["batch"], job["length"]
    base, source = loaded["base"][: batch[0], : batch[1]], loaded["source"][: batch[0], : batch[1]]
    rows, out = torch.arange(batch[0]), []
    with torch.no_grad():
        names = lambda name: name.endswith(("hook_z", "o.hook_in", "hook_resid_post", "hook_out"))
        _, cache = model.run_with_cache(source, names_filter=names)
        start = time.perf_counter()
        for layer, head, position in job["cells"]:
            name = f"blocks.{layer}.attn.hook_z" if head is not None else f"blocks.{layer}.hook_resid_post"
            def put(value, hook):
                value = value.clone()
                given = cache[name]
                if head is None:
                    value[:, position] = given[:, position]
                elif position is None:
                    value[:, :, head] = given[:, :, head]
                else:
                    value[:, position, head] = given[:, position, head]
                return value
            logits = model.run_with_hooks(base, fwd_hooks=[(name, put)])[:, -1]
            out.append(logits[:, 10] - logits[:, 20])
        seconds = time.perf_counter() - start
    save_file({"out": torch.stack(out)}, folder + "/theirs.safetensors")
    print(json.dumps({"seconds": seconds}), flush=True)
"""


@dataclass(frozen=True)
class Sweep:
    """One row of the table."""

    name: str
    site: str
    positions: bool
    batch: int
    length: int


SWEEPS = (
    Sweep("heads x 15 positions, 1 prompt of 15", "L*.h*", True, 1, 15),
    Sweep("heads x 16 positions, 8 prompts of 16", "L*.h*", True, 8, 16),
    Sweep("heads, all positions, 8 prompts of 16", "L*.h*", False, 8, 16),
    Sweep("residual x 16 positions, 8 prompts", "L*.resid.post", True, 8, 16),
    Sweep("residual x 256 positions, 1 prompt", "L*.resid.post", True, 1, 256),
)
SHAPES: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY_OF_GPT2, attn_implementation="eager")),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY_OF_GPT2, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
        intermediate_size=2048, max_position_embeddings=1024, attn_implementation="eager",
    )),
}  # fmt: skip
VOCABULARY_OF_GPT2 = 50257


class Ids:
    """Stands in for a tokenizer: tokens are ids."""

    bos_token_id = None

    def __call__(self, text: list[str], /, **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in one.split()] for one in text]}

    def decode(self, token_ids: list[int], /) -> str:
        return " ".join(map(str, token_ids))


def examples(base: Tensor, source: Tensor) -> Examples:
    items: list[Example] = []
    for clean, corrupt in zip(base.tolist(), source.tolist(), strict=True):
        pair = Pair(clean=tuple(clean), corrupt=tuple(corrupt), answer=((10,),), wrong=((20,),))
        items.append(Example(tuple(clean), ((10,),), pair, tuple(corrupt), ((20,),), {"end": (len(clean) - 1, len(clean))}))
    return Examples(tuple(items), Ids(), "random", "logit_diff")


def rate(model: Model) -> float:
    """Multiply-adds a second of the model's own blocks at 128 x 16 tokens."""
    tokens = torch.randint(3, VOCABULARY, (128, 16))
    best = float("inf")
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            model.hf(input_ids=tokens, use_cache=False, logits_to_keep=1)
            best = min(best, time.perf_counter() - start)
    width, vocabulary = model.width, VOCABULARY_OF_GPT2
    return (2048 * sum(block(model, 16).values()) * model.layers + 128 * width * vocabulary) / best


def block(model: Model, length: int) -> dict[str, float]:
    """Multiply-adds of one position in one block, by what they are for."""
    size, width = model.anatomy.sizes[0], model.width
    inner, own = size.heads * size.head_width, size.kv_heads * size.head_width
    mlp = sum(p.numel() for p in model.anatomy.layers[0].mlp.parameters() if p.dim() == 2)
    return {"q": width * inner, "kv": 2 * width * own, "o": inner * width, "mlp": mlp, "attention": length * inner}


def limit(model: Model, sweep: Sweep) -> float:
    """Multiply-adds that the sweep needs at least."""
    cost, total = block(model, sweep.length), 0.0
    whole, after = sum(cost.values()), 1 if sweep.positions else sweep.length
    head = model.anatomy.sizes[0].head_width * model.width
    per_layer = model.anatomy.sizes[0].heads if sweep.site == "L*.h*" else 1
    for layer in range(model.layers):
        for position in range(sweep.length) if sweep.positions else [0]:
            left, cells = sweep.length - position, 0.0
            changed = after if sweep.positions else left
            if sweep.site == "L*.h*":  # the head's own output projection, and the MLP where it reads the change
                cells += (1 if layer == model.layers - 1 else changed) * (head + cost["mlp"])
            for later in range(layer + 1, model.layers):
                moved = changed if later == layer + 1 else left
                out = 1 if later == model.layers - 1 else left
                queries = min(out, moved) if later == layer + 1 else out
                cells += moved * cost["kv"] + queries * cost["q"] + out * (whole - cost["kv"] - cost["q"])
            total += per_layer * cells
    return total * sweep.batch


def resident(what: str) -> int:
    """Of this process, in kB: VmRSS (now) or VmHWM (the peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what + ":"))


def reset_peak() -> int:
    """Start the peak again from what is resident now (Linux), and say how much that is."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def cells_of(parts: Gated) -> list[tuple[int | None, int | None, int | None]]:
    return [(site.layer, site.index, site.position if isinstance(site.position, int) else None) for site in parts.labels]


def run(model: Model, sweep: Sweep, tokens: tuple[Tensor, Tensor], folder: Path, peer: Any, sample: int) -> None:
    base, source = (one[: sweep.batch, : sweep.length] for one in tokens)
    parts = gated(model, [sweep.site], positions=range(sweep.length) if sweep.positions else ())
    batch, fallback = examples(base, source).batch(), parts.fallback("resample")
    fallback.at(batch)
    gates = 1 - torch.eye(len(parts.labels))[:, None, None]
    chosen = torch.randperm(len(gates), generator=torch.Generator().manual_seed(0))[:sample].tolist()
    parts.measure(batch, gates[:3], fallback)
    before = reset_peak()
    ours, theirs, plain, rates, memory = [], [], [], [], 0.0
    values = torch.empty(0)
    for _ in range(2):
        start = time.perf_counter()
        values = parts.measure(batch, gates, fallback)
        ours.append(time.perf_counter() - start)
        memory = memory or (resident("VmHWM") - before) / 1024
        job = {"batch": sweep.batch, "length": sweep.length, "cells": [cells_of(parts)[number] for number in chosen]}
        peer.stdin.write(json.dumps(job) + "\n")
        peer.stdin.flush()
        answer = peer.stdout.readline()
        if not answer:
            raise SystemExit((folder / "errors.txt").read_text())
        rates.append(rate(model))
        theirs.append(json.loads(answer)["seconds"] * len(gates) / len(chosen))
        start = time.perf_counter()
        with torch.no_grad():
            alone = [model.target_logits(batch, parts.edits(gates[[n]], fallback, batch)) for n in chosen[:10]]
        plain.append((time.perf_counter() - start) * len(gates) / 10)
    peers = load_file(str(folder / "theirs.safetensors"))["out"]
    apart = float((values[chosen] - peers).abs().max())
    alone_apart = max(
        float((METRICS["logit_diff"](one, batch)[0] - values[n]).abs().max()) for one, n in zip(alone, chosen, strict=False)
    )
    bound = limit(model, sweep) / max(rates)
    ratios = [t / o for t, o in zip(theirs, ours, strict=True)]
    print(f"{sweep.name}: {len(gates)} cells")
    print(f"  replay {min(ours):.2f} s; limit {bound:.2f} s ({bound / min(ours):.0%} of it); one by one {min(plain) / min(ours):.1f}x;"
          f" TransformerLens {min(theirs):.1f} s = {min(theirs) / min(ours):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})")  # fmt: skip
    print(
        f"  differs from TransformerLens by {apart:.1e}, from whole runs by {alone_apart:.1e}; memory above the model {memory:.0f} MB",
        flush=True,
    )
    if max(apart, alone_apart) > TOLERANCE:
        raise SystemExit("the numbers differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path(tempfile.gettempdir()) / "patchclamp-transformerlens")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="gpt2")
    parser.add_argument("--rows", default="1,2,3,4,5")
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    python = environment(options.env)
    torch.manual_seed(0)
    hf = SHAPES[options.shape]().eval()
    tokens = torch.randint(3, VOCABULARY, (2, 8, 256))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save(hf, folder, tokens[0], tokens[1])
        model = Model.load(hf)
        peer = subprocess.Popen([python, "-c", THEIRS, folder, str(options.threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=(folder / "errors.txt").open("w"), text=True)  # fmt: skip
        assert peer.stdout is not None
        while not peer.stdout.readline().startswith("ready"):
            if peer.poll() is not None:
                raise SystemExit("TransformerLens could not be started")
        print(f"{options.shape}, {model.parameters / 1e6:.0f} M parameters, {options.threads} threads, torch {torch.__version__}")
        for row in options.rows.split(","):
            run(model, SWEEPS[int(row) - 1], (tokens[0], tokens[1]), folder, peer, options.sample)
        peer.terminate()


if __name__ == "__main__":
    main()
