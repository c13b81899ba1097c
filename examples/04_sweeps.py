"""Any site can have a gate, so one function does every sweep; each setting runs from where it first differs."""

import patchclamp as pc

model, task = pc.Model.load("zoo/small"), pc.load_task("ioi")
fit, select, confirm = task.split(model.tokenizer, n=64)

states = pc.gated(model, ["L*.resid.post"], positions=["S2", "end"])  # or "L*.h*.q", "L*.mlp.n*", positions=range(12)
found = pc.attribute(states, select, states.fallback("resample"), "exact")  # layer x position, with intervals
print(found.top(4).select("site", "score", "low", "high"))

traced = pc.trace(model, select, ["L*.mlp.write"], ["S2", "end"], subject="S2", window=2, draws=3)  # causal tracing
print(traced.grid())
