"""Edges: slopes of all of them, in plain forward passes and memory; and closing them one by one, against whole runs.

F is one plain forward pass of the same batch: logits at every position, the same attention kernel, no hooks. Slopes of all edges
(fallback recorded anew each time) and F alternate in one run; medians, with the lowest and the highest ratio. Memory is the peak
above the loaded model. Limits: 6 F and 500 MB. Of the slopes, edges into some readers are compared with autograd through gates
(every destination reading a stream of its own), to 1e-4 of the largest.

With --exact, a random sample of edges is closed one by one, from where each first differs from the model itself, and in whole runs.

With --task, all edges of the shipped model are closed one by one on that task instead, and first-order methods compared with them.

    python benchmarks/edges.py --task ioi [--prompts 16]
    python benchmarks/edges.py [--shape gpt2|llama|gemma2] [--batch 8] [--length 32] [--repeats 5] [--exact 64]
"""

import argparse
import statistics
import time
from typing import Any

import torch
from gradient import live, peak, plain, seconds, spread
from replay import SHAPES, VOCABULARY, VOCABULARY_OF_GPT2, examples
from transformers import Gemma2Config, Gemma2ForCausalLM

from patchclamp.methods import effects
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Edges, edges
from patchclamp.tasks import Examples, load_task

METRIC = METRICS["logit_diff"]
KINDS: dict[str, Any] = {
    **SHAPES,
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(
        vocab_size=VOCABULARY_OF_GPT2, hidden_size=768, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4,
        head_dim=96, intermediate_size=2304, max_position_embeddings=1024, sliding_window=16, query_pre_attn_scalar=96,
    )),
}  # fmt: skip
TOLERANCE = 1e-4


def slopes(parts: Edges, made: Examples) -> torch.Tensor:
    """Of all edges: [example, edge]. The fallback's values are new for a new batch."""
    batch = made.batch()
    return parts.gradient(batch, parts.open(), parts.fallback("resample"), METRIC)[1][0]


def gradient(parts: Edges, made: Examples, repeats: int) -> None:
    model = parts.model
    slopes(parts, made)  # finds how streams are read, once per model
    ratios: list[float] = []
    base: list[float] = []
    for _ in range(repeats):
        before = seconds(lambda: plain(model, made))
        taken = seconds(lambda: slopes(parts, made))
        base.append(statistics.mean([before, seconds(lambda: plain(model, made))]))
        ratios.append(taken / base[-1])
    tensors, process = live(lambda: slopes(parts, made)), peak(lambda: slopes(parts, made))
    itself = peak(lambda: plain(model, made))
    print(f"  slopes of {len(parts.labels)} edges: {spread(ratios)} F (limit 6); F {statistics.median(base):.3f} s; {tensors:.0f} MB of "
          f"tensors, {process:.0f} MB of the process (limit 500; a plain pass {itself:.0f})", flush=True)  # fmt: skip


def against_autograd(parts: Edges, made: Examples) -> None:
    """Edges into three readers, in closed form and through gates on what they read."""
    model, batch = parts.model, made.batch([0, 1])
    last = model.layers - 1
    some = edges(model, destinations=[f"L{last // 2}.h1.q", f"L{last}.kv0.k", f"L{last}.mlp"])
    gates = some.open().expand(-1, len(batch), -1, -1).clone()
    gates[..., -1] = 1 - 1e-7  # not open: this way goes through autograd
    rule = some.fallback("resample")
    autograd = some.gradient(batch, gates, rule, METRIC)[1][0]
    apart = some.gradient(batch, some.open(), rule, METRIC)[1][0] - autograd
    worst = float(apart.abs().max() / autograd.abs().max())
    print(f"  {len(some.labels)} of them through gates and autograd: differ by {worst:.1e} of the largest", flush=True)
    if worst > TOLERANCE:
        raise SystemExit("the slopes differ")


def exact(parts: Edges, made: Examples, count: int, repeats: int) -> None:
    """A random sample of edges closed one by one, by replay and in whole runs."""
    model, batch = parts.model, made.batch()
    chosen = torch.randperm(len(parts.labels), generator=torch.Generator().manual_seed(0))[:count].sort().values
    gates = parts.open(count)
    gates[torch.arange(count), ..., chosen] = 0
    rule = parts.fallback("resample")
    rule.at(batch)
    ratios, taken = list[float](), list[float]()
    for _ in range(repeats):
        before = seconds(lambda: plain(model, made))
        taken.append(seconds(lambda: parts.measure(batch, gates, rule, METRIC)))
        whole = count * statistics.mean([before, seconds(lambda: plain(model, made))])
        ratios.append(whole / taken[-1])
    found, own = parts.measure(batch, gates, rule, METRIC), parts.whole().measure(batch, gates, rule, METRIC)
    apart = float((found - own).abs().max())
    print(f"  {count} edges closed one by one: {statistics.median(taken):.1f} s, as many plain passes take {spread(ratios)} times "
          f"that; whole runs differ by {apart:.1e}", flush=True)  # fmt: skip


def shipped(task: str, prompts: int) -> None:
    """All edges of zoo/small on a task: exact, with its time; how far gradient and integrated agree with that."""
    model = Model.load("zoo/small")
    made, parts = load_task(task).examples(model.tokenizer, prompts, seed=0), edges(model)
    rule, count = parts.fallback("resample"), len(parts.labels)
    start, used = time.perf_counter(), time.process_time()
    truth = effects(parts, made, rule, "exact").mean(1)
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    batch = made.batch()
    replay = parts.replay(batch, rule, METRIC)
    for some in torch.arange(count).split(512):
        gates = parts.open(len(some))
        gates[torch.arange(len(some)), ..., some] = 0
        replay.measure(gates)
    naive = (count + 1) * model.layers
    print(f"zoo/small on {task}, {prompts} prompts of {batch.tokens.shape[1]} tokens: all {count} edges in {wall:.1f} s ({cpu:.1f} s of "
          f"processors); {replay.blocks} blocks run, naive {naive} ({naive / replay.blocks:.2f} times as many)", flush=True)  # fmt: skip
    top = set(truth.abs().topk(20).indices.tolist())
    for method in ("gradient", "integrated"):
        start = time.process_time()
        found = effects(parts, made, rule, method).mean(1)
        used = time.process_time() - start
        both = torch.stack([truth.double(), found.double()])
        ranks = both.argsort(1).argsort(1).double()
        print(f"  {method}: Pearson {float(torch.corrcoef(both)[0, 1]):.3f}, Spearman {float(torch.corrcoef(ranks)[0, 1]):.3f}, relative "
              f"L2 {float((found - truth).norm() / truth.norm()):.3f}, {len(top & set(found.abs().topk(20).indices.tolist()))} of the "
              f"top 20; {used:.1f} s of processors", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(KINDS), default="gpt2")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="eager")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--exact", type=int, default=0)
    parser.add_argument("--task")
    parser.add_argument("--prompts", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.task is not None:
        shipped(options.task, options.prompts)
        return
    torch.manual_seed(0)
    hf = KINDS[options.shape]().eval()
    hf.config._attn_implementation = options.attention
    tokens = torch.randint(3, VOCABULARY, (2, options.batch, options.length))
    model = Model.load(hf)
    made, parts = examples(tokens[0], tokens[1]), edges(model)
    print(f"{options.shape}, {options.attention} attention, {model.parameters / 1e6:.0f} M parameters, {options.threads} threads, "
          f"torch {torch.__version__}; {options.batch} prompts of {options.length} tokens")  # fmt: skip
    gradient(parts, made, options.repeats)
    against_autograd(parts, made)
    if options.exact:
        exact(parts, made, options.exact, options.repeats)


if __name__ == "__main__":
    main()
