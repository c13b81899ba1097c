"""A head-by-head patching sweep here and in TransformerLens, on the same random checkpoints: agreement and time.

Every head's z at all positions is replaced by what it is on another prompt (batch x length tokens, logits at the last position).
TransformerLens runs its own `get_act_patch_attn_head_out_all_pos` on a TransformerBridge, in an environment of its own that is
made in --env (and used again). Fails where logits differ by more than 1e-4.

    python benchmarks/patching_vs_transformerlens.py [--env FOLDER] [--batch 4] [--length 16] [--repeats 3]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from patchclamp.edits import Mix, Put
from patchclamp.models.inputs import token_batch
from patchclamp.models.model import Model
from patchclamp.sites import Site

PINS = ("torch==2.13.0", "transformer-lens==4.3.0")
TOLERANCE = 1e-4
VOCABULARY = 5000
SHAPES: dict[str, Callable[[], Any]] = {
    "GPT-2, 6 layers as wide as small": lambda: GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_layer=6, attn_implementation="eager",
    )),
    "Llama, as many with grouped queries": lambda: LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=768, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=4,
        intermediate_size=2048, max_position_embeddings=1024, attn_implementation="eager",
    )),
}  # fmt: skip

THEIRS = """
import json, sys, time
import torch
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.patching import get_act_patch_attn_head_out_all_pos

folder, repeats, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
tokens = load_file(folder + "/tokens.safetensors")
model = TransformerBridge.boot_transformers(folder, device="cpu")
seconds = []
with torch.no_grad():
    for _ in range(repeats):
        kept = []
        def metric(logits):
            kept.append(logits[:, -1].clone())
            return logits[0, -1, 0]
        start = time.perf_counter()
        _, cache = model.run_with_cache(tokens["source"], names_filter=lambda name: name.endswith("hook_z") or name.endswith("o.hook_in"))
        get_act_patch_attn_head_out_all_pos(model, tokens["base"], cache, metric)
        seconds.append(time.perf_counter() - start)
save_file({"logits": torch.stack(kept)}, folder + "/theirs.safetensors")
print(json.dumps({"seconds": min(seconds)}))
"""


def environment(folder: Path) -> Path:
    """The Python of an environment that holds TransformerLens; made where it is missing."""
    python = folder / "bin" / "python"
    if not python.is_file():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PINS], check=True)
    return python


def save(hf: Any, folder: Path, base: Tensor, source: Tensor) -> None:
    """The checkpoint as both tools read it, with a tokenizer (TransformerLens wants one) and the token ids."""
    hf.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2").save_pretrained(folder)
    save_file({"base": base, "source": source}, str(folder / "tokens.safetensors"))


def one_by_one(model: Model, base: Tensor, source: Tensor) -> Tensor:
    """Logits at the last position for each head, one forward pass per head."""
    last = torch.tensor([base.shape[1] - 1])
    batch = token_batch(base)
    values = model.record(source, [Site("z", layer) for layer in range(model.layers)])
    with torch.no_grad():
        return torch.stack([
            model.forward(batch, {Site("z", layer, head): Put(values[Site("z", layer)][:, :, head])}, columns=last)[:, 0]
            for layer, size in enumerate(model.anatomy.sizes) for head in range(size.heads)
        ])  # fmt: skip


def folded(model: Model, base: Tensor, source: Tensor) -> Tensor:
    """The same, a layer's heads folded into the batch."""
    last = torch.tensor([base.shape[1] - 1])
    batch = token_batch(base)
    values = model.record(source, [Site("z", layer) for layer in range(model.layers)])
    found: list[Tensor] = []
    with torch.no_grad():
        for layer, size in enumerate(model.anatomy.sizes):
            gates = (1 - torch.eye(size.heads)).repeat_interleave(len(base), 0)[:, None, :, None]
            patched = values[Site("z", layer)].repeat(size.heads, 1, 1, 1)
            logits = model.forward(batch, {Site("z", layer): Mix(gates, patched)}, settings=size.heads, columns=last)
            found.append(logits[:, 0].unflatten(0, (size.heads, -1)))
    return torch.cat(found)


def timed(call: Callable[[], Tensor], repeats: int) -> tuple[Tensor, float]:
    found, seconds = call(), []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return found, min(seconds)


def compare(name: str, python: Path, options: argparse.Namespace) -> bool:
    """Both tools on one shape, after one another; whether they agree."""
    torch.manual_seed(0)
    hf = SHAPES[name]().eval()
    with torch.no_grad():  # as drawn, weights are so small that patching hardly moves a logit
        for parameter in hf.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    base, source = torch.randint(3, VOCABULARY, (2, options.batch, options.length))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save(hf, folder, base, source)
        model = Model.load(folder)
        ours = {"one by one": timed(lambda: one_by_one(model, base, source), options.repeats),
                "folded": timed(lambda: folded(model, base, source), options.repeats)}  # fmt: skip
        command = [python, "-c", THEIRS, folder, str(options.repeats), str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
        theirs = load_file(str(folder / "theirs.safetensors"))["logits"]
    plain = model.run(base)[:, -1]
    moved = float((theirs - plain).abs().max())
    print(f"{name}: {len(theirs)} heads, {options.batch} x {options.length} tokens; patching moves logits by up to {moved:.2f}")
    print(f"  TransformerLens          {seconds:7.2f} s")
    agree = True
    for way, (logits, mine) in ours.items():
        apart = float((logits - theirs).abs().max())
        agree = agree and apart < TOLERANCE
        print(f"  Patchclamp, {way:12} {mine:7.2f} s: {seconds / mine:4.1f} times as fast; logits differ by {apart:.1e} at most")
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path(tempfile.gettempdir()) / "patchclamp-transformerlens")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    python = environment(options.env)
    agree = [compare(name, python, options) for name in SHAPES]
    sys.exit(0 if all(agree) else 1)


if __name__ == "__main__":
    main()
