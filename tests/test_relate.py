"""Relate: what is planted in wired models comes out of the step, the command and the report by name."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from patchclamp.cli.show import show
from patchclamp.dependence import close_pairs
from patchclamp.dependence.association import recorded
from patchclamp.errors import PatchclampError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import benefits, nodes
from patchclamp.report import render
from patchclamp.sites import Site
from patchclamp.store import load_record
from patchclamp.study import Plan, Study, map, open_run, relate
from patchclamp.study.cost import cost
from patchclamp.tasks import load_task
from patchclamp.zoo import wired
from patchclamp.zoo._wired import Wired
from test_cost import CLOSE, by_step, counted, job_of


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

    monkeypatch.setattr(relate, "associate", refuse)
    model, plan = wired("redundant"), Plan(n=32, pairs_of=3)
    study = map(Model.load(model.hf, tokenizer=model.tokenizer), model.task, plan, do=("relate",))
    assert study.record.relations is not None and "association" not in study.record.relations.pairs.columns
    assert any("outputs go together was not measured: too few" in warning for warning in study.record.warnings)
    assert "Interaction of every pair" in render(study.record)


def test_where_nothing_interacts_there_are_neither_communities_nor_hubs(capsys: pytest.CaptureFixture[str]):
    """Two heads that only add up: a graph without edges has no null and no hubs, and nothing is claimed of either."""
    _, study = related("interfering", "resample", "zero")
    found = study.record.relations
    assert found is not None and found.about["hubs"] is None and found.about["modularity"] is None
    assert not any("hubs" in claim.statement for claim in study.claims)
    assert "Interaction of every pair" in render(study.record)
    show(study, Path("report.html"), ("relate",))
    assert "neither communities nor hubs" in " ".join(capsys.readouterr().out.split())


def test_parts_are_chosen_and_hubs_closed_on_prompts_that_are_not_judged():
    """The parts of largest effect on select prompts, in forward order; random sets beside the hubs are of these parts alone."""
    model = wired("redundant")
    study = map(
        Model.load(model.hf, tokenizer=model.tokenizer), model.task, Plan(n=64, pairs_of=3, second="zero"), do=("relate",)
    )
    found = study.record.relations
    assert found is not None and found.about["hubs"]["among"] == 3 and len(found.about["hubs"]["parts"]) <= 2
    labels = [Site("head", 0, head) for head in range(4)]
    samples = np.array([[0.1, 0.3], [-2.0, -1.0], [1.0, -1.0], [0.5, 0.5]])
    assert relate._chosen(labels, samples, 2) == ["L0.h1", "L0.h3"]


@pytest.mark.long
def test_what_relate_will_take_is_what_it_takes(monkeypatch: pytest.MonkeyPatch):
    """By multiplications, to a tenth; pairs to a third, for which parts they are of is not known before.

    What takes slopes of the unembedding (self-repair, outputs) cannot run while PyTorch counts: it is left out, and made before.
    """
    model, task = Model.load("zoo/small"), load_task("ioi")
    job = job_of(model, task, Plan(n=48, pairs_of=4, second="mean"))
    outputs = recorded(job.parts, job.split.confirm)
    monkeypatch.setattr(relate, "recorded", lambda *_: outputs)
    monkeypatch.setattr(relate, "_repairs", lambda *_: [])
    predicted, real = by_step(job, ("relate",)), counted(job, task, ("relate",))
    for step in ("exact", "select-effects"):
        assert real[step] == pytest.approx(predicted[step][0], rel=CLOSE), (step, real[step], predicted[step])
    for step in ("pairs", "pairs-second", "pairs-held"):
        expected, most = predicted[step]
        assert real[step] <= most * (1 + CLOSE) and real[step] == pytest.approx(expected, rel=0.35), (step, real[step], expected)
    assert real["hubs"] == pytest.approx(predicted["hubs"][0], rel=0.5), (real["hubs"], predicted["hubs"])
    assert real[""] == pytest.approx(predicted[""][0], rel=CLOSE, abs=1)  # the mean of the second fallback


@pytest.mark.long
def test_values_and_a_screen_are_asked_for_by_name(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Shapley values of three parts add up to closing all three; a screen's pairs are measured as close_pairs measures them."""
    monkeypatch.setattr(relate, "SHUT", 0.2)  # masks that close more are fewer
    code, out, err = cli("relate", "zoo/small", "ioi", "--n", 32, "--pairs-of", 3, "--shapley", "--screen-pairs", "--out", "run")
    assert code == 0, err
    assert "Shapley values (" in out and "Screened among all 36 parts" in out and "not verified, at most" in out
    found = load_record(tmp_path / "run").relations
    assert found is not None and found.shapley is not None and found.screened is not None
    model = Model.load("zoo/small")
    parts, split = nodes(model), load_task("ioi").split(model.tokenizer, 32, seed=0)
    names = found.shapley["site"].to_list()
    gates = torch.cat([parts.open(), parts.without([Site.parse(name) for name in names])])
    ends = benefits(parts, split.confirm, gates, parts.fallback("resample"), METRICS["logit_diff"]).mean(1)
    assert found.shapley["score"].sum() == pytest.approx(float(ends[0] - ends[1]), abs=1e-3)
    assert found.pairs["shapley"].null_count() == 0 and found.pairs.height == 3
    row = found.screened.row(0, named=True)
    closed = close_pairs(parts, split.confirm, parts.fallback("resample"), pairs=[(row["a"], row["b"])])
    assert row["score"] == pytest.approx(closed.interaction.mean(), abs=1e-3)
    code, out, _ = cli(
        "relate", "zoo/small", "ioi", "--n", 32, "--shapley", "--screen-pairs", "--pairs-of", 3, "--dry-run", "--json"
    )
    assert code == 0 and {"shapley", "screen-pairs", "select-effects"} <= {line["step"] for line in json.loads(out)["lines"]}
