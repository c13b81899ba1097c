"""The page of a counterfactual: what its tables say, drawn."""

import altair as alt
import numpy as np
import polars as pl
import pytest

from patchclamp.report.counterfactual import clamped_curves, shifts, write_counterfactual
from patchclamp.training.counterfactual import Counterfactual, compared


@pytest.fixture(scope="module")
def found() -> Counterfactual:
    """Sigmoids that turn at 300 steps, with an arm that turns at 100 and one that never does."""
    rows = []
    for seed in range(3):
        for arm, middle in (("unclamped", 300.0), ("forced", 100.0), ("forbidden", 1e9)):
            for step in range(0, 1001, 20):
                height = 4 - 3 / (1 + np.exp(-(np.log1p(step) - np.log1p(middle * (1 + 0.05 * seed))) / 0.05))
                rows.append({"arm": arm, "seed": seed, "step": step, "value": height, "free": height + 0.1})
    return compared(pl.DataFrame(rows), 1000, resamples=20)


def test_every_verdict_is_on_the_page(found, tmp_path):
    found.save(tmp_path)
    page = write_counterfactual(tmp_path).read_text()
    assert found.verdict("forced") == "earlier" and found.verdict("forbidden") == "never"
    assert "forced: earlier (0.34 times as many steps" in " ".join(page.split())
    assert "forbidden: never (at least 3" in " ".join(page.split())
    assert page.count("<tr><th>unclamped</th>") == 3


def test_charts_are_valid_and_show_the_numbers(found):
    for chart in (clamped_curves(found), clamped_curves(found, "free"), shifts(found)):
        chart.to_dict(validate=True)
    layers = shifts(found).to_dict(validate=False)["layer"]
    drawn = [row for layer in layers for row in layer["data"].get("values", []) if "low" in row]
    assert {row["arm"]: round(row["factor"], 2) for row in drawn if row["arm"] == "forced"} == {
        "forced": pytest.approx(1 / 3, abs=0.02)
    }
    assert isinstance(shifts(found), alt.LayerChart)
