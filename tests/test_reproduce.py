"""Reproductions: the grid against what it is made of, claims and their verdicts, and every paper on the shipped model."""

import json

import numpy as np
import pytest
import torch

from cases import tiny
from patchclamp.errors import BaselineError, GateError, PatchclampError
from patchclamp.models.model import Model
from patchclamp.patching import advice, patch
from patchclamp.reproduce import reproduce, reproduction_names
from patchclamp.reproduce._result import claim, prompts
from patchclamp.reproduce.p257 import pearson
from patchclamp.scores.statistics import Interval
from patchclamp.study.grid import REFERENCE, against_clean, grid
from patchclamp.tracing import trace
from test_parts import examples

NAMES = ("greater-than", "ioi-heads", "p032", "p089", "p171", "p257")


def test_each_way_of_the_grid_is_patching_or_tracing():
    model, some = Model.load(tiny("gpt2")), examples(4, (7,))
    found = grid(model, some, ["L*.mlp.write"], ["fact", "end"], subject="fact", metrics=("logit_diff",), windows=(1, 2), draws=2)
    assert set(found.scores) == {(c, "logit_diff", w) for c in ("replacement", "noise") for w in (1, 2)}
    same = patch(model, some, ["L*.mlp.write"], ["fact", "end"], direction="denoising", metric="logit_diff")
    assert np.array_equal(found.scores[REFERENCE].values(), same.values())
    noisy = trace(model, some, ["L*.mlp.write"], ["fact", "end"], subject="fact", metric="logit_diff", draws=2, window=2).effects
    assert np.array_equal(found.scores["noise", "logit_diff", 2].values(), noisy.values())
    row = found.row("replacement", "logit_diff", 1)
    assert row["spearman"] == 1.0 and row["top"] == 1.0 and row["signs"] == 0
    assert str(found).count("\n") == 3
    with pytest.raises(PatchclampError, match="no corruption 'flood'"):
        grid(model, some, corruptions=("flood",))
    with pytest.raises(GateError, match="span"):
        grid(model, some, ["L*.mlp.write"], ["end"], subject="nobody")


def test_divergence_is_from_the_clean_run_whatever_runs():
    model, some = Model.load(tiny("gpt2")), examples(3, (7, 5))
    metric, batch = against_clean(model, some), some.batch()
    with torch.no_grad():
        clean, corrupt = model.target_logits(batch), model.target_logits(batch.swapped())
    assert float(metric(clean, batch).abs().max()) < 1e-6
    p, q = clean[0].log_softmax(-1), corrupt[0].log_softmax(-1)
    by_hand = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(metric(corrupt, batch.swapped())[0], by_hand, rtol=1e-4, atol=1e-6)  # float32
    alone = some.batch([1])
    with torch.no_grad():
        torch.testing.assert_close(
            metric(model.target_logits(alone.swapped()), alone.swapped())[0], by_hand[1:2], rtol=1e-4, atol=1e-5
        )


def test_verdicts_are_of_intervals():
    """Inside the allowed range, partly, not at all; a number without an interval is inside or not."""
    found = Interval(0.4, 0.3, 0.55, 20)
    assert claim("x", "1", found, 0.3, 1.0).verdict == claim("x", "1", found, 0.0, 0.55).verdict == "agrees"
    partly = claim("x", "1", found, 0.5, 1.0)
    assert partly.verdict == "undecided" and "only partly" in partly.why and "undecided" in str(partly)
    for low, high in ((0.0, 0.5), (0.35, 0.5), (0.55, 1.0), (0.0, 0.3)):
        assert claim("x", "1", found, low, high).verdict == "undecided"
    assert claim("x", "1", found, 0.6, 1.0).verdict == "differs" and claim("x", "1", found, 0.0, 0.2).verdict == "differs"
    assert claim("x", "1", 0.55, 0.6, 1.0).verdict == "differs" and claim("x", "1", 0.6, 0.6, 1.0).verdict == "agrees"
    assert claim("x", "1", found, 0.6, 1.0, None).verdict == "differs"
    assert claim("x", "1", Interval(0.1, -0.02, 0.2, 20), 0.0, 2.0, None).verdict == "undecided"  # it may be 0
    other = claim("x", "1", found, 0.6, 1.0, False)
    assert other.verdict == "not comparable" and "its own model" in other.why and "0.40 [0.30, 0.55]" in str(other)


def test_correlations_and_their_intervals():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(8, 30)) + rng.normal(size=(8, 1))
    groups = [str(number // 2) for number in range(30)]
    same, draws = pearson(2 * exact + 1, exact, groups, 0)
    assert same.mean == pytest.approx(1) and draws.min() > 0.999
    other = rng.normal(size=(8, 30))
    none, _ = pearson(other, exact, groups, 0)
    assert none.low is not None and none.high is not None and none.high - none.low > 0.1
    centred = [table.mean(1) - table.mean() for table in (other, exact)]
    assert none.mean == pytest.approx(centred[0] @ centred[1] / (np.linalg.norm(centred[0]) * np.linalg.norm(centred[1])))


def test_what_cannot_be_reproduced_is_said(cli):
    assert reproduction_names() == NAMES
    with pytest.raises(PatchclampError, match="nothing called 'p999'"):
        reproduce("p999", Model.load(tiny("gpt2")))
    code, _, err = cli("reproduce", "p999")
    assert code == 2 and "choose from greater-than" in err
    code, _, err = cli("reproduce", "p032", "--out", "figure.docx")
    assert code == 2 and ".svg" in err
    with pytest.raises(BaselineError, match="cannot be seen where there is none"):
        prompts(Model.load("zoo/small"), "ioi", 24, 0, least=1.01)


def test_reuse_is_reproduced_on_the_shipped_model(cli, tmp_path):
    code, out, err = cli("reproduce", "p032", "--n", "32", "--json")
    assert code == 0, err
    body = json.loads(out)
    assert body["rows"][0]["verdict"] == "not comparable"  # the paper's share is GPT-2 medium's
    assert {row["verdict"] for row in body["rows"][1:]} <= {"agrees", "undecided", "differs"} and body["about"]["universe"] == 36
    assert "<svg" in (tmp_path / "p032.svg").read_text()[:500] and not list(tmp_path.glob(".*"))


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in NAMES if name != "p032"])
def test_every_paper_on_the_shipped_model(name: str):
    found = reproduce(name, Model.load("zoo/small"), n=64)
    assert len(found.rows) >= 2 and found.table.height and found.figure.to_dict()
    assert all(
        row.verdict in ("agrees", "undecided", "differs", "not comparable") and np.isfinite(row.ours) for row in found.rows
    )
    print(found)


def test_ways_of_patching_that_mislead_are_said(cli):
    """None for the recommended way; the right sentence for each other; and the command prints it."""
    assert advice("resample", "logit_diff") == ()
    for given, word in (
        (("noise", "logit_diff"), "off its distribution"), (("zero", "logit_diff"), "few parts ever have"),
        (("resample", "probability"), "go unseen"), (("resample", "kl"), "no answer"), (("resample", "logit_diff", 3), "window of 3"),
    ):  # fmt: skip
        (said,) = advice(*given)
        assert word in said
    code, out, err = cli("patch", "zoo/small", "ioi", "--n", "16", "--site", "L0.mlp", "--at", "end", "--metric", "probability")
    assert code == 0, err
    assert "Beware: probability" in out
