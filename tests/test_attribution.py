"""Gradient methods along paths: completeness, the fundamental theorem, what peers' rules give, and what is refused."""

from collections.abc import Callable

import pytest
import torch

from cases import tiny
from patchclamp.edits import Add
from patchclamp.errors import GateError
from patchclamp.methods import attribute, conductance, effects, inputs, method_named, method_names, passes_of, segments
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Nodes, edges, gated, nodes
from patchclamp.sites import Site
from patchclamp.zoo import wired
from test_parts import examples

DIFF = METRICS["logit_diff"]


@pytest.fixture(scope="module")
def gpt2() -> Nodes:
    return nodes(Model.load(tiny("gpt2", dtype=torch.float64)))


@pytest.fixture(scope="module")
def gemma2() -> Nodes:
    return nodes(Model.load(tiny("gemma2")))


def ends(model: Model, batch: object) -> torch.Tensor:
    """The metric on clean prompts less that on corrupt ones, by example."""
    return (DIFF(model.target_logits(batch), batch) - DIFF(model.target_logits(batch.swapped()), batch))[0].detach()  # type: ignore[attr-defined,arg-type]


def by_hand(model: Model, batch: object, shares: list[float]) -> torch.Tensor:
    """Integrated gradients of the first block's input, by hooks and autograd of the test's own: [row, position, width]."""
    block, kept = model.hf.transformer.h[0], list[torch.Tensor]()
    clean, corrupt = (model.record(one, "L0.resid.pre") for one in (batch, batch.swapped()))  # type: ignore[attr-defined,arg-type]
    (site,) = clean
    for share in shares:
        point = torch.lerp(corrupt[site], clean[site], share).requires_grad_()
        handle = block.register_forward_pre_hook(lambda module, args, point=point: (point, *args[1:]))
        value = DIFF(model.target_logits(batch), batch).sum()  # type: ignore[arg-type]
        handle.remove()
        kept.append(torch.autograd.grad(value, point)[0])
    return (clean[site] - corrupt[site]) * torch.stack(kept).mean(0)


@pytest.mark.parametrize("rule", ["midpoint", "left", "right"])
def test_the_input_path_by_hooks_of_the_tests_own(gpt2: Nodes, rule: inputs.Rule):
    batch, steps = examples(3, lengths=(7, 5)).batch(), 3
    stream = gated(gpt2.model, ["L0.resid.pre"])
    found = inputs.samples(stream, batch, stream.fallback("resample"), DIFF, 0, steps=steps, rule=rule)
    shares = [(k + {"midpoint": 0.5, "left": 0.0, "right": 1.0}[rule]) / steps for k in range(steps)]
    torch.testing.assert_close(found[0], by_hand(gpt2.model, batch, shares).sum((1, 2)), rtol=1e-9, atol=1e-12)


def test_one_right_step_of_the_input_path_is_the_gradient(gpt2: Nodes):
    batch = examples(3, lengths=(7, 5)).batch()
    for parts in (gpt2, edges(gpt2.model), gated(gpt2.model, ["L*.mlp.n*"])):
        fallback = parts.fallback("resample")
        wanted = parts.gradient(batch, parts.open(), fallback, DIFF)[1][0][:, list(parts.counted)].T
        found = inputs.samples(parts, batch, fallback, DIFF, 0, steps=1, rule="right")
        torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-7)  # gates in float32


def test_conductance_through_one_layer_is_complete(gpt2: Nodes):
    """All that flows from the embeddings to the logits flows through the stream behind block 0."""
    batch = examples(3, lengths=(7, 5)).batch()
    stream = gated(gpt2.model, ["L1.resid.pre"])
    gaps = [
        float((conductance.samples(stream, batch, stream.fallback("resample"), DIFF, 0, steps=m)[0] - ends(gpt2.model, batch)).abs().max())
        for m in (5, 20)
    ]  # fmt: skip
    assert gaps[1] < 1e-4 and gaps[1] < gaps[0] / 12  # the midpoint rule's error falls with the square of the step


def test_conductance_of_the_embedding_is_its_integrated_gradient(gpt2: Nodes):
    batch = examples(2).batch()
    stream = gated(gpt2.model, ["L0.resid.pre"])
    fallback = stream.fallback("resample")
    one, two = (method.samples(stream, batch, fallback, DIFF, 0) for method in (conductance, inputs))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_each_part_alone_converges_to_the_exact_effect(gpt2: Nodes):
    """The peers' per-node integrated gradients end at half the effect: every sink's gradients are summed and divided once."""
    some, fallback = examples(3, lengths=(7, 5)), gpt2.fallback("resample")
    exact = effects(gpt2, some, fallback, "exact")
    each = [[number] for number in gpt2.counted]
    errors: list[float] = []
    for steps in (3, 9, 50):
        found = segments.segmented(gpt2, some.batch(), fallback, DIFF, each, steps=steps, tolerance=float("inf"))
        assert found.points == (steps,) * len(each)
        torch.testing.assert_close(found.samples - found.effects, found.gaps, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.effects, exact, rtol=0, atol=1e-12)
        errors.append(float((found.samples - exact).abs().max()))
    assert errors[2] < errors[1] < errors[0] and errors[2] < 1e-5


@pytest.mark.parametrize("kind", ["nodes", "neurons", "edges"])
def test_a_segment_adds_up_to_what_closing_it_takes(gpt2: Nodes, kind: str):
    parts = {
        "nodes": gpt2,
        "neurons": gated(gpt2.model, ["L*.mlp.n*"]),
        "edges": edges(gpt2.model, destinations=["L1.h0.*", "L1.mlp"]),
    }[kind]
    batch, fallback = examples(2).batch(), parts.fallback("resample")
    groups = segments.by_segment(parts)
    assert sorted(number for group in groups for number in group) == list(parts.counted)
    found = segments.segmented(parts, batch, fallback, DIFF, groups)
    assert found.gap <= found.allowed
    gates = parts.open(len(groups) + 1)
    for row, group in enumerate(groups):
        gates[row + 1, ..., group] = 0
    values = parts.measure(batch, gates, fallback, DIFF)
    torch.testing.assert_close(found.effects.double(), (values[:1] - values[1:]).double(), rtol=0, atol=1e-6)
    rows = {number: row for row, number in enumerate(parts.counted)}
    sums = torch.stack([found.samples[[rows[number] for number in group]].sum(0) for group in groups])
    torch.testing.assert_close(sums - found.effects, found.gaps, rtol=0, atol=1e-6)
    assert float(found.gaps.mean(1).abs().max()) <= 0.01 * float(found.effects.abs().mean(1).max())


class Sharp(Nodes):
    """Parts whose metric is a step of the first part's gate, exp(-((1 - g) / width)): all of its rise is in the last hundredth."""

    width = 0.01

    def measure(self, batch, gates, fallback, metric=None):  # type: ignore[no-untyped-def]
        return torch.exp(-(1 - gates[..., 0, 0, 1].double()) / self.width)[:, None].expand(-1, len(batch))

    def gradient(self, batch, gates, fallback, metric=None):  # type: ignore[no-untyped-def]
        values = self.measure(batch, gates, fallback)
        slopes = torch.zeros(len(gates), len(batch), len(self.labels), dtype=torch.float64)
        slopes[..., 1] = values / self.width
        return values, slopes


def test_points_go_where_the_line_bends(gpt2: Nodes):
    sharp, batch = Sharp(gpt2.model), examples(2).batch()
    each, fallback = [[number] for number in sharp.counted], sharp.fallback("resample")
    even = segments.segmented(sharp, batch, fallback, DIFF, each, tolerance=float("inf"))
    assert float(even.samples[0].mean()) < 0.01  # exact: 1
    found = segments.segmented(sharp, batch, fallback, DIFF, each)
    torch.testing.assert_close(found.samples[0], torch.ones(2, dtype=torch.float64), rtol=0, atol=0.01)
    assert found.points[0] < 40 and set(found.points[1:]) == {5}
    few = segments.segmented(sharp, batch, fallback, DIFF, each, most=7)
    assert few.gap > few.allowed
    with pytest.warns(UserWarning, match="take its parts by exact"):
        segments.told(few)


def test_paths_that_are_not_there_are_refused(gpt2: Nodes):
    some = examples(2)
    with pytest.raises(GateError, match="use resample"):
        attribute(gpt2, some, gpt2.fallback("zero"), "conductance")


def test_every_method_says_what_it_costs_and_the_help_names_it(cli: Callable[..., tuple[int, str, str]]):
    for name in method_names():
        forward, backward = passes_of(name, layers=6, parts=42)
        assert forward >= backward >= 0, name
    from patchclamp.cli.questions import METHODS

    assert tuple(METHODS) == method_names()
    code, out, _ = cli("attribute", "--help")
    assert code == 0 and all(name in out for name in method_names())


@pytest.fixture(scope="module")
def straight() -> Model:
    """A model that is linear in its stream: no norms, identity for an activation, attention by constant queries."""
    hf = tiny("gpt2", dtype=torch.float64)
    with torch.no_grad():
        for block in hf.transformer.h:
            block.ln_1, block.ln_2, block.mlp.act = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity()
            block.attn.c_attn.weight[:, :64] = 0  # queries and keys are their biases
        hf.transformer.ln_f = torch.nn.Identity()
    return Model.load(hf)


def test_in_a_linear_model_slopes_are_exact_and_effects_add_up(straight: Model):
    batch = examples(2).batch()
    for parts, names in (
        (nodes(straight), ("gradient", "inputs", "conductance", "segments", "corrected")),
        (edges(straight, destinations=["L1.h0.*", "L1.kv0.*", "L1.mlp"]), ("gradient", "inputs", "conductance")),
    ):
        fallback = parts.fallback("resample")
        exact = method_named("exact")(parts, batch, fallback, DIFF, 0).double()
        assert float(exact.abs().max()) > 0.01
        for name in names:
            found = method_named(name)(parts, batch, fallback, DIFF, 0).double()
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    parts = edges(straight, destinations=["L1.mlp"])  # two edges into one destination
    fallback, gates = parts.fallback("resample"), parts.open(3)
    gates[0, ..., [0, 1]] = 0
    gates[1, ..., 0] = 0
    gates[2, ..., 1] = 0
    values = parts.measure(batch, gates, fallback, DIFF)
    opened = parts.measure(batch, parts.open(), fallback, DIFF)
    torch.testing.assert_close(opened - values[:1], 2 * opened - values[1:2] - values[2:], rtol=0, atol=1e-9)


def test_idle_parts_of_a_wired_model_score_nothing():
    model = wired("induction", "gpt2")
    parts = nodes(Model.load(model.hf, tokenizer=model.tokenizer))
    some, fallback = model.task.examples(model.tokenizer, 4, seed=4), parts.fallback("resample")
    idle = {site for site, role in model.truth.roles.items() if role == "irrelevant"}
    works = {site for site, role in model.truth.roles.items() if role == "facilitating"}
    assert idle and works
    for name in sorted(
        {*method_names()} - {"random", "alone", "segments"}
    ):  # these two follow the exact effects by their own gap
        scores = attribute(parts, some, fallback, name)
        size = dict(zip(map(str, scores.sites), abs(scores.values()), strict=True))
        assert max(size[site] for site in idle) <= 1e-3 * max(size.values()), name


def test_a_means_fallback_is_each_nodes_own():
    """A peer averages over nodes, so that every node gets the same mean: all its scores under a mean are wrong."""
    model = Model.load(tiny("gpt2", dtype=torch.float64))
    parts, fit, some = nodes(model), examples(4, seed=1), examples(2)
    fallback = parts.fallback("mean:all", fit=fit)
    whole = fit.batch()
    for row, number in enumerate(parts.counted):
        label = parts.labels[number]
        site = Site("z", label.layer, label.index) if label.kind == "head" else Site("mlp.write", label.layer)
        values = torch.cat([model.record(one, [site])[site] for one in (whole, whole.swapped())])
        batch = some.batch()
        leaf = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        own = model.record(batch, [site])[site]
        moved = {site: Add(leaf * (own - values.mean((0, 1))))}
        (wanted,) = torch.autograd.grad(DIFF(model.target_logits(batch, moved), batch).sum(), leaf)
        found = method_named("gradient")(parts, batch, fallback, DIFF, 0)[row].sum()
        assert float(found) == pytest.approx(float(wanted), rel=1e-5, abs=1e-6), label
