"""Folding gates into weights: every family, against the same gates live; checkpoints on disk; side effects by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cases import CONFIGS, model_of, tiny
from patchclamp.change import fold, side_effects, text_effects, write_checkpoint
from patchclamp.errors import FamilyError, GateError, PatchclampError
from patchclamp.models.inputs import token_batch
from patchclamp.models.model import Model
from patchclamp.parts import Gated, gated, nodes
from patchclamp.tasks import load_task
from test_parts import examples

MEANS = {"gpt2", "gpt_neox", "gpt_neox-sequential", "llama", "smollm3", "granite", "opt", "phi", "bloom", "gpt_neo", "normless"}
"""Families whose projections have biases, or can be given them."""


def drawn(parts: Gated, seed: int = 0) -> torch.Tensor:
    """Gates of some parts: closed, half open, amplified; the rest open."""
    draws = torch.Generator().manual_seed(seed)
    gates = parts.open()
    chosen = torch.tensor(parts.counted)[torch.rand(len(parts.counted), generator=draws) < 0.6]
    gates[..., chosen] = torch.tensor([0.0, 0.3, 1.7])[torch.randint(0, 3, (len(chosen),), generator=draws)]
    return gates


@pytest.mark.parametrize("family", CONFIGS)
def test_folded_weights_compute_what_the_gates_do(family: str):
    """Zero: heads, MLPs, attention as a whole. The comparison is of whole runs, with gates live in the model that was given."""
    model, batch = model_of(family), examples(4, (7, 5)).batch()
    parts = gated(model, ["L*.h*", "L*.mlp", "L*.attn.write"])
    gates, rule = drawn(parts), parts.fallback("zero")
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    found = fold(parts, gates, rule, batch)
    live, plain = model.run(batch, parts.edits(gates, rule, batch)), model.run(batch)
    moved = (live - plain).abs()[batch.mask].max()
    # the same products in another order: float32 rounding of logits of order 1 to 10
    assert (found.model.run(batch) - live).abs()[batch.mask].max() < 2e-5 * live.abs().max() < moved
    assert all(torch.equal(value, before[name]) for name, value in model.hf.state_dict().items())


@pytest.mark.parametrize("family", CONFIGS)
def test_means_fold_where_there_is_a_bias_and_are_refused_by_name_elsewhere(family: str):
    model, some = model_of(family), examples(4, (7, 5))
    parts = nodes(model)
    gates, rule = drawn(parts), parts.fallback("mean:all", fit=some)
    if family not in MEANS:
        with pytest.raises(FamilyError, match=r"no bias|no place|without bias|several experts"):
            fold(parts, gates, rule, some.batch())
        return
    found, batch = fold(parts, gates, rule, some.batch()), some.batch()
    live = model.run(batch, parts.edits(gates, rule, batch))
    assert (found.model.run(batch) - live).abs()[batch.mask].max() < 2e-5 * live.abs().max()
    assert found.biases == (family in ("llama", "smollm3", "granite"))


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon-new", "gpt_neox"])
@pytest.mark.parametrize("kind", ["zero", "mean:all"])
def test_neurons_values_and_what_holds_them_compose(family: str, kind: str):
    """A head behind its key/value head, an MLP behind its neurons: each gate takes what those before it left."""
    if kind != "zero" and family == "falcon-new":
        pytest.skip("no biases there")
    model, some = Model.load(tiny(family)), examples(4, (7, 5))
    parts = gated(model, ["L*.kv*.v", "L*.h*", "L*.mlp.n*", "L*.mlp"])
    gates, rule, batch = drawn(parts, 1), parts.fallback(kind, fit=some), some.batch()
    found = fold(parts, gates, rule, batch)
    live = model.run(batch, parts.edits(gates, rule, batch))
    assert (found.model.run(batch) - live).abs()[batch.mask].max() < 3e-5 * live.abs().max()


def test_what_cannot_be_folded_is_refused():
    model, some = Model.load(tiny("gpt2")), examples(4)
    batch = some.batch()
    for patterns, word in ((["L0.h1.q"], "linear end"), (["L1.resid.pre"], "linear end")):
        parts = gated(model, patterns)
        with pytest.raises(GateError, match=word):
            fold(parts, parts.closed(), parts.fallback("zero"), batch)
    parts = gated(model, ["L0.h1"], positions=["end"])
    with pytest.raises(GateError, match="one position"):
        fold(parts, parts.closed(), parts.fallback("zero"), batch)
    parts = nodes(model)
    for kind, word in (("resample", "depends on the prompt"), ("mean:position", "depend on the prompt")):
        with pytest.raises(GateError, match=word):
            fold(parts, parts.closed(), parts.fallback(kind, fit=some), batch)
    with pytest.raises(GateError, match="one setting"):
        fold(parts, parts.closed(2), parts.fallback("zero"), batch)


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path):
    model = Model.load("zoo/small")
    parts, batch = nodes(model), load_task("ioi").examples(model.tokenizer, 6, seed=0).batch()
    found = fold(parts, drawn(parts, 2), parts.fallback("zero"), batch)
    folder = write_checkpoint(found.model, tmp_path / "new", {"gates": found.gates}, batch)
    again = Model.load(folder)
    assert torch.equal(again.run(batch), found.model.run(batch))
    assert json.loads((folder / "patchclamp.json").read_text())["gates"] == found.gates
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    with pytest.raises(PatchclampError, match="there already"):
        write_checkpoint(found.model, folder, {}, batch)
    with pytest.raises(TypeError):  # what json cannot write
        write_checkpoint(found.model, tmp_path / "other", {"gates": object()}, batch)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_side_effects_are_those_of_two_runs_by_hand():
    model = Model.load(tiny("gpt2", dtype=torch.float64))
    parts, some = nodes(model), examples(6, (7, 5))
    other = fold(parts, drawn(parts, 3), parts.fallback("zero"), some.batch()).model
    row = side_effects(model, other, [some]).row(0, named=True)
    batch = some.batch()

    def difference(which: Model) -> np.ndarray:
        last = which.run(batch)[:, -1]
        pairs = [(example.answers[0][0], example.wrong[0][0]) for example in some]
        return np.array([float(last[i, right] - last[i, wrong]) for i, (right, wrong) in enumerate(pairs)])

    before, after = difference(model), difference(other)
    assert row["before"] == pytest.approx(before.mean(), abs=1e-12) and row["after"] == pytest.approx(after.mean(), abs=1e-12)
    assert row["accuracy_after"] == (after > 0).mean() and row["change"] == pytest.approx((after - before).mean(), abs=1e-12)
    assert row["low"] <= row["change"] <= row["high"]
    texts = token_batch([[1, 5, 9, 4], [7, 3]])
    found = text_effects(model, other, texts)
    logp = [which.run(torch.tensor([[1, 5, 9, 4]])).log_softmax(-1)[0] for which in (model, other)]
    short = [which.run(torch.tensor([[7, 3]])).log_softmax(-1)[0] for which in (model, other)]
    nll = [-(float(a[0, 5] + a[1, 9] + a[2, 4]) + float(b[0, 3])) / 4 for a, b in zip(logp, short, strict=True)]
    assert found["tokens"] == 4 and found["nll_before"] == pytest.approx(nll[0], abs=1e-9)
    assert found["nll_after"] == pytest.approx(nll[1], abs=1e-9)
    kl = sum(
        float((a.exp() * (a - b)).sum()) for a, b in [*zip(logp[0][:3], logp[1][:3], strict=True), (short[0][0], short[1][0])]
    )
    assert found["kl"] == pytest.approx(kl / 4, abs=1e-9)
    assert text_effects(model, model, texts)["kl"] == 0
    with pytest.raises(PatchclampError, match="two tokens"):
        text_effects(model, model, token_batch([[4]]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has found a circuit."""
    from patchclamp.study import Plan, map, open_run

    model, task, plan = Model.load("zoo/small"), load_task("ioi"), Plan(n=48)
    folder = tmp_path_factory.mktemp("runs") / "ioi"
    source = {"model": "zoo/small", "task": "ioi", "loading": {}, "asked": {}}
    with open_run(folder, model, task, plan, source=source) as opened:
        map(model, task, plan, opened, do=("discover",))
    return folder


def test_apply_writes_the_circuit_as_a_checkpoint(cli, run: Path, tmp_path: Path):
    code, out, err = cli("apply", run, "--keep", "circuit", "--out", "kept", "--also", "agreement", "--n", 16)
    assert code == 0, err
    assert "ioi" in out and "agreement" in out and "Plain text (32 texts, written by the model itself)" in out
    note = json.loads((tmp_path / "kept" / "patchclamp.json").read_text())
    # what the checkpoint computes on new prompts, against the gates live
    model, other = Model.load("zoo/small"), Model.load(tmp_path / "kept")
    from patchclamp.store import load_record

    circuit = load_record(run).circuit
    assert circuit is not None
    parts, fit = nodes(model), load_task("ioi").split(model.tokenizer, 48, seed=0).fit
    batch = load_task("ioi").examples(model.tokenizer, 8, seed=5).batch()
    gates, rule = parts.only([*circuit]), parts.fallback("mean:all", fit=fit)
    live = model.run(batch, parts.edits(gates, rule, batch))
    assert (other.run(batch) - live).abs()[batch.mask].max() < 1e-4 * live.abs().max()
    assert sorted(note["gates"]) == sorted(str(site) for site in parts.labels[1:] if site not in circuit)
    assert note["side_effects"][0]["task"] == "ioi" and note["text"]["tokens"] > 100


def test_apply_scales_parts_and_generate_runs_the_same_gates_live(cli, run: Path, tmp_path: Path):
    code, out, err = cli(
        "apply", run, "--scale", "L1.h*=1.5", "--scale", "L2.mlp=0.5", "--out", "scaled", "--also", "none", "--json"
    )
    assert code == 0, err
    body = json.loads(out)
    assert body["gates"]["L1.h3"] == 1.5 and body["gates"]["L2.mlp"] == 0.5 and len(body["gates"]) == 9
    prompt = "When Mary and John went to the store , John gave a drink to"
    model = Model.load("zoo/small")
    prompt = model.tokenizer.decode(load_task("ioi").examples(model.tokenizer, 1, seed=5)[0].clean, skip_special_tokens=True)
    live = cli("generate", "zoo/small", prompt, "--scale", "L1.h*=1.5", "--scale", "L2.mlp=0.5", "--json")
    folded = cli("generate", "scaled", prompt, "--json")
    plain = cli("generate", "zoo/small", prompt, "--json")
    assert live[0] == folded[0] == 0 and json.loads(live[1]) == json.loads(folded[1])
    assert json.loads(plain[1])[0]["prompt"] == prompt
    code, out, _ = cli("generate", run, prompt, "--keep", "circuit", "--json")
    assert code == 0 and json.loads(out)[0]["text"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--out", "x"), "no gates were asked for"),
        (("--out", "x", "--scale", "L1.h3"), "write SITE=g"),
        (("--out", "x", "--scale", "L9.h3=0"), "L9.h3"),
        (("--out", "x", "--scale", "L1.h3.q=0"), "linear end"),
        (("--out", "x", "--keep", "circuit", "--fallback", "resample"), "use zero or mean"),
        (("--out", "x", "--keep", "other"), "--keep circuit"),
        (("--out", "x", "--scale", "L1.h3=0", "--text", "none.txt"), "no file none.txt"),
        (("--out", "x", "--scale", "L1.h3=0", "--also", "nonsense"), "nonsense"),
        (("--out", ".", "--scale", "L1.h3=0"), "there already"),
    ],
)
def test_bad_input_writes_nothing(cli, run: Path, tmp_path: Path, words: tuple[str, ...], said: str):
    (tmp_path / "here").write_text("something")
    code, _, err = cli("apply", run, *words)
    assert code == 2 and said in err and [path.name for path in tmp_path.iterdir()] == ["here"]
