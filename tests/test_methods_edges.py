"""Methods that pass something else back than derivatives, on edges: edge by edge by hooks of the tests' own, and what they sum to."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CONFIGS, tiny
from patchclamp.errors import FamilyError
from patchclamp.methods import attribute, deeplift
from patchclamp.metrics import METRICS
from patchclamp.models.differences import differences
from patchclamp.models.model import Model
from patchclamp.parts import Edges, edges, gated, nodes
from patchclamp.parts.edge_maps import maps_of
from patchclamp.parts.edge_norms import NormSlope
from patchclamp.parts.slopes import frozen
from patchclamp.sites import Edge, Site
from patchclamp.tasks._batch import Batch
from test_edges_brute import ROWS, Hooked
from test_parts import examples

DIFF = METRICS["logit_diff"]
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
POSTNORMS = ("gemma2", "gemma3_text", "gemma3", "olmo2", "olmo3")
"""There a head's write is its share at the run's own scale, and a gate on the head stands before the norm: two things."""
SHORT = ("gpt2", "gemma2", "falcon-new")


def scored(parts: Edges, batch: Batch) -> dict[Edge, Tensor]:
    found = deeplift.samples(parts, batch, parts.fallback("resample"), DIFF, 0)
    return dict(zip(parts.labels, found, strict=True))


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in CONFIGS])
def test_differences_of_edges_sum_to_those_of_their_ends(name: str):
    """Into a destination: the score of what it reads, into the logits delta. From a source: the source's own."""
    model, batch = Model.load(tiny(name)), examples(3, lengths=(7, 5)).batch()
    parts = edges(model)
    rule = parts.fallback("resample")
    if name in MIXTURES:
        with pytest.raises(FamilyError, match="mixture of experts"):
            deeplift.samples(parts, batch, rule, DIFF, 0)
        return
    found = scored(parts, batch)
    read = gated(model, ["L*.h*.q", "L*.kv*.k", "L*.kv*.v", "L*.mlp.write"])
    wanted = dict(zip(read.labels, deeplift.samples(read, batch, read.fallback("resample"), DIFF, 0), strict=True))
    delta = (DIFF(model.target_logits(batch), batch) - DIFF(model.target_logits(batch.swapped()), batch))[0].detach()
    wanted = {Site("mlp", one.layer) if one.kind == "mlp.write" else one: score for one, score in wanted.items()}
    for target in {edge.target for edge in parts.labels}:
        total = torch.stack([score for edge, score in found.items() if edge.target == target]).sum(0)
        expected = delta if target.kind == "logits" else wanted[target]
        torch.testing.assert_close(total, expected.to(total), rtol=1e-4, atol=2e-5)  # float32, logits of size 1
    if name in POSTNORMS:
        return
    whole = nodes(model)
    mine = deeplift.samples(whole, batch, whole.fallback("resample"), DIFF, 0)
    for source, score in zip((whole.labels[number] for number in whole.counted), mine, strict=True):
        total = torch.stack([one for edge, one in found.items() if edge.source == source]).sum(0)
        torch.testing.assert_close(total, score.to(total), rtol=1e-4, atol=2e-5)


def by_hand(model: Model, name: str, batch: Batch, edge: Edge) -> Tensor:
    """One edge: both runs side by side under the mode, its reader's map and norm called on a stream of their own."""
    hooked, row, target = Hooked(model, ROWS[name], batch), ROWS[name], edge.target
    assert batch.corrupt is not None
    halves = [hooked.stream(target).clone(), Hooked(model, row, batch.swapped()).stream(target).clone()]
    stream = torch.cat(halves).requires_grad_()
    live = torch.zeros(2 * len(batch.tokens), *stream.shape[1:], dtype=stream.dtype, requires_grad=True)
    handles = [hooked.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: ((args[0] + live, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": kwargs["hidden_states"] + live}),
        with_kwargs=True)]  # fmt: skip
    layer = target.layer or 0

    def put(module: Any, columns: list[int] | None, norm: str | None):
        def hook(_: Any, args: Any, out: Tensor) -> Tensor:
            given = hooked.at(layer, norm)(stream)
            made = type(module).forward(module, given)
            if columns is None:
                return made
            new = out.clone()
            new[..., columns] = made[..., columns]
            return new

        handles.append(module.register_forward_hook(hook))

    if target.kind == "logits":
        handles.append(hooked.blocks[-1].register_forward_hook(
            lambda _, args, out: (stream + 0 * out[0], *out[1:]) if isinstance(out, tuple) else stream + 0 * out))  # fmt: skip
    elif target.kind == "mlp":
        put(hooked.at(layer, row.mlp), None, row.second)
    else:
        put(hooked.at(layer, row.maps["qkv".index(target.kind)]), hooked.columns(target), row.first)
    ids = (batch.mask.long().cumsum(-1) - 1).clamp(min=0).repeat(2, 1)
    try:
        with frozen(model), differences(model.anatomy):
            logits = model.hf(
                input_ids=torch.cat([batch.tokens, batch.corrupt]), attention_mask=batch.mask.long().repeat(2, 1), position_ids=ids,
                use_cache=False,
            ).logits  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
    value = DIFF(logits[: len(batch.tokens)][batch.target_row, batch.target_position][None], batch)
    (multiplier,) = torch.autograd.grad(value.sum(), stream)
    source = str(edge.source)
    return ((hooked.clean[source] - hooked.corrupt[source]) * multiplier.chunk(2)[0]).sum((1, 2))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_edges_difference_by_hooks(name: str):
    model = Model.load(tiny(name, dtype=torch.float64))
    parts, batch = edges(model), examples(2, lengths=(5,)).batch()
    found, draw = scored(parts, batch), torch.Generator().manual_seed(0)
    for kind in ("q", "k", "v", "mlp", "logits"):
        mine = [edge for edge in parts.labels if edge.target.kind == kind and edge.target.layer != 0]
        largest = 0.0  # some are 0: what the embedding says at another position, to the last queries
        for number in torch.randperm(len(mine), generator=draw)[:3].tolist():
            wanted = by_hand(model, name, batch, mine[number])
            # Llama's norms compute in float32
            torch.testing.assert_close(found[mine[number]].to(wanted), wanted, rtol=1e-5, atol=1e-10 if name == "gpt2" else 1e-6)
            largest = max(largest, float(wanted.abs().max()))
        assert largest > 1e-4, kind


def test_the_multiplier_of_a_norm_takes_differences_to_differences():
    """<N(x) - N(x'), g> = <x - x', M^T g> for any g, both kinds of norm; and the slope itself where x = x'."""
    draw = torch.Generator().manual_seed(0)
    x, y, g = (torch.randn(2, 3, 16, generator=draw).double() for _ in range(3))
    for norm in (torch.nn.LayerNorm(16).double(), torch.nn.RMSNorm(16, eps=1e-3).double()):
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.normal_(generator=draw)
        back = NormSlope.between(norm, x, y)(g)
        wanted = ((norm(x) - norm(y)) * g).sum(-1)
        torch.testing.assert_close(((x - y) * back).sum(-1), wanted.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(NormSlope.between(norm, x, x)(g), NormSlope.at(norm, x)(g), rtol=1e-12, atol=1e-12)


def test_differences_of_edges_at_positions_sum_to_those_at_all():
    """Positions that hold every token: an edge's score is the sum over where it is written and, into keys and values, read."""
    model, batch = Model.load(tiny("gpt2", dtype=torch.float64)), examples(2, lengths=(4,)).batch()
    whole, apart = edges(model, ["embed", "L0.*"]), edges(model, ["embed", "L0.*"], positions=range(batch.tokens.shape[1]))
    wanted, found = scored(whole, batch), scored(apart, batch)
    for edge, score in wanted.items():
        at = [one for label, one in found.items() if (label.source.at(None), label.target.at(None)) == (edge.source, edge.target)]
        torch.testing.assert_close(torch.stack(at).sum(0), score, rtol=1e-8, atol=1e-10)


def test_differences_of_edges_leave_nothing_behind():
    model = Model.load(tiny("llama", "sdpa"))
    parts = edges(model)
    assert all(maps_of(model).attention)
    scores = attribute(parts, examples(2), parts.fallback("resample"), "deeplift")
    assert 0 <= scores.about["gap"] < 1e-5
    assert model.hf.config._attn_implementation == "sdpa" and "forward" not in vars(model.hf.model.layers[0].mlp.act_fn)
