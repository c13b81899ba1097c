"""Compare: circuits, effects and roles of maps side by side, by hand; the command."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.stats import hypergeom, spearmanr

from fake_record import STRONG, fake_record
from patchclamp.circuit import Circuit
from patchclamp.compare import compare
from patchclamp.errors import PatchclampError
from patchclamp.store import Run
from patchclamp.store.record import Record

SITES = [site for site in fake_record().scores["site"] if site != "embed"]


def with_circuit(record: Record, sites: list[str]) -> Record:
    return replace(record, circuit=Circuit(sites))


def test_overlap_and_agreement_are_those_by_hand():
    one = with_circuit(fake_record(), SITES[:10])
    other = fake_record()
    turned = other.scores.with_columns(pl.col("exact") * -1)
    two = with_circuit(replace(other, scores=turned), SITES[4:16])
    found = compare({"a": one, "b": two})
    row = found.pairs.row(0, named=True)
    assert (row["shared"], row["size_one"], row["size_two"]) == (6, 10, 12) and row["jaccard"] == 6 / 16
    assert row["p"] == pytest.approx(hypergeom(45, 10, 12).sf(5)) and row["expected"] == pytest.approx(120 / 45)
    assert row["spearman"] == pytest.approx(-1) and row["sign"] == 0.0 and row["clear"] >= len(STRONG)
    assert row["same_role"] == 1.0 and row["kappa"] == pytest.approx(1)
    assert found.everywhere == tuple(SITES[4:10]) and found.nowhere == tuple(SITES[16:])
    assert found.parts["in_circuits"].to_list() == [(i < 10) + (4 <= i < 16) for i in range(45)]


def test_effects_of_unlike_maps_are_ranked_as_a_library_ranks_them():
    one, two = fake_record(), fake_record()
    mixed = np.random.default_rng(0).permutation(two.scores["exact"].to_numpy())
    two = replace(two, scores=two.scores.with_columns(pl.Series("exact", mixed)))
    kept = [record.scores.filter(pl.col("site") != "embed")["exact"].to_numpy() for record in (one, two)]
    row = compare({"a": one, "b": two}).pairs.row(0, named=True)
    assert row["spearman"] == pytest.approx(spearmanr(*kept).statistic)


def test_what_a_map_lacks_stays_empty():
    bare = replace(fake_record(), circuit=None, scores=fake_record().scores.drop("role"))
    found = compare({"a": fake_record(), "b": bare, "c": fake_record()})
    assert found.pairs.height == 3 and found.about["without_circuit"] == ["b"]
    rows = {(row["one"], row["two"]): row for row in found.pairs.iter_rows(named=True)}
    assert rows["a", "b"]["shared"] is None and rows["a", "b"]["kappa"] is None and rows["a", "c"]["jaccard"] == 1.0
    assert found.everywhere == () and found.nowhere == ()


def test_maps_of_other_parts_are_refused():
    less = replace(fake_record(), scores=fake_record().scores.filter(pl.col("site") != "L3.h6"))
    with pytest.raises(PatchclampError, match=r"b is a map of other parts than a \(L3.h6\)"):
        compare({"a": fake_record(), "b": less})
    with pytest.raises(PatchclampError, match="two or more"):
        compare({"a": fake_record()})


def test_the_command_compares_runs(cli, tmp_path: Path):
    for name in ("one", "two"):
        with Run.open(tmp_path / name, {"name": name}, digest=name * 8, task="ioi", model="m") as run:
            run.save(fake_record())
    code, out, err = cli("compare", "one", "two", "--out", "parts.csv")
    assert code == 0, err
    assert "7 of 7 and 7" in out and "In every circuit (7)" in out and (tmp_path / "parts.csv").is_file()
    code, out, _ = cli("compare", "one", "two", "--json")
    assert code == 0 and json.loads(out)["pairs"][0]["jaccard"] == 1.0
    code, _, err = cli("compare", "one", "nowhere")
    assert code == 2 and "not the folder of a run" in err
