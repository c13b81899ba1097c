"""A circuit in words: how the shipped model tells the indirect object, claim by claim, each with the intervention that could refute it."""

import torch

import patchclamp as pc
from patchclamp.scores.statistics import mean_interval

model, task = pc.Model.load("zoo/small"), pc.load_task("ioi")
fit, select, confirm = task.split(model.tokenizer, n=128)
batch = confirm.batch()
assert batch.wrong is not None
right, wrong = batch.answers, batch.wrong  # the indirect object, and the subject


def names(closed: list[str], at: str) -> torch.Tensor:
    """Logits of the indirect object and of the subject, [2, example], with sites closed at one place (their mean put in)."""
    parts = pc.gated(model, closed, positions=(at,)) if closed else pc.nodes(model)
    edits = parts.edits(parts.closed() if closed else parts.open(), parts.fallback("mean:position", fit=fit), batch)
    with torch.no_grad():
        values = model.target_logits(batch, edits)[0]
    return torch.cat([values.gather(-1, tokens) for tokens in (right, wrong)], -1).T


def interval(values: torch.Tensor) -> str:
    """Mean over prompts, with its 95 % interval."""
    found = mean_interval(values.double().numpy())
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"


def said(text: str, closed: list[str], at: str) -> None:
    """What closing some sites does to both names' logits."""
    io, subject = names(closed, at) - names([], at)
    print(f"{text}: indirect object {interval(io)}, subject {interval(subject)}")


print("1. Heads of the first two layers copy both names to the end.")
said("   without their values at the indirect object", ["L0.kv*.v", "L1.kv*.v"], "IO")
said("   without their values at the first subject", ["L0.kv*.v", "L1.kv*.v"], "S1")

print("2. Heads of the last layer look from the end at the second subject, and what they carry is its value.")
patterns = model.record(batch, "L3.h*.pattern").values()
looks = [(one[batch.target_row, batch.target_position] * batch.columns("S2")).sum(-1).mean() for one in patterns]
print("   attention from the end to it, by head:", " ".join(f"{float(share):.2f}" for share in looks))
for site, at in (("L3.h*.q", "end"), ("L3.kv*.k", "S2"), ("L3.kv*.v", "S2")):
    part = pc.gated(model, [site], positions=(at,))
    own, other = part.measure(batch, torch.cat([part.open(), part.closed()]), part.fallback("resample"))
    print(f"   {site}@{at} from the corrupt prompt: logit difference {interval(own)} becomes {interval(other)}")

print("3. They speak against the name that they read.")
said("   without them", ["L3.h*"], "end")

print("4. Nothing looks for a repetition: a third name in that place, said once, is spoken against just the same.")
known, third = sorted({one.answers[0][0] for one in confirm}), batch.tokens.clone()
put = [next(name for name in known if name not in pair) for pair in torch.cat([right, wrong], -1).tolist()]
third[batch.columns("S2")] = torch.tensor(put)
values = model.run(third)[torch.arange(len(third)), batch.target_position]
here = torch.cat([right, wrong, torch.tensor(put)[:, None]], -1)
absent = torch.stack(
    [row[[name for name in known if name not in there]].mean() for row, there in zip(values, here.tolist(), strict=True)]
)
print(f"   its logit {interval(values.gather(-1, here)[:, 2])}, that of names not in the prompt {interval(absent)}")
print(f"   logit difference of the two first names {interval((values.gather(-1, right) - values.gather(-1, wrong))[:, 0])}")
