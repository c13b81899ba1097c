"""Edges and neurons from the command line: screened, verified, searched, judged; and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cases import tiny
from patchclamp.errors import PatchclampError, SiteError
from patchclamp.models.model import Model
from patchclamp.study import Plan, load, map
from patchclamp.study.cost import cost
from patchclamp.study.located import parts_of
from patchclamp.zoo import wired
from saved_model import save

Cli = Callable[..., tuple[int, str, str]]
EDGES = {"embed>L0.kv1.v", "L0.h1>L1.kv2.k", "L1.h2>logits"}
"""What carries anything in the wired induction model."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(wired("induction"), tmp_path_factory.mktemp("models") / "wired", 32)


def test_edges_are_screened_and_verified_from_the_shell(cli: Cli, saved: Path, tmp_path: Path):
    code, out, err = cli("attribute", saved, saved / "pairs.jsonl", "--parts", "edges", "--out", tmp_path / "run", "--json")
    assert code == 0, err
    body = json.loads(out)
    assert {row["site"] for row in body["scores"][:3]} == EDGES and body["circuit"] is None
    assert all(row["low"] <= row["exact"] <= row["high"] for row in body["scores"])
    claim = next(one for one in body["claims"] if "measured by itself" in one["statement"])
    assert claim["verdict"] == "supported" and body["verified"].startswith(claim["evidence"])
    assert "Methods side by side" in Path(body["report"]).read_text()
    assert load(tmp_path / "run").record.localisation is not None
    code, out, err = cli("attribute", tmp_path / "run")  # shown once more, from what was kept
    assert code == 0 and "Largest exact effects of 110 edges" in out, err


def test_a_circuit_of_edges_is_searched_and_judged_from_the_shell(cli: Cli, saved: Path, tmp_path: Path):
    given = ("--parts", "edges", "--search", "acdc", "--metric", "logit_diff", "--random-circuits", "5", "--json")
    code, out, err = cli("trust", saved, saved / "pairs.jsonl", *given, "--out", tmp_path / "run")
    assert code == 0, err
    body = json.loads(out)
    assert set(body["circuit"]) == EDGES and body["trust"]["faithfulness"][0] == pytest.approx(1, abs=1e-4)
    assert "3 of its 110 edges keep 100%" in body["headline"]
    order = next(one for one in body["claims"] if "order in which parts" in one["statement"])
    assert order["verdict"] == "supported" and "Jaccard 1.00 between 3 orders" in order["evidence"]


def test_neurons_and_other_searches(saved: Path):
    model = Model.load(saved)
    plan = Plan(parts="neurons")
    truth = wired("facts")
    facts = Model.load(truth.hf, tokenizer=truth.tokenizer)
    study = map(facts, truth.task, Plan(n=24, parts="neurons", search="greedy", faithfulness=0.5), do=("attribute", "discover"))
    assert study.circuit is not None and {site.layer for site in study.circuit} == {1}  # type: ignore[union-attr]
    assert study.record.localisation is not None and study.record.localisation.about["parts"] == "neurons"
    nodes = map(model, wired("induction").task, Plan(n=24, search="acdc", metric="logit_diff"), do=("discover",))
    assert {str(site) for site in nodes.circuit or ()} == {"L0.h1", "L1.h2"}
    assert any("order in which parts" in one.statement for one in nodes.claims)
    with pytest.raises(PatchclampError, match="is of heads and MLPs"):
        map(model, wired("induction").task, plan, do=("gate",))


def test_what_it_takes_is_said_before(saved: Path):
    truth = wired("induction")
    model = Model.load(saved)
    for plan in (Plan(n=24, parts="edges"), Plan(n=24, parts="neurons", search="acdc"), Plan(n=24, search="greedy")):
        do = ("attribute", "discover", "trust") if plan.parts != "nodes" else ("discover", "trust")
        found = cost(model, truth.task, plan, do)
        steps = {line.step for line in found.lines}
        assert {"discover" if plan.search == "threshold" else plan.search, "trust", "baseline"} <= steps
        assert ("screened" in steps) == (plan.parts != "nodes")
        for line in found.lines:
            assert line.most.forward >= line.expected.forward >= 0
    with pytest.raises(PatchclampError, match="is of heads and MLPs"):
        cost(model, truth.task, Plan(n=24, parts="edges"), ("verify",))


def test_what_cannot_be_asked_of_edges_is_refused(cli: Cli, saved: Path, tmp_path: Path):
    pairs, out = saved / "pairs.jsonl", ("--out", tmp_path / "run")
    for words, told in (
        (("attribute", saved, pairs, "--parts", "edges", "--metric", "kl"), "kl"),
        (("attribute", saved, pairs, "--parts", "features"), "--parts 'features'"),
        (("attribute", saved, pairs, "--parts", "edges", "--screen", "exact"), "a screen by 'exact'"),
        (("discover", saved, pairs, "--threshold", "0.1"), "of acdc"),
        (("gate", saved, pairs, "--parts", "edges"), "No such option"),
    ):
        code, _, err = cli(*words, *out)
        assert code == 2 and told in err, (words, err)
        assert not (tmp_path / "run").exists()


def test_parts_that_a_family_does_not_have_one_by_one_are_refused_by_name():
    with pytest.raises(SiteError, match=r"L\*\.mlp\.n\*"):  # fused experts
        parts_of(Plan(parts="neurons"), Model.load(tiny("mixtral")))
