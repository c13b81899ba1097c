"""Exact sweeps by replay: against TransformerLens and nnsight, against our own whole runs, and against the arithmetic limit.

GPT-2-small shape (or a Llama shape with grouped queries), random weights, float32. Each peer runs in an environment of its own
(made under --env, used again) on the same checkpoint, a random sample of the cells in turn with ours; its time is scaled to all
cells. TransformerLens runs one whole pass a cell (its patching idiom), nnsight batched invokes (as many cells in one trace as make
128 rows). Results must agree to 1e-4.

The limit is the arithmetic that a sweep needs at least, divided by the rate at which the model's own blocks run 128 x 16
tokens: in the patched layer only what changed; later layers from the first changed position on; in the layer right behind the
patch no queries of unchanged positions; in the last layer queries, output projection and MLP at the answer position alone.

    python benchmarks/replay.py [--env FOLDER] [--shape gpt2|llama] [--rows 1,2,3,4,5] [--sample 40] [--peers transformerlens,nnsight]
"""

import argparse
import json
import subprocess
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from patching_vs_transformerlens import VOCABULARY, save
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Gated, gated
from patchclamp.tasks import Example, Examples, Pair

TOLERANCE = 1e-4

COMMON = """
import json, sys, time
import torch
from safetensors.torch import load_file, save_file

folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
loaded = load_file(folder + "/tokens.safetensors")
{boot}
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    base, source = (loaded[name][: job["batch"], : job["length"]] for name in ("base", "source"))
    with torch.no_grad():
        seconds, out = sweep(base, source, job["cells"])
    save_file({{"out": out}}, folder + "/theirs.safetensors")
    print(json.dumps({{"seconds": seconds}}), flush=True)
"""

TRANSFORMERLENS = """
from transformer_lens.model_bridge import TransformerBridge
model = TransformerBridge.boot_transformers(folder, device="cpu")

def sweep(base, source, cells):
    names = lambda name: name.endswith(("hook_z", "o.hook_in", "hook_resid_post", "hook_out"))
    _, cache = model.run_with_cache(source, names_filter=names)
    out, start = [], time.perf_counter()
    for layer, head, position in cells:
        name = f"blocks.{layer}.attn.hook_z" if head is not None else f"blocks.{layer}.hook_resid_post"
        def put(value, hook):
            value, given = value.clone(), cache[name]
            if head is None:
                value[:, position] = given[:, position]
            elif position is None:
                value[:, :, head] = given[:, :, head]
            else:
                value[:, position, head] = given[:, position, head]
            return value
        logits = model.run_with_hooks(base, fwd_hooks=[(name, put)])[:, -1]
        out.append(logits[:, 10] - logits[:, 20])
    return time.perf_counter() - start, torch.stack(out)
"""

NNSIGHT = """
from nnsight import LanguageModel
from transformers import AutoModelForCausalLM, AutoTokenizer
hf = AutoModelForCausalLM.from_pretrained(folder).eval()
model = LanguageModel(hf, tokenizer=AutoTokenizer.from_pretrained(folder))
gpt2 = hasattr(hf, "transformer")
blocks = model.transformer.h if gpt2 else model.model.layers
outputs = [block.attn.c_proj if gpt2 else block.self_attn.o_proj for block in blocks]
wide = hf.config.hidden_size // hf.config.num_attention_heads

def sweep(base, source, cells):
    with model.trace(source):
        zs, states = list().save(), list().save()
        for block, output in zip(blocks, outputs):
            zs.append(output.input)
            states.append(block.output)
    assert isinstance(states[0], torch.Tensor)
    many, found, start = max(1, 128 // len(base)), [], time.perf_counter()
    for first in range(0, len(cells), many):
        with model.trace() as tracer:
            out = list().save()
            for layer, head, position in cells[first : first + many]:
                with tracer.invoke(base):
                    at = slice(None) if position is None else position
                    if head is None:
                        blocks[layer].output[:, at] = states[layer][:, at]
                    else:
                        own = slice(head * wide, (head + 1) * wide)
                        outputs[layer].input[:, at, own] = zs[layer][:, at, own]
                    logits = model.lm_head.output[:, -1]
                    out.append(logits[:, 10] - logits[:, 20])
        found += out
    return time.perf_counter() - start, torch.stack(found)
"""
PEERS = {
    "transformerlens": (("torch==2.13.0", "transformer-lens==4.3.0"), TRANSFORMERLENS),
    "nnsight": (("torch==2.13.0", "transformers==5.23.0", "nnsight==0.8.1"), NNSIGHT),
}


@dataclass(frozen=True)
class Sweep:
    """One row of the table."""

    name: str
    site: str
    positions: bool
    batch: int
    length: int
    every: int = 1
    """Only every so manieth position is measured (shares of the limit are per cell)."""

    @property
    def chosen(self) -> range:
        return range(self.every - 1, self.length, self.every)


SWEEPS = (
    Sweep("heads x 15 positions, 1 prompt of 15", "L*.h*", True, 1, 15),
    Sweep("heads x 16 positions, 8 prompts of 16", "L*.h*", True, 8, 16),
    Sweep("heads, all positions, 8 prompts of 16", "L*.h*", False, 8, 16),
    Sweep("residual x 16 positions, 8 prompts", "L*.resid.post", True, 8, 16),
    Sweep("residual x 256 positions (every 16th), 1 prompt", "L*.resid.post", True, 1, 256, 16),
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
        for position in sweep.chosen if sweep.positions else [0]:
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


class Peer:
    """Another library in a process of its own."""

    def __init__(self, name: str, root: Path, folder: Path, threads: int):
        pins, boot = PEERS[name]
        place = root / name
        python = place / "bin" / "python"
        if not python.exists():
            venv.create(place, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "-q", *pins], check=True)
        self.name, self.folder, self.errors = name, folder, folder / f"{name}.txt"
        script = COMMON.format(boot=boot)
        self.process = subprocess.Popen([python, "-c", script, folder, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors.open("w"), text=True)  # fmt: skip
        self._line("ready")

    def _line(self, wanted: str = "{") -> str:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.startswith(wanted):
                return line
        raise SystemExit(f"{self.name} stopped:\n{self.errors.read_text()[-3000:]}")

    def sweep(self, job: dict[str, Any]) -> tuple[float, Tensor]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        seconds = float(json.loads(self._line())["seconds"])
        return seconds, load_file(str(self.folder / "theirs.safetensors"))["out"]


def run(model: Model, sweep: Sweep, tokens: tuple[Tensor, Tensor], peers: list[Peer], sample: int, repeats: int) -> None:
    base, source = (one[: sweep.batch, : sweep.length] for one in tokens)
    parts = gated(model, [sweep.site], positions=sweep.chosen if sweep.positions else ())
    batch, fallback = examples(base, source).batch(), parts.fallback("resample")
    fallback.at(batch)
    gates = 1 - torch.eye(len(parts.labels))[:, None, None]
    chosen = torch.randperm(len(gates), generator=torch.Generator().manual_seed(0))[:sample].tolist()
    job = {"batch": sweep.batch, "length": sweep.length, "cells": [cells_of(parts)[number] for number in chosen]}
    parts.measure(batch, gates[:3], fallback)
    before = reset_peak()
    ours, plain, rates, apart, memory = list[float](), list[float](), list[float](), 0.0, 0.0
    theirs: dict[str, list[float]] = {peer.name: [] for peer in peers}
    values = torch.empty(0)
    for _ in range(repeats):
        rates.append(rate(model))
        start = time.perf_counter()
        values = parts.measure(batch, gates, fallback)
        ours.append(time.perf_counter() - start)
        memory = memory or (resident("VmHWM") - before) / 1024
        rates.append(rate(model))
        for peer in peers:
            seconds, found = peer.sweep(job)
            theirs[peer.name].append(seconds * len(gates) / len(chosen))
            apart = max(apart, float((values[chosen] - found).abs().max()))
        start = time.perf_counter()
        with torch.no_grad():
            alone = [model.target_logits(batch, parts.edits(gates[[n]], fallback, batch)) for n in chosen[:10]]
        plain.append((time.perf_counter() - start) * len(gates) / 10)
    alone_apart = max(
        float((METRICS["logit_diff"](one, batch)[0] - values[n]).abs().max()) for one, n in zip(alone, chosen, strict=False)
    )
    bound = limit(model, sweep) / max(rates)
    shares = sorted(limit(model, sweep) / max(rates[2 * n : 2 * n + 2]) / one for n, one in enumerate(ours))
    print(f"{sweep.name}: {len(gates)} cells, {repeats} repeats")
    print(f"  replay {min(ours):.2f} s; limit {bound:.2f} s ({bound / min(ours):.0%} of it; by repeat {shares[0]:.0%} to {shares[-1]:.0%});"
          f" one by one {min(plain) / min(ours):.1f}x; memory above the model {memory:.0f} MB")  # fmt: skip
    for name, seconds in theirs.items():
        ratios = [t / o for t, o in zip(seconds, ours, strict=True)]
        print(f"  {name} {min(seconds):.1f} s = {min(seconds) / min(ours):.1f}x ({min(ratios):.1f} to {max(ratios):.1f})")
    print(f"  differs from peers by {apart:.1e}, from whole runs by {alone_apart:.1e}", flush=True)
    if max(apart, alone_apart) > TOLERANCE:
        raise SystemExit("the numbers differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path(tempfile.gettempdir()) / "patchclamp-peers")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="gpt2")
    parser.add_argument("--rows", default="1,2,3,4,5")
    parser.add_argument("--sample", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default="transformerlens,nnsight")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    hf = SHAPES[options.shape]().eval()
    tokens = torch.randint(3, VOCABULARY, (2, 8, 256))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save(hf, folder, tokens[0], tokens[1])
        model = Model.load(hf)
        peers = [Peer(name, options.env, folder, options.threads) for name in options.peers.split(",") if name]
        print(f"{options.shape}, {model.parameters / 1e6:.0f} M parameters, {options.threads} threads, torch {torch.__version__}")
        for row in options.rows.split(","):
            run(model, SWEEPS[int(row) - 1], (tokens[0], tokens[1]), peers, options.sample, options.repeats)
        for peer in peers:
            peer.process.terminate()


if __name__ == "__main__":
    main()
