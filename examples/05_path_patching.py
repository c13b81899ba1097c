"""Edges: what one part writes, as one other part reads it. Slopes screen all of them, closed gates and path patching confirm."""

import patchclamp as pc

model, task = pc.Model.load("zoo/small"), pc.load_task("ioi")
fit, select, confirm = task.split(model.tokenizer, n=32)

edges = pc.edges(model)  # every edge between embedding, heads, MLPs and logits
found = pc.attribute(edges, select, edges.fallback("resample"), "gradient")  # edge attribution patching
print(found.top(4).select("site", "score", "low", "high"))

direct = pc.path_patching(model, confirm, ["L*.h*"], ["logits"], between="mlps")  # heads frozen, MLPs computed anew
print(direct.top(4).select("site", "score", "low", "high"))

some = pc.edges(model, ["embed", "L*.h*", "L*.mlp"], ["L3.h1.q", "L3.kv1.k", "L3.kv1.v"])  # what the first of them reads
print(pc.attribute(some, confirm, some.fallback("resample"), "exact").top(4).select("site", "score", "low", "high"))
