"""GRASP: directions of a fine-tuning without labels; updates that add nothing along them, whatever the optimizer and the family."""

from pathlib import Path

import numpy as np
import pytest
import torch

import cases
from drawn import Drawn
from patchclamp.errors import TrainingError
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.training import Rows, Training, lora, train
from patchclamp.training.clamps import Schedule
from patchclamp.training.directions import drift_directions, orthonormal, weight_directions
from patchclamp.training.grasp import Grasp, Writer, writers

TOKENS = torch.tensor([[5, 7, 5, 9, 7, 5, 7], [3, 3, 4, 8, 3, 4, 6]])
NORMED, EXPERTS = ("gemma2", "gemma3", "gemma3_text", "olmo2", "olmo3"), ("mixtral", "qwen3_moe", "gpt_oss")
LINEAR = tuple(name for name in cases.CONFIGS if name not in (*NORMED, *EXPERTS, "bloom"))
QUICK = ("gpt2", "llama", "gpt_neox", "falcon-alibi", "opt")
PLAN = Training(4, batch=4, rate=1e-2, schedule="constant", decay=0.1, clip=None, checkpoints=(4,))


def fresh(family: str = "gpt2", seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    return Model.load(cases.tiny(family, seed=seed, dtype=dtype))


def basis(rank: int = 2, width: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randn(width, rank, generator=torch.Generator().manual_seed(seed))


def outputs(model: Model) -> list[torch.Tensor]:
    """What writes, [out, ...], folded: by the names of modules, not by `writers`."""
    hf = model.hf.get_base_model() if hasattr(model.hf, "peft_config") else model.hf
    found: list[torch.Tensor] = []
    for name, module in hf.named_modules():
        if name.endswith((".c_proj", ".o_proj", ".down_proj")) and hasattr(module, "weight"):
            base = getattr(module, "base_layer", module)
            weight = base.weight.detach().clone()
            if hasattr(module, "lora_B"):
                weight = weight + module.get_delta_weight("default").detach()
            found.append(weight.T if type(base).__name__ == "Conv1D" else weight)
    return found


def share(change: torch.Tensor, u: torch.Tensor) -> float:
    """Of a change [out, in], the share of its norm that lies along u."""
    return float((orthonormal(u).to(change).T @ change).norm() / change.norm())


@pytest.mark.parametrize("family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in LINEAR])
def test_nothing_is_added_along_the_directions_in_any_family(family: str, tmp_path: Path):
    """AdamW with decay, four updates: U^T of each writer's change is 0 to rounding (weights of size .15 in float32: 1e-6)."""
    model, u = fresh(family), orthonormal(basis())
    before = {one.name: one.parameter.detach().clone() for one in writers(model)}
    train(model, Drawn(lowest=3), PLAN, tmp_path / "run", clamps=[Grasp(basis())])
    for one in writers(model):
        change = (one.parameter.detach() - before[one.name]).double()
        along = u.T @ (change if one.axis == 0 else change.T)
        assert float(change.abs().max()) > 1e-3 and float(along.abs().max()) < 1e-6, one.name
    counted = sum(one.parameter.dim() == 2 and "emb" not in one.name and "wte" not in one.name and "wpe" not in one.name
                  for one in writers(model))  # fmt: skip
    assert counted == 2 * model.layers


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lora_writes_nothing_along_the_directions(family: str, tmp_path: Path):
    """The product of the factors, and what a checkpoint of it adds; without the clamp it does write there."""
    base = fresh(family)
    plain, held = lora(base, 4, seed=3), lora(base, 4, seed=3)
    train(plain, Drawn(lowest=3), PLAN, tmp_path / "plain")
    train(held, Drawn(lowest=3), PLAN, tmp_path / "held", clamps=[Grasp(basis())])
    folded = outputs(Model.load(str(tmp_path / "held/checkpoints/step-0000004")))
    for old, free, new, kept in zip(outputs(base), outputs(plain), outputs(held), folded, strict=True):
        assert share(free - old, basis()) > 0.05
        assert float((orthonormal(basis()).float().T @ (new - old)).abs().max()) < 1e-6
        torch.testing.assert_close(kept, new, atol=1e-6, rtol=0)
        assert float((new - old).abs().max()) > 1e-4
    folder = tmp_path / "plain/checkpoints/step-0000004"
    with pytest.raises(TrainingError, match="wears an adapter"):
        weight_directions(base, held)
    found = weight_directions(base, Model.load(str(folder)), rank=3)
    changes = np.concatenate([(new - old).numpy() for old, new in zip(outputs(base), outputs(plain), strict=True)], 1)
    vectors, values, _ = np.linalg.svd(changes.astype(np.float64), full_matrices=False)
    cosines = np.abs((vectors[:, :3] * found.basis.numpy()).sum(0))
    np.testing.assert_allclose(cosines, 1, atol=1e-4)  # folding rounds the change to 1e-8 of weights of .15
    np.testing.assert_allclose(found.share.numpy(), values[:3] ** 2 / (values**2).sum(), rtol=1e-3)
    with pytest.raises(TrainingError, match="begin with a new adapter"):
        train(plain, Drawn(lowest=3), PLAN, tmp_path / "again", clamps=[Grasp(basis())])


def test_what_adam_makes_of_projected_gradients(tmp_path: Path):
    """Gradients alone: plain descent adds nothing along U, AdamW does, for it scales each entry by itself."""
    found: dict[str, float] = {}
    for name, clamps, plan in (
        ("free", [], PLAN),
        ("adamw, gradients alone", [Grasp(basis(), updates=False)], PLAN),
        ("sgd, gradients alone", [Grasp(basis(), updates=False)], Training(4, batch=4, rate=1e-2, optimizer="sgd", checkpoints=(4,))),
    ):  # fmt: skip
        model = fresh("llama")
        before = outputs(model)
        train(model, Drawn(lowest=3), plan, tmp_path / name, clamps=clamps)
        found[name] = float(np.mean([share(new - old, basis()) for old, new in zip(before, outputs(model), strict=True)]))
    # Two of 32 random directions hold sqrt(2 / 32) = .25 of a change.
    assert found["sgd, gradients alone"] < 1e-3 and 0.02 < found["adamw, gradients alone"] < found["free"]


@pytest.mark.parametrize("conv", [False, True])
def test_gradients_are_projected_as_written(conv: bool):
    """In closed form, of Linear [out, in] and Conv1D [in, out], of biases, and half-way."""
    model = fresh("gpt2" if conv else "llama", dtype=torch.float64)
    layer = model.anatomy.layers[1]
    weight, u = layer.down.weight, orthonormal(basis())
    for one in model.hf.parameters():
        one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradient = weight.grad.clone()
    Grasp(basis(), schedule=Schedule(strength=0.5)).gradients(model, 0)
    half = torch.eye(32, dtype=torch.float64) - 0.5 * u @ u.T
    torch.testing.assert_close(weight.grad, gradient @ half if conv else half @ gradient, atol=1e-12, rtol=0)
    first = layer.mlp.c_fc.weight if conv else layer.mlp.up_proj.weight
    expected = torch.randn(first.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(first.grad, expected)
    if conv:
        bias = torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        torch.testing.assert_close(layer.down.bias.grad, half @ bias, atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "olmo2", "mixtral", "bloom", "gpt_neox"])
def test_the_stream_gives_no_gradient_along_the_directions(family: str):
    """Not a bit of the logits changes; at all that is added to the stream the gradient along U is 0, and without it is not."""
    model, clamp = fresh(family), Grasp(basis(), stream=True, weights=False)
    rows, u = Drawn(lowest=3).rows(0, 3), orthonormal(basis()).float()
    slopes: dict[str, list[torch.Tensor]] = {}
    logits: dict[str, torch.Tensor] = {}
    for name, edits in (("free", {}), ("held", clamp.edits(model, 0, rows))):
        seen: list[torch.Tensor] = []

        def keep(value: torch.Tensor, _: object, /, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            same = value.clone()
            seen.append(same)
            same.retain_grad()
            return same

        watched = dict.fromkeys(model.find(("embed", "L*.attn.write", "L*.mlp.write")), keep)
        with model.editing(watched, rows.batch), model.editing(edits, rows.batch):
            logits[name] = model.hf(input_ids=rows.tokens, use_cache=False).logits
            logits[name].logsumexp(-1).sin().sum().backward()
        slopes[name] = [one.grad for one in seen if one.grad is not None]
        model.hf.zero_grad(set_to_none=True)
    assert torch.equal(logits["free"], logits["held"]) and len(slopes["held"]) == 1 + 2 * model.layers
    for free, held in zip(slopes["free"], slopes["held"], strict=True):
        assert float((free @ u).norm() / free.norm()) > 0.02
        assert float((held @ u).norm() / held.norm()) < 1e-5


def test_a_planted_direction_is_found():
    """Written by every output projection beside changes of one topic: from the weights; a bias: from the drift, exactly."""
    before, after = fresh("llama"), fresh("llama")
    draw = torch.Generator().manual_seed(2)
    u = orthonormal(torch.randn(32, 1, generator=draw))[:, 0].float()
    with torch.no_grad():
        for layer in after.anatomy.layers:
            for module in (layer.output, layer.down):
                module.weight += 0.02 * torch.outer(u, torch.randn(module.weight.shape[1], generator=draw))
                module.weight += 0.002 * torch.randn(module.weight.shape, generator=draw)
    found = weight_directions(before, after)
    assert abs(float(found.basis[:, 0] @ u)) > 0.98 and 0.5 < float(found.share[0]) < 1
    moved = fresh("gpt2")
    with torch.no_grad():
        moved.anatomy.layers[1].down.bias += 0.3 * u
    drift = drift_directions(fresh("gpt2"), moved, TOKENS)
    assert abs(float(drift.basis[:, 0] @ u)) > 1 - 1e-6 and float(drift.share[0]) > 1 - 1e-6
    with pytest.raises(TrainingError, match="did not move"):
        drift_directions(fresh("gpt2"), moved, TOKENS, layer=0)


def test_padding_does_not_drift():
    """A row alone, and the same row behind padding, have the same directions."""
    before, after = fresh("llama"), fresh("llama", seed=1)
    padded = torch.cat([torch.zeros(1, 6, dtype=torch.long), TOKENS[:1]], 1)
    rows = Rows(padded, (padded > 0).float(), padded > 0)
    alone, behind = drift_directions(before, after, TOKENS[:1], 2), drift_directions(before, after, rows.batch, 2)
    torch.testing.assert_close((alone.basis * behind.basis).sum(0).abs(), torch.ones(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(alone.share, behind.share, atol=1e-4, rtol=0)
    site = Site("resid.post", 1)
    ends = (after.record(TOKENS, site)[site] - before.record(TOKENS, site)[site])[:1, -1]
    for prompts in (TOKENS[:1], rows.batch):
        found = drift_directions(before, after, prompts, last=True)
        torch.testing.assert_close((ends @ found.basis)[0, 0].abs(), ends.norm(), atol=1e-4, rtol=1e-4)


def test_killed_and_begun_again_it_is_the_same(tmp_path: Path):
    """Its state is that of one update."""
    whole, part = fresh("llama"), fresh("llama")
    plan = Training(6, batch=4, rate=1e-2, checkpoints=(6,), save=2)
    train(whole, Drawn(lowest=3), plan, tmp_path / "whole", clamps=[Grasp(basis(), stream=True)])

    class Cut(Exception):
        pass

    def tick(done: int, of: int, numbers: object) -> None:
        if done == 5:
            raise Cut

    with pytest.raises(Cut):
        train(part, Drawn(lowest=3), plan, tmp_path / "part", clamps=[Grasp(basis(), stream=True)], tick=tick)
    again = fresh("llama")
    train(again, Drawn(lowest=3), plan, tmp_path / "part", clamps=[Grasp(basis(), stream=True)])
    for one, two in zip(whole.hf.parameters(), again.hf.parameters(), strict=True):
        assert torch.equal(one, two)


def test_refusals():
    model = fresh("llama")
    for wrong in (torch.zeros(32, 1), torch.ones(32, 2), torch.full((32, 1), torch.nan), torch.zeros(32, 0)):
        with pytest.raises(TrainingError, match="independent"):
            Grasp(wrong)
    with pytest.raises(TrainingError, match="holds nothing"):
        Grasp(basis(), weights=False)
    with pytest.raises(TrainingError, match="32 wide"):
        Grasp(basis(width=16)).updated(model, 0)
    for family in (*NORMED, *EXPERTS, "bloom"):
        with pytest.raises(TrainingError, match="stream=True"):
            writers(cases.model_of(family))
    frozen = fresh("llama")
    frozen.hf.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to project"):
        writers(frozen)
    with pytest.raises(TrainingError, match="L7"):
        drift_directions(model, model, TOKENS, layer=7)
    with pytest.raises(TrainingError, match="1 to 32"):
        weight_directions(model, fresh("llama", seed=1), rank=33)
    assert repr(Grasp(basis())) == repr(Grasp(basis())) != repr(Grasp(basis(seed=2)))
    assert Writer("w", torch.nn.Parameter(torch.ones(2, 2)), 0).along(torch.eye(2), torch.eye(2)[:, :1]).tolist() == [
        [1, 0],
        [0, 0],
    ]
