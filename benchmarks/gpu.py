"""Every head and MLP of a large model, exact, on one accelerator: time, and the share of its matrix-multiply peak.

By default a Qwen3-4B shape (36 layers, 32 heads over 8 key/value heads, width 2560) with random bfloat16 weights, 128 prompts of
32 tokens, sdpa attention: 1152 heads and 36 MLPs, each gate closed once. The peak is what a large matrix product reaches in the
same run and type. The arithmetic counted is what the sweep needs at least (the blocks behind each part; in the patched block a
head's own output projection and the MLP). The same command runs anywhere: on a CPU give it a small shape.

    python benchmarks/gpu.py [--prompts 128] [--length 32] [--dtype bfloat16] [--layers 36] [--width 2560] [--whole 4]

--whole: so many parts are also run whole, one by one, for agreement and for the ratio to running everything.
"""

import argparse
import time

import torch
from replay import examples
from transformers import Qwen3Config, Qwen3ForCausalLM

from patchclamp.metrics import METRICS
from patchclamp.models.memory import shown
from patchclamp.models.model import Model
from patchclamp.parts import nodes


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Multiply-adds a second of a square matrix product."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronise(device)
        start = time.perf_counter()
        left @ right
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return size**3 / best


def needed(model: Model, prompts: int, length: int) -> float:
    """Multiply-adds that the sweep needs at least."""
    sizes, width = model.anatomy.sizes[0], model.width
    queries, own = sizes.heads * sizes.head_width, sizes.kv_heads * sizes.head_width
    mlp = 3 * width * (sizes.neurons or 0)
    block = width * (2 * queries + 2 * own) + mlp + length * queries  # causal attention: half of 2 x length x queries
    last = 2 * width * own + (width * 2 * queries + mlp + length * queries) / length  # all but keys and values at answers alone
    total, layers = 0.0, model.layers
    for layer in range(layers):
        behind = (layers - layer - 2) * block + last if layer < layers - 1 else 0.0
        patched = (mlp + sizes.head_width * width) / (length if layer == layers - 1 else 1)
        total += sizes.heads * (patched + behind) + behind
    return total * prompts * length


def asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--inner", type=int, default=9728)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--batch", type=int, default=128, help="prompts at once")
    parser.add_argument("--whole", type=int, default=4)
    return parser.parse_args()


def main() -> None:
    options = asked()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=options.vocabulary, hidden_size=options.width, num_hidden_layers=options.layers, intermediate_size=options.inner,
        num_attention_heads=options.heads, num_key_value_heads=options.kv_heads, head_dim=max(8, 128 * options.width // 2560),
        attn_implementation="sdpa", dtype=dtype,
    )  # fmt: skip
    with torch.device(device):
        torch.set_default_dtype(dtype)
        hf = Qwen3ForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    model = Model.load(hf)
    parts = nodes(model)
    tokens = torch.randint(3, options.vocabulary, (2, options.prompts, options.length))
    batches = list(examples(tokens[0], tokens[1]).batches(options.batch))
    rule = parts.fallback("resample")
    counted = torch.tensor(parts.counted)
    gates = parts.open(len(counted) + 1)
    gates[torch.arange(len(counted)), :, :, counted.to(device)] = 0
    parts.measure(batches[0], gates[:3], rule)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
    synchronise(device)
    start = time.perf_counter()
    values = [parts.measure(batch, gates, rule) for batch in batches]
    synchronise(device)
    seconds = time.perf_counter() - start
    arithmetic, most = needed(model, options.prompts, options.length), peak(device, dtype, min(8192, 4 * options.width))
    print(f"{model!r} on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}")
    print(f"{len(counted)} parts x {options.prompts} prompts x {options.length} tokens: {seconds:.2f} s")
    print(f"arithmetic {arithmetic:.3g} multiply-adds, peak {most:.3g} a second: {arithmetic / most / seconds:.1%} of the peak")
    if device.type == "cuda":
        print(f"memory above the model {shown(torch.cuda.max_memory_allocated(device) - base)}")
    if options.whole:
        chosen = torch.randperm(len(counted), generator=torch.Generator().manual_seed(0))[: options.whole].tolist()
        synchronise(device)
        start = time.perf_counter()
        with torch.no_grad():
            alone = [model.target_logits(batches[0], parts.edits(gates[[n]], rule, batches[0])) for n in chosen]
        synchronise(device)
        each = (time.perf_counter() - start) / len(chosen)
        found = torch.stack([METRICS["logit_diff"](one, batches[0].to(device))[0] for one in alone])
        largest = float(alone[0].abs().max())
        apart = float((found - values[0][chosen]).abs().max()) / largest
        print(
            f"whole runs: {each * len(gates) * len(batches) / seconds:.1f}x the time; differ by {apart:.1e} of the largest logit"
        )


if __name__ == "__main__":
    main()
