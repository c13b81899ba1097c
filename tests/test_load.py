"""Loading: names, folders, objects; adapted, quantised and dispatched models; and what cannot be loaded, with its message."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import tiny
from patchclamp.edits import Zero
from patchclamp.errors import ModelError
from patchclamp.models.doctor import examine
from patchclamp.models.model import Model
from patchclamp.sites import Site

TOKENS = torch.tensor([[5, 11, 23, 42, 7, 31, 64], [61, 17, 3, 90, 28, 28, 45]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny model, without a tokenizer."""
    tiny("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


class Words:
    """The least that is asked of a tokenizer."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


# --- what can be loaded


def test_from_a_folder(folder: Path) -> None:
    model = Model.load(folder, tokenizer=Words())
    assert torch.equal(model.run(TOKENS), Model.load(tiny("llama", "sdpa")).run(TOKENS))
    assert torch.equal(model.run("5 11 23"), model.run(torch.tensor([[5, 11, 23]])))
    assert not model.hf.training and model.folder == folder and model.name == str(folder)
    assert model.encode("5 6", bos=True).tokens.tolist() == [[1, 5, 6]]
    assert model.encode(["5 6", "7"]).mask.tolist() == [[True, True], [False, True]]
    assert repr(model).startswith(f"Model('{folder}', llama: 2 layers x 4 heads, width 32, ")


def test_precision(folder: Path) -> None:
    model = Model.load(folder, tokenizer=Words(), dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16 and model.run(TOKENS).dtype == torch.bfloat16


def test_what_is_asked_is_passed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked: list[dict[str, Any]] = []

    def model(where: str, **options: Any) -> Any:
        asked.append({"where": where, **options})
        return tiny("llama"), {"missing_keys": set()}

    def tokenizer(where: str, **options: Any) -> Any:
        asked.append({"where": where, **options})
        return Words()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", tokenizer)
    assert Model.load("some/model", revision="step1000").revision == "step1000"
    assert [a["where"] for a in asked] == ["some/model"] * 2
    assert [a["revision"] for a in asked] == ["step1000"] * 2
    assert [a["trust_remote_code"] for a in asked] == [False] * 2
    assert asked[0]["dtype"] == "auto" and asked[0]["use_safetensors"] is True
    asked.clear()
    quantised = object()
    Model.load("some/model", tokenizer="other/words", trust_remote_code=True, quantization_config=quantised, device_map="auto")
    assert [a["trust_remote_code"] for a in asked] == [True] * 2
    assert asked[0]["quantization_config"] is quantised and asked[0]["device_map"] == "auto"
    assert asked[1]["where"] == "other/words" and "revision" not in asked[1]


SHARED = {
    "mingpt-adder-gpt2": ("gpt2", 3, 3),
    "mingpt-sort-gpt2": ("gpt2", 3, 3),
    "shakespeare-byte-gpt2": ("gpt2", None, None),
    "sophia-byte-llama": ("llama", None, None),
    "stories260k-llama": ("llama", 5, 8),
    "tinystories-656k-llama": ("llama", None, None),
}


@pytest.mark.parametrize("name", SHARED)
def test_real_models(shared: Path, name: str) -> None:
    model = Model.load(shared / "models" / name)
    family, layers, heads = SHARED[name]
    assert model.family.name == family
    assert layers is None or (model.layers, model.anatomy.sizes[0].heads) == (layers, heads)
    found = examine(model)
    assert found.passed, str(found)


def test_a_real_model_writes_what_is_known_of_it(shared: Path) -> None:
    """The sample in the model's own description."""
    model = Model.load(shared / "models" / "stories260k-llama")
    assert model.anatomy.sizes[0].kv_heads == 4
    known = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, "
        "red ball. She wanted to play with it, but it was too high."
    )
    written = model.generate("Once upon a time", max_new_tokens=80)
    assert ("Once upon a time" + written.texts[0]).startswith(known)


# --- model objects


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # in peft
@pytest.mark.parametrize(
    ("name", "targets"), [("llama", ["q_proj", "v_proj", "o_proj", "down_proj"]), ("gpt2", ["c_attn", "c_proj"])]
)
def test_adapted_models(name: str, targets: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = tiny(name)
    before = Model.load(base).run(TOKENS)
    adapted: Any = get_peft_model(base, LoraConfig(r=4, target_modules=targets, fan_in_fan_out=name == "gpt2")).eval()
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.2)
    model = Model.load(adapted)
    with torch.no_grad():
        plain = adapted(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    assert not torch.allclose(plain, before, atol=1e-2)
    values = model.record(TOKENS, ["logits", "L*.*", "L*.*.*"])
    assert torch.equal(values[Site("logits")], plain)
    found = examine(model)
    assert found.passed, str(found)
    edited = model.run(TOKENS, {Site("head", 0, 1): Zero()})
    merged = Model.load(adapted.merge_and_unload())
    torch.testing.assert_close(merged.run(TOKENS), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.run(TOKENS, {Site("head", 0, 1): Zero()}), edited, atol=1e-5, rtol=1e-5)


class Int8(nn.Module):
    """A linear map whose weights are kept as int8 with a scale per row, as weight-only quantisers do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.weight, Tensor) and isinstance(self.scale, Tensor)
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def swapped(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8(child))
        else:
            swapped(child)


def test_weights_kept_as_int8() -> None:
    hf = tiny("qwen2")
    swapped(hf.model.layers)
    model = Model.load(hf)
    with torch.no_grad():
        plain = hf(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    assert torch.equal(model.record(TOKENS, ["logits", "L*.*", "L*.*.*"])[Site("logits")], plain)
    assert not torch.allclose(plain, Model.load(tiny("qwen2")).run(TOKENS), atol=1e-4)
    found = examine(model)
    assert found.passed, str(found)
    assert model.run(TOKENS, {Site("z", 0): Zero()}).shape == plain.shape


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_dynamically_quantised_models(name: str) -> None:
    """Activations are rounded too, so heads' shares sum only nearly to what attention writes; the doctor says so."""
    hf = torch.ao.quantization.quantize_dynamic(tiny(name), {nn.Linear}, dtype=torch.qint8)
    model = Model.load(hf)
    with torch.no_grad():
        plain = hf(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    values = model.record(TOKENS, ["logits", "L*.pattern", "L0.h*.write", "L0.attn.write", "L*.mlp.n"])
    assert torch.equal(values[Site("logits")], plain)
    found = examine(model)
    shares = next(i for i in found.invariants if i.name == "heads and bias are attention")
    assert 0 < shares.measured < 0.05 and "quantised" in shares.why
    assert shares.passed


def test_dispatched_models(folder: Path) -> None:
    for device_map in ("auto", {"": "cpu"}):
        model = Model.load(folder, tokenizer=Words(), device_map=device_map)
        assert torch.equal(model.run(TOKENS), Model.load(tiny("llama", "sdpa")).run(TOKENS))


def test_offloaded_models() -> None:
    from accelerate import cpu_offload

    plain = Model.load(tiny("llama"))
    model = Model.load(cpu_offload(tiny("llama"), execution_device=torch.device("cpu")))
    assert next(model.hf.parameters()).device.type == "meta" and model.device.type == "cpu"
    patterns = ["logits", "L*.*", "L*.*.*", "L0.h*.write"]
    one, two = plain.record(TOKENS, patterns), model.record(TOKENS, patterns)
    assert list(one) == list(two) and all(torch.equal(one[site], two[site]) for site in one)
    edits = {Site("head", 0, 1): Zero()}
    assert torch.equal(plain.run(TOKENS, edits), model.run(TOKENS, edits))
    assert plain.generate(TOKENS, edits, max_new_tokens=3) == model.generate(TOKENS, edits, max_new_tokens=3)


# --- what cannot


def refused(source: Any, message: str, **options: Any) -> None:
    with pytest.raises(ModelError) as caught:
        Model.load(source, **options)
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    refused("no-such-model-anywhere", "the model 'no-such-model-anywhere' could not be loaded: ")
    refused("some/where/else", "there is no folder some/where/else: give a folder with config.json and weights, a hub name")
    refused(tmp_path / "nothing", "there is no folder ")
    refused(tmp_path, "is a folder without config.json")
    refused("zoo/nothing", "there is no model 'zoo/nothing' that ships or was trained here: there is ")
    refused(nn.Linear(2, 2), "Linear is neither a transformers model nor a name or folder of one")


def test_folders_that_are_broken(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    refused(folder, "could not be loaded: ", tokenizer=Words())
    weights.unlink()
    refused(folder, "holds no *.safetensors weights")
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, "holds weights as pytorch_model.bin only: pickle files are not read")
    weights.write_bytes(whole)
    assert Model.load(folder).tokenizer is None
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "the tokenizer of ")
    Model.load(folder, tokenizer=Words())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(folder, "weights (model.layers.2.", tokenizer=Words())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    refused(folder, "could not be loaded: ", tokenizer=Words())
    (folder / "config.json").write_text("{")
    refused(folder, "could not be loaded: ", tokenizer=Words())


def test_code_from_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "theirs", "auto_map": auto}))
    (folder / "theirs.py").write_text(f"open({str(marker)!r}, 'w').close()\nraise RuntimeError\n")
    refused(folder, "trust_remote_code", tokenizer=Words())
    assert not marker.exists()


def test_options_that_contradict(folder: Path) -> None:
    refused(tiny("llama"), "device='cpu' was asked of a model object, which stays as it is", device="cpu")
    refused(tiny("llama"), "dtype='float16' was asked of a model object", dtype="float16")
    refused(folder, "device='cpu' and device_map='auto' were both asked", device="cpu", device_map="auto")
    refused(folder, "there is no dtype 'float99'", dtype="float99", tokenizer=Words())


def test_without_accelerate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import modeling_utils

    monkeypatch.setattr(modeling_utils, "is_accelerate_available", lambda: False, raising=False)
    monkeypatch.setattr("transformers.integrations.accelerate.is_accelerate_available", lambda: False)
    refused(folder, "ccelerate", device_map="auto", tokenizer=Words())


def test_quantised_models_are_not_moved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def model(where: str, **options: Any) -> Any:
        hf = tiny("llama")
        hf.hf_quantizer = object()
        return hf, {"missing_keys": set()}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", model)
    refused(folder, "device='cpu' was asked of the quantised model", device="cpu", tokenizer=Words())
    assert Model.load(folder, tokenizer=Words()).layers == 2


def test_text_without_a_tokenizer(folder: Path) -> None:
    model = Model.load(tiny("llama"))
    with pytest.raises(ModelError, match="this model came without a tokenizer: give tokenizer="):
        model.run("a b")
    with pytest.raises(ModelError, match="a prompt is empty"):
        Model.load(folder, tokenizer=Words()).run("")
    shutil.rmtree(folder)
