"""Relate: what is planted in wired models comes out of the step, the command and the report by name."""

import importlib
import json
from pathlib import Path

import polars as pl
import pytest

from patchclamp.errors import PatchclampError
from patchclamp.models.model import Model
from patchclamp.report import render
from patchclamp.study import Plan, Study, map, open_run
from patchclamp.study.cost import cost
from patchclamp.zoo import wired
from patchclamp.zoo._wired import Wired


def related(name: str, fallback: str, second: str) -> tuple[Wired, Study]:
    model, plan = wired(name), Plan(n=128, fallback=fallback, second=second)
    return model, map(Model.load(model.hf, tokenizer=model.tokenizer), model.task, plan, do=("relate",))


@pytest.fixture(scope="module")
def redundant() -> tuple[Wired, Study]:
    return related("redundant", "resample", "zero")


def test_a_redundant_pair_is_said_by_name(redundant: tuple[Wired, Study]):
    """Closing either alone takes nothing, closing both everything: I = -(all that there is), in closed form."""
    model, study = redundant
    found = study.record.relations
    assert found is not None
    row = found.pairs.filter((pl.col("a") == "L0.h1") & (pl.col("b") == "L1.h2")).row(0, named=True)
    alone = [model.truth.effects["resample"][part] for part in ("L0.h1", "L1.h2")]
    both = model.truth.joint[frozenset({"L0.h1", "L1.h2"})]["resample"]
    assert row["relation"] == "redundancy" and row["word"] == "OR"
    assert row["interaction"] == pytest.approx(sum(alone) - both, abs=1e-5)
    statements = {claim.statement: claim.verdict for claim in study.claims}
    assert statements["L0.h1 and L1.h2 stand in for each other: either alone is enough"] == "supported"
    changed = found.changed.filter((pl.col("a") == "L0.h1") & (pl.col("b") == "L1.h2")).row(0, named=True)
    assert changed["role"] == "facilitating" and abs(changed["open"]) < 1e-6 and changed["score"] == pytest.approx(both, abs=1e-5)
    idle = {part for part, role in model.truth.roles.items() if role == "irrelevant"}
    assert not set(found.pairs.filter(pl.col("word").is_in(["AND", "OR"]))["a"]) & idle
    assert found.parts["site"].to_list() == found.parts.sort("order")["site"].to_list() and found.parts.height == 10


@pytest.mark.long
def test_a_pair_that_needs_each_other_is_said_too():
    _, study = related("and", "zero", "mean")
    found = study.record.relations
    assert found is not None
    row = found.pairs.filter((pl.col("a") == "L0.h1") & (pl.col("b") == "L0.h2")).row(0, named=True)
    assert row["word"] == "AND" and row["interaction"] == pytest.approx(6.5, abs=1e-5)  # each alone takes all that there is
    assert "L0.h1 and L0.h2 need each other" in [claim.statement for claim in study.claims]


def test_the_report_shows_relations(redundant: tuple[Wired, Study]):
    text = render(redundant[1].record)
    for said in ("Interaction of every pair", "redundancy", "Roles that depend on another part", "connectome", "modularity"):
        assert said in text


def test_relations_are_kept_and_their_cost_is_known(tmp_path: Path, redundant: tuple[Wired, Study]):
    model = wired("redundant")
    loaded, plan = Model.load(model.hf, tokenizer=model.tokenizer), Plan(n=64, pairs_of=4)
    with open_run(tmp_path / "run", loaded, model.task, plan) as run:
        study = map(loaded, model.task, plan, run, do=("relate",))
    assert study.record.relations is not None and study.record.relations.pairs.height == 6
    with open_run(tmp_path / "run", loaded, model.task, plan) as run:
        again = map(loaded, model.task, plan, run, do=("attribute",))  # what a run has found stays in it
    assert again.record.relations is not None
    assert again.record.relations.pairs.equals(study.record.relations.pairs)
    assert not [
        line
        for line in cost(loaded, model.task, plan, ("relate",), tmp_path / "run").lines
        if line.step == "pairs" and not line.kept
    ]
    lines = {line.step: line for line in cost(loaded, model.task, plan, ("relate",)).lines}
    assert lines["pairs"].settings == 1 + 4 + 6 and lines["hubs"].settings == 202


def test_the_command_shows_pairs(cli, tmp_path: Path):
    code, out, err = cli("relate", "zoo/small", "ioi", "--n", 32, "--pairs-of", 6, "--out", "run")
    assert code == 0, err
    assert "15 pairs of 6 parts" in out and "Closing the hubs" in out
    code, out, _ = cli("relate", "zoo/small", "ioi", "--n", 32, "--pairs-of", 6, "--dry-run", "--json")
    assert code == 0 and {"pairs", "pairs-second", "pairs-held"} <= {line["step"] for line in json.loads(out)["lines"]}
    code, _, err = cli("relate", "zoo/small", "ioi", "--pairs-of", 1)
    assert code == 2 and "choose 2 or more" in err


def test_too_few_independent_prompts_leave_outputs_out(monkeypatch: pytest.MonkeyPatch):
    """A refusal of the statistics is a warning: what was closed is told all the same."""

    def refuse(*_: object, **__: object) -> None:
        raise PatchclampError("too few")

    monkeypatch.setattr(importlib.import_module("patchclamp.study.relate"), "associate", refuse)
    model, plan = wired("redundant"), Plan(n=32, pairs_of=3)
    study = map(Model.load(model.hf, tokenizer=model.tokenizer), model.task, plan, do=("relate",))
    assert study.record.relations is not None and "association" not in study.record.relations.pairs.columns
    assert any("outputs go together was not measured: too few" in warning for warning in study.record.warnings)
    assert "Interaction of every pair" in render(study.record)
