"""Searches that learn, look or walk, as steps of a study and from the shell: masks, codes, paths of neurons."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from patchclamp.discover.codes import codes
from patchclamp.discover.masks import MaskSettings, probe
from patchclamp.discover.neuron_paths import neuron_path
from patchclamp.errors import PatchclampError, TaskError
from patchclamp.models.model import Model
from patchclamp.parts import gated, nodes
from patchclamp.store import load_step
from patchclamp.study import Plan, map, open_run
from patchclamp.study.cost import job_of, lines
from patchclamp.study.searches import PAIRS, SEEDS
from patchclamp.tasks import load_task
from patchclamp.zoo import wired
from saved_model import save

Cli = Callable[..., tuple[int, str, str]]


def model_of(name: str) -> Model:
    truth = wired(name)
    return Model.load(truth.hf, tokenizer=truth.tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wired induction model; pairs with two answers, and pairs in which the last word was there before and was not."""
    folder = save(wired("induction"), tmp_path_factory.mktemp("models") / "wired", 48)
    with (folder / "present.jsonl").open("w") as present:
        for line in (folder / "pairs.jsonl").read_text().splitlines():
            words = json.loads(line)["clean"].split()
            absent = ["so" if at == words.index(words[-1]) else word for at, word in enumerate(words)]
            present.write(json.dumps({**json.loads(line), "corrupt": " ".join(absent)}) + "\n")
    return folder


def test_masks_are_learned_from_three_seeds_and_their_overlap_is_told(tmp_path: Path):
    """Each mask is what `probe` makes of its seed; the circuit is the first one's."""
    truth, model = wired("induction"), model_of("induction")
    plan = Plan(n=24, search="masks", mask_price=0.5, updates=3)
    with open_run(tmp_path / "run", model, truth.task, plan) as run:
        study = map(model, truth.task, plan, run, do=("discover",))
    masks = load_step(tmp_path / "run", "masks")
    assert study.circuit == masks[0].circuit
    overlap = sum(masks[a].circuit.jaccard(masks[b].circuit) for a, b in ((0, 1), (0, 2), (1, 2))) / 3
    claim = next(one for one in study.claims if "seed that its mask" in one.statement)
    assert f"Jaccard {overlap:.2f} between 3 masks at a price of 0.5" in claim.evidence
    parts, select = nodes(model), truth.task.split(truth.tokenizer, 24, seed=0).select
    again = probe(parts, select, parts.fallback("resample"), 0.5, settings=MaskSettings(updates=3, seed=1))
    assert again.scores.values().tolist() == pytest.approx(masks[1].scores.values().tolist())


@pytest.mark.long
def test_masks_from_the_shell_are_those_that_python_learns(cli: Cli, folder: Path, tmp_path: Path):
    """Three seeds, each mask as `probe` makes it; the circuit is the first one's, and the claim counts their overlap."""
    given = ("--search", "masks", "--mask-price", "0.5", "--updates", "12", "--n", "24", "--json")
    code, out, err = cli("discover", folder, folder / "pairs.jsonl", *given, "--out", tmp_path / "run")
    assert code == 0, err
    body = json.loads(out)
    claim = next(one for one in body["claims"] if "seed that its mask" in one["statement"])
    masks = load_step(tmp_path / "run", "masks")
    assert len(masks) == SEEDS and [mask.scores.about["seed"] for mask in masks] == [0, 1, 2]
    overlap = sum(masks[a].circuit.jaccard(masks[b].circuit) for a, b in ((0, 1), (0, 2), (1, 2))) / 3
    assert f"Jaccard {overlap:.2f}" in claim["evidence"] and claim["verdict"] == (
        "supported" if overlap >= 0.8 else "not supported"
    )
    assert {str(part) for part in masks[0].circuit} == set(body["circuit"])
    model = Model.load(folder)
    select, parts = load_task(str(folder / "pairs.jsonl")).split(model.tokenizer, 24, seed=0).select, nodes(model)
    again = probe(parts, select, parts.fallback("resample"), 0.5, settings=MaskSettings(updates=12, seed=1))
    assert again.scores.values().tolist() == pytest.approx(masks[1].scores.values().tolist())


def test_codes_find_the_planted_head_and_say_so_where_there_is_none(folder: Path):
    """Where the word was there before, the induction head looks elsewhere; in pairs of two answers it is at work in both."""
    model, present = model_of("induction"), load_task(str(folder / "present.jsonl"))
    study = map(model, present, Plan(n=48, search="codes", random_circuits=5), do=("discover", "trust"))
    assert [str(part) for part in study.circuit or ()] == ["L1.h2"] and study.record.trust is not None
    select = present.split(model.tokenizer, None, seed=0).select
    found = codes(model, select.take(range(min(PAIRS, len(select)))))
    heads = len(found.scores)
    least = float(found.scores.table["p"].min()) * heads  # type: ignore[arg-type]
    claim = next(one for one in study.claims if "takes other values" in one.statement)
    assert claim.verdict == ("supported" if least <= 0.05 else "not supported") and f"1 of {heads} heads" in claim.evidence
    assert claim.scope == study.claims[0].scope
    pairs = load_task(str(folder / "pairs.jsonl"))
    nothing = map(model, pairs, Plan(search="codes"), do=("discover",))
    claim = next(one for one in nothing.claims if "takes other values" in one.statement)
    assert nothing.circuit is None and claim.verdict == "not supported"
    with pytest.raises(PatchclampError, match=f"no circuit to judge: 0 of {heads} heads"):
        map(model, pairs, Plan(search="codes"), do=("trust",))
    whole = map(model, pairs, Plan(search="codes"), do=("verify", "discover", "trust"))
    assert (
        whole.circuit is None
        and whole.record.trust is None
        and any("takes other values" in one.statement for one in whole.claims)
    )


def test_a_path_of_neurons_is_chosen_on_select_and_judged_on_confirm(tmp_path: Path):
    truth, model = wired("facts"), model_of("facts")
    plan = Plan(n=24, parts="neurons", search="path")
    with open_run(tmp_path / "run", model, truth.task, plan) as run:
        study = map(model, truth.task, plan, run, do=("discover",))
    kept = load_step(tmp_path / "run", "path")
    split, parts = truth.task.split(truth.tokenizer, 24, seed=0), gated(model, ["L*.mlp.n*"])
    found = neuron_path(parts, split.select, parts.fallback("resample"), split.confirm, draws=1)
    assert study.circuit == kept.circuit == found.circuit and len(found.circuit) == model.layers
    removal = {row["choice"]: row["removal"] for row in kept.judged.to_dicts()}
    assert removal["path"] == pytest.approx(found.judged["removal"][0])  # on the same prompts, whatever it is held against
    claim = next(one for one in study.claims if "random neurons of the same layers" in one.statement)
    assert f"{removal['path']:+.3g} of logit_diff" in claim.evidence and f"p = {kept.p:.2g}" in claim.evidence
    assert claim.verdict == ("supported" if kept.p <= 0.05 and removal["path"] > 0 else "not supported")


def test_what_these_searches_take_is_said_before():
    truth, model = wired("induction"), model_of("induction")
    for plan in (Plan(n=24, search="masks", updates=7), Plan(n=24, search="codes"), Plan(n=24, search="path", parts="neurons")):
        line = next(line for line in lines(job_of(model, truth.task, plan), ("discover",)) if line.step == plan.search)
        assert line.most.forward >= line.expected.forward > 0
        if plan.search == "masks":  # six prompts select: one batch of all of them
            assert line.expected.sloped == SEEDS * 7 * 6


def test_what_these_searches_cannot_do_is_refused(cli: Cli, folder: Path, tmp_path: Path):
    pairs, out = folder / "pairs.jsonl", ("--out", tmp_path / "run")
    for words, told in (
        (("--sparsity", "0.9"), "--search masks"),
        (("--search", "acdc", "--updates", "5"), "--search masks"),
        (("--search", "masks", "--sparsity", "1.5"), "between 0 and 1"),
        (("--search", "masks", "--sparsity", "0.5", "--mask-price", "2"), "one of the two"),
        (("--search", "masks", "--mask-price", "0"), "above 0"),
        (("--search", "masks", "--updates", "0"), "1 or more"),
        (("--search", "codes", "--parts", "edges"), "codes are of heads"),
        (("--search", "codes", "--tied", "L*.block"), "codes are of heads"),
        (("--search", "path"), "--parts neurons"),
        (("--search", "nothing"), "choose from threshold"),
    ):
        code, _, err = cli("discover", folder, pairs, *words, *out)
        assert code == 2 and told in err, (words, err)
        assert not (tmp_path / "run").exists()


def test_codes_need_pairs(tmp_path: Path):
    words = ("apple", "bear", "cloud", "door", "egg")
    rows = [{"text": f"{a} so {b} the {a}"} for a in words for b in words if a != b]
    (tmp_path / "alone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TaskError, match="no corrupt prompts"):
        map(model_of("induction"), str(tmp_path / "alone.jsonl"), Plan(search="codes"), do=("discover",))
