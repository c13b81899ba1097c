"""Greater than: late MLPs compare the years, and a small circuit keeps most of what the model does.

Hanna, Liu and Variengien 2023, https://arxiv.org/abs/2305.00586: on GPT-2 small, MLPs 8 to 11 (the last third) write the answer; the circuit
recovers 89.5 % of the model's probability difference.
"""

from collections.abc import Callable

import polars as pl
import torch

from patchclamp.discover import discover
from patchclamp.methods import attribute, groups_of
from patchclamp.metrics import metric_named
from patchclamp.models.model import Model
from patchclamp.parts import benefits, edges, nodes
from patchclamp.reproduce._figures import bars
from patchclamp.reproduce._result import Reproduction, claim, is_called, prompts
from patchclamp.scores.ratios import Shares
from patchclamp.sites import Site

PAPER = "How does GPT-2 compute greater-than?, https://arxiv.org/abs/2305.00586"
METRIC = "probability_diff"


def run(model: Model, n: int, seed: int, progress: Callable[[str, int, int], None]) -> Reproduction:
    """Direct effects of MLPs, and the circuit of heads and MLPs on unseen prompts."""
    same = is_called(model, ("gpt2", "gpt2-small"))
    split, metric = prompts(model, "greater_than", n, seed), metric_named(METRIC)
    progress("direct effects of MLPs", 0, 2)
    direct = edges(model, ["L*.mlp"], ["logits"])
    rule, late = direct.fallback("resample"), [edge for edge in direct.labels if (edge.source.layer or 0) >= 2 * model.layers / 3]
    gates = torch.cat([direct.open(), direct.closed(), direct.only(late)])
    opened, closed, kept = benefits(direct, split.confirm, gates, rule, metric).double().numpy()
    share = Shares.of(opened, closed, groups_of(split.confirm), metric=METRIC, seed=seed).interval(kept)
    scores = attribute(direct, split.confirm, rule, "exact", metric=METRIC, seed=seed)
    progress("the circuit", 1, 2)
    parts = nodes(model)
    resample = parts.fallback("resample")
    found, _ = discover(parts, split.select, resample, attribute(parts, split.select, resample, metric=METRIC), metric=METRIC)
    sites = [site for site in found if isinstance(site, Site)]
    gates = torch.cat([parts.open(), parts.closed(), parts.only(sites)])
    whole, nothing, circuit = benefits(parts, split.confirm, gates, resample, metric).double().numpy()
    faithful = Shares.of(whole, nothing, groups_of(split.confirm), metric=METRIC, seed=seed).interval(circuit)
    heads = sum(site.kind == "head" for site in sites)
    rows = (
        claim("share of the MLPs' direct effect that the last third has", "MLPs 8 to 11 of 12 (GPT-2 small)", share, 0.5, 2.0, None),
        claim("of the behaviour that the circuit keeps on unseen prompts", "89.5 % (GPT-2 small)", faithful, 0.8, 1.2, None),
        claim("share of the heads that the circuit has", "8 of 144 (GPT-2 small)", heads / sum(one.heads for one in model.anatomy.sizes),
              0, 0.15, same),
    )  # fmt: skip
    table = scores.table.with_columns(pl.Series("mlp", [f"L{edge.source.layer}" for edge in direct.labels]))
    figure = bars(table.to_dicts(), "mlp", "score", "Direct effect of each MLP on the probability difference, by layer.")
    about = {"task": "greater_than", "metric": METRIC, "fallback": "resample", "n": len(split.confirm), "seed": seed,
             "circuit": [str(site) for site in found]}  # fmt: skip
    return Reproduction("greater-than", PAPER, model.name, rows, table, figure, about)
