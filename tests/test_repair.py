"""Repair: a model with one head turned round, where what mends it is known; differences calibrated; the command."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from patchclamp.change import fold
from patchclamp.errors import MetricError, PatchclampError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Nodes, benefits, nodes
from patchclamp.repair import Act, Repaired, Share, fallback_of, repair
from patchclamp.sites import Site
from patchclamp.tasks import Examples, load_task

TURNED, BY = Site.parse("L0.h3"), -0.5


@pytest.fixture(scope="module")
def broken() -> tuple[Nodes, Examples, Examples]:
    """zoo/small with what one head writes times -0.5, folded into the weights: it fails on a third of the prompts."""
    model = Model.load("zoo/small")
    parts, split = nodes(model), load_task("ioi").split(model.tokenizer, 96, seed=0)
    gates = parts.open()
    gates[..., parts.index[TURNED]] = BY
    made = fold(parts, gates, parts.fallback("zero"), split.fit.batch([0, 1])).model
    return nodes(made), split.fit, split.confirm


@pytest.fixture(scope="module")
def found(broken: tuple[Nodes, Examples, Examples]) -> Repaired:
    parts, search, test = broken
    return repair(parts, search, test, parts.fallback("zero"), acts=(0.0, 1 / BY), draws=40)


def test_the_head_that_was_turned_round_is_what_repairs(found: Repaired, broken: tuple[Nodes, Examples, Examples]):
    """A gate of 1 / BY on it is the model as it was: every prompt right, with nothing else needed."""
    assert found.common == (Act(TURNED, 1 / BY),) and found.before.share is not None and 0.5 < found.before.share < 0.9
    assert found.repaired.share == 1.0 and found.kept.share == 1.0 and found.repaired.n >= 4
    assert found.random is not None and found.random[0] < 0.5 and found.random[2] < 0.05
    assert found.steps.row(0, named=True) == {"k": 1, "act": str(found.common[0]), "repaired": 1.0, "kept": 1.0}
    assert found.examples["repaired"].all() and found.examples["before"].max() <= 0 < found.examples["after"].min()
    assert found.examples.height == found.about["failing"] == round((1 - found.before.share) * found.about["searched"])


def test_what_a_prompt_gains_by_itself_is_what_a_run_with_its_acts_gives(
    found: Repaired, broken: tuple[Nodes, Examples, Examples]
):
    parts, search, _ = broken
    plain = benefits(parts, search, parts.open(), parts.fallback("zero"), METRICS["logit_diff"])[0]
    failing = search.take(torch.nonzero(plain <= 0)[:, 0].tolist())
    for number, row in list(enumerate(found.examples.iter_rows(named=True)))[:5]:
        gates = parts.open()
        for text in row["acts"].split(", "):
            site, _, gate = text.partition("=")
            gates[..., parts.index[Site.parse(site)]] = float(gate)
        value = parts.measure(failing.batch([number]), gates, parts.fallback("zero"))
        assert row["after"] == pytest.approx(float(value), abs=1e-3)  # float32, another batch


@pytest.mark.long
def test_effects_on_failing_and_succeeding_prompts_are_compared(found: Repaired, broken: tuple[Nodes, Examples, Examples]):
    """Columns add up; under prompts exchanged at random, p is uniform: a tenth lies below .1."""
    parts, search, _ = broken
    table = found.differences
    assert table["site"].to_list() == [str(parts.labels[number]) for number in parts.counted]
    assert np.allclose(table["failing"] - table["succeeding"], table["difference"])
    assert ((table["q"] >= table["p"]) & (table["p"] > 0)).all()
    from patchclamp.repair import _differences

    low: list[float] = []
    for seed in range(20):
        flags = np.random.default_rng([seed, 1]).permutation(np.arange(len(search)) < 16)
        low += [float(p) for p in _differences(parts, search, parts.fallback("zero"), METRICS["logit_diff"], flags, seed)["p"]]
    assert 0.06 < np.mean(np.array(low) < 0.1) < 0.14  # 720 dependent values: .1 with a standard error of about .015


def test_nothing_to_repair_is_said(broken: tuple[Nodes, Examples, Examples]):
    parts, search, test = broken
    whole = nodes(Model.load("zoo/small"))
    with pytest.raises(PatchclampError, match="all 48 prompts of 'ioi' succeed"):
        repair(whole, search, test, whole.fallback("zero"))
    with pytest.raises(MetricError, match="whose sign says"):
        repair(parts, search, test, parts.fallback("zero"), metric="nll")
    with pytest.raises(MetricError, match="whose sign says"):
        fallback_of(parts, "success", search, "nll")
    for options, said in (({"most": 0}, "0 parts at most"), ({"draws": 0}, "0 random repairs"), ({"acts": (1.0,)}, "acts 1 change"),
                          ({"acts": ()}, "acts none change"), ({"acts": (float("nan"),)}, "acts nan change")):  # fmt: skip
        with pytest.raises(PatchclampError, match=said):
            repair(parts, search, test, parts.fallback("zero"), **options)


def test_a_prompt_that_no_act_helps_keeps_its_benefit_and_has_none(broken: tuple[Nodes, Examples, Examples]):
    """A gate next to 1 mends nothing, and what makes a failing prompt worse is no act of its own."""
    parts, search, test = broken
    found = repair(parts, search, test, parts.fallback("zero"), acts=(0.999,), most=2, draws=2)
    assert found.common == () and not found.examples["repaired"].any()
    assert (found.examples["after"] >= found.examples["before"]).all()
    idle = found.examples.filter(pl.col("acts") == "")
    assert (idle["after"] == idle["before"]).all()


def test_shares_have_exact_intervals():
    """Clopper and Pearson, at 0 of n: 1 - .025^(1/n)."""
    none = Share.of(np.zeros(10, dtype=bool))
    assert none.share == 0 and none.low == 0 and none.high == pytest.approx(1 - 0.025**0.1)
    assert Share.of(np.zeros(0, dtype=bool)).share is None


@pytest.mark.long
def test_the_command_says_what_repairs(cli, broken: tuple[Nodes, Examples, Examples], tmp_path: Path):
    parts, _, _ = broken
    parts.model.hf.save_pretrained(tmp_path / "broken")
    parts.model.tokenizer.save_pretrained(tmp_path / "broken")
    code, out, err = cli(
        "repair", "broken", "ioi", "--n", 96, "--act", 0, "--act", -2, "--fallback", "zero", "--out", "found.parquet"
    )
    assert code == 0, err
    assert "L0.h3=-2" in out and "100%" in out
    assert pl.read_parquet(tmp_path / "found.parquet")["repaired"].all()
    code, _, err = cli("repair", "zoo/small", "ioi", "--n", 48)
    assert code == 2 and "succeed" in err
