"""Signals and flow from the shell: the numbers are those of Python, the planted head loses its key with its signal, bad input is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch

from patchclamp.discover.flow import flow, flow_heads
from patchclamp.discover.signal_table import signal_table
from patchclamp.discover.signals import signals, trace
from patchclamp.errors import PatchclampError
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.zoo import wired
from saved_model import save

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(wired("induction"), tmp_path_factory.mktemp("models") / "wired")


PROMPT = "apple bear so cloud door the apple"
"""The induction head looks from the last apple at what followed the first: bear."""


def test_a_signal_taken_out_takes_the_attention_with_it(cli: Cli, folder: Path, tmp_path: Path):
    given = ("signals", folder, PROMPT, "--head", "L1.h2", "--at", "-1")
    code, out, err = cli(*given, "--json", "--out", tmp_path / "signals.csv")
    assert code == 0, err
    (row,) = json.loads(out)["signals"]
    model = Model.load(folder)
    ids = model.encode(PROMPT).tokens[0]
    (one,) = [one for one in signals(model, ids, [Site("head", 1, 2)]) if one.query == len(ids) - 1]
    assert (row["head"], row["query_token"], row["key_token"]) == ("L1.h2", "apple", "bear")
    assert (row["key"], row["count"], row["rank"]) == (one.key, one.count, len(one.terms))
    for name, value in (("weight", one.weight), ("score", one.score), ("strength", one.strength)):
        assert row[name] == pytest.approx(value, rel=1e-5)
    first = trace(model, ids, one).filter(pl.col("side") == "key").row(0, named=True)
    assert (row["key_writer"], row["key_share"]) == (first["part"], pytest.approx(first["share"], rel=1e-5))
    assert row["key_writer"] == "L0.h1"
    # what it attends to falls by the signal's strength, e to the so many: the head looks elsewhere; not so without other directions
    assert row["without"] < 0.01 * row["weight"] and row["without_others"] == pytest.approx(row["weight"], abs=0.01)
    assert pl.read_csv(tmp_path / "signals.csv")["head"].to_list() == ["L1.h2"]
    code, out, _ = cli(*given)
    assert code == 0 and "bear" in out and "L0.h1" in out


def test_where_a_score_is_not_above_zero_nothing_is_traced():
    truth = wired("induction")
    model = Model.load(truth.hf, tokenizer=truth.tokenizer)
    ids = model.encode(PROMPT).tokens[0]
    heads, end = (
        [Site("head", 0, 3), Site("head", 1, 2)],
        len(ids) - 1,
    )  # one that is silent, and attends evenly; the induction head
    table = signal_table(model, ids, heads, [-1], above=0.1)
    every = [one for one in signals(model, ids, heads, above=0.1) if one.query == end]
    assert table.height == len(every) and table["weight"].to_list() == sorted(table["weight"].to_list(), reverse=True)
    empty = table.filter(pl.col("count") == 0)
    assert empty.height == sum(one.count == 0 for one in every) > 0
    assert empty["without"].null_count() == empty["key_writer"].null_count() == empty.height
    with pytest.raises(PatchclampError, match="positions -8 to 7"):
        signal_table(model, ids, at=[8])


def test_routes_of_a_prompt_are_those_of_python(cli: Cli, folder: Path):
    code, out, err = cli("flow", folder, PROMPT, "--threshold", "0.1", "--json")
    assert code == 0, err
    model = Model.load(folder)
    expected = flow(model, PROMPT).routes(threshold=0.1)
    assert json.loads(out)["routes"] == json.loads(json.dumps(expected.to_dicts()))
    code, out, _ = cli("flow", folder, PROMPT)
    assert code == 0 and "contributions of 0.04" in out and "apple (7)" in out


def test_flow_over_a_corpus_is_that_of_its_rows(cli: Cli, folder: Path, tmp_path: Path):
    """Texts of their own length without packing, each with a first token as the tokenizer has it: rows are the texts, in any order."""
    texts = [PROMPT, "door bear so door", "cloud the cloud bear"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    given = ("flow", folder, "--corpus", tmp_path / "texts.jsonl", "--no-pack", "--length", "9")
    code, out, err = cli(*given, "--json", "--out", tmp_path / "flow.parquet")
    assert code == 0, err
    body, model = json.loads(out), Model.load(folder)
    assert (body["rows"], body["tokens"]) == (3, 18)
    expected = flow_heads(model, texts)
    key = ["site", "class", "relation"]
    found = pl.read_parquet(tmp_path / "flow.parquet").sort(key)
    assert found.select(key).equals(expected.sort(key).select(key))
    torch.testing.assert_close(found["share"].to_torch(), expected.sort(key)["share"].to_torch(), rtol=1e-5, atol=1e-7)
    few = json.loads(cli(*given, "--from", "previous", "--class", "word", "--texts", "2", "--json")[1])
    assert few["rows"] == 2 and {(row["class"], row["relation"]) for row in few["heads"]} == {("word", "previous")}
    code, out, _ = cli(*given, "--top", "3")
    assert code == 0 and "over 18 tokens of 3 rows" in out


def test_what_makes_no_sense_is_refused(cli: Cli, folder: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text(PROMPT)
    for words, told in (
        (("signals", folder, ""), "the prompt is empty"),
        (("signals", folder, PROMPT, "--head", "L0.mlp"), "L0.mlp is no head"),
        (("signals", folder, PROMPT, "--at", "40"), "positions -8 to 7"),
        (("signals", folder, PROMPT, "--out", tmp_path / "a.txt"), ".parquet or .csv"),
        (("signals", folder, PROMPT, "--above", "3"), "from 0 to below 1"),
        (("flow", folder), "give PROMPT, or --corpus"),
        (("flow", folder, PROMPT, "--corpus", tmp_path / "a.txt"), "not both"),
        (("flow", folder, PROMPT, "--class", "word"), "are of a corpus"),
        (("flow", folder, "--corpus", tmp_path / "a.txt", "--from", "nowhere"), "choose from itself"),
        (("flow", folder, "--corpus", tmp_path / "none.txt"), "none.txt"),
        (("flow", folder, "--corpus", tmp_path / "a.txt", "--class", "verb"), "choose from word, capital"),
        (("flow", folder, "--corpus", tmp_path / "a.txt", "--texts", "0"), "choose 1 or more"),
        (
            ("flow", folder, "--corpus", tmp_path / "a.txt", "--length", "5", "--class", "number"),
            "no token of these texts is of the class",
        ),
    ):
        code, _, err = cli(*words)
        assert code == 2 and told in err, (words, err)
    assert (tmp_path / "a.txt").read_text() == PROMPT
