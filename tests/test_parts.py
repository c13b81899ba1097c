"""Conformance of parts, over tiny models of every family and by hand."""

import pytest
import torch

from cases import CONFIGS, model_of, tiny
from patchclamp.edits import Put, Scale
from patchclamp.errors import GateError, MetricError
from patchclamp.metrics import METRICS, metric_named
from patchclamp.models.model import Model
from patchclamp.models.replay import why_plain
from patchclamp.parts import Nodes, nodes
from patchclamp.parts.fallbacks import Fallback
from patchclamp.sites import Site
from patchclamp.tasks import Example, Examples, Pair
from patchclamp.tasks._batch import Batch

DIFF, NLL = METRICS["logit_diff"], METRICS["nll"]


class Digits:
    """A tokenizer for ids written as they are; blanks between them."""

    bos_token_id = None

    def __call__(self, text: list[str], /, **options: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in one.split()] for one in text]}

    def decode(self, token_ids: list[int], /) -> str:
        return " ".join(map(str, token_ids))


def examples(n: int = 5, lengths: tuple[int, ...] = (7,), seed: int = 0, answers: int = 1) -> Examples:
    """Random pairs that differ in one token, with answers of `answers` tokens; prompts as long as `lengths` say, in turn."""
    draw = torch.Generator().manual_seed(seed)
    items = []
    for i in range(n):
        clean = torch.randint(3, 90, (lengths[i % len(lengths)],), generator=draw).tolist()
        corrupt = [*clean]
        corrupt[2] = clean[2] % 80 + 5
        right, wrong = torch.randint(3, 90, (2, answers), generator=draw).tolist()
        if right == wrong:
            wrong = [token + 1 for token in wrong]
        pair = Pair(clean=tuple(clean), corrupt=tuple(corrupt), answer=(tuple(right),), wrong=(tuple(wrong),))
        spans = {"end": (len(clean) - 1, len(clean)), "fact": (2, 3)}
        items.append(Example(tuple(clean), (tuple(right),), pair, tuple(corrupt), (tuple(wrong),), spans))
    return Examples(tuple(items), Digits(), "random", "logit_diff")


@pytest.fixture(scope="module")
def gpt2() -> Nodes:
    return nodes(model_of("gpt2", dtype=torch.float64))


@pytest.fixture(scope="module", params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> Nodes:
    return nodes(model_of(request.param))


def test_open_gates_are_the_model_bit_for_bit(family: Nodes):
    batch = examples(lengths=(7, 5)).batch()
    plain = DIFF(family.model.target_logits(batch).detach(), batch)
    fallback = family.fallback("resample")
    assert torch.equal(family.measure(batch, family.open(), fallback), plain)
    ones = family.open().expand(-1, len(batch), -1, -1).clone()
    edits = family.edits(ones.requires_grad_(), fallback, batch)  # here every gate is computed: lerp at 1 is exact
    assert len(edits) == len(family.places)
    assert torch.equal(DIFF(family.model.target_logits(batch, edits), batch), plain)


def test_everything_closed_is_the_corrupt_run(family: Nodes):
    batch = examples(lengths=(7, 5)).batch()
    closed = family.measure(batch, torch.zeros_like(family.open()), family.fallback("resample"))
    corrupt = DIFF(family.model.target_logits(batch.swapped()).detach(), batch)
    # same arithmetic on the same values; mixture-of-experts kernels order their sums by routing
    torch.testing.assert_close(closed, corrupt, rtol=0, atol=1e-5)


def test_labels_are_unique_sorted_and_parse_back(family: Nodes):
    labels = family.labels
    assert list(labels) == sorted(set(labels), key=lambda site: site.key)
    assert all(Site.parse(str(site)) == site for site in labels)
    assert labels[0] == Site("embed") and 0 not in family.counted
    assert len(family.counted) == sum(size.heads + 1 for size in family.model.anatomy.sizes)


def test_slopes_are_finite_differences(gpt2: Nodes):
    batch, fallback = examples(3, lengths=(7, 5)).batch(), gpt2.fallback("resample")
    gates = torch.rand(2, 1, 1, len(gpt2.labels), generator=torch.Generator().manual_seed(1)).double()
    for metric in (DIFF, NLL, METRICS["kl"]):
        values, slopes = gpt2.gradient(batch, gates, fallback, metric)
        assert slopes.shape == (2, 3, len(gpt2.labels))
        torch.testing.assert_close(values, gpt2.measure(batch, gates, fallback, metric))
        for part in range(len(gpt2.labels)):
            step = torch.zeros_like(gates)
            step[..., part] = 1e-6
            up, down = (gpt2.measure(batch, gates + sign * step, fallback, metric) for sign in (1, -1))
            # central differences in float64: error of order step^2, rounding of order 1e-16 / step
            torch.testing.assert_close(slopes[..., part], (up - down) / 2e-6, rtol=1e-6, atol=1e-8)


def test_one_closed_head_is_a_patch_by_hand(gpt2: Nodes):
    batch = examples(4, lengths=(7, 5)).batch()
    model, head = gpt2.model, Site("head", 1, 2)
    z = model.record(batch.swapped(), "L1.h2.z")[Site("z", 1, 2)]
    by_hand = DIFF(model.target_logits(batch, {Site("z", 1, 2): Put(z)}).detach(), batch)
    closed = gpt2.measure(batch, gpt2.without([head]), gpt2.fallback("resample"))
    torch.testing.assert_close(closed, by_hand, rtol=0, atol=1e-12)


def test_folding_and_company_change_nothing_but_rounding(gpt2: Nodes):
    whole, fallback = examples(6, lengths=(7, 5, 6)), gpt2.fallback("resample")
    gates = torch.rand(9, 1, 1, len(gpt2.labels), generator=torch.Generator().manual_seed(2)).double()
    together = gpt2.measure(whole.batch(), gates, fallback)
    one_by_one = torch.cat([gpt2.measure(whole.batch(), gates[k : k + 1], fallback) for k in range(9)])
    alone = torch.cat([gpt2.measure(whole.batch([i]), gates, fallback) for i in range(6)], 1)
    small = nodes(gpt2.model, memory=1)  # a budget that allows one setting at a time
    assert small.fold(whole.batch()) == 1 < gpt2.fold(whole.batch())
    for other in (one_by_one, alone, small.measure(whole.batch(), gates, fallback)):
        torch.testing.assert_close(together, other, rtol=0, atol=1e-11)  # float64


def test_gates_by_example_and_position(gpt2: Nodes):
    batch, fallback = examples(3).batch(), gpt2.fallback("resample")
    shape = (1, 3, batch.tokens.shape[1], len(gpt2.labels))
    gates = torch.rand(shape, generator=torch.Generator().manual_seed(3)).double()
    values, slopes = gpt2.gradient(batch, gates, fallback)
    assert slopes.shape == shape
    shared = gates[:, :, :1]
    alone = torch.cat([gpt2.measure(examples(3).batch([i]), shared[:, i : i + 1], fallback) for i in range(3)], 1)
    torch.testing.assert_close(gpt2.measure(batch, shared, fallback), alone, rtol=0, atol=1e-11)
    torch.testing.assert_close(values, gpt2.measure(batch, gates, fallback))


def test_parts_at_positions_split_a_part_over_positions(gpt2: Nodes):
    batch, fallback = examples(4, lengths=(7, 5)).batch(), gpt2.fallback("resample")
    spread = nodes(gpt2.model, positions=("fact", "end"))
    site = Site("head", 0, 1)
    assert len(spread.counted) == 2 * len(gpt2.counted) and Site.parse("L0.h1@fact") in spread.labels
    z = gpt2.model.record(batch.swapped(), "L0.h1.z")[Site("z", 0, 1)]
    by_hand = gpt2.model.target_logits(batch, {Site("z", 0, 1, position="fact"): Put(z)}).detach()
    closed = spread.measure(batch, spread.without([site.at("fact")]), fallback)
    torch.testing.assert_close(closed, DIFF(by_hand, batch), rtol=0, atol=1e-12)


def test_means_leave_padding_out(gpt2: Nodes):
    fit = examples(6, lengths=(7, 5), seed=4)
    place = Site("z", 1)
    alone = [values[i] for i in range(6) for values in (gpt2.record(fit.batch([i]))[place], gpt2.record(fit.batch([i]).swapped())[place])
             if i < len(values)]  # fmt: skip
    rows = [gpt2.record(one)[place][0] for i in range(6) for one in (fit.batch([i]), fit.batch([i]).swapped())]
    everything = torch.cat(rows).mean(0)
    assert alone  # rows were recorded without padding
    mean = gpt2.fallback("mean:all", fit)
    torch.testing.assert_close(mean.at(None)[place][0, 0], everything, rtol=0, atol=1e-12)
    same = examples(6, lengths=(7,), seed=4)
    by_position = gpt2.fallback("mean", same).at(same.batch())[place][0]
    third = torch.stack([gpt2.record(one)[place][0, 3] for i in range(6) for one in (same.batch([i]), same.batch([i]).swapped())])
    torch.testing.assert_close(by_position[3], third.mean(0), rtol=0, atol=1e-12)
    by_span = gpt2.fallback("mean", fit).at(fit.batch())[place]
    fact = torch.stack([row[2] for row in rows]).mean(0)
    torch.testing.assert_close(by_span[fit.batch().columns("fact")][0], fact, rtol=0, atol=1e-12)


def test_zero_closes_what_a_part_writes(gpt2: Nodes):
    batch = examples(2).batch()
    closed = gpt2.measure(batch, gpt2.closed(), gpt2.fallback("zero"))
    embed = gpt2.model.record(batch, "embed")[Site("embed")]
    block = gpt2.model.hf.transformer
    stream = embed + sum(layer.attn.c_proj.bias for layer in block.h)  # biases of the output projections are no head's
    logits = gpt2.model.hf.lm_head(block.ln_f(stream))[:, -1][None]
    torch.testing.assert_close(closed, DIFF(logits.detach(), batch), rtol=0, atol=1e-10)


def test_answers_of_several_tokens(gpt2: Nodes):
    some = examples(3, answers=2)
    batch = some.batch()
    assert len(batch.tokens) == 6 and len(batch) == 3
    values = gpt2.measure(batch, gpt2.open(), gpt2.fallback("resample"))[0]
    for i, example in enumerate(some):
        both = []
        for answer in (example.answers[0], example.wrong[0]):
            logp = gpt2.model.run(torch.tensor([[*example.clean, *answer]]))[0].log_softmax(-1)
            both.append((logp[-3, answer[0]] + logp[-2, answer[1]]) / 2)
        torch.testing.assert_close(values[i], both[0] - both[1], rtol=0, atol=1e-12)


def test_weights_stay_as_they_were(gpt2: Nodes):
    hf = gpt2.model.hf
    wanted = {name: parameter.requires_grad for name, parameter in hf.named_parameters()}
    gpt2.gradient(examples(2).batch(), gpt2.open(), gpt2.fallback("resample"))
    assert {name: parameter.requires_grad for name, parameter in hf.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in hf.parameters())


def test_what_does_not_fit_is_said(gpt2: Nodes):
    some = examples(2)
    fallback = gpt2.fallback("resample")
    with pytest.raises(GateError, match="resample, mean, zero"):
        gpt2.fallback("median")
    with pytest.raises(GateError, match="fit set"):
        gpt2.fallback("mean")
    with pytest.raises(GateError, match=r"with 11 parts, not \(1, 1, 1, 3\)"):
        gpt2.measure(some.batch(), torch.ones(1, 1, 1, 3), fallback)
    with pytest.raises(GateError, match="no corrupt prompt"):
        gpt2.edits(gpt2.closed(), fallback)
    with pytest.raises(GateError, match="gates for 5 examples"):
        gpt2.measure(some.batch(), gpt2.open().expand(1, 5, 1, -1), fallback)
    with pytest.raises(GateError, match="not among the 11 parts"):
        gpt2.without([Site("head", 7, 0)])
    with pytest.raises(MetricError, match="choose from"):
        metric_named("bleu")


def test_gates_in_generation(gpt2: Nodes):
    prompt = torch.tensor([[5, 6, 7, 8]])
    zero = gpt2.fallback("zero")
    same = gpt2.model.generate(prompt, gpt2.edits(gpt2.open(), zero), max_new_tokens=5)
    plain = gpt2.model.generate(prompt, max_new_tokens=5)
    assert same.tokens == plain.tokens
    closed = gpt2.model.generate(prompt, gpt2.edits(gpt2.closed(), zero), max_new_tokens=5)
    assert closed.tokens != plain.tokens


def plainly(parts: Nodes, batch: Batch, gates: torch.Tensor, fallback: Fallback) -> torch.Tensor:
    """One whole run per setting, with every gate computed."""
    rows = [DIFF(parts.model.target_logits(batch, parts.edits(one[None], fallback, batch)), batch)[0] for one in gates]
    return torch.stack(rows).detach()


@pytest.mark.parametrize("lengths", [(7,), (7, 5)])
def test_runs_from_the_middle_are_the_same(family: Nodes, lengths: tuple[int, ...]):
    """Settings of any depth, in any order, with prompts of several lengths: rounding apart, as a whole run each."""
    assert why_plain(family.model) == ""
    batch = examples(lengths=lengths).batch()
    draw = torch.Generator().manual_seed(1)
    gates = family.open(8)
    for number in range(7):  # the last one stays open
        several = torch.randint(0, gates.shape[-1], (1 + number % 2,), generator=draw)
        gates[number, ..., several] = torch.rand(1, generator=draw)
    scale = max(1.0, float(family.model.target_logits(batch).detach().abs().max()))
    for kind in ("resample", "zero"):
        fallback = family.fallback(kind)
        with torch.no_grad():
            expected = plainly(family, batch, gates, fallback)
        torch.testing.assert_close(family.measure(batch, gates, fallback), expected, atol=1e-5 * scale, rtol=0)
        order = torch.randperm(8, generator=draw)
        torch.testing.assert_close(family.measure(batch, gates[order], fallback), expected[order], atol=1e-5 * scale, rtol=0)
        values, _ = family.gradient(batch, gates, fallback)
        torch.testing.assert_close(values, expected, atol=1e-5 * scale, rtol=0)


def one_by_one(parts: Nodes) -> torch.Tensor:
    """A setting per part, with that part alone closed."""
    return 1 - torch.eye(len(parts.labels), dtype=parts.open().dtype)[:, None, None]


def test_runs_from_the_middle_at_positions():
    """Parts at one late position start there; slopes of the embedding see every column all the same."""
    model = Model.load(tiny("gpt2", dtype=torch.float64))
    parts = nodes(model, positions=("end",))
    batch, fallback = examples().batch(), parts.fallback("zero")
    gates = one_by_one(parts)
    with torch.no_grad():
        expected = plainly(parts, batch, gates, fallback)
    torch.testing.assert_close(parts.measure(batch, gates, fallback), expected, atol=1e-10, rtol=0)
    late = gates[1:]  # no embedding among them
    torch.testing.assert_close(parts.measure(batch, late, fallback), expected[1:], atol=1e-10, rtol=0)
    _, slopes = parts.gradient(batch, parts.open().double(), fallback)
    up, down = parts.open().double(), parts.open().double()
    up[..., 0], down[..., 0] = 1 + 1e-6, 1 - 1e-6
    with torch.no_grad():
        steep = (plainly(parts, batch, up, fallback) - plainly(parts, batch, down, fallback))[0] / 2e-6
    torch.testing.assert_close(slopes[0, :, 0], steep, atol=1e-5, rtol=1e-5)


def test_other_edits_forbid_runs_from_the_middle(gpt2: Nodes):
    """With a part held at another value around `measure`, the reference would not know: every run is whole."""
    batch, fallback = examples().batch(), gpt2.fallback("resample")
    gates = one_by_one(gpt2)
    with gpt2.model.editing({Site("mlp.write", 0): Scale(0.0)}):
        assert why_plain(gpt2.model) == "other edits are on"
        with torch.no_grad():
            expected = plainly(gpt2, batch, gates, fallback)
        torch.testing.assert_close(gpt2.measure(batch, gates, fallback), expected, atol=1e-10, rtol=0)
    assert why_plain(gpt2.model) == ""


def test_nothing_stays_in_the_model_after_runs_from_the_middle(gpt2: Nodes):
    batch, fallback = examples().batch(), gpt2.fallback("resample")
    gpt2.measure(batch, one_by_one(gpt2), fallback)
    assert not any("forward" in vars(layer.block) for layer in gpt2.model.anatomy.layers)
