"""Train a small model from scratch, cut the run off, go on, and look at what was learned when."""

import torch

import patchclamp as pc
from patchclamp.training import Tokens, Training, begin, held_out, lora, train

torch.set_num_threads(1)  # so small a model gains nothing from more
# Rows that count on from anywhere, modulo 31.
data = Tokens(1 + (torch.arange(31)[:, None] + torch.arange(12)) % 31, seed=0, held=6)
config = {"model_type": "gpt2", "vocab_size": 32, "n_positions": 12, "n_embd": 32, "n_layer": 2, "n_head": 2,
          "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
plan = Training(steps=24, batch=8, rate=1e-2, schedule="wsd", warmup=4, cooldown=8, checkpoints=4)
measures = [held_out(data, rows=6)]


class Cut(Exception):
    """The power goes."""


def cut(done: int, of: int, numbers: object) -> None:
    """Once, behind update 15."""
    if done == 15:
        raise Cut


try:
    train(begin(config, seed=0), data, plan, "run", measures=measures, tick=cut)
except Cut:
    print("cut off behind update 15; begun again, it goes on from its last checkpoint")
run = train(begin(config, seed=0), data, plan, "run", measures=measures)
whole = train(begin(config, seed=0), data, plan, "whole", measures=measures)
pairs = zip(run.model.hf.parameters(), whole.model.hf.parameters(), strict=True)
print("the weights are those of a run that was not cut off, bit for bit:", all(torch.equal(a, b) for a, b in pairs))

print("held-out loss, by updates:", {step: round(value, 3) for step, value in run.curve("held-out loss").rows()})
for step in run.steps:  # each checkpoint is a model
    model = pc.Model.load(f"run/checkpoints/step-{step:07d}")
    print(f"  step {step}: {model.parameters} parameters, largest logit {float(model.run(data.rows(-1, 4).tokens).max()):.2f}")

# LoRA: factors are trained beside frozen weights, which stay as they are; its checkpoints hold the sum and load alike.
down = Tokens(data.tokens.flip(1), held=6)
adapted = lora(run.model, rank=2)
tuned = train(adapted, down, Training(steps=8, batch=8, rate=1e-2, checkpoints=1), "tuned", measures=[held_out(down, rows=6)])
trained = sum(p.numel() for p in adapted.hf.parameters() if p.requires_grad)
print(f"LoRA trains {trained} numbers to count down:", tuned.curve("held-out loss").rows())
