"""Optimal ablation: its loss against the mean's on unseen prompts, its best constant in closed form, and what it refuses."""

import pytest
import torch

from cases import tiny
from patchclamp.errors import GateError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import benefits, edges, nodes
from patchclamp.parts.fallbacks import learn_mean
from patchclamp.parts.optimal import learn_optimal
from patchclamp.sites import Edge, Site
from patchclamp.zoo import wired
from test_parts import examples

KL = METRICS["kl"]


@pytest.mark.parametrize("name", ["gpt2", pytest.param("gemma2", marks=pytest.mark.long)])
def test_less_is_lost_than_with_means(name: str):
    """On prompts that nothing was learned on: of a circuit that it was learned for, by a tenth at least."""
    model = Model.load(tiny(name))
    parts = nodes(model)
    fit, unseen = examples(32, (6,), seed=1), examples(32, (6,), seed=2)
    circuit = [site for site in parts.labels if site.kind == "head" and site.index in (0, 1)]
    rule = learn_optimal(parts, fit, circuit=circuit, updates=60)
    best, mean = (
        -benefits(parts, unseen, parts.only(circuit), one, KL).mean() for one in (rule, learn_mean(parts.record, fit, by="all"))
    )
    assert float(best) < 0.9 * float(mean) and rule.loss[0] < rule.loss[1]


def test_subsets_of_edges_lose_less_and_never_more_than_with_means():
    model = Model.load(tiny("gpt2"))
    parts = edges(model, ["L0.h*", "L0.mlp"], ["logits"])
    fit, unseen = examples(24, (5,), seed=1), examples(24, (5,), seed=2)
    rule = learn_optimal(parts, fit, updates=50, rows=8)
    draw = torch.Generator().manual_seed(3)
    gates = (torch.rand(12, 1, 1, len(parts.labels), generator=draw) < 0.5).float()
    best, mean = (-benefits(parts, unseen, gates, one, KL).mean() for one in (rule, learn_mean(parts.record, fit, by="all")))
    assert float(best) < float(mean)
    still = learn_optimal(parts, fit, updates=1, rate=1e3)  # a step that can only hurt is not taken
    assert still.loss[0] == still.loss[1]
    assert torch.equal(still.at(None)[Site("z", 0)], learn_mean(parts.record, _clean(fit), by="all").total[Site("z", 0)])


def _clean(some):
    return type(some)(
        tuple(type(item)(**{**vars(item), "corrupt": None}) for item in some), some.tokenizer, some.task, some.metric
    )


def test_of_a_saturating_part_the_best_constant_is_not_the_mean():
    """OR: two heads vote, one vote is enough. With one head closed the answer is to stay. Its mean over words adds a vote to every
    word, a constant that helps the answer as it helps all: optimal constants leave at most what the mean leaves, here nearly
    nothing, since the other head suffices."""
    model = wired("or")
    parts = nodes(Model.load(model.hf, tokenizer=model.tokenizer))
    fit, unseen = model.task.examples(model.tokenizer, 24, seed=1), model.task.examples(model.tokenizer, 24, seed=2)
    circuit = [site for site in parts.labels[1:] if str(site) != "L0.h3"]
    rule = learn_optimal(parts, fit, circuit=circuit, updates=40)
    best, mean = (
        -benefits(parts, unseen, parts.only(circuit), one, KL).mean() for one in (rule, learn_mean(parts.record, fit, by="all"))
    )
    assert float(best) <= float(mean) + 1e-6 and float(best) < 0.05


def test_it_is_a_fallback_like_others():
    model = Model.load(tiny("gpt2"))
    parts, fit = nodes(model), examples(8, (5,), seed=1)
    rule = learn_optimal(parts, fit, updates=2)
    assert rule.kind == "optimal" and rule.since(fit.batch()) == 0 and rule.at(None) is rule.at(fit.batch())
    again = learn_optimal(parts, fit, updates=2)
    assert all(torch.equal(rule.constants[place], again.constants[place]) for place in rule.constants)  # same seed
    assert all(not value.requires_grad for value in rule.constants.values())
    assert all(parameter.requires_grad for parameter in model.hf.parameters())  # the model is left as it was
    made = model.generate(fit.batch([0]), parts.edits(parts.without([Site.parse("L0.h1")]), rule), max_new_tokens=2)
    assert 1 <= len(made.tokens[0]) <= 2
    for some in (nodes(model), edges(model, ["L0.h1"], ["logits"])):
        with pytest.raises(GateError, match="give the fit set"):
            some.fallback("optimal")
    assert Edge.parse("L0.h1>logits") in edges(model, ["L0.h1"], ["logits"]).labels
