"""Training in every family: padded rows weigh as if they stood alone, and a checkpoint goes on as the model that it was."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from cases import CONFIGS, tiny
from patchclamp.models.model import Model
from patchclamp.training import Rows, Tokens, Training, train
from patchclamp.training.forward import logits_of
from patchclamp.training.loss import next_token

LENGTHS = (5, 9, 7)


def padded(left: bool) -> tuple[Rows, list[torch.Tensor]]:
    """Rows of three lengths, and each by itself."""
    draw = torch.Generator().manual_seed(1)
    alone = [torch.randint(3, 97, (length,), generator=draw) for length in LENGTHS]
    tokens, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.bool)
    for row, one in enumerate(alone):
        where = slice(9 - len(one), None) if left else slice(0, len(one))
        tokens[row, where], mask[row, where] = one, True
    weights = mask.float()
    weights[torch.arange(3), mask.long().argmax(1)] = 0  # the first real token is not predicted from padding
    return Rows(tokens, weights, mask), alone


def gradient(model: torch.nn.Module) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


OFTEN = ("gpt2", "gemma3", "mixtral")
"""Plain; with names of its own on the hub; with experts that are fused in memory and apart on the disk. The others run with the long tests."""
FAMILIES = [pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.long]) for name in CONFIGS]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_nothing(family):
    """Loss and gradient of padded rows are those of the rows one by one: 1e-5, for kernels sum in another order."""
    model = Model.load(tiny(family))
    for left in (False, True):
        rows, alone = padded(left)
        loss = next_token(logits_of(model, rows), rows)
        loss.backward()
        ours = gradient(model.hf)
        single = [model.hf(input_ids=one[None], use_cache=False).logits[0] for one in alone]
        expected = sum(
            cross_entropy(logits[:-1], one[1:], reduction="sum") for logits, one in zip(single, alone, strict=True)
        ) / (21 - 3)
        expected.backward()
        theirs = gradient(model.hf)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_off_run_of_any_family_ends_in_the_same_weights(family, tmp_path):
    """Files keep the hub's format (experts one by one, other names): what comes back is the same bit for bit."""
    data = Tokens(torch.randint(3, 97, (12, 6), generator=torch.Generator().manual_seed(0)))
    training = Training(4, batch=3, schedule="constant", checkpoints=(2,))

    class Cut(Exception):
        pass

    def cut(done: int, of: int, numbers: object) -> None:
        if done == 3:
            raise Cut

    whole = train(Model.load(tiny(family)), data, training, tmp_path / "whole")
    with pytest.raises(Cut):
        train(Model.load(tiny(family)), data, training, tmp_path / "cut", tick=cut)
    again = train(Model.load(tiny(family)), data, training, tmp_path / "cut")
    for (name, a), b in zip(whole.model.hf.named_parameters(), again.model.hf.parameters(), strict=True):
        assert torch.equal(a, b), name
    loaded = Model.load(tmp_path / "cut" / "checkpoints" / "step-0000004")
    for (name, a), b in zip(again.model.hf.named_parameters(), loaded.hf.parameters(), strict=True):
        assert torch.equal(a, b), name
