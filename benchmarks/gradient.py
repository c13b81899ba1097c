"""The gradient engine: what attribution patching and integrated gradients cost in plain forward passes, and in memory.

F is one plain forward pass of the same batch: logits at every position, the same attention kernel, no hooks. Attribution (heads and
MLPs, fallback recorded anew each time) and F alternate in one run; medians, with the lowest and the highest ratio. Multiply-adds
of matrix products are counted beside them, on one call each. Limits: 3.2 F, and 2.2 m + 3 F with m steps.

With --env (an environment with TransformerLens 4.3, made if it is missing), its attribution patching of all heads and MLPs runs on
the same checkpoint in turn with ours (a cached run of the corrupt prompts, a forward and a backward pass with hooks); slopes must
agree to 1e-3 of the largest.

    python benchmarks/gradient.py [--shape gpt2|llama] [--attention sdpa|eager] [--steps 8,16,32] [--repeats 5] [--env FOLDER]
"""

import argparse
import ctypes
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from patching_vs_transformerlens import VOCABULARY, environment, save
from replay import SHAPES, examples, reset_peak, resident
from safetensors.torch import load_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from patchclamp.methods import gradient, integrated
from patchclamp.metrics import METRICS
from patchclamp.models.memory import total
from patchclamp.models.model import Model
from patchclamp.parts import Nodes, nodes
from patchclamp.parts.limits import limits_of
from patchclamp.tasks import Examples

METRIC = METRICS["logit_diff"]
BATCHES = ((8, 16), (16, 32), (8, 64))
TOLERANCE = 1e-3

THEIRS = """
import json, sys, time
import torch
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge

folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
model = TransformerBridge.boot_transformers(folder, device="cpu")
for parameter in model.parameters():
    parameter.requires_grad_(False)
loaded = load_file(folder + "/tokens.safetensors")
wanted = lambda name: name.endswith(("hook_z", "o.hook_in", "hook_mlp_out", "mlp.hook_out"))
root = torch.zeros(model.cfg.d_model, requires_grad=True)
print("ready", flush=True)
for line in sys.stdin:
    batch, length = json.loads(line)
    base, source = loaded["base"][:batch, :length], loaded["source"][:batch, :length]
    start = time.perf_counter()
    with torch.no_grad():
        _, corrupt = model.run_with_cache(source, names_filter=wanted)
    kept = {}
    def keep(value, hook):
        kept[hook.name] = value
        return value
    begin = lambda value, hook: value + root
    logits = model.run_with_hooks(base, fwd_hooks=[("hook_embed", begin), (wanted, keep)])[:, -1]
    names = list(kept)
    slopes = torch.autograd.grad((logits[:, 10] - logits[:, 20]).sum(), [kept[name] for name in names])
    out = {}
    for name, slope in zip(names, slopes):
        each = (kept[name].detach() - corrupt[name]) * slope
        layer = name.split(".")[1]
        if "attn" in name:
            each = each.reshape(*each.shape[:2], model.cfg.n_heads, -1)
            out[layer + ".z"] = each.sum((1, 3)).contiguous()
        else:
            out[layer + ".mlp"] = each.sum((1, 2)).contiguous()
    seconds = time.perf_counter() - start
    save_file(out, folder + "/theirs.safetensors")
    print(json.dumps({"seconds": seconds}), flush=True)
"""


def plain(model: Model, made: Examples) -> None:
    batch = made.batch()
    with torch.no_grad():
        model.hf(input_ids=batch.tokens, attention_mask=batch.mask.long(), use_cache=False)


def attributed(parts: Nodes, made: Examples, steps: int) -> Tensor:
    """Integrated gradients with so many steps; 0: the gradient. The fallback's values are new for a new batch."""
    batch, fallback = made.batch(), parts.fallback("resample")
    if steps:
        return integrated.samples(parts, batch, fallback, METRIC, 0, steps=steps)
    return gradient.samples(parts, batch, fallback, METRIC, 0)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as count:
        call()
    return count.get_total_flops()


def peak(call: Callable[[], object]) -> float:
    """MB above what is resident before the call, once the C library has given back what it holds for later."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = reset_peak()
    call()
    return (resident("VmHWM") - before) / 1024


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def costs(parts: Nodes, made: Examples, steps: list[int], repeats: int) -> None:
    """Times and multiply-adds of every kind of attribution, as multiples of F."""
    model = parts.model
    one = flops(lambda: plain(model, made))
    for many in (0, *steps):
        counted = flops(lambda many=many: attributed(parts, made, many)) / one
        ratios: list[float] = []
        base: list[float] = []
        for _ in range(repeats):
            before = seconds(lambda: plain(model, made))
            taken = seconds(lambda many=many: attributed(parts, made, many))
            base.append(statistics.mean([before, seconds(lambda: plain(model, made))]))
            ratios.append(taken / base[-1])
        name, limit = (f"integrated, {many} steps", 2.2 * many + 3) if many else ("gradient", 3.2)
        print(f"  {name:22} {spread(ratios)} F; counted {counted:5.2f} F; limit {limit:.1f} F; F {statistics.median(base):.3f} s",
              flush=True)  # fmt: skip


def live(call: Callable[[], object]) -> float:
    """MB that tensors made by the call hold at once at most, as torch's allocator counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    found: Any = seen.profiler
    changes = sorted((one.start_ns(), one.nbytes()) for one in found.kineto_results.events() if one.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes)) / 2**20


def memory(model: Model, made: Examples, repeats: int) -> None:
    """Peaks of one gradient above the loaded model and the fallback's values, where all is kept, half of it, as little as can be."""
    batch = made.batch()
    fallback = nodes(model).fallback("resample")
    fallback.at(batch)
    needed, kept, first = 0.0, torch.empty(0), None
    for name, share in (("all kept", None), ("half allowed", 0.5), ("none allowed", 0.0)):
        parts = nodes(model, memory=total(model.device) if share is None else max(1, int(share * needed)))
        found = parts.gradient(batch, parts.open(), fallback, METRIC)[1]
        call = partial(parts.gradient, batch, parts.open(), fallback, METRIC)
        tensors, process = live(call), peak(call)
        if share is None:
            needed, kept, first = len(batch.tokens) * max(limits_of(parts).rows.values()), found, call
        assert first is not None
        longer = [seconds(call) / seconds(first) for _ in range(repeats)]
        apart = float((found - kept).abs().max() / kept.abs().max())
        print(f"  {name:12} {tensors:4.0f} MB of tensors, {process:4.0f} MB of the process, {spread(longer)} times as long, "
              f"slopes differ by {apart:.0e}", flush=True)  # fmt: skip


def peer_of(python: Path, folder: Path, threads: int) -> Any:
    peer = subprocess.Popen([python, "-c", THEIRS, folder, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=(folder / "errors.txt").open("w"), text=True)  # fmt: skip
    assert peer.stdout is not None
    while not peer.stdout.readline().startswith("ready"):
        if peer.poll() is not None:
            raise SystemExit((folder / "errors.txt").read_text())
    return peer


def against(peer: Any, folder: Path, parts: Nodes, made: Examples, size: tuple[int, int], repeats: int) -> None:
    """Our gradient and theirs in turn."""
    ours, theirs = [], []
    for _ in range(repeats + 1):
        ours.append(seconds(lambda: attributed(parts, made, 0)))
        peer.stdin.write(json.dumps(size) + "\n")
        peer.stdin.flush()
        answer = peer.stdout.readline()
        if not answer:
            raise SystemExit((folder / "errors.txt").read_text())
        theirs.append(json.loads(answer)["seconds"])
    table, found = attributed(parts, made, 0), load_file(str(folder / "theirs.safetensors"))
    worst = 0.0
    for site, mine in zip([parts.labels[number] for number in parts.counted], table, strict=True):
        other = found[f"{site.layer}.z"][:, site.index] if site.kind == "head" else found[f"{site.layer}.mlp"]
        worst = max(worst, float((mine - other).abs().max()))
    apart = worst / float(table.abs().max())
    ratios = [there / here for there, here in zip(theirs[1:], ours[1:], strict=True)]
    print(f"  TransformerLens takes {spread(ratios)} times as long; slopes differ by {apart:.1e} of the largest", flush=True)
    if apart > TOLERANCE:
        raise SystemExit("the slopes differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="gpt2")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="eager")
    parser.add_argument("--steps", default="8,16,32")
    parser.add_argument("--batches", default="1,2,3")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--env", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    hf = SHAPES[options.shape]().eval()
    hf.config._attn_implementation = options.attention
    tokens = torch.randint(3, VOCABULARY, (2, 32, 64))
    with tempfile.TemporaryDirectory() as place:
        folder, peer = Path(place), None
        if options.env is not None:
            save(hf, folder, tokens[0].contiguous(), tokens[1].contiguous())
            peer = peer_of(environment(options.env), folder, options.threads)
        model = Model.load(hf)
        print(f"{options.shape}, {options.attention} attention, {model.parameters / 1e6:.0f} M parameters, {options.threads} threads, "
              f"torch {torch.__version__}")  # fmt: skip
        for row in options.batches.split(","):
            size = BATCHES[int(row) - 1]
            made, parts = examples(*(one[: size[0], : size[1]] for one in tokens)), nodes(model)
            attributed(parts, made, 0)
            print(f"{size[0]} prompts of {size[1]} tokens, {len(parts.counted)} heads and MLPs")
            costs(parts, made, [int(many) for many in options.steps.split(",") if many], options.repeats)
            memory(model, made, options.repeats)
            if peer is not None:
                against(peer, folder, parts, made, size, options.repeats)
        if peer is not None:
            peer.terminate()


if __name__ == "__main__":
    main()
