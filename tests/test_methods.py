"""Methods over parts: closed forms of hand-wired models, brute force, and what every method must hold."""

import numpy as np
import pytest
import torch

from cases import tiny
from patchclamp.edits import Zero
from patchclamp.errors import MetricError
from patchclamp.methods import attribute, counted, effects, groups_of, method_names
from patchclamp.methods.integrated import samples as integrated
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Nodes, benefits, nodes
from patchclamp.sites import Site
from patchclamp.zoo import wired, wired_names
from patchclamp.zoo._wired import FAMILIES, Wired
from test_parts import examples

DIFF = METRICS["logit_diff"]
CASES = [(name, family) for family in FAMILIES for name in wired_names()]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[Wired, Nodes]:
    model = wired(*request.param)
    return model, nodes(Model.load(model.hf, tokenizer=model.tokenizer))


@pytest.fixture(scope="module")
def gpt2() -> Nodes:
    return nodes(Model.load(tiny("gpt2", dtype=torch.float64)))


@pytest.mark.parametrize("kind", ["resample", "zero"])
def test_exact_effects_are_the_closed_form(case: tuple[Wired, Nodes], kind: str):
    model, parts = case
    some = model.task.examples(model.tokenizer, 40, seed=3)
    scores = attribute(parts, some, parts.fallback(kind), "exact")
    known = [model.truth.effects_on(one.pair.clean, kind) for one in some]
    wanted = np.array([np.mean([effects[str(site)] for effects in known]) for site in scores.sites])
    # GPT-2 class in float64 absolutely; Llama's norms compute in float32
    tolerance = {"rtol": 0, "atol": 1e-5} if model.family == "gpt2" else {"rtol": 1e-5, "atol": 2e-4}
    np.testing.assert_allclose(scores.values(), wanted, **tolerance)


def test_every_method_finds_the_planted_parts(case: tuple[Wired, Nodes]):
    model, parts = case
    some = model.task.examples(model.tokenizer, 32, seed=4)
    fallback = parts.fallback("resample")
    idle = {site for site, role in model.truth.roles.items() if role == "irrelevant"}
    for method in ("exact", "gradient", "integrated"):
        scores = attribute(parts, some, fallback, method)
        size = dict(zip(map(str, scores.sites), np.abs(scores.values()), strict=True))
        assert max(size[site] for site in idle) <= 1e-3, method
    total = dict(zip(map(str, scores.sites), scores.values(), strict=True))
    for site, role in model.truth.roles.items():  # integrated gradients see redundant parts too: they share the credit
        if role == "facilitating":
            assert total[site] > 0.01, site


def test_integrated_is_complete(gpt2: Nodes):
    batch, fallback = examples(4, lengths=(7, 5)).batch(), gpt2.fallback("resample")
    ends = gpt2.measure(batch, torch.cat([gpt2.open(), gpt2.closed()]), fallback)
    gaps = [
        float((integrated(gpt2, batch, fallback, DIFF, 0, steps=m).sum(0) - (ends[0] - ends[1])).abs().max()) for m in (8, 64)
    ]
    assert gaps[1] < 1e-3 and gaps[1] < gaps[0] / 30  # the midpoint rule's error falls with the square of the step


def test_gradient_is_exact_for_small_changes(gpt2: Nodes):
    """Where corrupt prompts equal clean ones but for a hair, first order is all there is."""
    batch, fallback = examples(3).batch(), gpt2.fallback("resample")
    gates = gpt2.open(1).double()  # in float32 the small change itself would be rounded
    slopes = gpt2.gradient(batch, gates, fallback)[1][0]
    for part in gpt2.counted:
        nearly = gates.clone()
        nearly[..., part] = 1 - 1e-6
        drop = (gpt2.measure(batch, gates, fallback) - gpt2.measure(batch, nearly, fallback))[0] / 1e-6
        torch.testing.assert_close(slopes[:, part], drop, rtol=1e-3, atol=1e-6)


def test_denoising_is_the_mirror(gpt2: Nodes):
    some = examples(4)
    fallback = gpt2.fallback("resample")
    restored = effects(gpt2, some, fallback, "exact", direction="denoising")
    batch = some.batch()
    site = Site("z", 1, 2)
    from patchclamp.edits import Put

    clean = gpt2.model.record(batch, site)[site]
    corrupt = DIFF(gpt2.model.target_logits(batch.swapped()).detach(), batch)
    patched = DIFF(gpt2.model.target_logits(batch.swapped(), {site: Put(clean)}).detach(), batch)
    row = counted(gpt2).index(Site("head", 1, 2))
    torch.testing.assert_close(restored[row], (patched - corrupt)[0], rtol=0, atol=1e-11)


def test_permuting_heads_permutes_scores():
    order = [2, 0, 3, 1]
    one, two = tiny("gpt2", dtype=torch.float64), tiny("gpt2", dtype=torch.float64)
    with torch.no_grad():
        for block in two.transformer.h:
            qkv, out, width = block.attn.c_attn, block.attn.c_proj, 8
            columns = torch.cat([torch.arange(h * width, (h + 1) * width) for h in order])
            for third in range(3):
                qkv.weight[:, third * 32 : (third + 1) * 32] = qkv.weight[:, third * 32 + columns]
                qkv.bias[third * 32 : (third + 1) * 32] = qkv.bias[third * 32 + columns]
            out.weight[:] = out.weight[columns]
    some = examples(3)
    for method in ("exact", "gradient", "integrated"):
        a, b = (attribute(p, some, p.fallback("resample"), method) for p in (nodes(Model.load(one)), nodes(Model.load(two))))
        for layer in range(2):
            for new, old in enumerate(order):
                assert b[f"L{layer}.h{new}"]["score"] == pytest.approx(a[f"L{layer}.h{old}"]["score"], abs=1e-9)


def test_same_seed_same_scores_and_random_knows_nothing(gpt2: Nodes):
    some, fallback = examples(4), gpt2.fallback("resample")
    for method in method_names():
        first, again = (attribute(gpt2, some, fallback, method, seed=5) for _ in range(2))
        assert first.table.equals(again.table)
    one, two = (attribute(gpt2, some, fallback, "random", seed=seed).values() for seed in (1, 2))
    assert not np.allclose(one, two)


def test_the_batch_size_changes_nothing(gpt2: Nodes):
    some, fallback = examples(6, lengths=(7, 5)), gpt2.fallback("resample")
    whole, split = (effects(gpt2, some, fallback, "exact", batch_size=size) for size in (64, 2))
    torch.testing.assert_close(whole, split, rtol=0, atol=1e-11)


def test_effects_equal_hooks_of_the_tests_own(gpt2: Nodes):
    batch = examples(3).batch()
    wanted = DIFF(gpt2.model.target_logits(batch).detach(), batch)[0]

    def cut(_: object, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        z = args[0].clone()
        z[..., 8:16] = 0
        return (z,)

    handle = gpt2.model.hf.transformer.h[0].attn.c_proj.register_forward_pre_hook(cut)
    without = DIFF(gpt2.model.target_logits(batch).detach(), batch)[0]
    handle.remove()
    row = counted(gpt2).index(Site("head", 0, 1))
    torch.testing.assert_close(effects(gpt2, examples(3), gpt2.fallback("zero"))[row], wanted - without, rtol=0, atol=1e-11)
    edited = DIFF(gpt2.model.target_logits(batch, {Site("head", 0, 1): Zero()}).detach(), batch)[0]
    torch.testing.assert_close(edited, without, rtol=0, atol=1e-12)


def test_signs_follow_the_benefit(gpt2: Nodes):
    """nll counts down where log_probability counts up; effects are of the benefit, so they agree."""
    some, fallback = examples(3), gpt2.fallback("resample")
    up, down = (effects(gpt2, some, fallback, metric=name) for name in ("log_probability", "nll"))
    torch.testing.assert_close(up, down)
    values = benefits(gpt2, some, gpt2.open(), fallback, METRICS["nll"])
    assert bool((values < 0).all())


def test_a_slope_that_is_zero_by_definition_is_refused(gpt2: Nodes):
    with pytest.raises(MetricError, match="identically zero"):
        attribute(gpt2, examples(2), gpt2.fallback("resample"), "gradient", metric="kl")
    with pytest.raises(MetricError, match=r"choose from alone, .*exact, .*gradient, .*random"):
        attribute(gpt2, examples(2), gpt2.fallback("resample"), "gradients")


def test_mirrors_are_one_group():
    some = examples(2)
    both = some.mirrored()
    groups = groups_of(both)
    assert len(both) == 4 and len(set(groups)) == 2
