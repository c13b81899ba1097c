"""Models larger than one device: blocks on the CPU's side and on disk, with accelerate's hooks; sharded ones are refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import tiny
from patchclamp.edits import Zero
from patchclamp.errors import ModelError
from patchclamp.models.doctor import examine
from patchclamp.models.model import Model
from patchclamp.models.offload import stored
from patchclamp.parts import nodes
from patchclamp.sites import Site
from patchclamp.store import weights_hash
from patchclamp.study.provenance import model_hash
from patchclamp.sweep import Case, sweep
from patchclamp.tasks import Example, Examples, Pair
from patchclamp.zoo import wired

MAPS: dict[str, dict[str, str]] = {
    "disk": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
             "model.rotary_emb": "cpu", "lm_head": "cpu"},
    "all but the embedding on disk": {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "disk",
                                      "model.rotary_emb": "cpu", "lm_head": "disk"},
}  # fmt: skip
TOKENS = torch.tensor([[5, 11, 23, 42, 7, 31, 64], [61, 17, 3, 90, 28, 28, 45]])


class Words:
    """The least that is asked of a tokenizer: a word is an id."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(str(one) for one in ids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiny") / "llama"
    tiny("llama").save_pretrained(place)
    return place


def some_examples(n: int = 8) -> Examples:
    """Random pairs that differ in one token."""
    draw = torch.Generator().manual_seed(0)
    items: list[Example] = []
    for _ in range(n):
        clean = torch.randint(3, 90, (6,), generator=draw).tolist()
        corrupt = [*clean[:2], clean[2] % 80 + 5, *clean[3:]]
        right = int(torch.randint(3, 90, (1,), generator=draw))
        pair = Pair(clean=tuple(clean), corrupt=tuple(corrupt), answer=((right,),), wrong=((right + 1,),))
        spans = {"end": (5, 6)}
        items.append(Example(tuple(clean), ((right,),), pair, tuple(corrupt), ((right + 1,),), spans))
    return Examples(tuple(items), Words(), "random", "logit_diff")


def hooks_of(model: Model) -> dict[str, tuple[Any, ...]]:
    """What hangs on every module: accelerate's hook, its forward, torch's hooks."""
    return {
        name: (
            id(getattr(module, "_hf_hook", None)), module.forward, len(module._forward_hooks), len(module._forward_pre_hooks),
            [(key, value.device.type) for key, value in module.named_parameters(recurse=False)],
        )
        for name, module in model.hf.named_modules()
    }  # fmt: skip


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_blocks_on_disk_give_the_same_numbers(folder: Path, where: str, dtype: str) -> None:
    """Bit for bit: the same kernels see the same weights, wherever these come from."""
    plain = Model.load(folder, tokenizer=Words(), dtype=dtype)
    model = Model.load(folder, tokenizer=Words(), dtype=dtype, device_map=MAPS[where])
    assert any(value.is_meta for value in model.hf.parameters()) and model.device.type == "cpu"
    before = hooks_of(model)
    patterns = ["logits", "L*.*", "L*.*.*", "L*.h*.write"]
    one, two = plain.record(TOKENS, patterns), model.record(TOKENS, patterns)
    assert list(one) == list(two) and all(torch.equal(one[site], two[site]) for site in one)
    for site in (Site("head", 0, 1), Site("head", 1, 2), Site("mlp", 1), Site("resid.post", 0)):
        edits = {site: Zero()}
        assert torch.equal(plain.run(TOKENS, edits), model.run(TOKENS, edits))
        assert not torch.equal(model.run(TOKENS, edits), model.run(TOKENS))
    assert plain.generate(TOKENS, edits, max_new_tokens=3) == model.generate(TOKENS, edits, max_new_tokens=3)
    examples = some_examples()
    batch = examples.batch()
    for kind in ("resample", "zero", "mean"):
        values: list[tuple[torch.Tensor, ...]] = []
        for each in (plain, model):
            parts = nodes(each)
            fallback = parts.fallback(kind, fit=examples)
            gates = torch.cat([parts.open(), parts.closed(), *(parts.without([site]) for site in parts.labels)])
            half = torch.full_like(parts.open(), 0.5)
            values.append((parts.measure(batch, gates, fallback), *parts.gradient(batch, half, fallback)))
        for value, other in zip(*values, strict=True):
            assert torch.equal(value, other)
        assert bool((values[0][2] != 0).any())
    assert hooks_of(model) == before
    found = examine(model)
    assert found.passed, str(found)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_digest_is_of_the_weights_wherever_they_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt2 and gemma2 tie their embeddings, whose names then count as one."""
    monkeypatch.setenv("PATCHCLAMP_CACHE", str(tmp_path / "cache"))
    tiny(name).save_pretrained(tmp_path / "model")
    plain = Model.load(tmp_path / "model", tokenizer=Words())
    wanted = weights_hash(plain.hf.state_dict(), plain.hf.config.to_dict())
    assert model_hash(plain) == wanted
    for number, device_map in enumerate(({"": "disk"}, {"": "cpu"})):
        monkeypatch.setenv("PATCHCLAMP_CACHE", str(tmp_path / f"cache{number}"))
        model = Model.load(tmp_path / "model", tokenizer=Words(), device_map=device_map)
        assert all(value.is_meta for value in model.hf.parameters()) == (device_map[""] == "disk")
        assert model_hash(model) == wanted
    changed = tiny(name)
    with torch.no_grad():
        changed.get_input_embeddings().weight[0, 0] += 1
    assert model_hash(Model.load(changed)) != wanted
    tensors, load = stored(torch.nn.Linear(2, 2, device="meta"))
    with pytest.raises(ModelError, match="weight is on the device meta"):
        load(next(name for name in tensors if name == "weight"))


@pytest.mark.long
def test_a_sweep_over_an_offloaded_model(tmp_path: Path) -> None:
    """The whole map, its digest and its scores are those of the model in one piece."""
    truth = wired("interfering")
    truth.hf.to(torch.float32).save_pretrained(tmp_path / "wired")
    truth.tokenizer.save_pretrained(tmp_path / "wired")
    examples = truth.task.examples(truth.tokenizer, 48, seed=2)
    lines = [{"clean": one.pair.clean, "corrupt": one.pair.corrupt, "answer": one.pair.answer[0], "wrong": one.pair.wrong[0]}
             for one in examples]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    device_map = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h": "disk", "transformer.ln_f": "disk",
                  "lm_head": "cpu"}  # fmt: skip
    one, two = (
        sweep([Case(str(tmp_path / "wired"), str(tmp_path / "pairs.jsonl"), steps=("verify",), loading=loading)], tmp_path / out)
        for out, loading in (("plain", {}), ("offloaded", {"device_map": device_map}))
    )
    assert not one.failed and not two.failed, (one.failed, two.failed)
    assert one.rows[0].digest == two.rows[0].digest and one.rows[0].found == two.rows[0].found


# --- tensor parallel

RANK = """
import os, sys, time
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from patchclamp.errors import ModelError
from patchclamp.models.model import Model

dist.init_process_group("gloo")
hf = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_plan="auto"))
whole = hf.config.num_attention_heads * hf.config.head_dim
here = hf.model.layers[0].self_attn.q_proj.weight
here = here.to_local() if hasattr(here, "to_local") else here
assert here.shape[0] * dist.get_world_size() == whole, (here.shape, whole)  # it really is in two
with torch.no_grad():
    assert hf(input_ids=torch.tensor([[5, 6, 7]])).logits.shape[-1] == hf.config.vocab_size
try:
    Model.load(hf)
except ModelError as error:
    print(f"rank {dist.get_rank()}: {error}")
else:
    sys.exit("it was loaded")
sys.stdout.flush()
dist.barrier()
time.sleep(0.5)  # until the other is through the barrier, too
os._exit(0)  # gloo's threads, taken down as the interpreter ends, sometimes abort the process
"""


@pytest.mark.long
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed")
def test_tensor_parallel_models_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "rank.py"), str(folder)], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for number, (rank, (out, errors)) in enumerate(zip(ranks, said, strict=True)):
        assert rank.returncode == 0, out + errors
        assert f"rank {number}: " in out and "the model is split over 2 processes (tensor parallel)" in out, out + errors
