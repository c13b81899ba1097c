"""The tree of runs: settings that agree run once until they part, columns that have not changed are not computed again."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import tiny
from patchclamp.errors import GateError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.models.replay import capped, why_plain
from patchclamp.models.standing import projections
from patchclamp.models.tree import grow
from patchclamp.parts import Gated, gated, nodes
from patchclamp.sites import Site
from test_parts import examples, plainly


@given(st.integers(1, 4), st.data())
def test_runs_at_a_block_are_the_ways_of_getting_there(layers: int, data: st.DataObject):
    """Against brute force: at block l, as many runs as there are different patterns up to it among settings that have begun."""
    patterns = data.draw(
        st.lists(st.tuples(*[st.integers(0, 2)] * (2 * layers + 1)).filter(any), min_size=1, max_size=12, unique=True)
    )
    joins = [next(stage for stage, name in enumerate(pattern) if name) // 2 for pattern in patterns]
    tree = grow(patterns, joins)
    for block, level in enumerate(tree.levels):
        begun = [pattern for pattern, join in zip(patterns, joins, strict=True) if join <= block]
        assert len(level) == len({pattern[: 2 * block + 2] for pattern in begun})
        assert [parent >= 0 for parent in level.parents] == sorted([parent >= 0 for parent in level.parents], reverse=True)
        inputs = {pattern[: 2 * block + 1] for pattern in begun if any(pattern[: 2 * block + 1])}
        assert len({read for read in level.reads if read >= 0}) == len(inputs)
    assert [tree.levels[-1].settings[leaf] for leaf in tree.leaves] == list(range(len(patterns)))
    for below, above in pairwise(tree.levels):
        assert all(parent < len(below) for parent in above.parents)


def counted(modules: Iterable[torch.nn.Module], measure: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
    """What a call gives, and how many [row, column] cells each module's own forward ran."""
    cells: dict[torch.nn.Module, int] = dict.fromkeys(modules, 0)

    def count(module: torch.nn.Module, own: Callable[..., Any], value: torch.Tensor, *args: Any) -> Any:
        cells[module] += value.shape[:-1].numel()
        return own(value, *args)

    for module in cells:
        module.forward = partial(count, module, module.forward)
    try:
        return measure(), list(cells.values())
    finally:
        for module in cells:
            del module.forward


def test_pairs_nest():
    """All pairs of heads: a pair runs from its later block on, and the first of them once for all of its pairs in a pass."""
    model = Model.load(tiny("gpt2"))
    parts, batch = gated(model, ["L*.h*"]), examples(2).batch()
    chosen = list(combinations(range(len(parts.labels)), 2))
    gates = parts.open(len(chosen))
    for number, pair in enumerate(chosen):
        gates[number, ..., list(pair)] = 0
    rule = parts.fallback("zero")
    assert why_plain(model) == ""
    values, cells = counted([layer.mlp for layer in model.anatomy.layers], lambda: parts.measure(batch, gates, rule))
    torch.testing.assert_close(values, plainly(parts, batch, gates, rule), atol=1e-5, rtol=1e-4)
    heads, width, rows = model.anatomy.sizes[0].heads, batch.tokens.shape[1], len(batch.tokens)
    own = heads * (heads - 1) // 2
    assert model.layers == 2
    # in block 0, pairs of its own heads and each of its heads alone; the model's own run once
    assert cells[0] == rows * width * (own + heads + 1)
    targets = len(batch.target_position.unique())
    assert cells[1] == rows * (width + targets * len(chosen))  # the last MLP at answer columns alone


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "gemma2", "phi3"])
def test_in_the_patched_block_one_column_runs(name: str):
    """Heads at one position: behind attention that column alone runs in the patched block; queries, keys, values not at all."""
    model = Model.load(tiny(name))
    batch = examples(2).batch()
    width, rows, at = batch.tokens.shape[1], len(batch.tokens), 3
    parts = gated(model, ["L0.h*"], positions=[at])
    gates, rule = 1 - torch.eye(len(parts.labels))[:, None, None], parts.fallback("zero")
    parts.measure(batch, gates, rule)
    values, cells = counted([layer.mlp for layer in model.anatomy.layers], lambda: parts.measure(batch, gates, rule))
    torch.testing.assert_close(values, plainly(parts, batch, gates, rule), atol=1e-5, rtol=1e-4)
    assert cells[0] == rows * (width + len(gates))
    layer = model.anatomy.layers[1]
    maps = projections(layer.attention, layer.output)
    assert maps
    ran = counted(maps, lambda: parts.measure(batch, gates, rule))[1]
    assert set(ran) == {rows * (width + len(gates))}, "right behind the patch, one column of queries, keys and values each"


def test_the_normaliser_streams_over_the_vocabulary(monkeypatch: pytest.MonkeyPatch):
    """In blocks of 10 tokens it is what the whole vocabulary's log-sum-exp is; where logits are capped, it is not streamed."""
    monkeypatch.setattr("patchclamp.models.standing.VOCABULARY", 10)
    for name, cap in (("gpt2", False), ("llama", False), ("gemma2", True), ("cohere", True), ("granite", True)):
        model = Model.load(tiny(name))
        assert capped(model) == cap
        parts, batch = nodes(model), examples(3).batch()
        gates, rule = 1 - torch.eye(len(parts.labels))[:, None, None], parts.fallback("resample")
        for metric in ("nll", "probability", "probability_diff"):
            with torch.no_grad():
                logits = [model.target_logits(batch, parts.edits(one[None], rule, batch)) for one in gates]
            expected = torch.cat([METRICS[metric](one, batch) for one in logits])
            torch.testing.assert_close(parts.measure(batch, gates, rule, METRICS[metric]), expected, atol=1e-5, rtol=1e-4)


def widest(model: Model, run: Callable[[], object]) -> int:
    seen: list[int] = []
    handle = model.anatomy.hf.register_forward_hook(lambda *call: seen.append(call[2].logits.shape[-1]))
    try:
        run()
    finally:
        handle.remove()
    return seen[-1]


def test_a_streamed_normaliser_makes_few_logits():
    """The answers' and one for all the rest."""
    model = Model.load(tiny("gpt2"))
    parts, batch = nodes(model), examples(3).batch()
    gates, rule = 1 - torch.eye(len(parts.labels))[:, None, None], parts.fallback("resample")
    answers = len(batch.numbered()[0])
    assert widest(model, lambda: parts.measure(batch, gates, rule, METRICS["nll"])) == answers + 1
    assert widest(model, lambda: parts.measure(batch, gates, rule, METRICS["logit_diff"])) == answers
    assert widest(model, lambda: parts.measure(batch, gates, rule, METRICS["top1"])) == model.anatomy.config.vocab_size


MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


@pytest.mark.parametrize("name", MIXTURES)
def test_frozen_routing_is_the_own_runs(name: str):
    """With every gate closed by another prompt's values, experts are still those of the model's own run, from everywhere."""
    model = Model.load(tiny(name))
    parts, batch = gated(model, ["L*.h*", "L*.mlp"], routing="frozen"), examples(4).batch()
    rule = parts.fallback("resample")
    gates = torch.cat([1 - torch.eye(len(parts.labels))[:, None, None], parts.closed(), parts.open()])
    values = parts.measure(batch, gates, rule)
    router = model.anatomy.layers[-1].router
    assert router is not None
    own: list[Any] = []
    handle = router.register_forward_hook(lambda *call: own.append(call[2]))
    model.run(batch)
    handle.remove()
    handle = router.register_forward_hook(lambda *_: own[0])
    # brute force: the last router always says what it said in the own run, and so does the first by having no gates before it
    first = parts.closed()
    first[..., [n for n, site in enumerate(parts.labels) if site.layer == 0 and site.kind == "head"]] = 1
    brute = plainly(gated(model, ["L*.h*", "L*.mlp"]), batch, first, rule)
    handle.remove()
    torch.testing.assert_close(parts.measure(batch, first, rule), brute, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        values[-1], METRICS["logit_diff"](model.target_logits(batch).detach(), batch)[0], atol=1e-5, rtol=0
    )
    free = gated(model, ["L*.h*", "L*.mlp"]).measure(batch, gates, rule)
    assert float((free - values).abs().max()) > 1e-4, "routing does move when it is free"


def test_frozen_routing_is_refused_where_it_means_nothing():
    with pytest.raises(GateError, match="no router"):
        nodes(Model.load(tiny("gpt2")), routing="frozen")
    with pytest.raises(GateError, match="routers have gates"):
        gated(Model.load(tiny("mixtral")), ["L*.router"], routing="frozen")


def margin(model: Model, parts: Gated, gates: torch.Tensor, batch: Any, rule: Any) -> float:
    """The smallest gap between the last expert chosen and the first not chosen, over tokens, layers and settings."""
    sites = [Site("router", number) for number, layer in enumerate(model.anatomy.layers) if layer.router is not None]
    smallest = float("inf")
    for one in gates:
        for logits in model.record(batch, sites, parts.edits(one[None], rule, batch)).values():
            config = model.anatomy.config
            top = logits.topk(config.num_experts_per_tok + 1).values
            smallest = min(smallest, float((top[..., -2] - top[..., -1])[batch.mask].min()))
    return smallest


@pytest.mark.parametrize("name", MIXTURES)
def test_free_routing_is_the_same_where_margins_are_wide(name: str):
    """Where every router's margin is above 1e-3, rounding does not change which experts run, and replay equals whole runs."""
    model = Model.load(tiny(name))
    parts = nodes(model)
    gates, rule = 1 - torch.eye(len(parts.labels))[:, None, None], parts.fallback("resample")
    tried = 0
    for seed in range(8):
        batch = examples(2, seed=seed).batch()
        if margin(model, parts, gates, batch, rule) < 1e-3:
            continue
        tried += 1
        torch.testing.assert_close(parts.measure(batch, gates, rule), plainly(parts, batch, gates, rule), atol=1e-5, rtol=1e-4)
    assert tried


ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_low_precision(name: str, dtype: torch.dtype):
    """Replay against whole runs one by one, both in the same low precision: 8 unit roundings of the largest logit. Two whole
    runs in other batch compositions differ by as much."""
    model = Model.load(tiny(name).to(dtype))
    parts, batch = nodes(model), examples(4).batch()
    gates, rule = 1 - torch.eye(len(parts.labels))[:, None, None], parts.fallback("resample")
    values = parts.measure(batch, gates, rule)
    assert values.dtype == torch.float32, "metrics are taken in float32"
    largest = float(model.run(batch).float().abs().max())
    torch.testing.assert_close(values, plainly(parts, batch, gates, rule), atol=8 * ROUNDING[dtype] * largest, rtol=0)
    assert float(values.std(0).max()) > 8 * ROUNDING[dtype] * largest / 8, "parts differ by more than rounding"


def test_order_and_composition_change_nothing_but_rounding():
    model = Model.load(tiny("llama"))
    parts, batch = nodes(model, positions=(3, 5, "end")), examples(4).batch()
    gates, rule = 1 - torch.eye(len(parts.labels))[:, None, None], parts.fallback("resample")
    values = parts.measure(batch, gates, rule)
    order = torch.randperm(len(gates), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(parts.measure(batch, gates[order], rule), values[order], atol=1e-5, rtol=0)
    parts.memory = 1
    torch.testing.assert_close(parts.measure(batch, gates, rule), values, atol=1e-5, rtol=0)
    halves = [parts.measure(examples(4).take(some).batch(), gates, rule) for some in (range(2), range(2, 4))]
    torch.testing.assert_close(torch.cat(halves, 1), values, atol=1e-5, rtol=0)
