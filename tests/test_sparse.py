"""Task neurons: how often each is active, the fewest that hold most of it, overlap beside chance; nothing else learns."""

import itertools
from pathlib import Path

import pytest
import torch

import cases
from drawn import Drawn
from patchclamp.errors import MeasureError, SiteError, TrainingError
from patchclamp.models.model import Model
from patchclamp.training import Rows, Training, train
from patchclamp.training.sparse import Only, frequencies, overlap, random_neurons, task_neurons

PLAN = Training(3, batch=4, rate=1e-2, schedule="constant", decay=0.1, checkpoints=(3,))


def padded() -> Rows:
    tokens = torch.tensor([[0, 0, 0, 5, 7, 5, 9], [3, 3, 4, 8, 3, 4, 6]])
    return Rows(tokens, (tokens > 0).float(), tokens > 0)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "phi3"])
def test_frequencies_are_what_hooks_of_the_tests_own_count(family: str):
    """Ungated: the sign of what goes into the activation. Gated: what goes into the down projection, against its own size."""
    model, rows = cases.model_of(family), padded()
    seen: dict[int, torch.Tensor] = {}
    hooks = []
    for number, layer in enumerate(model.anatomy.layers):
        if family in ("gpt2", "opt"):
            module = layer.mlp.c_fc if family == "gpt2" else layer.block.fc1
            hooks.append(module.register_forward_hook(lambda _, __, out, n=number: seen.update({n: out.detach()})))
        else:
            hooks.append(layer.down.register_forward_pre_hook(lambda _, args, n=number: seen.update({n: args[0].detach()})))
    try:
        model.run(rows.batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = frequencies(model, rows.batch)
    assert set(found) == {0, 1}
    for number, value in seen.items():
        real = value.reshape(*rows.tokens.shape, -1)[rows.real]
        on = real > 0 if family in ("gpt2", "opt") else real.abs() > real.square().mean().sqrt()
        torch.testing.assert_close(found[number], on.double().mean(0), atol=1e-12, rtol=0)
        assert 0.05 < float(found[number].mean()) < 0.95


@pytest.mark.parametrize("threshold", [0.3, 0.75, 0.95, 1.0])
def test_chosen_neurons_are_the_fewest_that_hold_the_share(threshold: float):
    """Against all subsets of 8 neurons, two layers, zeros and ties among them."""
    draw = torch.Generator().manual_seed(4)
    shares = {0: torch.randint(0, 5, (8,), generator=draw).double() / 4, 3: torch.rand(8, generator=draw).double()}
    shares[0][2] = 0
    found = task_neurons(shares, threshold)
    for layer, of in shares.items():
        mine = [int(site.rpartition("n")[2]) for site in found if site.startswith(f"L{layer}.")]
        wanted = threshold * float(of.sum())
        fewest = min(
            size for size in range(9) for some in itertools.combinations(range(8), size) if float(of[list(some)].sum()) >= wanted - 1e-9
        )  # fmt: skip
        assert len(mine) == fewest and float(of[mine].sum()) >= wanted - 1e-9 and 2 not in (mine if layer == 0 else [])
    assert task_neurons({0: torch.zeros(4)}) == ()


def test_overlap_is_that_of_sets_and_chance_that_of_draws():
    model = cases.model_of("llama")
    one = random_neurons(model, [f"L{n}.mlp.n{i}" for n in (0, 1) for i in range(20 + 10 * n)], seed=1)
    assert [sum(site.startswith(f"L{n}.") for site in one) for n in (0, 1)] == [20, 30]
    drawn = [random_neurons(model, one, seed) for seed in range(2, 202)]
    table = overlap(model, {"a": one, "b": drawn[0]})
    same, other, _ = table.rows(named=True)
    assert same["jaccard"] == 1 and same["both"] == 50
    assert other["both"] == len({*one} & {*drawn[0]}) and other["jaccard"] == other["both"] / len({*one} | {*drawn[0]})
    mean = sum(len({*one} & {*some}) / len({*one} | {*some}) for some in drawn) / len(drawn)
    assert mean == pytest.approx(other["chance"], abs=0.012)  # a Jaccard of 100 draws of 50 has a standard error of .003
    assert overlap(model, {"a": ["L0.mlp.n1"], "b": ["L1.mlp.n1"]})["chance"][1] == 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_nothing_else_learns(family: str, tmp_path: Path):
    """Rows and columns of two neurons change, every other entry of every weight keeps each bit, also under decay and momentum."""
    model = Model.load(cases.tiny(family))
    before = {name: one.detach().clone() for name, one in model.hf.named_parameters()}
    train(model, Drawn(lowest=3), PLAN, tmp_path / "run", clamps=[Only(("L0.mlp.n5", "L1.mlp.n9"))])
    allowed = {0: 5, 1: 9}
    changed = 0
    for name, one in model.hf.named_parameters():
        moved = one.detach() != before[name]
        if not bool(moved.any()):
            continue
        changed += 1
        layer = int(next(piece for piece in name.split(".") if piece.isdigit()))
        out = "c_proj" in name or "down" in name
        conv = family == "gpt2" and one.dim() == 2
        axis = 0 if one.dim() == 1 or (out == conv) else 1
        assert "mlp" in name and moved.nonzero()[:, axis].unique().tolist() == [allowed[layer]], name
    assert changed == 2 * 3  # gpt2: in with bias, out; llama: gate, up, down


def test_all_parts_are_plain_training(tmp_path: Path):
    """Bit for bit."""
    free, held = Model.load(cases.tiny("gpt2")), Model.load(cases.tiny("gpt2"))
    train(free, Drawn(lowest=3), PLAN, tmp_path / "free")
    train(held, Drawn(lowest=3), PLAN, tmp_path / "held", clamps=[Only(("embed", "L*.block", "final"))])
    for one, two in zip(free.hf.parameters(), held.hf.parameters(), strict=True):
        assert torch.equal(one, two)


def test_refusals(tmp_path: Path):
    model = cases.model_of("gpt2")
    for threshold in (0.0, 1.2):
        with pytest.raises(TrainingError, match="share above 0"):
            task_neurons({0: torch.ones(3)}, threshold)
    with pytest.raises(TrainingError, match="no neuron"):
        overlap(model, {"a": ["L0.h1"]})
    with pytest.raises(TrainingError, match="sets that have some"):
        overlap(model, {"a": ["L0.mlp.n1"], "b": []})
    with pytest.raises(TrainingError, match="no parts"):
        Only(())
    with pytest.raises(SiteError):
        Only("L9.mlp.n1").gradients(model, 0)
    with pytest.raises(MeasureError, match="neuron"):
        frequencies(cases.model_of("gpt_oss"), padded().batch)
    frozen = Model.load(cases.tiny("gpt2"))
    frozen.hf.requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing that may learn"):
        Only("L0.mlp.n1").gradients(frozen, 0)
