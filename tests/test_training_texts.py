"""Where training begins and what it reads: configurations, adapters, texts; and the command."""

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from cases import CONFIGS, tiny
from patchclamp.errors import ModelError, TrainingError
from patchclamp.models.model import Model
from patchclamp.training import Tokens, Training, begin, lora, texts, train
from patchclamp.training import trainer as trainer_module
from small_tokenizers import words

CONFIG = {"model_type": "gpt2", **CONFIGS["gpt2"]}
TEXTS = [
    f"the {animal} sees {count} of the {other} ."
    for animal in ("cat", "dog", "owl")
    for other in ("mice", "hens")
    for count in range(9)
]
PEFT = "ignore:`is_gradient_checkpointing` is deprecated"


def tokens(rows: int = 12, width: int = 6) -> Tokens:
    return Tokens(torch.randint(3, 97, (rows, width), generator=torch.Generator().manual_seed(0)))


def test_weights_are_drawn_by_the_seed_from_a_dict_a_file_or_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    random = torch.random.get_rng_state()
    models = [begin(CONFIG, seed=3), begin(tmp_path / "config.json", seed=3), begin(str(tmp_path), seed=3, attention="eager")]
    for model in models[1:]:
        for a, b in zip(models[0].hf.parameters(), model.hf.parameters(), strict=True):
            assert torch.equal(a, b)
    assert models[2].hf.config._attn_implementation == "eager"
    assert not torch.equal(models[0].hf.transformer.wte.weight, begin(CONFIG, seed=4).hf.transformer.wte.weight)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert begin("zoo/small", attention="eager").hf.dtype == torch.float32
    assert begin("zoo/small").tokenizer is not None


def test_configurations_that_are_none(tmp_path):
    def refused(source, message, **more):
        with pytest.raises(ModelError, match=message):
            begin(source, **more)

    refused({"n_layer": 2}, "has no model_type")
    refused({**CONFIG, "model_type": "nonesuch"}, "a nonesuch model of this configuration was asked, and transformers refuses")
    refused({**CONFIG, "n_head": 5}, "and transformers refuses: ")
    refused(CONFIG, "transformers refuses: ", attention="nonesuch")
    refused(CONFIG, "there is no dtype 'float3'", dtype="float3")
    (tmp_path / "config.json").write_text("[1]")
    refused(tmp_path / "config.json", "holds no configuration")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path / "config.json", "cannot be read")
    refused(tmp_path / "nothing.json", "cannot be read")


@pytest.mark.filterwarnings(PEFT)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in ("gpt2", "gemma2") else [pytest.mark.long]) for name in CONFIGS]
)
def test_lora_trains_factors_alone(family, tmp_path):
    """Before training the same logits; the base keeps every bit; a checkpoint is W + B A alpha / rank, to 1e-5, and goes on exactly."""
    base = Model.load(tiny(family))
    before = {name: value.clone() for name, value in base.hf.state_dict().items()}
    grads = [p.requires_grad for p in base.hf.parameters()]
    data, plan = tokens(), Training(6, batch=3, rate=0.02, schedule="constant", checkpoints=(3,))
    some = data.rows(0, 2).tokens
    adapted = lora(base, 2, alpha=6, dropout=0.2, seed=1)
    torch.testing.assert_close(adapted.run(some), base.run(some), atol=1e-6, rtol=0)
    trained = [name for name, p in adapted.hf.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    run = train(adapted, data, plan, tmp_path / "whole")
    assert float((run.model.run(some) - base.run(some)).abs().max()) > 1e-3
    for name, value in base.hf.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [p.requires_grad for p in base.hf.parameters()] == grads
    folder = tmp_path / "whole" / "checkpoints" / "step-0000006"
    loaded = begin(folder)
    if not family.startswith("falcon"):  # whose kernels differ, and cannot be chosen anew
        loaded.hf.set_attn_implementation("eager")
        torch.testing.assert_close(loaded.run(some), run.model.run(some), atol=1e-5, rtol=0)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()

    class Cut(Exception):
        pass

    def cut(done, of, numbers):
        if done == 5:
            raise Cut

    with pytest.raises(Cut):
        train(lora(base, 2, alpha=6, dropout=0.2, seed=1), data, plan, tmp_path / "cut", tick=cut)
    again = train(lora(base, 2, alpha=6, dropout=0.2, seed=1), data, plan, tmp_path / "cut")
    for (name, a), b in zip(run.model.hf.named_parameters(), again.model.hf.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(TrainingError, match=r"adapters.default.lora_alpha is 6 there, and 2 was asked"):
        train(lora(base, 2, dropout=0.2, seed=1), data, plan, tmp_path / "cut")


@pytest.mark.filterwarnings(PEFT)
def test_lora_that_cannot_be():
    base = Model.load(tiny("gpt2"))
    with pytest.raises(TrainingError, match="rank of 1 or more"):
        lora(base, 0)
    with pytest.raises(TrainingError, match=r"LoRA was asked of .'nothing'.: "):
        lora(base, 2, targets=["nothing"])
    with pytest.raises(TrainingError, match="wears an adapter already"):
        lora(lora(base, 2), 2)


def test_each_epoch_has_every_row_once_and_none_that_is_set_aside():
    """In an order of its own, the same in another object; what is set aside comes in negative steps alone, in a circle."""
    data = Tokens(torch.arange(44).reshape(11, 4), seed=5, held=3)
    drawn = torch.cat([data.rows(step, 5).tokens[:, 0] for step in range(8)]).tolist()  # 40 rows: five epochs of eight
    epochs = [drawn[start : start + 8] for start in range(0, 40, 8)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    aside = [data.rows(-step, 2).tokens[:, 0].tolist() for step in (1, 2, 3)]
    assert Counter(row for rows in aside for row in rows) == Counter({row: 2 for row in {*range(0, 44, 4)} - {*drawn}})
    twin = Tokens(torch.arange(44).reshape(11, 4), seed=5, held=3)
    assert torch.equal(twin.rows(7, 5).tokens, data.rows(7, 5).tokens)
    assert twin.name == data.name != Tokens(torch.arange(44).reshape(11, 4) + 1, seed=5, held=3).name
    assert not torch.equal(Tokens(torch.arange(44).reshape(11, 4), seed=6, held=3).rows(0, 5).tokens, data.rows(0, 5).tokens)
    with pytest.raises(TrainingError, match="there are none"):
        tokens().rows(-1, 2)
    with pytest.raises(TrainingError, match="12 of 12 rows were to be set aside"):
        Tokens(torch.ones(12, 4, dtype=torch.long), held=12)


def test_texts_are_read_alike_from_every_kind_of_file(tmp_path):
    """JSONL, Parquet, a folder of both halves, and what datasets saved; a .txt is one text."""
    datasets = pytest.importorskip("datasets")
    tokenizer = words(TEXTS)
    rows = [{"story": text} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    pl.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "1.jsonl").write_text("\n".join(map(json.dumps, rows[:20])))
    pl.DataFrame(rows[20:]).write_parquet(tmp_path / "both" / "2.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "splits")
    whole = texts(TEXTS, tokenizer, 16)
    flat = [token for text in TEXTS for token in tokenizer(text)["input_ids"]]
    assert whole.tokens.flatten().tolist() == flat[: len(flat) // 16 * 16]
    for name in ("a.jsonl", "a.parquet", "both", "saved", "splits"):
        assert torch.equal(texts(tmp_path / name, tokenizer, 16, column="story").tokens, whole.tokens), name
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    assert torch.equal(texts(tmp_path / "a.txt", tokenizer, 16).tokens, whole.tokens)
    tokenizer.eos_token = "<s>"
    ended = texts(TEXTS, tokenizer, 16).tokens.flatten().tolist()
    parted = [token for text in TEXTS for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    assert ended == parted[: len(parted) // 16 * 16]


def test_a_text_a_row_is_padded_under_the_mask():
    tokenizer = words(TEXTS)
    data = texts(["the cat", "the cat sees 1 of the mice .", "the"], tokenizer, 6, pack=False)
    assert data.tokens.shape == (2, 6)  # one token predicts nothing
    rows = data.at(torch.tensor([0, 1]))
    assert rows.real.sum(1).tolist() == [len(tokenizer("the cat")["input_ids"]), 6]
    assert torch.equal(rows.weights, rows.real.float())


def test_texts_that_cannot_be_read(tmp_path):
    tokenizer = words(TEXTS)

    def refused(message, name, body=None, **more):
        if body is not None:
            (tmp_path / name).write_bytes(body)
        with pytest.raises(TrainingError, match=message):
            texts(tmp_path / name, tokenizer, **{"length": 8, **more})

    refused("there is no text at", "nothing.txt")
    refused("ends in .csv: texts are read from .txt, .jsonl, .parquet", "a.csv", b"a,b")
    refused("is no text in UTF-8", "a.txt", b"\xff\xfe\xff")
    refused("line 2 is no JSON", "a.jsonl", b'{"text": "the cat"}\n{')
    refused("line 1 has no text in 'story'", "b.jsonl", b'{"text": "the cat"}', column="story")
    refused("is no Parquet", "a.parquet", b"PAR1")
    refused("less than one row of 800", "c.jsonl", b'{"text": "the cat"}', length=800)
    refused("a share below 1", "c.jsonl", held=1.0)
    with pytest.raises(TrainingError, match="the model has no tokenizer"):
        texts(TEXTS, None)


@pytest.fixture
def room(tmp_path):
    """A configuration, a tokenizer and texts."""
    words(TEXTS).save_pretrained(tmp_path / "tok")
    (tmp_path / "c.json").write_text(json.dumps(CONFIG))
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return tmp_path


def test_the_command_trains_goes_on_and_refuses(cli, room, monkeypatch):
    given = ("train", "c.json", "--tokenizer", "tok", "--data", "t.jsonl", "--out", "run", "--length", 16, "--batch", 4, "--held-out", 0.2,
             "--checkpoints", "3,5")  # fmt: skip
    code, out, errors = cli(*given, "--steps", 8, "--dry-run", "--json")
    assert code == 0, errors
    found = json.loads(out)
    assert code == 0 and not (room / "run").exists()
    assert found["trained"] == found["parameters"] and found["tokens"] == 8 * 4 * 16 and found["disk"] == 4 * found["checkpoint"]

    own = trainer_module.train

    def interrupted(*positional, tick, **named):
        def press(done, of, numbers):
            tick(done, of, numbers)
            if done == 4:
                signal.raise_signal(signal.SIGINT)

        return own(*positional, tick=press, **named)

    with monkeypatch.context() as patched:
        patched.setattr("patchclamp.training.train", interrupted)
        code, out, errors = cli(*given, "--steps", 8)
    assert (code, out) == (130, "") and "interrupted; run holds the last update: run the same command again to go on" in errors
    code, out, errors = cli(*given, "--steps", 8)
    assert code == 0 and "goes on from step 4" in errors and "4 checkpoints, each a model" in out
    number = r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]"
    assert re.search(rf"rows that were set aside: {number} before, {number} after \(95 % over rows\)", " ".join(out.split()))
    sizes = sum(path.stat().st_size for path in (room / "run" / "checkpoints" / "step-0000008").glob("[mo]*.safetensors"))
    assert found["checkpoint"] == pytest.approx(sizes, rel=0.05)  # the rest is headers

    before = sorted(path for path in room.rglob("*"))
    for words_, message in (
        (("--steps", 9), "run holds another training: training.steps is 8 there, and 9 was asked"),
        ((), "give --steps or --epochs, and not both"),
        (("--steps", 8, "--precision", "int8"), "precision 'int8' was asked: choose from float32, bfloat16, float16"),
        (("--steps", 8, "--checkpoints", "x"), "--checkpoints 'x' is neither a number nor steps"),
        (("--steps", 8, "--out", "new", "--length", 99), "rows are 99 tokens long, and GPT2LMHeadModel has 64 positions"),
        (("--steps", 8, "--out", "new", "--column", "story"), "has no text in 'story'"),
        (("--steps", 8, "--out", "new", "--lora", 0), "give a rank of 1 or more"),
        (("--steps", 8, "--out", "new", "--attention", "nonesuch"), "transformers refuses"),
    ):
        code, out, errors = cli(*given, *words_)
        assert (code, out) == (2, "") and message in errors, (errors, message)
        assert sorted(path for path in room.rglob("*")) == before


@pytest.mark.filterwarnings(PEFT)
def test_the_command_adapts_a_pretrained_model(cli, room):
    code, out, errors = cli("train", "zoo/small", "--data", "t.jsonl", "--out", "run", "--epochs", 0.5, "--length", 16, "--batch", 4, "--lora", 2,
                            "--lora-targets", "q_proj,v_proj", "--checkpoints", 1, "--json")  # fmt: skip
    assert code == 0, errors
    found = json.loads(out)
    assert found["held_out"]["last"] < found["held_out"]["first"] and found["checkpoints"] == [0, found["steps"]]
    for which in ("first", "last"):
        low, high = found["held_out"][f"{which}_interval"]
        assert low < found["held_out"][which] < high
    assert Model.load(room / "run" / "checkpoints" / f"step-{found['steps']:07d}").tokenizer is not None


@pytest.mark.long
def test_a_launcher_starts_several_processes(cli, room):
    """torchrun with two of them against one: the same held-out losses and weights, to 1e-5 (sums in another order), said once."""
    (room / "still.json").write_text(json.dumps({**CONFIG, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}))
    given = (
        "train",
        "still.json",
        "--tokenizer",
        "tok",
        "--data",
        "t.jsonl",
        "--steps",
        4,
        "--batch",
        4,
        "--length",
        16,
        "--optimizer",
        "sgd",
        "--json",
    )
    code, out, errors = cli(*given, "--out", "one")
    assert code == 0, errors
    alone, here = json.loads(out), Path(sys.executable).parent
    command = (here / "torchrun", "--nproc-per-node", 2, "--no-python", here / "patchclamp", *given, "--out", "two")
    told = subprocess.run([str(word) for word in command], cwd=room, capture_output=True, text=True, timeout=300, check=False)
    assert told.returncode == 0, told.stderr
    both = json.loads(told.stdout)
    for which in ("first", "last"):
        assert both["held_out"][which] == pytest.approx(alone["held_out"][which], abs=1e-5)
    one, two = (load_file(room / name / "checkpoints/step-0000004/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0)
