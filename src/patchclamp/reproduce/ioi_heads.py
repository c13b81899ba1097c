"""IOI heads: which heads write the answer of indirect object identification, which write against it, and who tells them where to look.

Wang et al. 2022, https://arxiv.org/abs/2211.00593: on GPT-2 small, name movers 9.9, 9.6 and 10.0 write the name, negative name movers 10.7
and 11.10 write against it, and S-inhibition heads 7.3, 7.9, 8.6 and 8.10 act on the name movers' queries.
"""

from collections.abc import Callable
from math import inf

import polars as pl
import torch

from patchclamp.methods import attribute, groups_of
from patchclamp.metrics import metric_named
from patchclamp.models.model import Model
from patchclamp.parts import benefits, edges
from patchclamp.reproduce._figures import heat
from patchclamp.reproduce._result import Reproduction, claim, is_called, prompts
from patchclamp.scores.ratios import Shares
from patchclamp.scores.statistics import Interval
from patchclamp.sites import Edge

PAPER = "Interpretability in the Wild, https://arxiv.org/abs/2211.00593"
MOVERS, AGAINST = {"L9.h9", "L9.h6", "L10.h0"}, {"L10.h7", "L11.h10"}


def run(model: Model, n: int, seed: int, progress: Callable[[str, int, int], None]) -> Reproduction:
    """Direct effects of all heads on the logits, then what acts on the queries of the three largest."""
    same = is_called(model, ("gpt2", "gpt2-small"))
    split = prompts(model, "ioi", n, seed, counterfactual="abc")
    progress("direct effects", 0, 2)
    direct = edges(model, ["L*.h*"], ["logits"])
    rule = direct.fallback("resample")
    chosen = attribute(direct, split.select, rule, "exact", seed=seed)
    order = sorted(direct.labels, key=lambda edge: -chosen[edge]["score"])
    top = order[:3]
    gates = torch.cat([direct.open(), direct.closed(), direct.without(top)])
    opened, closed, without = benefits(direct, split.confirm, gates, rule, metric_named("logit_diff")).double().numpy()
    ratio = Shares.of(opened, closed, groups_of(split.confirm), metric="logit_diff", seed=seed)
    kept = ratio.interval(without)
    share = Interval(
        1 - kept.mean, None if kept.high is None else 1 - kept.high, None if kept.low is None else 1 - kept.low, kept.n
    )
    confirmed = attribute(direct, split.confirm, rule, "exact", seed=seed)
    against = confirmed.significant().filter(pl.col("score") < 0)["site"].to_list()
    progress("what acts on their queries", 1, 2)
    queries = [edge.source for edge in top]
    into = edges(model, ["L*.h*"], [f"L{head.layer}.h{head.index}.q" for head in queries if head.layer])
    acting = attribute(into, split.confirm, into.fallback("resample"), "exact", seed=seed).significant()
    senders = {str(Edge.parse(site).source) for site in acting.filter(pl.col("score") > 0)["site"]}
    names = {str(head) for head in queries}
    rows = [
        claim("share of all heads' direct effect that three heads have", "three name movers write most of the name", share, 0.5, 2.0, None),
        claim("heads that clearly write against the answer", "2 negative name movers (GPT-2 small)", float(len(against)), 1, inf, None),
        claim("heads that clearly act on the queries of these three", "4 S-inhibition heads (GPT-2 small)", float(len(senders)), 1, inf, None),
        claim("of the paper's name movers among the three", "3 of 3 (GPT-2 small)", float(len(names & MOVERS)), 2, 3, same),
        claim("of the paper's negative name movers among those", "2 of 2 (GPT-2 small)",
              float(len({str(Edge.parse(site).source) for site in against} & AGAINST)), 2, 2, same),
    ]  # fmt: skip
    table = confirmed.table.with_columns(
        pl.Series("head", [edge.source.index for edge in direct.labels]),
        pl.Series("layer", [edge.source.layer for edge in direct.labels]),
    )
    figure = heat(
        table.to_dicts(), "head", "layer", "score", "Direct effect of each head on the logit difference, by layer and head."
    )
    about = {
        "task": "ioi",
        "metric": "logit_diff",
        "fallback": "resample",
        "n": len(split.confirm),
        "seed": seed,
        "movers": sorted(names),
    }
    return Reproduction("ioi-heads", PAPER, model.name, tuple(rows), table, figure, about)
