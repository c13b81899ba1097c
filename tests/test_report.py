"""The report: one file, no network, nothing in it runs that is not ours, and what was not done says so."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import polars as pl
import pytest

from fake_record import PARTS, fake_record
from patchclamp.circuit import Circuit
from patchclamp.errors import StoreError
from patchclamp.report import figures, render, write_report
from patchclamp.report.page import number, percent, signed
from patchclamp.report.panels import _sets
from patchclamp.store import Run
from patchclamp.store.record import Record

HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script><!--\u2028{{ 7 * 7 }}"


def bare_record() -> Record:
    """A study that did nothing but the baseline."""
    full = fake_record()
    return Record(full.headline, {}, full.provenance, full.baseline, full.scores.select("site", "layer", "kind", "index"))


@cache
def rendered(hostile: str = "") -> str:
    return render(fake_record(hostile))


class Page(HTMLParser):
    """Elements, scripts and attributes, as a browser would find them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.words = ""
        self._inside: dict[str, str | None] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._inside = dict(attrs) if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._inside is not None:
            self.scripts.append((self._inside, data))
            self._inside = None
        else:
            self.words += data


def without_library(page: Page) -> list[str]:
    return [text for kind, text in page.scripts if kind.get("type") == "application/json"]


# --- safety


def test_what_tasks_and_models_say_is_text() -> None:
    clean, dirty = Page(rendered()), Page(rendered(HOSTILE))
    assert dirty.tags == clean.tags  # not one element more
    assert dirty.words.count("<img src=x onerror=alert(1)>") >= 5 and "{{ 7 * 7 }}" in dirty.words
    assert not {"img", "iframe", "object", "embed"} & set(dirty.tags)
    assert not [name for name, _ in dirty.attributes if name.startswith("on")]
    specs = without_library(dirty)
    assert any("<img src=x onerror=alert(1)>" in str(json.loads(spec)) for spec in specs)
    assert not [spec for spec in specs if "<" in spec or "\u2028" in spec]


def test_the_policy_lets_only_our_scripts_run_and_nothing_be_fetched() -> None:
    page = Page(rendered(HOSTILE))
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split("; ")}
    assert rules["default-src"] == ["'none'"] and "connect-src" not in rules
    ran = [text for kind, text in page.scripts if "type" not in kind]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in ran]
    assert rules["script-src"] == hashes and len(ran) == 2
    links = [value for name, value in page.attributes if name in ("href", "src", "action")]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    text = rendered()
    assert not re.findall(r"(?:@import|url\()", text[text.index("<style>") : text.index("</style>")])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here to draw the page in")
@pytest.mark.parametrize("hostile", ["", HOSTILE])
def test_a_browser_draws_every_chart(tmp_path: Path, hostile: str) -> None:
    html = rendered(hostile)
    (tmp_path / "report.html").write_text(html)
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=10000",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    command = ["chromium", *options, "--dump-dom", str(tmp_path / "report.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    drawn = done.stdout
    assert "could not be drawn" not in drawn[: drawn.index("<footer>")]
    assert len(re.findall(r'<svg[^>]+class="marks"', drawn)) == html.count("data-chart>") == 26
    assert "<img" not in drawn[: drawn.index("<footer>")]


# --- what it says


def test_every_section_has_its_numbers() -> None:
    words = " ".join(Page(rendered()).words.split())
    said = [
        "zoo/small names the indirect object with 7 of 45 parts",
        "3.02 to 3.40 (95 %)",
        "99\u202f%",
        "most frequent answer alone: 9\u202f%",
        "✗ not supported",
        "○ not tested",
        "Closing L3.h6 on new prompts leaves",
        "facilitating: 7",
        "redundant with L2.h2.",
        "gates say facilitating, the exact effect is zero",
        "1 of 9",
        "0.90 to 0.96",
        "mean Jaccard index",
        "14 dropped (two tokens)",
        "1\u202f843\u202f200 parameters",
        "patchclamp map zoo/small ioi --seed 0",
        "transformers 5.23.0",
        "812 MB",
        "12 of 45 parts were looked at, 66 pairs, on 120 prompts",
        "redundancy",
        "3 communities, modularity 0.31",
        "Roles that depend on another part",
        "2 families: silhouette 0.41",
        "L2.h2 switches: open on 50% of 12 unseen inputs",
        "A is ioi, B is agreement",
    ]
    for text in said:
        assert text.replace("\u202f", " ") in words, text
    assert "Not tested:" not in words


def test_what_was_not_done_is_not_tested() -> None:
    """Sections with nothing to show are one list at the end, each with what would fill it."""
    text = render(bare_record())
    page = Page(text)
    listed = text[text.index('<section id="absent">') :].partition("</section>")[0]
    assert listed.count("<li>") == 13 and "how parts depend on each other (patchclamp relate)" in listed
    assert [name for name in re.findall(r'<section id="([^"]*)"', text)] == ["roles-table", "absent", "provenance"]
    assert not without_library(page)


@pytest.mark.parametrize("missing", [("nulls", "curve", "trust"), ("toggles", "random", "circuit"), ("patterns", "random")])
def test_any_part_of_a_study_may_be_missing(missing: tuple[str, ...]) -> None:
    text = render(replace(fake_record(), **{field: () if field == "nulls" else None for field in missing}))
    assert ("Circuit: no circuit was chosen" in text) == ({"circuit", "curve"} <= set(missing))
    assert ("Not tested: no faithfulness curve" in text) == ("curve" in missing)


def test_numbers_in_words() -> None:
    assert [signed(-0.001), signed(1.5), signed(None), signed(-2.0, 1)] == ["+0.00", "+1.50", "–", "−2.0"]
    assert [number(1234567), number(-0.5), number(3)] == ["1\u202f234\u202f567", "−0.50", "3"]
    assert [percent(0.5), percent(0.123), percent(None)] == ["50\u202f%", "12.3\u202f%", "–"]


def test_report_is_made_from_the_store(tmp_path: Path) -> None:
    with Run.open(tmp_path / "run", {}, digest="0" * 64, task="ioi", model="m") as run:
        run.step("one", lambda: {})
        with pytest.raises(StoreError, match="not finished"):
            write_report(tmp_path / "run")
        run.save(fake_record(HOSTILE))
    path = write_report(tmp_path / "run")
    assert path == tmp_path / "run" / "report.html" and path.read_text() == rendered(HOSTILE)
    assert path.stat().st_size < 2_000_000


# --- figures


def rows_of(chart: Any) -> list[list[dict[str, Any]]]:
    """The values of every layer that has its own."""
    spec = chart.to_dict()
    layers = [spec, *spec.get("layer", [])]
    return [layer["data"]["values"] for layer in layers if "data" in layer]


RECORD = fake_record()
assert RECORD.curve is not None and RECORD.toggles is not None and RECORD.circuit is not None
assert RECORD.patterns is not None and RECORD.trust is not None and RECORD.relations is not None
assert RECORD.dynamics is not None and RECORD.localisation is not None
CHARTS: dict[str, Callable[[], Any]] = {
    "role_map": lambda: figures.role_map(RECORD.scores),
    "effect_map": lambda: figures.effect_map(RECORD.scores),
    "agreement_scatter": lambda: figures.agreement_scatter(RECORD.scores, "gradient", "attribution patching"),
    "null_shares": lambda: figures.null_shares({"facilitating": 0.2, "interfering": 0.1}, RECORD.nulls),
    "null_gates": lambda: figures.null_gates(RECORD.scores),
    "toggle_curves": lambda: figures.toggle_curves(RECORD.toggles, "log-probability"),
    "faithfulness_curve": lambda: figures.faithfulness_curve(RECORD.curve, RECORD.random, 7),
    "minimality_bars": lambda: figures.minimality_bars(RECORD.trust.minimality),
    "circuit_drawing": lambda: figures.circuit_drawing(RECORD.circuit, RECORD.scores),
    "method_agreement": lambda: figures.method_agreement(RECORD.localisation.agreement),
    "faithfulness_curves": lambda: figures.faithfulness_curves(RECORD.localisation.curves),
    "flow_graph": lambda: figures.flow_graph(RECORD.localisation.flow, RECORD.localisation.tokens),
    "attention_pattern": lambda: figures.attention_pattern(RECORD.patterns, 0),
    "interaction_matrix": lambda: figures.interaction_matrix(RECORD.relations.pairs, RECORD.relations.parts),
    "connectome": lambda: figures.connectome(RECORD.relations.pairs, RECORD.relations.parts),
    "causal_against_statistical": lambda: figures.causal_against_statistical(RECORD.relations.pairs),
    "switching_map": lambda: figures.switching_map(RECORD.dynamics.gates),
}


def test_every_figure_is_tried() -> None:
    assert set(CHARTS) == set(figures.__all__)


@pytest.mark.parametrize("name", CHARTS)
def test_figures_can_be_saved_for_a_paper(name: str, tmp_path: Path) -> None:
    chart = CHARTS[name]()
    chart.save(tmp_path / "figure.svg")
    assert "<svg" in (tmp_path / "figure.svg").read_text()[:200]
    assert len(chart.to_dict()["description"]) > 20


def test_png(tmp_path: Path) -> None:
    CHARTS["effect_map"]().save(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


def test_maps_hold_every_head_and_mlp() -> None:
    for name in ("role_map", "effect_map"):
        rows = next(values for values in rows_of(CHARTS[name]()) if len(values) > 2)
        assert {row["site"] for row in rows} == {str(site) for site in PARTS} - {"embed"}
        assert sum(row["column"] == "MLP" for row in rows) == 5
    effects = next(values for values in rows_of(CHARTS["effect_map"]()) if len(values) > 2)
    exact = dict(RECORD.scores.select("site", "exact").iter_rows())
    assert all(row["value"] == exact[row["site"]] for row in effects)
    assert {row["site"]: row["mark"] for row in effects}["L4.h6"] == "−"


def test_maps_without_mlps_and_with_holes() -> None:
    heads = RECORD.scores.filter(pl.col("kind") == "head").with_columns(
        exact=pl.when(pl.col("index") == 0).then(float("nan")).otherwise("exact")
    )
    rows = next(values for values in rows_of(figures.effect_map(heads)) if len(values) > 2)
    assert len(rows) == 35
    figures.effect_map(heads.head(0)).to_dict()


def test_random_band_is_its_percentiles() -> None:
    rows = [row for values in rows_of(CHARTS["faithfulness_curve"]()) for row in values if row.get("what") == "random circuits"]
    at = next(row for row in rows if row["k"] == 7)
    assert RECORD.random is not None
    draws = RECORD.random.filter(pl.col("k") == 7)["faithfulness"].to_numpy()
    np.testing.assert_allclose([at["low"], at["value"], at["high"]], np.percentile(draws, [2.5, 50, 97.5]))


def test_circuit_of_edges_is_drawn_as_it_is() -> None:
    circuit = Circuit(["embed>L0.h1.q", "L0.h1>L1.mlp", "L1.mlp>logits"])
    drawn = rows_of(figures.circuit_drawing(circuit))
    assert [len(values) for values in drawn] == [3, 4, 4]  # lines, marks, names
    assert [row["read"] for row in drawn[0]] == ["query", "MLP", "logits"]
    assert isinstance(figures.circuit_drawing(Circuit([])), alt.LayerChart)


def test_edges_are_as_wide_as_their_effects() -> None:
    found = RECORD.localisation
    assert found is not None and found.circuit is not None
    lines = {row["edge"]: row["width"] for row in rows_of(figures.circuit_drawing(found.circuit, found.scores))[0]}
    effects = dict(found.scores.select("site", "exact").iter_rows())
    assert max(lines, key=lambda edge: lines[edge]) == "L3.h6>logits" and lines["L3.h6>logits"] == 5
    assert lines["L4.h6>logits"] == pytest.approx(1 + 4 * abs(effects["L4.h6>logits"]) / effects["L3.h6>logits"])


def test_agreement_of_methods_is_symmetric_with_exact_first() -> None:
    cells = {(row["a"], row["b"]): row["value"] for row in rows_of(CHARTS["method_agreement"]())[0]}
    assert cells["exact", "gradient"] == cells["gradient", "exact"] == 0.61 and cells["exact", "exact"] == 1
    assert next(iter(cells)) == ("exact", "exact") and len(cells) == 9


def test_sets_and_what_stands_in_for_what_are_told() -> None:
    words = Page(rendered()).words
    for told in ("2 distinct sets keep 80\u202f% of the behaviour", "L2.h2 and L2.h7 stand in for each other: closing both costs 1.40 nats",
                 "24 permutations of 12 parts", "at most 1.0% (10) have |I| >= 0.45"):  # fmt: skip
        assert told in words
    random = [row for row in _sets(RECORD) if row["method"] == "random"]
    assert len(random) == 1 and random[0]["share"] == pytest.approx(0.15)  # the mean of both draws
