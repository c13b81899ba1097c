"""Load a model, look into it, close a head, and ask which heads matter."""

import patchclamp as pc
from patchclamp.edits import Zero

model = pc.Model.load("zoo/small")  # a hub name, a folder or a model object do as well
task = pc.load_task("ioi")  # or your own: load_task("mine.jsonl")
fit, select, confirm = task.split(model.tokenizer, n=80)

batch = select.batch()
seen = model.record(batch, ["L2.h*.pattern", "L*.resid.post"])  # any site, by pattern
edited = model.run(batch, {pc.Site.parse("L3.h0"): Zero()})  # any edit, anywhere

parts = pc.nodes(model)  # heads and MLPs, each with a gate
fallback = parts.fallback("resample")  # what a closed gate passes: the corrupt prompt's value
scores = pc.attribute(parts, select, fallback, "exact")  # close each gate alone
print(scores.top(5))
