"""Conformance of edges, over tiny models of every family, and against forward passes written out here."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from cases import CONFIGS, tiny
from patchclamp.edits import Put, Scale
from patchclamp.errors import FamilyError, GateError, MetricError, SiteError
from patchclamp.methods import attribute
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Edges, Parts, edges, nodes, sites_of
from patchclamp.sites import Edge, Site
from patchclamp.zoo import wired
from test_parts import examples

DIFF = METRICS["logit_diff"]


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> Model:
    return Model.load(tiny(name, dtype=dtype))


@pytest.fixture(params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> Edges:
    return edges(model_of(request.param))


def plain(parts: Edges, batch) -> Tensor:
    return DIFF(parts.model.target_logits(batch).detach(), batch)


def test_open_edges_are_the_model_bit_for_bit_and_closed_ones_the_corrupt_run(family: Edges):
    batch = examples(4, lengths=(7, 5)).batch()
    assert isinstance(family, Parts)
    rule = family.fallback("resample")
    assert torch.equal(family.measure(batch, family.open(), rule), plain(family, batch))
    # the same stream, summed in another order: float32 rounding
    closed, corrupt = family.measure(batch, family.closed(), rule), plain(family, batch.swapped())
    torch.testing.assert_close(closed, corrupt, rtol=0, atol=1e-5)
    assert (plain(family, batch) - corrupt).abs().max() > 0.05


def test_labels_are_unique_sorted_and_parse_back(family: Edges):
    labels = family.labels
    assert list(labels) == sorted(set(labels))
    assert all(Edge.parse(str(edge)) == edge for edge in labels)
    assert family.counted == tuple(range(len(labels)))


def test_how_many_edges_there_are():
    """gpt2, 2 layers of 4 heads: 12 q, k, v read embed, or embed + 4 heads + MLP; MLPs 5 and 10 sources; logits all 11."""
    assert len(edges(model_of("gpt2")).labels) == 12 * 1 + 12 * 6 + 5 + 10 + 11
    # llama's keys and values are 2 each; parallel blocks' MLPs read what attention reads
    assert len(edges(model_of("llama")).labels) == 8 * 1 + 8 * 6 + 5 + 10 + 11
    assert len(edges(model_of("phi")).labels) == 12 * 1 + 12 * 6 + 1 + 6 + 11


def test_every_edge_into_a_destination_closed_is_what_it_makes_of_the_corrupt_prompt(family: Edges):
    """Then its queries, keys, values or MLP output are those of the corrupt run: patched there, by an edit, it is the same."""
    model, batch = family.model, examples(3, lengths=(7, 5)).batch()
    targets = sorted({edge.target for edge in family.labels})
    gates = torch.cat([family.without([edge for edge in family.labels if edge.target == target]) for target in targets])
    found = family.measure(batch, gates, family.fallback("resample"))
    corrupt = model.record(batch.swapped(), [target for target in targets if target.kind != "logits"])
    moved = 0.0
    for target, value in zip(targets, found, strict=True):
        if target.kind == "logits":
            expected = plain(family, batch.swapped())
        else:
            expected = DIFF(model.target_logits(batch, {target: Put(corrupt[target])}).detach(), batch)[0][None]
        # float32: the streams are sums in another order; scores of experts and softmax pass that on
        torch.testing.assert_close(value[None], expected, rtol=0, atol=2e-5)
        moved = max(moved, float((value - plain(family, batch)[0]).abs().max()))
    assert moved > 0.05


def test_every_edge_of_a_source_closed_is_the_source_closed(family: Edges):
    """Heads behind a post-norm are left out: there a head's share is taken at the run's own scale, its node changes the scale."""
    model, batch = family.model, examples(3, lengths=(7, 5)).batch()
    both = nodes(model)
    for site in both.labels:
        if site.kind == "head" and model.anatomy.layers[site.layer or 0].attn_post is not None:
            continue
        mine = family.without([edge for edge in family.labels if edge.source == site])
        for kind in ("resample", "zero"):
            found = family.measure(batch, mine, family.fallback(kind))
            expected = both.measure(batch, both.without([site]), both.fallback(kind))
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)  # float32, as above


def test_company_changes_nothing(family: Edges):
    """Settings side by side, one by one and with memory for one alone; gates 1, 0 and between."""
    batch, draw = examples(3, lengths=(7, 5)).batch(), torch.Generator().manual_seed(0)
    gates = family.open(7)
    gates[:2] = torch.rand(2, 1, 1, gates.shape[-1], generator=draw).round()
    for number, edge in enumerate((0, 7, -1, len(family.labels) // 2)):
        gates[2 + number, ..., edge] = torch.rand(1, generator=draw)
    rule = family.fallback("resample")
    together = family.measure(batch, gates, rule)
    alone = torch.cat([family.measure(batch, one[None], rule) for one in gates])
    small = edges(family.model, memory=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together, small.measure(batch, gates, rule), rtol=0, atol=1e-5)
    assert torch.equal(together[-1:], plain(family, batch))


EXPERTS = ("mixtral", "qwen3_moe", "gpt_oss")
"""Their kernels take no float64."""


def test_slopes_at_the_model_are_differences(family: Edges):
    """Central differences of `measure`, along a random direction into each kind of destination.

    In float64, but most norms and softmaxes compute in float32: steps of .001 (short of the kinks of ReLUs), in which
    rounding makes 1e-4 of a slope. (No padding: a float64 mask overflows in a float32 softmax, and padded rows become NaN.)
    """
    name = _name(family)
    parts = family if name in EXPERTS else edges(model_of(name, torch.float64))
    batch, rule = examples(3, lengths=(5,)).batch(), parts.fallback("resample")  # short: some windows hold 4 tokens
    values, slopes = parts.gradient(batch, parts.open(), rule)
    torch.testing.assert_close(values, plain(parts, batch))
    draw, step = torch.Generator().manual_seed(1), 1e-6 if name == "normless" else 1e-3  # no norm, softmax in float64, many kinks
    for kind in ("q", "k", "v", "mlp", "logits"):
        mine = torch.tensor([edge.target.kind == kind for edge in parts.labels])
        way = (torch.rand(len(parts.labels), generator=draw) * 2 - 1).to(slopes.dtype) * mine
        up, down = parts.measure(batch, torch.stack([1 + step * way, 1 - step * way])[:, None, None], rule)
        scale = float((slopes[0] * way).abs().sum(1).max())
        assert scale > 1e-3, kind
        rounding = 1e-3 if name in EXPERTS else 0.0  # of logits in float32, by the step
        torch.testing.assert_close(slopes[0] @ way, (up - down) / (2 * step), rtol=0, atol=2e-3 * scale + rounding)


def _name(parts: Edges) -> str:
    return next(name for name in CONFIGS if model_of(name) is parts.model)


@pytest.mark.parametrize("family", ["gpt2"], indirect=True)
def test_slopes_are_exact_differences_one_by_one(family: Edges):
    """In float64 throughout: error of order step^2, rounding of order 1e-16 / step."""
    parts = edges(model_of("gpt2", torch.float64))
    batch, rule = examples(2, lengths=(6, 5)).batch(), parts.fallback("resample")
    random = torch.rand(1, 1, 1, len(parts.labels), generator=torch.Generator().manual_seed(2)).double()
    gates = torch.cat([torch.ones_like(random), random])
    values, slopes = parts.gradient(batch, gates, rule)
    torch.testing.assert_close(values, parts.measure(batch, gates, rule))
    for number in range(0, len(parts.labels), 3):
        step = torch.zeros_like(gates)
        step[..., number] = 1e-6
        up, down = (parts.measure(batch, gates + sign * step, rule) for sign in (1, -1))
        torch.testing.assert_close(slopes[..., number], (up - down) / 2e-6, rtol=1e-6, atol=1e-8)


def test_gates_by_example_and_position():
    parts = edges(model_of("gpt2", torch.float64))
    batch, rule = examples(3, lengths=(7, 5)).batch(), parts.fallback("resample")
    shape = (1, 3, batch.tokens.shape[1], len(parts.labels))
    gates = torch.rand(shape, generator=torch.Generator().manual_seed(3)).double()
    values, slopes = parts.gradient(batch, gates, rule)
    assert slopes.shape == shape
    torch.testing.assert_close(values, parts.measure(batch, gates, rule))
    _, opened = parts.gradient(batch, torch.ones(shape).double(), rule)
    _, total = parts.gradient(batch, parts.open(), rule)
    torch.testing.assert_close(opened.sum(2), total)
    shared = gates[:, :, :1]
    alone = torch.cat([parts.measure(examples(3, lengths=(7, 5)).batch([i]), shared[:, i : i + 1], rule) for i in range(3)], 1)
    torch.testing.assert_close(parts.measure(batch, shared, rule), alone, rtol=0, atol=1e-11)


class ByHand:
    """Forward passes of GPT-2 and Llama written out with their weights, head by head, every destination with its own stream."""

    def __init__(self, hf, tokens: Tensor):
        self.hf, self.tokens, self.llama = hf, tokens, hf.config.model_type == "llama"
        self.blocks = hf.model.layers if self.llama else hf.transformer.h
        self.heads, self.width = hf.config.num_attention_heads, hf.config.hidden_size // hf.config.num_attention_heads

    def run(self, closed: set[str], corrupt: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and what each source writes; `closed` edges carry what the corrupt run's source writes."""
        hf, writes = self.hf, dict[str, Tensor]()
        length = self.tokens.shape[1]

        def stream(target: str) -> Tensor:
            return sum((corrupt if f"{source}>{target}" in closed else writes)[source] for source in writes) + sum(bias)

        bias: list[Tensor] = [torch.zeros(1, 1, hf.config.hidden_size, dtype=hf.dtype)]
        if self.llama:
            writes["embed"] = hf.model.embed_tokens(self.tokens)
        else:
            writes["embed"] = hf.transformer.wte(self.tokens) + hf.transformer.wpe(torch.arange(length))
        ahead = torch.full((length, length), -torch.inf, dtype=hf.dtype).triu(1)
        for number, block in enumerate(self.blocks):
            found = dict[str, Tensor]()
            for head in range(self.heads):
                q, k, v = (self.read(number, slot, head, stream) for slot in "qkv")
                pattern = (q @ k.transpose(1, 2) / self.width**0.5 + ahead).softmax(-1)
                cut = slice(head * self.width, (head + 1) * self.width)
                output = block.self_attn.o_proj.weight.T if self.llama else block.attn.c_proj.weight
                found[f"L{number}.h{head}"] = pattern @ v @ output[cut]
            writes |= found
            if not self.llama:
                bias.append(block.attn.c_proj.bias)
            norm = block.post_attention_layernorm if self.llama else block.ln_2
            writes[f"L{number}.mlp"] = block.mlp(norm(stream(f"L{number}.mlp")))
        norm = hf.model.norm if self.llama else hf.transformer.ln_f
        return hf.lm_head(norm(stream("logits"))), writes

    def read(self, number: int, slot: str, head: int, stream) -> Tensor:
        block = self.blocks[number]
        if not self.llama:
            at = "qkv".index(slot) * self.heads * self.width + head * self.width
            name = f"h{head}.q" if slot == "q" else f"kv{head}.{slot}"
            return block.attn.c_attn(block.ln_1(stream(f"L{number}.{name}")))[..., at : at + self.width]
        shared = head // (self.heads // self.hf.config.num_key_value_heads)
        mine = head if slot == "q" else shared
        name = f"h{head}.q" if slot == "q" else f"kv{shared}.{slot}"
        made = getattr(block.self_attn, f"{slot}_proj")(block.input_layernorm(stream(f"L{number}.{name}")))
        made = made[..., mine * self.width : (mine + 1) * self.width]
        if slot == "v":
            return made
        half, place = self.width // 2, torch.arange(self.tokens.shape[1])[:, None]
        angle = place / self.hf.config.rope_parameters["rope_theta"] ** (torch.arange(half) / half)
        first, second = made[..., :half], made[..., half:]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_any_edges_closed_are_the_pass_written_out(name: str):
    """One edge at a time, and random halves of all. GPT-2 in float64 to 1e-11; Llama's norms compute in float32: 1e-5."""
    model = model_of(name, torch.float64 if name == "gpt2" else torch.float32)
    parts, batch = edges(model), examples(3, lengths=(7,)).batch()
    assert batch.corrupt is not None
    with torch.no_grad():
        _, corrupt = ByHand(model.hf, batch.corrupt).run(set(), {})
        clean = ByHand(model.hf, batch.tokens)
        draw = torch.Generator().manual_seed(4)
        gates = parts.open(len(parts.labels) + 5)
        gates[torch.arange(len(parts.labels)), ..., torch.arange(len(parts.labels))] = 0
        gates[-5:] = torch.rand(5, 1, 1, len(parts.labels), generator=draw).round()
        found = parts.measure(batch, gates, parts.fallback("resample"))
        for setting, value in zip(gates[:, 0, 0], found, strict=True):
            shut = {str(edge) for edge, gate in zip(parts.labels, setting, strict=True) if gate == 0}
            logits, _ = clean.run(shut, corrupt)
            expected = DIFF(logits[batch.target_row, batch.target_position][None], batch)[0]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-11 if name == "gpt2" else 1e-5)
    assert float((found - plain(parts, batch)).abs().amax(1)[: len(parts.labels)].median()) > 1e-4


def test_the_wired_induction_head_is_fed_through_its_keys():
    """L0.h1 writes each token's predecessor, by which L1.h2 is found: as its keys, not as its queries or values."""
    for name in ("gpt2", "llama"):
        made = wired("induction", name)
        model = Model.load(made.hf, tokenizer=made.tokenizer)
        some = made.task.examples(made.tokenizer, 8, seed=3)
        parts = edges(model, ["L0.h*"], ["L1.h*.q", "L1.kv*.k", "L1.kv*.v"])
        scores = attribute(parts, some, parts.fallback("resample"))
        truth = made.truth.effects["resample"]["L0.h1"]
        found = dict(zip(map(str, scores.sites), scores.values(), strict=True))
        (best,) = [edge for edge, value in found.items() if abs(value) > 1e-3 * truth]
        assert best.startswith("L0.h1>L1.kv") and best.endswith(".k")
        assert found[best] == pytest.approx(truth, rel=1e-4), "the whole effect of the head"


def test_fallbacks_of_edges():
    model = model_of("gpt2", torch.float64)
    some = examples(4, lengths=(7,))
    batch, parts = some.batch(), edges(model)
    edge = Edge.parse("L0.h1>L1.kv2.k")
    k = Site("k", 1, 2)
    z = model.record(batch, "L0.h1.z")[Site("z", 0, 1)]
    weights = model.hf.transformer.h[0].attn.c_proj.weight.detach()[8:16]
    mean = torch.cat([model.record(one, "L0.h1.z")[Site("z", 0, 1)] for one in (batch, batch.swapped())]).mean(0)
    for kind, closing in (("zero", torch.zeros_like(z)), ("mean:position", mean.expand_as(z))):
        stream = model.record(batch, "L1.resid.pre")[Site("resid.pre", 1)] + (closing - z) @ weights
        block = model.hf.transformer.h[1]
        with torch.no_grad():
            key = block.attn.c_attn(block.ln_1(stream))[..., 32:64].unflatten(-1, (4, 8))[:, :, 2]
        expected = DIFF(model.target_logits(batch, {k: Put(key)}).detach(), batch)
        found = parts.measure(batch, parts.without([edge]), parts.fallback(kind, fit=some))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    with pytest.raises(GateError, match="give the fit set"):
        parts.fallback("mean")
    with pytest.raises(GateError, match="no fallback 'noise'"):
        parts.fallback("noise")


def test_gates_as_edits_are_what_is_measured():
    model = model_of("llama")
    parts, batch = edges(model), examples(3, lengths=(7, 5)).batch()
    gates = torch.rand(2, 1, 1, len(parts.labels), generator=torch.Generator().manual_seed(5))
    rule = parts.fallback("resample")
    with torch.no_grad():
        found = DIFF(model.target_logits(batch, parts.edits(gates, rule, batch), 2), batch)
    torch.testing.assert_close(found, parts.measure(batch, gates, rule), rtol=0, atol=1e-5)
    assert parts.edits(parts.open(), rule, batch) == {}
    with pytest.raises(GateError, match="use nodes to generate"):
        parts.edits(gates, rule)
    with pytest.raises(GateError, match="prompts of the batch"):
        model.generate(batch, parts.edits(gates[:1], rule, batch), max_new_tokens=2)


def test_what_cannot_be_asked_is_said():
    model = model_of("gpt2")
    parts, batch = edges(model), examples(2).batch()
    rule = parts.fallback("resample")
    with pytest.raises(SiteError, match="fits none"):
        edges(model, ["L9.h1"])
    with pytest.raises(GateError, match="no edge leads"):
        edges(model, ["L1.mlp"], ["L0.mlp"])
    with pytest.raises(GateError, match="not among the"):
        parts.without([Edge.parse("L0.h1>L9.mlp")])
    with pytest.raises(GateError, match="with 110 edges"):
        parts.measure(batch, parts.open()[..., 1:], rule)
    with model.editing({Site("attn", 0): Scale(1.0)}, batch), pytest.raises(GateError, match="other edits are on"):
        parts.measure(batch, parts.closed(), rule)
    with pytest.raises(GateError, match="is an edge"):
        sites_of(parts)
    with pytest.raises(MetricError, match="identically zero"):
        attribute(parts, examples(2), rule, "gradient", metric="kl")
    assert parts.on(model).labels == parts.labels and "110 edges into 27" in repr(parts)


def test_slopes_leave_the_model_as_it_was():
    model = model_of("gpt2")
    parts, batch = edges(model), examples(2).batch()
    before = [parameter.requires_grad for parameter in model.hf.parameters()]
    parts.gradient(batch, parts.open(), parts.fallback("resample"))
    assert [parameter.requires_grad for parameter in model.hf.parameters()] == before
    assert all(parameter.grad is None for parameter in model.hf.parameters())


@pytest.mark.parametrize(("attention", "dtype", "tolerance"), [("sdpa", torch.float32, 1e-5), ("eager", torch.bfloat16, 0.1)])
def test_other_kernels_and_types(attention: str, dtype: torch.dtype, tolerance: float):
    """Fused attention where no queries, keys or values are asked for; bfloat16, whose steps are 2^-8 of a logit difference of 3."""
    for name in ("gpt2", "llama", "qwen3"):
        model = Model.load(tiny(name, attention, dtype=dtype))
        batch = examples(4, lengths=(7, 5)).batch()
        for parts in (edges(model), edges(model, destinations=["L*.mlp", "logits"])):
            rule = parts.fallback("resample")
            assert torch.equal(parts.measure(batch, parts.open(), rule), plain(parts, batch))
            every = [edge for edge in parts.labels if edge.target.kind == "logits"]
            found = parts.measure(batch, parts.without(every), rule)
            torch.testing.assert_close(found, plain(parts, batch.swapped()), rtol=0, atol=tolerance)
            _, slopes = parts.gradient(batch, parts.open(), rule)
            assert slopes.dtype == torch.float32 and bool((slopes != 0).any())


def test_blocks_that_are_one_module_are_refused():
    model = model_of("gpt2")
    first = model.anatomy.layers[0]
    shared = replace(model, anatomy=replace(model.anatomy, layers=(first, first)))
    with pytest.raises(FamilyError, match="share one module"):
        edges(shared)
