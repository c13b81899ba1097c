"""What measures find in models that others trained; the figures of docs/measures.md."""

import json
from pathlib import Path

import polars as pl
import pytest
import torch

from patchclamp.models.model import Model
from patchclamp.units import dormancy, heads, int8, intervene, massive, places, sinks
from patchclamp.units.recall import recall, without

pytestmark = pytest.mark.long
"""Each test runs a thousand short stories' beginnings through a small model: under a minute, but not every time."""


def stories(shared: Path, model: Model, length: int) -> torch.Tensor:
    """The first 64 stories with so many tokens, cut there; the model's first token before them."""
    lines = (shared / "data/tinystories-sample/stories.jsonl").read_text().splitlines()[:600]
    rows = [model.tokenizer(json.loads(line)["text"], truncation=True, max_length=length)["input_ids"] for line in lines]
    return torch.tensor([row for row in rows if len(row) == length][:64])


def value(table: pl.DataFrame, part: str, name: str) -> tuple[float, float, float]:
    ((found, low, high),) = table.filter(part=part, name=name).select("value", "low", "high").rows()
    return found, low, high


def test_stories260k_has_heads_for_the_token_before_and_no_induction_and_no_sink(shared: Path) -> None:
    model = Model.load(str(shared / "models/stories260k-llama"))
    found = heads(model)
    before = found.filter(name="previous").sort("value", descending=True)
    assert before["part"][0] == "L3.h6" and before["low"][0] > 0.75
    assert found.filter(pl.col("name") == "induction", pl.col("part") != "model")["high"].max() < 0.15  # type: ignore[operator]
    memory = recall(model)
    assert value(memory, "model", "serial")[2] < value(memory, "model", "chance")[0]
    rest = sinks(model, stories(shared, model, 256), length=64)
    assert value(rest, "model", "chance.alpha")[0] == pytest.approx(0.0741, abs=1e-4)
    assert value(rest, "model", "sink")[0] == 0 and rest.filter(name="alpha")["high"].max() < 0.2  # type: ignore[operator]
    cost = int8(model, stories(shared, model, 256))
    assert 0 < value(cost, "model", "change.int8")[0] < 0.03


def test_tinystories656k_has_sinks_and_an_activation_that_is_a_bias(shared: Path) -> None:
    """One coordinate, largest at the first token: at zero it costs half a nat, at its mean next to nothing (as in the paper)."""
    model = Model.load(str(shared / "models/tinystories-656k-llama"))
    rows = stories(shared, model, 128)
    rest = sinks(model, rows, length=64)
    found, low, high = value(rest, "model", "sink")
    assert 0.08 < low < found < high < 0.17 and value(rest, "L1.kv3", "drain")[2] < 0.5
    assert value(rest, "L0.resid.post", "peak")[1] > 2.5
    size = massive(model, rows)
    assert value(size, "L0.resid.post", "ratio")[1] > 45 and value(size, "L0.resid.post", "massive")[0] == 0
    first = places(model, rows[:4], top=1).filter(part="L1.resid.post")
    assert first["coordinate"].unique().to_list() == [88] and first["position"].unique().to_list() == [0]
    changed = intervene(model, rows, above=5.0, times=20.0, ways=("zero", "mean", "others"))
    zero, mean, others = (value(changed, "L0.resid.post", f"change.{way}") for way in ("zero", "mean", "others"))
    assert zero[1] > 0.5 and mean[2] < 0.1 and others[2] < 0.01 and zero[1] > 5 * mean[2]


def test_no_head_of_the_story_models_is_what_recall_needs(shared: Path) -> None:
    model = Model.load(str(shared / "models/tinystories-656k-llama"))
    best = heads(model).filter(pl.col("name") == "induction", pl.col("part") != "model").sort("value", descending=True)
    change = without(model, best["part"][:4].to_list())
    found, low, high = value(change, "model", "change")
    assert low <= 0 <= high and abs(found) < 0.01  # there is nothing to lose
    switch = dormancy(
        model, {"stories": stories(shared, model, 64)[:16], "random": torch.randint(3, 2000, (16, 64))}, effects=False
    )
    assert switch.filter(name="switch")["value"].abs().max() < 0.3  # type: ignore[operator]
