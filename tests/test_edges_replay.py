"""Settings of edges from where they first differ: equal to whole runs, and the blocks that are spared are spared."""

from functools import cache

import pytest
import torch

from cases import CONFIGS, tiny
from patchclamp.errors import GateError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.models.replay import why_plain
from patchclamp.parts import Edges, edges
from test_parts import examples


@cache
def model_of(name: str) -> Model:
    return Model.load(tiny(name))


def settings(parts: Edges, seed: int = 0) -> torch.Tensor:
    """Single edges; circuits; circuits that share all their gates into the first block; the model itself."""
    draw, count = torch.Generator().manual_seed(seed), len(parts.labels)
    single = list(range(0, count, 7))
    gates = parts.open(len(single) + 8)
    gates[torch.arange(len(single)), ..., single] = 0
    gates[-8:-5] = torch.rand(3, 1, 1, count, generator=draw).round()
    late = torch.tensor([edge.target.key[0] >= 1 for edge in parts.labels])
    gates[-5:-1, ..., late] = torch.rand(4, 1, 1, int(late.sum()), generator=draw)
    gates[-4:-1, ..., ~late] = 0.5 * torch.rand(1, 1, 1, int((~late).sum()), generator=draw)
    return gates


def replayed_as_whole(name: str) -> None:
    parts = edges(model_of(name))
    assert not why_plain(parts.model)
    batch, gates = examples(3, lengths=(7, 5)).batch(), settings(parts)
    for kind, metric in (("resample", "logit_diff"), ("zero", "kl")):
        rule = parts.fallback(kind)
        found = parts.measure(batch, gates, rule, METRICS[metric])
        whole = parts.whole().measure(batch, gates, rule, METRICS[metric])
        torch.testing.assert_close(found, whole, rtol=0, atol=5e-6)  # the same sums in another order, float32
        assert float((whole - whole[-1]).abs().median()) > 2e-5  # cohere scales its logits down


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "phi", "qwen3_moe", "opt"])
def test_settings_from_the_middle_are_whole_runs(name: str):
    replayed_as_whole(name)


@pytest.mark.long
@pytest.mark.parametrize("name", list(CONFIGS))
def test_in_every_family(name: str):
    replayed_as_whole(name)


def test_blocks_that_run_are_counted_by_hooks_on_them():
    """A sweep of single edges into the last block and behind it: one block a setting, or none, beside the model's own run."""
    model = model_of("gpt2")
    parts = edges(model, destinations=["L1.h*.q", "L1.kv*.k", "logits"])
    batch, rule = examples(3, lengths=(7,)).batch(), parts.fallback("resample")
    gates = torch.cat([parts.without([edge]) for edge in parts.labels])
    behind = sum(edge.target.kind == "logits" for edge in parts.labels)
    ran = [0]

    def count(module, args, output) -> None:
        ran[0] += len(args[0]) // len(batch.tokens)

    replay = parts.replay(batch, rule)
    outputs = [layer.attention.c_proj for layer in model.anatomy.layers]  # what is read once more for its queries ends before it
    hooks = [module.register_forward_hook(count) for module in outputs]
    try:
        replay.measure(gates)
    finally:
        for hook in hooks:
            hook.remove()
    assert ran[0] == len(gates) - behind, "each setting runs the last block once; those behind it run none"
    assert replay.blocks == model.layers + len(gates) - behind


def test_candidates_on_one_base_share_its_run():
    """Many settings that differ in one late edge from a circuit: the circuit's first block runs once."""
    parts = edges(model_of("llama"))
    batch, rule = examples(3, lengths=(7,)).batch(), parts.fallback("resample")
    draw = torch.Generator().manual_seed(1)
    base = torch.rand(1, 1, 1, len(parts.labels), generator=draw).round()
    late = [number for number, edge in enumerate(parts.labels) if edge.target.layer == 1 and base[..., number] == 1][:12]
    gates = base.repeat(len(late), 1, 1, 1)
    gates[torch.arange(len(late)), ..., late] = 0
    replay = parts.replay(batch, rule)
    found = replay.measure(gates)
    assert replay.blocks == 2 + 1 + len(late), "the model itself; the base's first block; the second one of each"
    torch.testing.assert_close(found, parts.whole().measure(batch, gates, rule), rtol=0, atol=5e-6)
    again = torch.cat([replay.measure(one[None]) for one in gates])
    torch.testing.assert_close(again, found, rtol=0, atol=5e-6)


def test_what_replay_cannot_do_is_said():
    parts = edges(model_of("gpt2"))
    batch, rule = examples(2).batch(), parts.fallback("resample")
    replay = parts.replay(batch, rule)
    with pytest.raises(GateError, match="with 110 edges"):
        replay.measure(parts.open()[..., 1:])
    added = torch.zeros(*batch.tokens.shape, parts.model.width)
    with pytest.raises(GateError, match="added to the embeddings"):
        parts.under(added).measure(batch, parts.closed(), rule)
