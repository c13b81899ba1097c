"""The command line as a stranger meets it: every command, every bad input with its message, code 2 and nothing left behind."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from patchclamp.cli import PANELS, app
from patchclamp.zoo import wired
from patchclamp.zoo._wired import Wired
from saved_model import save

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session")
def truth() -> Wired:
    return wired("interfering")


@pytest.fixture(scope="session")
def saved(truth: Wired, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hand-wired model as a folder, with its pairs as JSONL beside it."""
    truth.hf.to(torch.float32)
    return save(truth, tmp_path_factory.mktemp("models") / "wired", 96)


QUICK = ("--no-nulls", "--random-circuits", "10")


def test_a_map_from_the_shell(cli: Cli, saved: Path, tmp_path: Path, truth: Wired, few_gates):
    with few_gates():
        code, out, err = cli("map", saved, saved / "pairs.jsonl", "--out", tmp_path / "run", *QUICK)
    assert code == 0, err
    assert str(tmp_path / "run" / "report.html") in out and "Circuit" in out
    interfering = next(site for site, role in truth.truth.roles.items() if role == "interfering")
    assert f"{interfering} interferes with the behaviour" in out
    code, out, _ = cli("trust", tmp_path / "run", "--json")
    body = json.loads(out)
    assert code == 0 and body["trust"]["draws"] == 10 and Path(body["report"]).is_file()
    assert all("exact" in row and "role" in row for row in body["scores"])  # what the map found is still there
    code, out, _ = cli("report", tmp_path / "run", "--csv", tmp_path / "parts.csv", "--figures", tmp_path / "figures")
    assert code == 0 and pl.read_csv(tmp_path / "parts.csv").height == len(truth.truth.roles)
    assert (tmp_path / "figures" / "effects.svg").read_text().startswith("<svg")
    code, out, _ = cli("runs", tmp_path, "--json")
    assert [row["status"] for row in json.loads(out)] == ["finished"]


@pytest.mark.parametrize("command", ["attribute", "verify", "discover", "trust"])
def test_a_part_of_the_map(cli: Cli, saved: Path, tmp_path: Path, command: str):
    quick = QUICK if command in ("map", "trust") else QUICK[:1]
    code, out, err = cli(command, saved, saved / "pairs.jsonl", "--out", tmp_path / "run", "--n", 48, "--json", *quick)
    assert code == 0, err
    body = json.loads(out)
    assert (body["circuit"] is not None) == (command in ("discover", "trust"))
    assert (body["trust"] is not None) == (command == "trust")


def test_gate(cli: Cli, saved: Path, tmp_path: Path, few_gates):
    with few_gates():
        code, out, err = cli("gate", saved, saved / "pairs.jsonl", "--out", tmp_path / "run", "--n", 64, "--no-nulls", "--json")
    assert code == 0, err
    rows = json.loads(out)["scores"]
    assert all({"gate", "gate_plus", "gate_minus", "role"} <= set(row) for row in rows)


def test_looking(cli: Cli, saved: Path):
    assert "ioi" in cli("tasks")[1]
    code, out, _ = cli("tasks", saved / "pairs.jsonl", "--model", saved)
    assert code == 0 and "clean" in out and "answer" in out
    assert "gpt_neox" in cli("families")[1]
    assert "zoo/small" in cli("zoo", "list")[1] and "ioi" in cli("zoo", "about", "zoo/small")[1]
    assert cli("zoo", "about", "smal")[0] == 2
    assert json.loads(cli("sites", saved, "--json")[1])
    code, out, _ = cli("doctor", saved)
    assert code == 0 and "sound" in out
    assert "0.1.0" in cli("--version")[1]


def test_record_and_generate(cli: Cli, saved: Path, tmp_path: Path, truth: Wired):
    prompt = json.loads((saved / "pairs.jsonl").read_text().splitlines()[0])["clean"]
    code, out, err = cli("record", saved, prompt, "-s", "L*.h*.pattern", "-s", "embed", "--out", tmp_path / "seen.safetensors")
    assert code == 0, err
    kept = load_file(tmp_path / "seen.safetensors")
    assert kept["L1.h2.pattern"].shape[-1] == kept["tokens"].shape[-1]
    code, out, err = cli("generate", saved, prompt, "--max-new-tokens", 2, "-e", "L1.h0=zero", "--json")
    assert code == 0 and json.loads(out)[0]["text"]
    code, _, err = cli("generate", saved, prompt, "-e", "L1.h0=nothing")
    assert code == 2 and "SITE=zero" in err
    code, _, err = cli("record", saved, prompt, "-s", "L9.mlp", "--out", tmp_path / "none.safetensors")
    assert code == 2 and "layers 0 to" in err and not (tmp_path / "none.safetensors").exists()


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_bad_input_is_said_and_leaves_nothing(cli: Cli, saved: Path, tmp_path: Path):
    good = json.loads((saved / "pairs.jsonl").read_text().splitlines()[0])
    out = tmp_path / "run"
    longer = lines(tmp_path / "longer.jsonl", *[{**good, "corrupt": good["corrupt"] + " " + good["clean"].split()[0]}] * 3)
    cases: list[tuple[tuple[object, ...], str]] = [
        (("map", tmp_path / "nowhere", "ioi"), "there is no folder"),
        (("map", saved, "no_such_task"), "there is no task 'no_such_task'"),
        (("map", saved, lines(tmp_path / "bad.jsonl", good, "{not json")), "line 2"),
        (("map", saved, longer), "align"),
        (("map", saved, lines(tmp_path / "empty.jsonl")), "empty"),
        (("map", saved, saved / "pairs.jsonl", "--metric", "bleu"), "there is no metric 'bleu'"),
        (("map", saved, saved / "pairs.jsonl", "--fallback", "median"), "there is no fallback 'median'"),
        (("map", saved, saved / "pairs.jsonl", "--n", 4000), "96"),
        (("map", saved, saved / "pairs.jsonl", "--budget", "huge"), "default, code, paper"),
        (("map", saved, saved / "pairs.jsonl", "--faithfulness", 3), "from 0 to 1"),
        (("map", saved, saved / "pairs.jsonl", "--option", "nonsense"), "key=value"),
        (("map", saved), "no TASK was given"),
        (("map", saved, saved / "pairs.jsonl", "--method", "foo"), "there is no method 'foo'"),
        (
            ("map", saved, saved / "pairs.jsonl", "--routing", "loose"),
            "--routing 'loose' was asked for: choose from free, frozen",
        ),
        (("map", saved, saved / "pairs.jsonl", "--routing", "frozen"), "has no router"),
        (("map", saved, saved / "pairs.jsonl", "--second", "resample"), "another than the first"),
        (("map", saved, saved / "pairs.jsonl", "--seed", -1), "0 or more"),
        (("map", saved, saved / "pairs.jsonl", "--lambda", -1), "above 0"),
        (("map", saved, saved / "pairs.jsonl", "--n", 3), "16 or more"),
        (("map", saved, saved / "pairs.jsonl", "--device", "tpu"), "'tpu'"),
        (("map", saved, lines(tmp_path / "typo.jsonl", {"clean": "a", "corupt": "b", "answer": "c"})), "is 'corrupt' meant?"),
    ]
    for words, said in cases:
        code, _, err = cli(*words, "--out", out)
        assert code == 2, (words, err)
        assert said in err, (words, err)
        assert "Traceback" not in err and not out.exists(), words


def test_bad_input_of_looking(cli: Cli, saved: Path, tmp_path: Path):
    for words, said in (
        (("record", saved, "nofile.jsonl", "-s", "L0.z", "--out", tmp_path / "v.safetensors"), "there is no file nofile.jsonl"),
        (("generate", saved, "a", "-e", "L0.h0=clamp:1,-1"), "must not be above"),
        (("zoo", "about", "nope"), "induction"),
        (("zoo", "load", "small"), "has no recipe to check it by"),
        (("develop", "zoo/small", "--task", "ioi", "--out", tmp_path / "d"), "a finished model without checkpoints"),
        (
            ("train", saved, "--data", "none.txt", "--out", tmp_path / "t", "--steps", 3, "--lora-dropout", 0.5),
            "--lora-dropout is of LoRA",
        ),
        (("clamp", "induction", "--data", "none.txt", "--out", tmp_path / "c", "--ablate", "L0.h0"), "has data of its own"),
        (("clamp", "induction", "--steps", 2, "--out", tmp_path / "c", "--ablate", "L0.h0"), "train 8 steps or more"),
    ):
        code, _, err = cli(*words)
        assert code == 2 and said in err and not (tmp_path / "v.safetensors").exists(), (words, err)


def test_a_model_that_cannot_do_it(cli: Cli, saved: Path, tmp_path: Path):
    rows = [json.loads(line) for line in (saved / "pairs.jsonl").read_text().splitlines()]
    wrong = lines(tmp_path / "wrong.jsonl", *({**row, "answer": row["wrong"], "wrong": row["answer"]} for row in rows))
    code, _, err = cli("map", saved, wrong, "--out", tmp_path / "run")
    assert code == 2 and "does not show the behaviour" in err and "--min-accuracy" in err
    assert not (tmp_path / "run").exists()


def test_weights_that_are_no_numbers(cli: Cli, saved: Path, tmp_path: Path):
    sick = wired("interfering").hf.to(torch.float32)
    with torch.no_grad():
        sick.transformer.h[1].mlp.c_proj.weight[0, 0] = float("nan")
    sick.save_pretrained(tmp_path / "sick")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "sick" / name).write_text((saved / name).read_text())
    code, _, err = cli("map", tmp_path / "sick", saved / "pairs.jsonl", "--out", tmp_path / "run")
    assert code == 2 and "nan" in err.lower() and not (tmp_path / "run").exists()


def test_damage_is_named(cli: Cli, saved: Path, tmp_path: Path):
    run = tmp_path / "run"
    assert cli("verify", saved, saved / "pairs.jsonl", "--n", 48, "--out", run)[0] == 0
    body = bytearray((run / "scores.parquet").read_bytes())
    body[len(body) // 2] ^= 255
    (run / "scores.parquet").write_bytes(body)
    code, _, err = cli("report", run)
    assert code == 2 and "scores.parquet" in err
    (run / "manifest.json").write_text("{}")
    code, _, err = cli("verify", run)
    assert code == 2 and "manifest" in err


def test_where_nothing_can_be_written(cli: Cli, saved: Path, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("here already")
    code, _, err = cli("verify", saved, saved / "pairs.jsonl", "--n", 48, "--out", file / "run")
    assert code == 2 and str(tmp_path) in err and file.read_text() == "here already"
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    code, _, err = cli("verify", saved, saved / "pairs.jsonl", "--n", 48, "--out", full)
    assert code == 2 and "not empty" in err and os.listdir(full) == ["mine.txt"]


def test_markup_in_a_prompt_stays_text(cli: Cli, tmp_path: Path, shared: Path):
    rows = [{"clean": f"</script><b>{a}{b}", "corrupt": f"</script><b>{b}{a}", "answer": c, "wrong": d}
            for a, b, c, d in (("x", "y", "a", "b"), ("q", "r", "c", "d"), ("k", "l", "e", "f"), ("m", "n", "g", "h"))]  # fmt: skip
    task = lines(tmp_path / "markup.jsonl", *rows)
    model = shared / "models" / "shakespeare-byte-gpt2"
    code, _, err = cli("verify", model, task, "--min-accuracy", 0, "--out", tmp_path / "run")
    assert code == 0, err
    page = (tmp_path / "run" / "report.html").read_text()
    assert "</script><b>" not in page and "&lt;" in page


def test_help_groups_every_command():
    grouped = [name for names in PANELS.values() for name in names]
    known = {info.name or getattr(info.callback, "__name__", "") for info in (*app.registered_commands, *app.registered_groups)}
    assert len(grouped) == len(set(grouped)) and set(grouped) == known
