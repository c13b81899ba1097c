"""How methods do on trained behaviour: the shipped model's tasks. Figures are those that were measured, and are in docs/attribution.md."""

import re
from pathlib import Path

import numpy as np
import pytest

from patchclamp.methods import compare, effects, segments
from patchclamp.methods._agreement import against
from patchclamp.metrics import metric_named
from patchclamp.models.model import Model
from patchclamp.parts import Nodes, nodes
from patchclamp.tasks import load_task

DOCS = Path(__file__).parent.parent / "docs" / "attribution.md"
TASKS = ("ioi", "greater_than", "gendered_pronoun", "induction")
QUICK = ("gradient", "linear", "relevance", "inputs")


@pytest.fixture(scope="module")
def small() -> Nodes:
    return nodes(Model.load("zoo/small"))


def written(task: str) -> dict[str, tuple[float, float]]:
    """By method, Pearson and relative L2 as the table in docs/attribution.md has them."""
    found: dict[str, tuple[float, float]] = {}
    head, column = f"| method | {' | '.join(TASKS)} | passes |", 1 + TASKS.index(task)
    for line in DOCS.read_text().split(head)[1].split("\n\n")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > column and re.match(r"^-?\d*\.\d+ / \d*\.\d+$", cells[column]):
            one, two = cells[column].split(" / ")
            found[cells[0]] = (float(one), float(two))
    return found


@pytest.mark.parametrize("task", ["ioi", *(pytest.param(task, marks=pytest.mark.long) for task in TASKS[1:])])
def test_the_table_in_the_docs_is_what_is_measured(small: Nodes, task: str, request: pytest.FixtureRequest):
    """The same 48 prompts: to two units of the last digit that is written."""
    some, wanted = load_task(task).examples(small.model.tokenizer, 48, seed=11), written(task)
    everything = request.node.get_closest_marker("long") is not None
    names = [name for name in wanted if everything or name in QUICK]
    assert set(QUICK) <= set(names)
    for row in compare(small, some, small.fallback("resample"), names).iter_rows(named=True):
        if row["method"] in names:
            pearson, relative = wanted[row["method"]]
            assert row["pearson"] == pytest.approx(pearson, abs=0.02), row
            assert row["relative_l2"] == pytest.approx(relative, abs=max(0.02, 0.02 * relative)), row


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_each_part_alone_is_exact_with_five_midpoints_and_the_line_of_inputs_is_not(small: Nodes, task: str):
    some, fallback = load_task(task).examples(small.model.tokenizer, 48, seed=11), small.fallback("resample")
    exact = effects(small, some, fallback).double().mean(1).numpy()
    each = [[number] for number in small.counted]
    found = segments.segmented(
        small, some.batch(), fallback, metric_named(some.metric), each, steps=5, tolerance=float("inf")
    ).samples  # fmt: skip
    alone = against(found.double().mean(1).numpy(), exact, top=5)
    assert alone["pearson"] is not None and alone["pearson"] >= 0.99 and (alone["relative_l2"] or 0) <= 0.10
    from patchclamp.methods.inputs import samples

    few, many = (
        samples(small, some.batch(), fallback, metric_named(some.metric), 0, steps=steps).double().mean(1).numpy()
        for steps in (5, 20)
    )
    size = np.linalg.norm(exact)
    assert np.linalg.norm(few - many) / size < 0.1 < np.linalg.norm(many - exact) / size  # converged, and to something else
