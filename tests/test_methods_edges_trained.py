"""How methods do on edges of trained behaviour: the shipped model's tasks, beside the exact effects. Figures are in docs/attribution.md."""

import re
from pathlib import Path

import pytest

from patchclamp.methods import compare
from patchclamp.models.model import Model
from patchclamp.parts import edges
from patchclamp.tasks import load_task

DOCS = Path(__file__).parent.parent / "docs" / "attribution.md"
TASKS = ("ioi", "greater_than", "gendered_pronoun", "induction")
CHEAP = ("gradient", "deeplift", "linear", "relevance", "gim", "corrected", "importance")
N, SEED, TOP = 16, 11, 20


def written(task: str) -> dict[str, tuple[float, float, float, float]]:
    """By method: Pearson, Spearman, relative L2 and the share of the top 20, as the table in docs/attribution.md has them."""
    text, found = DOCS.read_text().split("## Edges")[1], dict[str, tuple[float, float, float, float]]()
    column = 1 + TASKS.index(task)
    for line in text.split(f"| method | {' | '.join(TASKS)} |")[1].split("\n\n")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) > column and (at := re.match(r"^(-?[\d.]+) / (-?[\d.]+) / ([\d.]+), (\d+)%$", cells[column])):
            one, two, three, four = map(float, at.groups())
            found[cells[0]] = (one, two, three, four / 100)
    return found


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_the_table_of_edges_in_the_docs_is_what_is_measured(task: str):
    """All 1,519 edges on the same 16 prompts: to two units of the second digit, and one edge of the twenty."""
    parts = edges(Model.load("zoo/small"))
    some, wanted = load_task(task).examples(parts.model.tokenizer, N, seed=SEED), written(task)
    names = [name for name in CHEAP if name in wanted]
    assert len(names) >= len(CHEAP) - 1 and len(parts.labels) == 1519
    rows = {row["method"]: row for row in compare(parts, some, parts.fallback("resample"), names, top=TOP).iter_rows(named=True)}
    for name in names:
        found = [rows[name][column] for column in ("pearson", "spearman", "relative_l2")]
        assert found == pytest.approx(wanted[name][:3], abs=0.02), name
        assert rows[name]["overlap"] == pytest.approx(wanted[name][3], abs=1.01 / TOP), name


def test_figures_of_the_edges_from_two_heads():
    """All edges from the two heads of largest effect, on ioi: Pearson .775, .949, .779 and Spearman .881, .599, .962 were measured.

    Differences passed back see what slopes miss of large effects; softmax itself what they miss of small ones, into queries and keys.
    """
    parts = edges(Model.load("zoo/small"), sources=["L0.h0", "L0.h4"])
    some = load_task("ioi").examples(parts.model.tokenizer, 8, seed=SEED)
    found = compare(parts, some, parts.fallback("resample"), ["gradient", "deeplift", "corrected", "random"], top=TOP)
    *_, random = rows = found.rows(named=True)[1:]
    assert [row["pearson"] for row in rows[:3]] == pytest.approx([0.775, 0.949, 0.779], abs=0.02)
    assert [row["spearman"] for row in rows[:3]] == pytest.approx([0.881, 0.599, 0.962], abs=0.02)
    assert abs(random["pearson"]) < 0.3
