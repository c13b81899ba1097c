"""The trainer: the same numbers as a loop of the tests' own; cut off and begun again, the same weights."""

from dataclasses import dataclass

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from patchclamp.models.model import Model
from patchclamp.training import Rows, Training, train


@dataclass(frozen=True)
class Repeats:
    """Random tokens said twice."""

    name: str = "repeats"
    half: int = 6
    seed: int = 0

    def rows(self, step: int, count: int) -> Rows:
        draw = torch.Generator().manual_seed(hash((self.seed, step)) % 2**63)
        first = torch.randint(1, 20, (count, self.half), generator=draw)
        weights = torch.ones(count, 2 * self.half)
        return Rows(torch.cat([first, first], 1), weights)


def small(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return Model.load(GPT2LMHeadModel(config).eval())


def test_updates_are_those_of_a_loop_of_the_tests_own(tmp_path):
    """AdamW without decay, a constant rate, no dropout: weights equal to 1e-6."""
    ours, theirs = small(), small().hf
    for one in (ours.hf, theirs):
        for module in one.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    run = train(ours, Repeats(), Training(5, batch=8, schedule="constant", clip=None), tmp_path)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(5):
        tokens = Repeats().rows(step, 8).tokens
        loss = theirs(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert run.curve("loss")["value"].to_list() == pytest.approx(losses, abs=1e-6)
    for a, b in zip(ours.hf.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_a_run_that_was_cut_off_ends_in_the_same_weights(tmp_path):
    whole = train(small(), Repeats(), Training(12, batch=4, save=5), tmp_path / "whole")

    class Cut(Exception):
        pass

    def cut(model: Model, step: int) -> dict[str, float]:
        if step == 8 and not (tmp_path / "again").exists():
            raise Cut
        return {}

    with pytest.raises(Cut):
        train(small(), Repeats(), Training(12, batch=4, save=5, checkpoints=(8,)), tmp_path / "cut", measures=[cut])
    (tmp_path / "again").touch()
    again = train(small(), Repeats(), Training(12, batch=4, save=5, checkpoints=(8,)), tmp_path / "cut", measures=[cut])
    for a, b in zip(whole.model.hf.parameters(), again.model.hf.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.curve("loss").equals(whole.curve("loss"))
