"""Edges at positions: against forward passes written out, in which every query has keys and values of its own."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from cases import tiny
from patchclamp.errors import GateError, TaskError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Edges, edges
from patchclamp.sites import Edge, Site
from patchclamp.tasks import Examples
from patchclamp.zoo import wired
from test_edges import ByHand
from test_parts import examples

DIFF = METRICS["logit_diff"]
SPANS = ({"fact": (2, 4), "tail": (4, 6), "end": (6, 7)}, {"fact": (1, 4), "tail": (5, 6), "end": (6, 7)})


@cache
def model_of(name: str, dtype: torch.dtype = torch.float64) -> Model:
    return Model.load(tiny(name, dtype=dtype))


def named(n: int = 3, lengths: tuple[int, ...] = (7,)) -> Examples:
    """Prompts whose spans are of unequal lengths."""
    some = examples(n, lengths=lengths)
    return replace(some, items=tuple(replace(one, spans=SPANS[number % 2]) for number, one in enumerate(some.items)))


class ByQuery(ByHand):
    """As `ByHand`, but each query's keys and values are made anew, of the stream that its own position's edges give."""

    def at(self, span: str) -> Tensor:
        return self.spans(span)[..., None].to(self.hf.dtype)

    def placed(self, closed: set[str], corrupt: dict[str, Tensor], spans) -> Tensor:
        """Logits with edges `source@P>target@Q` closed."""
        self.spans, hf, length = spans, self.hf, self.tokens.shape[1]
        writes, bias = dict[str, Tensor](), torch.zeros(1, 1, hf.config.hidden_size, dtype=hf.dtype)
        shut = [(edge.source, edge.target) for edge in map(Edge.parse, closed)]
        if self.llama:
            writes["embed"] = hf.model.embed_tokens(self.tokens)
        else:
            writes["embed"] = hf.transformer.wte(self.tokens) + hf.transformer.wpe(torch.arange(length))

        def stream(target: str, asking: Tensor | None = None) -> Tensor:
            """What a target reads; of keys and values, as a query reads it that stands where `asking` says."""
            total = sum(writes.values()) + bias
            for source, end in shut:
                if str(end.at(None)) != target:
                    continue
                apart = (corrupt[str(source.at(None))] - writes[str(source.at(None))]) * self.at(source.position)
                asked = asking is None or end.kind not in ("k", "v")
                total = total + (apart if asked else apart * (spans(end.position) & asking).any(1)[:, None, None])
            return total

        ahead = torch.full((length, length), -torch.inf, dtype=hf.dtype).triu(1)
        for number, block in enumerate(self.blocks):
            found = dict[str, Tensor]()
            for head in range(self.heads):
                q, rows = self.read(number, "q", head, stream), list[Tensor]()
                for query in range(length):
                    here = torch.zeros(self.tokens.shape, dtype=torch.bool)
                    here[:, query] = True
                    k, v = (self.read(number, slot, head, lambda target: stream(target, here)) for slot in "kv")  # noqa: B023
                    score = (q[:, query : query + 1] @ k.transpose(1, 2)) / self.width**0.5 + ahead[query]
                    rows.append(score.softmax(-1) @ v)
                output = block.self_attn.o_proj.weight.T if self.llama else block.attn.c_proj.weight
                found[f"L{number}.h{head}"] = torch.cat(rows, 1) @ output[head * self.width : (head + 1) * self.width]
            writes |= found
            bias = bias if self.llama else bias + block.attn.c_proj.bias
            norm = block.post_attention_layernorm if self.llama else block.ln_2
            writes[f"L{number}.mlp"] = block.mlp(norm(stream(f"L{number}.mlp")))
        return hf.lm_head((hf.model.norm if self.llama else hf.transformer.ln_f)(stream("logits")))


def some_edges(model: Model, count: int, seed: int = 0) -> Edges:
    every = edges(model, positions=("fact", "tail", "end"))
    draw = torch.randperm(len(every.labels), generator=torch.Generator().manual_seed(seed))
    cross = [e for e in every.labels if e.target.kind in ("k", "v") and (e.source.position, e.target.position) == ("fact", "end")]
    return Edges(model, sorted({*(every.labels[number] for number in draw[:count].tolist()), *cross[:4]}))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_any_edges_at_positions_closed_are_the_pass_written_out(name: str):
    """Single edges and random halves; GPT-2 in float64 to 1e-11, Llama's norms compute in float32: 1e-5."""
    model = model_of(name, torch.float64 if name == "gpt2" else torch.float32)
    parts, batch = some_edges(model, 24), named().batch()
    count = len(parts.labels)
    gates = parts.open(count + 3)
    gates[torch.arange(count), ..., torch.arange(count)] = 0
    gates[-3:] = torch.rand(3, 1, 1, count, generator=torch.Generator().manual_seed(4)).round()
    found, rule = parts.measure(batch, gates, parts.fallback("resample")), parts.fallback("resample")
    with torch.no_grad():
        _, corrupt = ByHand(model.hf, batch.corrupt).run(set(), {})
        for setting, value in zip(gates[:, 0, 0], found, strict=True):
            shut = {str(edge) for edge, gate in zip(parts.labels, setting, strict=True) if gate == 0}
            logits = ByQuery(model.hf, batch.tokens).placed(shut, corrupt, batch.columns)
            expected = DIFF(logits[batch.target_row, batch.target_position][None], batch)[0]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-11 if name == "gpt2" else 1e-5)
    torch.testing.assert_close(found, parts.whole().measure(batch, gates, rule), rtol=0, atol=1e-11 if name == "gpt2" else 5e-6)
    plain = DIFF(model.target_logits(batch).detach(), batch)[0]
    assert int(((found - plain).abs().amax(1)[:count] > 1e-4).sum()) >= 8, "those from later to earlier spans are none"


def test_slopes_at_positions_are_differences():
    """Open, and at random gates; float64: error of order step^2, rounding 1e-16 / step."""
    parts, batch = some_edges(model_of("gpt2"), 30, seed=1), named().batch()
    rule = parts.fallback("resample")
    draw = torch.rand(1, 1, 1, len(parts.labels), generator=torch.Generator().manual_seed(2)).double()
    gates = torch.cat([torch.ones_like(draw), draw])
    values, slopes = parts.gradient(batch, gates, rule)
    torch.testing.assert_close(values, parts.measure(batch, gates, rule))
    for number in range(len(parts.labels)):
        step = torch.zeros_like(gates)
        step[..., number] = 1e-6
        up, down = (parts.measure(batch, gates + sign * step, rule) for sign in (1, -1))
        torch.testing.assert_close(slopes[..., number], (up - down) / 2e-6, rtol=1e-6, atol=1e-8)
    assert int((slopes[0].abs().amax(0) > 1e-4).sum()) >= 8, "those from later to earlier spans are none"


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "phi"])
def test_spans_that_cover_the_prompt_add_up_to_the_edge(name: str):
    """Every part of an edge closed is the edge closed; its parts' slopes add up to its slope."""
    model = model_of(name, torch.float32)
    some = named(2)
    spans = {"first": (0, 3), "second": (3, 6), "end": (6, 7)}
    some = replace(some, items=tuple(replace(one, spans=spans) for one in some.items))
    chosen = (["embed", "L0.h1", "L0.mlp"], ["L1.h2.q", "L1.kv1.k", "L1.kv0.v", "L1.mlp", "logits"])
    whole, parts, batch = edges(model, *chosen), edges(model, *chosen, positions=tuple(spans)), some.batch()
    rule = whole.fallback("resample")
    of = {edge: [one for one in parts.labels if (one.source.at(None), one.target.at(None)) == (edge.source, edge.target)]
          for edge in whole.labels}  # fmt: skip
    assert {len(found) for found in of.values()} == {3, 9}
    gates = torch.cat([parts.without(found) for found in of.values()])
    expected = torch.cat([whole.without([edge]) for edge in of])
    torch.testing.assert_close(
        parts.measure(batch, gates, rule), whole.measure(batch, expected, rule), rtol=0, atol=1e-5
    )  # float32
    slopes, total = (one.gradient(batch, one.open(), rule)[1][0] for one in (parts, whole))
    summed = torch.stack([slopes[:, [parts.index[one] for one in found]].sum(1) for found in of.values()], 1)
    torch.testing.assert_close(summed, total[:, [whole.index[edge] for edge in of]], rtol=0, atol=1e-5)


def test_the_wired_induction_head_looks_back_from_the_end():
    """L0.h1 tells each token's predecessor, which L1.h2's key carries to the query at the end, and to no other."""
    made = wired("induction", "gpt2")
    model = Model.load(made.hf, tokenizer=made.tokenizer)
    batch = made.task.examples(made.tokenizer, 8, seed=3).batch()
    length = int(batch.mask.sum(1)[0])
    assert bool((batch.mask.sum(1) == length).all())
    parts = edges(model, ["L0.h1"], ["L1.kv*.k"], positions=tuple(range(length)))
    rule = parts.fallback("resample")
    asked = [edge for edge in parts.labels if edge.target.position == length - 1]
    other = [edge for edge in parts.labels if edge.target.position != length - 1]
    both = edges(model, ["L0.h1"], ["L1.kv*.k"])
    whole = both.measure(batch, torch.cat([both.open(), both.closed()]), rule)
    found = parts.measure(batch, torch.cat([parts.without(asked), parts.without(other)]), rule)
    effect = (whole[0] - whole[1]).mean()
    assert effect > 1
    torch.testing.assert_close(found[0], whole[1], rtol=0, atol=1e-4 * float(effect))
    torch.testing.assert_close(found[1], whole[0], rtol=0, atol=1e-4 * float(effect))


def test_prompts_of_other_lengths_are_handled_by_name_and_refused_by_number():
    model = model_of("gpt2")
    some = examples(4, lengths=(7, 5))
    by_name, batch = edges(model, ["L0.h*"], ["L1.kv*.k"], positions=("fact", "end")), some.batch()
    rule = by_name.fallback("resample")
    gates = by_name.without(by_name.labels[::3])
    alone = torch.cat([by_name.measure(some.batch([number]), gates, rule) for number in range(4)], 1)
    torch.testing.assert_close(by_name.measure(batch, gates, rule), alone, rtol=0, atol=1e-11)
    by_number = edges(model, ["L0.h*"], ["L1.kv*.k"], positions=(2, 4))
    for call in (by_number.measure, by_number.gradient):
        with pytest.raises(GateError, match="prompts of 5 to 7 tokens: name spans"):
            call(batch, by_number.open(), rule)
    same = examples(2, lengths=(5,)).batch()
    found = by_number.measure(same, by_number.closed(), by_number.fallback("resample"))
    named = edges(model, ["L0.h*"], ["L1.kv*.k"], positions=("fact", "end"))
    torch.testing.assert_close(found, named.measure(same, named.closed(), named.fallback("resample")))
    with pytest.raises(TaskError, match="no span 'subject'"):
        missing = edges(model, ["L0.h*"], ["L1.kv*.k"], positions=("subject",))
        missing.measure(batch, missing.closed(), rule)
    with pytest.raises(GateError, match="only keys and values"):
        Edges(model, [Edge(Site("head", 0, 1, position="fact"), Site("q", 1, 1, position="end"))])
    assert all(Edge.parse(str(edge)) == edge for edge in by_name.labels)


def test_padding_is_not_seen_in_float64():
    """Llama's softmax computes in float32, where what masks a row of float64 is minus infinity: rows of padding alone have nothing
    else to attend to. Each prompt by itself, without padding, says what is right; norms and softmax in float32: 1e-5."""
    model, some = model_of("llama"), named(4, lengths=(7, 9))
    assert not bool(some.batch().mask.all())
    parts = some_edges(model, 6)
    count = len(parts.labels)
    gates = parts.open(count + 1)
    gates[torch.arange(count), ..., torch.arange(count)] = 0
    gates[-1] = 0.5
    rule = parts.fallback("resample")
    values, slopes = parts.measure(some.batch(), gates, rule), parts.gradient(some.batch(), gates[-1:], rule)[1]
    for number in range(len(some)):
        alone = some.take([number]).batch()
        torch.testing.assert_close(values[:, number], parts.measure(alone, gates, rule)[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(slopes[:, number], parts.gradient(alone, gates[-1:], rule)[1][:, 0], rtol=0, atol=1e-5)
