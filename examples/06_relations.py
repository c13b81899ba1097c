"""Two parts at once: what closing both does beyond closing each, named where it holds under two fallbacks."""

import patchclamp as pc
from patchclamp.dependence import close_pairs, interaction_table, named, relations

model, task = pc.Model.load("zoo/small"), pc.load_task("ioi")
fit, select, confirm = task.split(model.tokenizer, n=64)
parts = pc.nodes(model)

pairs = [("L0.h0", "L0.h4"), ("L1.h1", "L1.h6"), ("L0.h4", "L3.h1")]
rules = [parts.fallback("resample"), parts.fallback("mean", fit=fit)]
first, second = (close_pairs(parts, confirm, rule, pairs=pairs) for rule in rules)
print(interaction_table(first))
print(named(relations(first, second), "AND", "OR").select("a", "b", "score", "other", "word", "relation"))
