"""Folding gates into weights: every family, against the same gates live; checkpoints on disk; side effects by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cases import CONFIGS, tiny
from patchclamp.change import fold, side_effects, text_effects, write_checkpoint
from patchclamp.errors import FamilyError, GateError, PatchclampError
from patchclamp.models.inputs import token_batch
from patchclamp.models.model import Model
from patchclamp.parts import Gated, gated, nodes
from patchclamp.tasks import load_task
from test_parts import examples

MEANS = {"gpt2", "gpt_neox", "gpt_neox-sequential", "llama", "smollm3", "granite", "opt", "phi", "bloom", "gpt_neo"}
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
    model, batch = Model.load(tiny(family)), examples(4, (7, 5)).batch()
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
    model, some = Model.load(tiny(family)), examples(4, (7, 5))
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
