"""The circuit-localisation protocol: against the evaluation that it is made of, on planted circuits, and there and back through files."""

import json

import pytest

from patchclamp.bench import bench, cells, live, planted, sizes_of, submitted
from patchclamp.bench.protocol import nine
from patchclamp.circuit import Circuit
from patchclamp.discover import evaluate
from patchclamp.errors import BaselineError, PatchclampError
from patchclamp.exchange import read_submission, save_graph, to_graph
from patchclamp.exchange.submission import count_of, size_of
from patchclamp.methods import attribute
from patchclamp.models.model import Model
from patchclamp.parts import edges, nodes
from patchclamp.sites import Edge
from patchclamp.tasks import load_task
from patchclamp.zoo import wired


@pytest.fixture(scope="module")
def induction():
    made = wired("induction", "llama")  # two query heads read each key/value head
    return made, Model.load(made.hf, tokenizer=made.tokenizer)


def test_rows_are_what_evaluation_gives(induction):
    made, model = induction
    found = bench(model, [made.task], methods=("exact", "random"), granularity="nodes", n=40, seed=1)
    split = made.task.split(made.tokenizer, 40, seed=1)
    parts = nodes(model)
    rule = parts.fallback("resample")
    scores = attribute(parts, split.fit, rule, "exact")
    row = found.table.row(0, named=True)
    assert row["method"] == "exact" and row["accuracy"] == 1.0 and row["n"] == len(split.confirm)
    assert row["CPR"] == pytest.approx(evaluate(parts, split.confirm, rule, scores, by="signed").area("CPR"))
    assert row["CMD"] == pytest.approx(evaluate(parts, split.confirm, rule, scores, by="magnitude").area("CMD"))
    exact, random = found.table["CPR"].to_list()
    assert exact > random + 0.1 and found.table["CMD"][0] < found.table["CMD"][1] - 0.1
    assert found.curves.height == 2 * 2 * 10 and not found.skipped and "CPR" in str(found)


def test_on_a_trained_model_every_method_is_clear_of_random():
    """Indirect object identification in the shipped model, heads and MLPs: intervals of CPR and CMD apart from the random ranking's."""
    found = bench(Model.load("zoo/small"), [load_task("ioi")], granularity="nodes", n=48)
    rows = {row["method"]: row for row in found.table.iter_rows(named=True)}
    for name in ("exact", "integrated", "gradient"):
        assert rows[name]["CPR_low"] > rows["random"]["CPR_high"] and rows[name]["CMD_high"] < rows["random"]["CMD_low"]


def test_planted_edges_are_ranked_first(induction):
    """The three edges of the wiring, found by closing each alone, and ranked by slopes; both AUROCs by hand for exact scores."""
    made, model = induction
    parts, some = edges(model, ["embed", "L0.h*", "L1.h*"]), made.task.examples(made.tokenizer, 6, seed=3)
    rule = parts.fallback("resample")
    truth = live(parts, some, rule, least=1e-2)
    assert {"embed>L0.kv0.v", "L0.h1>L1.kv1.k", "L1.h2>logits"} <= {str(edge) for edge in truth} and len(truth) <= 6
    table = planted(parts, some, rule, truth, ("exact", "gradient", "random"))
    rows = {row["method"]: row for row in table.iter_rows(named=True)}
    assert (
        rows["exact"]["auroc"] == 1.0
        and rows["random"]["auroc"] < 0.95
        and rows["exact"]["benchmark"] > rows["random"]["benchmark"]
    )
    with pytest.raises(PatchclampError, match="not among"):
        planted(parts, some, rule, [Edge.parse("L0.mlp>logits")], ("exact",))
    why = planted(parts, some, rule, truth, ("gradient",), metric="kl").row(0, named=True)
    assert why["auroc"] is None and "zero" in why["why"]


def test_a_submission_is_judged_as_what_it_was_made_from(induction, tmp_path):
    made, model = induction
    found = bench(model, [made.task], methods=("gradient",), n=24)
    (file,) = cells(tmp_path, model, found, "gradient")
    assert file.parent.name.startswith(f"{made.task.name}_")
    sizes = sizes_of(model)
    assert sizes.group == 2 and sizes.rotary and not sizes.parallel
    again = read_submission(file.parent, sizes.kv_heads)
    parts, split = edges(model), made.task.split(made.tokenizer, 24)
    row, _ = submitted(parts, split.confirm, parts.fallback("resample"), again)
    assert row["CPR"] == pytest.approx(found.table["CPR"][0], abs=1e-6) and row["CMD"] == pytest.approx(
        found.table["CMD"][0], abs=1e-6
    )
    circuits = cells(tmp_path / "nine", model, found, "gradient", circuits=True)
    assert len(circuits) == 9
    back = read_submission(circuits[0].parent, sizes.kv_heads)
    chosen = nine(found.scores[made.task.name, "gradient"], sizes)
    assert back.circuits == chosen
    assert all(size_of(circuit, sizes) <= max(1, int(share * count_of(circuit, sizes))) for share, circuit in chosen.items())
    row, _ = submitted(parts, split.confirm, parts.fallback("resample"), back)
    assert row["CMD"] == pytest.approx(
        found.table["CMD"][0], abs=0.1
    )  # sizes are counted there by query head, and cut a little lower
    with pytest.raises(PatchclampError, match="another model"):
        submitted(nodes(model), split.confirm, nodes(model).fallback("resample"), again)
    with pytest.raises(PatchclampError, match="no part of"):
        submitted(nodes(model), split.confirm, nodes(model).fallback("resample"), back)
    with pytest.raises(PatchclampError, match="nothing was measured"):
        cells(tmp_path, model, found, "exact")


def test_what_cannot_be_run_is_said(induction):
    made, model = induction
    with pytest.raises(PatchclampError, match="no method 'magic'"):
        bench(model, [made.task], methods=("magic",))
    with pytest.raises(PatchclampError, match="at least one"):
        bench(model, [], methods=("exact",))
    with pytest.raises(BaselineError, match="right in"):
        bench(model, [made.task], methods=("exact",), n=24, min_accuracy=1.01)
    some = bench(model, [made.task], methods=("gradient", "random"), granularity="nodes", n=24, metric="kl")
    assert "zero" in some.skipped[f"{made.task.name}, gradient"] and some.table["method"].to_list() == ["random"]


def test_the_command(cli, tmp_path):
    rows = [{"clean": f"{a} + {b} =", "corrupt": f"{a} + {c} =", "answer": f" {a + b}", "wrong": f" {a + c}"}
            for a, b, c in [(n, 10 + n, 20 + (2 * n) % 7) for n in range(11, 43)]]  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = ("bench", "zoo/small", tmp_path / "tasks", "--parts", "nodes", "--min-accuracy", "0")
    code, out, err = cli(*asked, "--method", "exact", "--submit", "mine", "--json")
    assert code == 0, err
    body = json.loads(out)
    assert body["table"][0]["task"] == "sums" and len(body["curves"]) == 20 and len(body["files"]) == 1
    code, out, err = cli(*asked, "--read", "mine", "--json")
    assert code == 0, err
    assert json.loads(out)["table"][0]["CPR"] == pytest.approx(body["table"][0]["CPR"], abs=1e-6)
    for more, why in (
        (("--circuits",), "say where"), (("--read", "mine", "--method", "exact"), "leave out"), (("--parts", "words"), "choose edges"),
        (("--read", "nowhere"), "no folder"), (("--method", "magic"), "no method"),
    ):  # fmt: skip
        code, out, err = cli(*(asked[:-4] if more[0] == "--parts" else asked), *more)
        assert code == 2 and why in err, err
    (tmp_path / "empty").mkdir()
    code, _, err = cli("bench", "zoo/small", tmp_path / "empty")
    assert code == 2 and "no task files" in err


def test_the_command_that_judges_a_circuit(cli, tmp_path):
    """Of the shipped model: a circuit of all heads but one is sufficient, one MLP is not; and from a graph file it is the same circuit."""
    (tmp_path / "one.json").write_text(json.dumps({"sites": ["L3.mlp"], "about": {}}))
    asked = ("judge", "zoo/small", "ioi", "--n", "24", "--draws", "8", "--json")
    code, out, err = cli(*asked, "--circuit", "one.json")
    assert code == 0, err
    body = json.loads(out)
    passed = {row["name"]: row["passed"] for row in body["tests"]}
    assert not passed["sufficiency"] and not passed["equivalence"] and body["fragility"]["verdict"] == "insufficient"
    save_graph(tmp_path / "graph.json", to_graph(sizes_of(Model.load("zoo/small")), None, Circuit(["L3.mlp"])))
    code, again, err = cli(*asked, "--circuit", "graph.json")
    assert code == 0, err
    assert [row["p"] for row in json.loads(again)["tests"]] == [row["p"] for row in body["tests"]]
    for words, why in (
        (("judge", "zoo/small", "ioi"), "MODEL TASK --circuit"), (("judge", "zoo/small", "ioi", "--circuit", "none.json"), "cannot be read"),
        ((*asked, "--circuit", "one.json", "--draws", "0"), "1 or more"),
    ):  # fmt: skip
        code, _, err = cli(*words)
        assert code == 2 and why in err, err
