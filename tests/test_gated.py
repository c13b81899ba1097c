"""Gated attention in the family without norms: against the formula, in the doctor, saved and loaded, refused where no kernel knows it."""

from pathlib import Path

import pytest
import torch

from patchclamp.models.doctor import examine
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.training import Training, train
from patchclamp.training.clamps.slices import slices
from patchclamp.zoo.recipes.backcopy import Backcopy, build


def gated_model(layers: int = 1) -> Model:
    """Backcopy's model with a gate whose weights are not near 0."""
    hf = build(3, layers=layers, gated=True)
    with torch.no_grad():
        for layer in hf.model.layers:
            layer.self_attn.gate.weight.normal_(0, 1, generator=torch.Generator().manual_seed(1))
    return Model.load(hf)


def test_a_gate_is_what_a_row_of_the_pattern_sums_to() -> None:
    """z = sigmoid(w x + b) softmax(scores) v, written out in float32, to 1e-6; with and without a tap; a gated model is healthy; a frozen
    head's gate is frozen; kernels that know no gates are refused; a model without gates has none, nor a word of them in its config."""
    model = gated_model()
    rows = Backcopy().rows(-1, 4)
    values = model.record(rows.tokens, ["L0.resid.pre", "L0.q", "L0.k", "L0.v", "L0.z", "L0.pattern"])
    read, q, k, v, z, pattern = (values[Site(kind, 0)] for kind in ("resid.pre", "q", "k", "v", "z", "pattern"))
    attention = model.hf.model.layers[0].self_attn
    gate = torch.sigmoid(read @ attention.gate.weight.T + attention.gate.bias).detach()
    assert float(gate.std()) > 0.1
    scores = torch.einsum("rqhd,rkhd->rhqk", q, k)
    ahead = torch.ones(25, 25, dtype=torch.bool).triu(1)
    soft = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    torch.testing.assert_close(pattern, soft * gate.transpose(1, 2)[..., None], atol=1e-6, rtol=0)
    torch.testing.assert_close(z, torch.einsum("rhqk,rkhd->rqhd", soft, v) * gate[..., None], atol=1e-5, rtol=0)
    with torch.no_grad():  # with a tap, the same
        watched = model.record(rows.tokens, ["logits", "L0.pattern"])[Site("logits")]
        torch.testing.assert_close(model.hf(input_ids=rows.tokens).logits, watched, atol=0, rtol=0)
    found = examine(model)
    assert found.passed, str(found)
    held = {piece.name for piece in slices(model, ("L0.h0",))}
    assert {f"model.layers.0.self_attn.gate.{name}" for name in ("weight", "bias")} <= held
    model.hf.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="gates are known to eager alone"):
        model.hf(input_ids=rows.tokens)
    plain = build(3)
    assert not any("gate" in name for name in plain.state_dict()) and "gated" not in plain.config.to_dict()


def test_a_gated_model_learns_saves_and_comes_back(tmp_path: Path) -> None:
    model = gated_model(2)
    run = train(model, Backcopy(), Training(3, batch=4, rate=1e-2, checkpoints=(3,), evaluate=3), tmp_path / "run")
    back = Model.load(str(tmp_path / "run/checkpoints/step-0000003"))
    rows = Backcopy().rows(-1, 4)
    torch.testing.assert_close(back.run(rows.tokens), run.model.run(rows.tokens), atol=0, rtol=0)
    before, after = (one.hf.model.layers[1].self_attn.gate.weight.detach() for one in (gated_model(2), back))
    assert float((after - before).abs().max()) > 1e-3
