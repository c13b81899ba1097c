"""Rules of backward passes: relevance, GIM and the linear map against forward passes of the tests' own, written for autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import CONFIGS, tiny
from patchclamp.edits import Add
from patchclamp.errors import FamilyError, MetricError
from patchclamp.methods import attribute, counted, gim, gradient, importance, linear, relevance
from patchclamp.metrics import METRICS
from patchclamp.models.backward import Rules, gated_mlps, ruled
from patchclamp.models.model import Model
from patchclamp.parts import edges, gated, nodes
from patchclamp.parts.slopes import frozen
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch
from test_parts import examples

DIFF = METRICS["logit_diff"]
RELP = Rules(norm=True, ratio=True, product=0.5)
METHODS = {"relevance": RELP, "relevance with patterns": Rules(norm=True, ratio=True, product=0.5, pattern=True), "gim": gim.RULES,
           "linear": linear.RULES}  # fmt: skip
EMBED = Site("embed")


def slope(model: Model, batch: Batch, rules: Rules, found: dict[str, Any] | None = None) -> tuple[Tensor, Tensor]:
    """Logits, and the metric's slope in the first block's input."""
    leaf = torch.zeros(*batch.tokens.shape, model.width, dtype=model.dtype, requires_grad=True)
    with frozen(model), torch.enable_grad(), ruled(model.anatomy, rules) as force:
        logits = model.target_logits(batch, force.around({EMBED: Add(leaf)}))
        (back,) = torch.autograd.grad(DIFF(logits, batch).sum(), leaf)
        (found if found is not None else {}).update(force.fired())
    return logits.detach(), back


# --- forward passes of the tests' own: a rule is written as detach() in the middle of the arithmetic


class Softer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward((scores / temperature).softmax(-1))
        return scores.softmax(-1)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (flat,) = ctx.saved_tensors
        return flat * (slopes[0] - (flat * slopes[0]).sum(-1, keepdim=True)), None


def quarter(value: Tensor, factor: float) -> Tensor:
    return value.detach() * (1 - factor) + value * factor


def through(value: Tensor, act: Callable[[Tensor], Tensor], rules: Rules) -> Tensor:
    return value * (act(value) / value).detach() if rules.ratio else act(value)


def attended(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> Tensor:
    """[row, head, position, width] each; causal."""
    q, k, v = quarter(q, rules.queries), quarter(k, rules.keys), quarter(v, rules.values)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    pattern = Softer.apply(scores, rules.temperature)
    return (pattern.detach() if rules.pattern else pattern) @ v


def own_gpt2(hf: Any, x: Tensor, rules: Rules) -> Tensor:
    def norm(module: Any, value: Tensor) -> Tensor:
        middle = value - value.mean(-1, keepdim=True)
        divisor = (middle.square().mean(-1, keepdim=True) + module.eps).sqrt()
        return middle / (divisor.detach() if rules.norm else divisor) * module.weight + module.bias

    for block in hf.transformer.h:
        q, k, v = (
            one.unflatten(-1, (4, 8)).transpose(1, 2) for one in block.attn.c_attn(norm(block.ln_1, x)).split(32, -1)
        )  # fmt: skip
        x = x + block.attn.c_proj(attended(q, k, v, rules).transpose(1, 2).flatten(-2))
        x = x + block.mlp.c_proj(through(block.mlp.c_fc(norm(block.ln_2, x)), lambda z: F.gelu(z, approximate="tanh"), rules))
    return norm(hf.transformer.ln_f, x) @ hf.lm_head.weight.T


def own_llama(hf: Any, x: Tensor, rules: Rules) -> Tensor:
    def norm(module: Any, value: Tensor) -> Tensor:
        divisor = (value.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
        return value / (divisor.detach() if rules.norm else divisor) * module.weight

    def turned(value: Tensor) -> Tensor:
        half = value.shape[-1] // 2
        angle = torch.arange(value.shape[-2])[:, None] * 10000.0 ** -(torch.arange(half) / half)[None]
        angle = torch.cat([angle, angle], -1).to(value)
        return value * angle.cos() + torch.cat([-value[..., half:], value[..., :half]], -1) * angle.sin()

    for block in hf.model.layers:
        read, attn, mlp = norm(block.input_layernorm, x), block.self_attn, block.mlp
        q, k, v = (p(read).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        q, k, v = turned(q), turned(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        x = x + attn.o_proj(attended(q, k, v, rules).transpose(1, 2).flatten(-2))
        read = norm(block.post_attention_layernorm, x)
        gate = through(mlp.gate_proj(read), F.silu, rules)
        x = x + mlp.down_proj(quarter((gate.detach() if rules.gate else gate) * mlp.up_proj(read), rules.product))
    return norm(hf.model.norm, x) @ hf.lm_head.weight.T


OWN = {"gpt2": own_gpt2, "llama": own_llama}


@pytest.fixture(scope="module", params=list(OWN))
def model(request: pytest.FixtureRequest) -> Model:
    return Model.load(tiny(request.param, dtype=torch.float64), tokenizer=None)


@pytest.mark.parametrize("method", list(METHODS))
def test_rules_are_detaches_in_a_forward_pass_of_the_tests_own(model: Model, method: str):
    batch, rules = examples(3).batch(), METHODS[method]
    own = OWN[model.family.name]
    x = model.record(batch, EMBED)[EMBED].requires_grad_()
    value = DIFF(own(model.hf, x, rules)[None, :, -1], batch)
    (wanted,) = torch.autograd.grad(value.sum(), x)
    found = slope(model, batch, rules)[1]
    # Llama's norms compute in float32 whatever the model's dtype
    rtol, atol = (1e-9, 1e-11) if model.family.name == "gpt2" else (2e-5, 2e-5)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)
    plain = slope(model, batch, Rules())[1]
    assert float((found - plain).norm()) > 0.05 * float(plain.norm())  # the rules are no small matter


def test_slopes_of_parts_follow_the_rules(model: Model):
    """A head's score is <z - corrupt z, slope in z>; z is the output projection's input, seen by a hook of the test's own."""
    batch, layer = examples(3).batch(), model.anatomy.layers[0]
    parts = nodes(model)
    fallback, seen = parts.fallback("resample"), list[Tensor]()

    def keep(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        if args[0].requires_grad:
            args[0].retain_grad()
        return args

    for method, rules in ((relevance, RELP), (gim, gim.RULES), (linear, linear.RULES)):
        wanted = method.samples(parts, batch, fallback, DIFF, 0)
        handle = layer.output.register_forward_pre_hook(keep)
        leaf = torch.zeros(model.width, dtype=model.dtype, requires_grad=True)
        with frozen(model), torch.enable_grad(), ruled(model.anatomy, rules) as force:
            DIFF(model.target_logits(batch, force.around({EMBED: Add(leaf)})), batch).sum().backward()
        clean = seen.pop()
        model.target_logits(batch.swapped())
        handle.remove()
        assert clean.grad is not None
        by_head = ((clean - seen.pop()) * clean.grad).unflatten(-1, (4, 8)).sum((1, 3))
        torch.testing.assert_close(wanted[:4].T, by_head.detach(), rtol=1e-6, atol=1e-8)
        seen.clear()


def test_neurons_have_the_slope_behind_the_half_rule(model: Model):
    """A neuron is the product itself: what halves is what flows on into its two factors."""
    batch, parts = examples(2).batch(), gated(model, ["L1.mlp.n*"])
    fallback = parts.fallback("zero")
    last = Rules(norm=True)  # behind the last MLP there is the final norm alone, whatever the other rules are
    from patchclamp.methods._slopes import slopes

    wanted = slopes(parts, batch, fallback, DIFF, last)[1]
    torch.testing.assert_close(relevance.samples(parts, batch, fallback, DIFF, 0).T, wanted)
    torch.testing.assert_close(gim.samples(parts, batch, fallback, DIFF, 0).T, wanted)


SHORT = ("gpt2", "gemma2", "mixtral", "falcon-new")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in CONFIGS])
def test_every_rule_is_put_in_everywhere_and_changes_no_value(name: str):
    model, batch = Model.load(tiny(name)), examples(3, lengths=(7, 5)).batch()
    plain, norms = model.target_logits(batch).detach(), 0
    for method, rules in METHODS.items():
        if name == "gpt_oss" and rules.ratio:
            with pytest.raises(FamilyError, match="no module for its own"):
                slope(model, batch, rules)
            continue
        found: dict[str, list[str]] = {}
        assert torch.equal(slope(model, batch, rules, found)[0], plain), method
        per_layer = {"activations", "gates", "products", "patterns", "softmax", "queries", "keys", "values"} & set(found)
        for rule in per_layer:
            assert {place.partition(".")[0] for place in found[rule]} == {"L0", "L1"}, (method, rule)
        norms = len(found.get("norms", []))
        assert ("products" in found) == (rules.product != 1 and gated_mlps(model.anatomy)[0])
    known = {
        "gpt2": 5,
        "gemma2": 9,
        "gemma3": 13,
        "olmo2": 9,
        "qwen3": 9,
        "llama": 5,
        "gpt_neox": 5,
        "normless": 0,
        "cohere": 3,
        "phi": 3,
    }
    assert norms == known.get(name, norms) and (norms or name == "normless")


def test_scaled_dot_product_attention_gives_the_same():
    batch = examples(3, lengths=(7, 5)).batch()
    one, two = (Model.load(tiny("llama", attention)) for attention in ("eager", "sdpa"))
    for rules in METHODS.values():
        torch.testing.assert_close(slope(one, batch, rules)[1], slope(two, batch, rules)[1], rtol=1e-4, atol=1e-5)
    assert two.hf.config._attn_implementation == "sdpa"


def test_each_rule_of_gim_counts():
    """A peer's rules for norms, softmax and queries did nothing on a Llama, in eager attention and in sdpa, and did not say so."""
    model, batch = Model.load(tiny("llama", "sdpa")), examples(3).batch()
    plain = slope(model, batch, Rules())[1]
    for rules in (
        Rules(norm=True),
        Rules(temperature=2.0),
        Rules(queries=0.25),
        Rules(keys=0.25),
        Rules(values=0.5),
        Rules(product=0.5),
    ):
        assert float((slope(model, batch, rules)[1] - plain).norm()) > 0.01 * float(plain.norm()), rules


def test_a_rule_that_does_not_come_to_act_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """A peer chose its activation when the model was made, so that switching the rule on later did nothing."""
    model, batch = Model.load(tiny("llama")), examples(2).batch()
    gated_mlps(model.anatomy)  # known from before
    mlp = model.hf.model.layers[1].mlp
    monkeypatch.setattr(mlp, "forward", lambda x: mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))
    with pytest.raises(FamilyError, match=r"the rule for activations was not put in at L1\.mlp\.act_fn"):
        slope(model, batch, RELP)
    parts = nodes(model)
    with pytest.raises(FamilyError, match=r"the rule for gates was not put in at L1\.mlp\.act_fn"):
        attribute(parts, examples(2), parts.fallback("resample"), "linear")


def test_the_scores_say_where_rules_were_put_in():
    parts = nodes(Model.load(tiny("llama")))
    scores = attribute(parts, examples(2), parts.fallback("resample"), "gim")
    assert scores.about["rules"]["softmax"] == ["L0", "L1"]
    assert scores.about["rules"]["norms"][-1] == "final" and len(scores.about["rules"]["norms"]) == 5


# --- the linear map


def test_contributions_of_tokens_add_up_to_the_metric():
    """A Llama has no biases: the whole logit difference is shared out among the tokens."""
    model, batch = Model.load(tiny("llama")), examples(4, lengths=(7, 5)).batch()
    found = linear.linearised(model, batch)
    value = DIFF(model.target_logits(batch), batch)[0].detach()
    torch.testing.assert_close(found.tokens.sum(-1), value, rtol=1e-5, atol=1e-5)
    assert float(found.biases.abs().max()) < 1e-5
    assert float(found.tokens[~batch.mask].abs().max()) == 0  # padding contributes nothing


def held_gpt2(hf: Any, at: Tensor) -> Callable[[Tensor], Tensor]:
    """The model's function of the first block's input with patterns, norms' divisors and activations' ratios as they are for `at`."""
    kept: list[Tensor] = []

    def run(x: Tensor, replay: list[Tensor] | None) -> Tensor:
        left = None if replay is None else iter(replay)

        def decision(value: Tensor) -> Tensor:
            if left is None:
                kept.append(value)
            return value if left is None else next(left)

        def norm(module: Any, value: Tensor) -> Tensor:
            middle = value - value.mean(-1, keepdim=True)
            return middle / decision((middle.square().mean(-1, keepdim=True) + module.eps).sqrt()) * module.weight + module.bias

        for block in hf.transformer.h:
            q, k, v = (one.unflatten(-1, (4, 8)).transpose(1, 2) for one in block.attn.c_attn(norm(block.ln_1, x)).split(32, -1))
            scores = q @ k.transpose(-1, -2) / 8**0.5
            pattern = decision(scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1))
            x = x + block.attn.c_proj((pattern @ v).transpose(1, 2).flatten(-2))
            z = block.mlp.c_fc(norm(block.ln_2, x))
            x = x + block.mlp.c_proj(z * decision(F.gelu(z, approximate="tanh") / z))
        return norm(hf.transformer.ln_f, x) @ hf.lm_head.weight.T

    run(at, None)
    return lambda x: run(x, kept)


def test_the_map_is_the_held_model_anywhere():
    """At any other input, not only near this one: value(x) = biases + <map, x>, exactly."""
    model, batch = Model.load(tiny("gpt2", dtype=torch.float64)), examples(3).batch()
    x = model.record(batch, EMBED)[EMBED]
    held, found = held_gpt2(model.hf, x), linear.linearised(model, batch)
    for other in (x, torch.zeros_like(x), torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double() * 3):
        value = DIFF(held(other)[None, :, -1], batch)[0]
        torch.testing.assert_close(found.biases + (found.map * other).sum((1, 2)), value.detach(), rtol=1e-9, atol=1e-9)


def test_parts_side_by_side_add_up_in_the_linear_map():
    model = Model.load(tiny("gpt2", dtype=torch.float64))
    batch = examples(3).batch()
    for apart, whole in (
        (["L1.h*"], "L1.attn.write"),
        (["L0.mlp.n*"], "L0.mlp.write"),
        (["L1.resid.mid@fact", "L1.resid.mid@3", "L1.resid.mid@end"], "L1.resid.mid"),
    ):
        found, wanted = (
            linear.samples(parts, batch, parts.fallback("resample"), DIFF, 0)
            for parts in (gated(model, apart), gated(model, [whole]))
        )
        rest = 0.0
        if "@" in apart[0]:
            others = gated(model, [f"L1.resid.mid@{at}" for at in (0, 1, 4, 5)])
            rest = linear.samples(others, batch, others.fallback("resample"), DIFF, 0).sum(0)
        torch.testing.assert_close(found.sum(0) + rest, wanted[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", pytest.param("gemma2", marks=pytest.mark.long), pytest.param("phi", marks=pytest.mark.long)]
)
def test_edges_of_a_source_add_up_to_the_source(name: str):
    """Under every rule: what a part does is what it does through all that read it. (Fallback zero: behind a post-norm, an edge's
    resample fallback is the corrupt run's normed write, a node's the corrupt z.)"""
    model = Model.load(tiny(name))
    batch, whole, apart = examples(2).batch(), nodes(model), edges(model)
    for method in (relevance, gim, linear):
        node = dict(zip(counted(whole), method.samples(whole, batch, whole.fallback("zero"), DIFF, 0), strict=True))
        edge = method.samples(apart, batch, apart.fallback("zero"), DIFF, 0)
        for source, wanted in node.items():
            mine = [row for row, label in enumerate(apart.labels) if label.source == source]
            torch.testing.assert_close(edge[mine].sum(0), wanted, rtol=1e-3, atol=1e-4)


# --- what they all hold


def test_importance_is_the_size_of_the_slope():
    parts = nodes(Model.load(tiny("gpt2", dtype=torch.float64)))
    batch, fallback = examples(3).batch(), parts.fallback("zero")
    step, found = 1e-4, importance.samples(parts, batch, fallback, DIFF, 0)
    for row, number in enumerate(parts.counted):
        gates = parts.open(2).double()
        gates[0, ..., number] += step
        gates[1, ..., number] -= step
        up, down = parts.measure(batch, gates, fallback, DIFF)
        torch.testing.assert_close(found[row].double(), ((up - down) / (2 * step)).abs(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["gradient", "relevance", "gim", "linear", "importance"])
@pytest.mark.parametrize("metric", ["kl", "l2", "top1"])
def test_a_metric_without_a_slope_at_the_model_is_refused(method: str, metric: str):
    parts = nodes(Model.load(tiny("gpt2")))
    with pytest.raises(MetricError, match="use logit_diff"):
        attribute(parts, examples(2), parts.fallback("resample"), method, metric=metric)


def test_an_mlps_score_takes_the_slope_at_its_output():
    """A peer multiplies the difference of the output with the slope at the input: .804 for -8.062 on a small model."""
    model = Model.load(tiny("gpt2", dtype=torch.float64))
    parts, batch = nodes(model), examples(3).batch()
    found = gradient.samples(parts, batch, parts.fallback("resample"), DIFF, 0)
    mlp, kept = model.hf.transformer.h[0].mlp, list[Tensor]()

    def keep(module: Any, args: Any, output: Tensor) -> None:
        kept.append(output)
        if output.requires_grad:
            output.retain_grad()

    handle = mlp.register_forward_hook(keep)
    DIFF(model.target_logits(batch), batch).sum().backward()
    model.target_logits(batch.swapped())
    handle.remove()
    clean, corrupt = kept
    assert clean.grad is not None
    by_hand = ((clean - corrupt) * clean.grad).sum((1, 2)).detach()
    torch.testing.assert_close(found[4].double(), by_hand, rtol=1e-5, atol=1e-6)
    model.hf.zero_grad()
