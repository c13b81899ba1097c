"""Mixtures of parts and another model's values, as a study and from the shell: what was planted comes out by name, and only that."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import tiny
from patchclamp.errors import PatchclampError
from patchclamp.models.model import Model
from patchclamp.parts import tied
from patchclamp.report import render
from patchclamp.store import load_plan, load_record
from patchclamp.study import Plan, map
from patchclamp.study.cost import cost
from patchclamp.study.provenance import identity
from patchclamp.zoo import wired
from saved_model import save

Cli = Callable[..., tuple[int, str, str]]
QUICK = ("--random-circuits", "10", "--json")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wired fact model, and one in which the memory gives the next person's word: as if the first were fine-tuned from it."""
    one, place = wired("facts"), tmp_path_factory.mktemp("tuned")
    base = deepcopy(one.hf)
    with torch.no_grad():
        base.transformer.h[1].mlp.c_proj.weight.copy_(base.transformer.h[1].mlp.c_proj.weight.roll(1, 0))
    return save(one, place / "tuned", 96, one.hf.to(torch.float32)), save(one, place / "base", 96, base.to(torch.float32))


def effects(body: dict[str, Any]) -> dict[str, float]:
    return {row["site"]: row["exact"] for row in body["scores"]}


@pytest.mark.parametrize("command", ["verify", pytest.param("map", marks=pytest.mark.long)])
def test_what_was_fine_tuned_in_one_part_is_found_from_the_shell(
    cli: Cli, tuned: tuple[Path, Path], tmp_path: Path, few_gates: Any, command: str
) -> None:
    """Whole layers, key/value heads, heads and an MLP in one mixture; closed gates pass what the base model has there."""
    model, base = tuned
    asked = ("--tied", "L0.block, L0.kv*,L1.h*,L1.mlp", "--fallback", "model", "--other", base)
    with few_gates():
        code, out, err = cli(
            command,
            model,
            model / "pairs.jsonl",
            "--out",
            tmp_path / "run",
            *asked,
            *(QUICK if command in ("map", "trust") else QUICK[2:]),
        )
    assert code == 0, err
    body = json.loads(out)
    found = effects(body)
    assert set(found) == {*(f"L0.kv{head}" for head in range(4)), *(f"L1.h{head}" for head in range(4)), "L0.block", "L1.mlp"}
    assert found.pop("L1.mlp") > 0.5 and max(map_abs(found)) < 1e-4  # float32: what differs in nothing is left by rounding
    if command == "map":
        roles = {row["site"]: row["role"] for row in body["scores"]}
        assert {site for site, role in roles.items() if role in ("facilitating", "interfering")} == {"L1.mlp"}
        assert body["circuit"] == ["L1.mlp"]
    spoken = [claim["statement"] for claim in body["claims"] if claim["verdict"] == "supported"]
    assert "L1.mlp facilitates the behaviour" in spoken and not any("L0" in text for text in spoken)
    record = load_record(tmp_path / "run")
    assert record.provenance.other is not None and record.provenance.other.hash != record.provenance.model.hash
    assert "model (base)" in record.claims[0].scope and "model (base)" in render(record)
    code, out, err = cli("attribute", tmp_path / "run", "--method", "gradient", "--out", tmp_path / "more", "--json")
    assert code == 0, err  # the run knows which model it was held against
    assert effects(json.loads(out))["L1.mlp"] > 0.5
    assert load_plan(tmp_path / "more")["source"]["asked"]["other"] == str(base)


def map_abs(found: dict[str, float]) -> list[float]:
    return [abs(value) for value in found.values()]


def test_one_part_that_was_changed_is_found_among_parts_of_every_kind(cli: Cli, tmp_path: Path) -> None:
    """A random mixture of experts of which one expert was changed: in the last block nothing reads what it writes, so that no other
    part can carry it. A neuron in the last block, whose input weights were changed, is found among neurons."""
    one = wired("facts")
    hf = tiny("qwen3_moe")
    assert len(one.tokenizer) <= hf.config.vocab_size
    model = save(one, tmp_path / "model", 48, hf.to(torch.float32))
    with torch.no_grad():
        hf.model.layers[1].mlp.experts.down_proj[2] *= -1
    base = save(one, tmp_path / "base", 48, hf.to(torch.float32))
    mixture = "L0.block,L*.kv*,L1.h*,L0.mlp.n1*,L1.mlp.e*,L0.h2@-1"
    asked = ("--tied", f"{mixture},L1.mlp", "--fallback", "model", "--other", base, "--min-accuracy", "0")
    code, out, err = cli("verify", model, model / "pairs.jsonl", *asked, "--second", "zero", "--out", tmp_path / "run", "--json")
    assert code == 0, err
    found = effects(json.loads(out))
    assert {"L0.block", "L1.kv1", "L1.h3", "L0.mlp.n17", "L1.mlp.e0", "L0.h2@-1"} < set(found)
    assert abs(found.pop("L1.mlp")) > 1e-3 and max(map_abs(found)) < 1e-6
    second = {row["site"]: row["second"] for row in json.loads(out)["scores"]}
    assert sum(abs(value) > 1e-3 for value in second.values()) > 10, "under zero every kind of part matters"
    loaded = [Model.load(str(folder)) for folder in (model, base)]
    with pytest.warns(UserWarning, match=r"the experts of layers 1 differ .* on their routing weights.*add L\*\.mlp"):
        tied(loaded[0], mixture.split(",")).fallback("model", other=loaded[1])


def test_a_neuron_that_was_changed_is_found_among_neurons() -> None:
    hf = tiny("gpt2")
    one = wired("facts")
    model = Model.load(deepcopy(hf), tokenizer=one.tokenizer)
    with torch.no_grad():
        hf.transformer.h[1].mlp.c_fc.weight[:, 7] *= -1
    base = Model.load(hf, tokenizer=one.tokenizer)
    plan = Plan(n=32, tied=("L0.block", "L1.kv*", "L1.mlp.n*"), fallback="model", min_accuracy=0.0)
    study = map(model, one.task, plan, do=("verify",), other=base)
    found = dict(zip(study.scores["site"], study.scores["exact"], strict=True))
    assert len(found) == 1 + 4 + 128
    assert abs(found.pop("L1.mlp.n7")) > 1e-4 and max(map_abs(found)) < 1e-6


def test_the_other_models_weights_are_part_of_the_question(tuned: tuple[Path, Path]) -> None:
    model, base = (Model.load(str(folder)) for folder in tuned)
    task, plan = wired("facts").task, Plan(n=32, fallback="model", tied=("L*.block",))
    again = Model.load(str(tuned[1]))
    assert identity(model, task, plan, base) == identity(model, task, plan, again)
    with torch.no_grad():
        again.hf.transformer.h[0].mlp.c_proj.weight[0, 0] += 1
    other = Model.load(again.hf, tokenizer=again.tokenizer)
    assert len({identity(model, task, plan, one) for one in (None, base, other, model)}) == 4
    assert identity(model, task, plan) != identity(model, task, Plan(n=32, fallback="model", tied=("L*.h*",)))


def test_what_a_mixture_takes_is_counted(tuned: tuple[Path, Path]) -> None:
    model, base = (Model.load(str(folder)) for folder in tuned)
    task, plan = wired("facts").task, Plan(n=32, fallback="model", tied=("L0.block", "L1.h*"), nulls=False)
    found = cost(model, task, plan, ("verify",), other=base)
    exact = next(line for line in found.lines if line.step == "exact")
    assert exact.settings == 6  # five parts, and all open
    plain = cost(model, task, Plan(n=32, fallback="zero", tied=("L0.block", "L1.h*"), nulls=False), ("verify",))
    assert exact.expected.plain > next(line for line in plain.lines if line.step == "exact").expected.plain
    assert found.memory > plain.memory


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--fallback", "model"), "none was given: name it (--other MODEL)"),
        (("--other", "BASE"), "no fallback takes its values: ask for one (--fallback model)"),
        (("--other-revision", "step1"), "no model that it is of"),
        (("--tied", "L9.block"), "fits none"),
        (("--tied", "L0.h1,,L0.mlp"), "one of them has no name"),
        (("--tied", "L0.h1,L0.h1.z"), "gates on the same"),
        (("--fallback", "model", "--other", "zoo/small"), "cannot stand in for parts of"),
        (("--fallback", "model", "--other", "nowhere/at-all-here"), "nowhere/at-all-here"),
    ],
)
def test_what_cannot_be_asked_is_said_and_leaves_nothing(
    cli: Cli, tuned: tuple[Path, Path], tmp_path: Path, asked: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, base = tuned
    words = [str(base) if word == "BASE" else word for word in asked]
    code, _, err = cli("verify", model, model / "pairs.jsonl", "--out", tmp_path / "run", *words)
    assert code == 2 and said in err, err
    assert not (tmp_path / "run").exists()


def test_steps_of_heads_and_mlps_refuse_mixtures(cli: Cli, tuned: tuple[Path, Path]) -> None:
    model, base = (Model.load(str(folder)) for folder in tuned)
    task, mixed = wired("facts").task, Plan(n=32, tied=("L*.block",))
    for step in ("relate", "localise"):
        with pytest.raises(
            PatchclampError, match=rf"{step} is of heads and MLPs, and a mixture of parts was asked for \(L\*\.block\)"
        ):
            map(model, task, mixed, do=(step,))
    with pytest.raises(PatchclampError, match="choose one"):
        Plan(parts="neurons", tied=("L*.block",))
    with pytest.raises(PatchclampError, match="go with heads and MLPs"):
        Plan(parts="edges", fallback="model")
    with pytest.raises(PatchclampError, match="none was given"):
        cost(model, task, Plan(n=32, second="model"), ("verify",))
    assert cli("relate", tuned[0], tuned[0] / "pairs.jsonl", "--tied", "L*.block")[0] == 2
    del base
