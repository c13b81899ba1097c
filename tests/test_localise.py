"""Localise: methods side by side on a wired model whose effects are known, as a step, on the command line and in the report."""

import polars as pl
import pytest

from patchclamp.errors import PatchclampError
from patchclamp.models.model import Model
from patchclamp.report import render
from patchclamp.store import load_record
from patchclamp.study import Plan, Study, map, open_run
from patchclamp.study.cost import cost
from patchclamp.zoo import wired

METHODS = ("gradient", "inputs", "random")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Study:
    known, plan = wired("interfering"), Plan(n=64, fallback="resample", compared=METHODS)
    model = Model.load(known.hf, tokenizer=known.tokenizer)
    with open_run(tmp_path_factory.mktemp("run") / "one", model, known.task, plan) as run:
        return map(model, known.task, plan, run, do=("localise",))


def test_exact_stands_beside_every_method(found: Study) -> None:
    local, known = found.record.localisation, wired("interfering")
    assert local is not None and local.about["methods"] == ["exact", *METHODS]
    effects = dict(local.scores.select("site", "exact").iter_rows())
    for site, effect in known.truth.effects["resample"].items():
        if site in effects:
            assert effects[site] == pytest.approx(effect, abs=1e-5)  # the wired model's closed form
    assert set(local.scores.columns) >= {"exact_low", "exact_high", *METHODS}
    pairs = {(row["a"], row["b"]) for row in local.agreement.to_dicts()}
    assert len(pairs) == 6 and ("exact", "gradient") in pairs


def test_circuits_by_exact_effects_beat_random_ones(found: Study) -> None:
    local = found.record.localisation
    assert local is not None
    areas = {(row["method"], row["name"]): row["value"] for row in local.areas.to_dicts()}
    assert set(name for _, name in areas) == {"CPR", "CMD", "log_area"}
    assert areas["exact", "CMD"] < areas["random", "CMD"] and areas["exact", "log_area"] > areas["random", "log_area"]
    ends = local.curves.filter(pl.col("share") == 1)
    assert ends.height == 4 and ends["faithfulness"].to_list() == pytest.approx([1.0] * 4)
    facilitating = {part for part, role in wired("interfering").truth.roles.items() if role == "facilitating"}
    assert local.circuit is not None and facilitating <= {str(site) for site in local.circuit}


def test_routes_end_at_the_last_token(found: Study) -> None:
    local = found.record.localisation
    assert local is not None and local.flow is not None and local.flow.height
    last = local.flow.filter(pl.col("level") == local.flow["level"].max())
    assert set(last["target"]) == {len(local.tokens) - 1} and (local.flow["share"] > 0.04).all()


def test_the_report_has_it_and_a_run_goes_on(found: Study) -> None:
    assert found.folder is not None
    again = load_record(found.folder).localisation
    assert again is not None and again.about == found.record.localisation.about  # type: ignore[union-attr]
    page = render(found.record)
    assert "Methods side by side" in page and page.count('id="method-') == 2


def test_edges_are_screened_first() -> None:
    known = wired("interfering")
    model = Model.load(known.hf, tokenizer=known.tokenizer)
    study = map(model, known.task, Plan(n=32, fallback="resample", parts="edges", compared=("gradient",)), do=("localise",))
    local = study.record.localisation
    assert local is not None and local.about["parts"] == "edges" and local.about["of"] == local.scores.height
    assert local.scores["exact"].is_not_null().sum() > 0 and "exact effects measured" in local.about["verified"]
    assert local.circuit is not None and local.circuit.about["group"] == 1


def test_what_cannot_be_is_said() -> None:
    known = wired("interfering")
    model = Model.load(known.hf, tokenizer=known.tokenizer)
    with pytest.raises(PatchclampError, match="there is no method 'nonsense'"):
        Plan(compared=("nonsense",))
    with pytest.raises(PatchclampError, match="the cost of localise is not counted"):
        cost(model, known.task, Plan(n=32), do=("localise",))
