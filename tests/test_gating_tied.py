"""Gates on everything: groups with one gate, nested parts, any mixture in one fit, and another model's values as the fallback."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from cases import tiny
from patchclamp.errors import GateError, SiteError
from patchclamp.gating import GatingSettings, Stage, fit, gating_settings, judge
from patchclamp.gating.judge import calls
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Parts, gated, nodes, tied
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.zoo import wired
from test_gating import Digits, examples_of, pairs_of

SHORT = GatingSettings(seeds=2, batch=6, free=Stage(2, 0.5, 0.5), pressed=Stage(3, 0.5, 0.5), window=0, hold=False, settle=False)
MIXED = ["L0.block", "L0.h*", "L0.kv1", "L*.mlp", "L1.mlp.n*", "L1.kv*", "L1.h2@-1", "L1.h2@3", "L1.z"]


@pytest.fixture(scope="module")
def llama() -> Model:
    return Model.load(tiny("llama", dtype=torch.float64), tokenizer=Digits())


@pytest.fixture(scope="module")
def toy() -> Examples:
    return examples_of(pairs_of(6))


def test_labels_are_what_was_asked_for_in_forward_order(llama: Model) -> None:
    parts = tied(llama, MIXED)
    assert isinstance(parts, Parts)
    names = [str(site) for site in parts.labels]
    assert names == [str(site) for site in sorted(map(Site.parse, names))] and len(set(names)) == len(names)
    assert names[:2] == ["L0.kv1", "L0.h0"] and "L0.block" in names and sum(".n" in name for name in names) == 64
    at = tied(llama, ["L0.block", "L1.kv0", "L0.h1@2"], positions=[-1, 0])
    assert [str(site) for site in at.labels] == ["L0.h1@2", "L0.block@0", "L0.block@-1", "L1.kv0@0", "L1.kv0@-1"]
    assert [str(site) for site in at.holds[Site.parse("L1.kv0@-1")]] == ["L1.kv0.k@-1", "L1.kv0.v@-1"]
    assert [str(site) for site in tied(llama, ["L1.kv1"], kv="heads").holds[Site.parse("L1.kv1")]] == ["L1.h2", "L1.h3"]


def test_what_cannot_be_gated_is_named(llama: Model) -> None:
    with pytest.raises(SiteError, match="fits none"):
        tied(llama, ["L7.block"])
    with pytest.raises(GateError, match="no site was named"):
        tied(llama, [])
    with pytest.raises(GateError, match=r"L0.h1.z and L0.h1 are gates on the same values"):
        gated(llama, ["L0.h1", "L0.h1.z"])
    with pytest.raises(GateError, match=r"L1\.h2 is not among the 2 parts"):
        tied(llama, ["L0.kv*"]).without([Site.parse("L1.h2")])
    with pytest.raises(SiteError, match="a part with one gate"):
        llama.record(torch.tensor([[3, 4]]), ["L0.kv1"])


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
def test_groups_close_their_members(llama: Model, toy: Examples, kind: str) -> None:
    batch = toy.batch()
    for group, sites, kv in (
        ("L0.block", ["L0.attn.write", "L0.mlp.write"], "keys and values"),
        ("L1.kv0", ["L1.kv0.k", "L1.kv0.v"], "keys and values"),
        ("L1.kv0", ["L1.h0", "L1.h1"], "heads"),
    ):
        one, many = tied(llama, [group], kv=kv), gated(llama, sites)
        found = one.measure(batch, one.closed(), one.fallback(kind, toy))
        wanted = many.measure(batch, many.closed(), many.fallback(kind, toy))
        assert torch.allclose(found, wanted, atol=1e-10)
        assert (found - one.measure(batch, one.open(), one.fallback(kind, toy))).abs().max() > 1e-3


def test_nested_gates_multiply(llama: Model, toy: Examples) -> None:
    """A head at a position, the head, its layer as a whole: half open each is an eighth open where they meet."""
    batch = toy.batch()
    parts = gated(llama, ["L1.z", "L1.h2", "L1.h2@3"])
    fallback = parts.fallback("resample")
    gates = parts.open() * 0.5
    apart = gated(llama, ["L1.h*"], positions=range(7))
    eighth = apart.open() * 0.5
    for number, site in enumerate(apart.labels):
        if site.index == 2:
            eighth[..., number] = 0.125 if site.position == 3 else 0.25
    wanted = apart.measure(batch, eighth, apart.fallback("resample"))
    assert torch.allclose(parts.measure(batch, gates, fallback), wanted, atol=1e-10)


@pytest.mark.parametrize(("family", "step", "off"), [("gpt2", 1e-4, 1e-6), ("llama", 1e-2, 2e-3)])
def test_slopes_of_a_mixture_are_finite_differences(family: str, step: float, off: float) -> None:
    """Double precision, central differences: gpt2 to second order; Llama's norms round to single, 1e-7 over a step of 1e-2."""
    model = Model.load(tiny(family, dtype=torch.float64), tokenizer=Digits())
    parts, batch = tied(model, [*MIXED[:4], "L1.mlp.n1*", *MIXED[5:]]), examples_of(pairs_of(4)).batch()
    fallback = parts.fallback("resample")
    gates = torch.from_numpy(np.random.default_rng(0).uniform(0.2, 0.9, (1, 1, 1, len(parts.labels))))
    values, slopes = parts.gradient(batch, gates, fallback, METRICS["nll"])
    assert torch.allclose(values, parts.measure(batch, gates, fallback, METRICS["nll"]), atol=1e-5)
    moves = torch.eye(len(parts.labels), dtype=torch.float64)[:, None, None] * step
    high, low = (parts.measure(batch, gates + sign * moves, fallback, METRICS["nll"]) for sign in (1, -1))
    assert torch.allclose(slopes[0].T, (high - low) / (2 * step), atol=off)
    assert (slopes[0].abs().mean(0) > 1e-4).double().mean() > 0.9  # all but a head of the last block, where nobody looks


@pytest.mark.parametrize("kind", ["zero", "mean", "resample"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2"])
def test_every_kind_of_part_in_one_fit(family: str, kind: str) -> None:
    """Heads, key/value heads, MLPs, neurons, experts, whole layers and positions: every gate moves as a fit of its own moves it."""
    model = Model.load(tiny(family), tokenizer=Digits())
    experts = ["L1.mlp.e*"] if family == "qwen3_moe" else []
    sites = ["L*.block", "L*.kv*", "L*.h*", "L*.mlp", "L0.mlp.n1*", *experts, "L1.h1@-1"]
    parts, toy = tied(model, sites), examples_of(pairs_of(8))
    fallback = parts.fallback(kind, toy)
    both = fit(parts, toy, fallback, SHORT)
    assert both.gate.shape == (2, len(parts.labels)) and len({site.kind for site in both.labels}) >= 5
    assert (np.abs(both.plus.logits - both.free.logits) > 1e-3).all()
    assert both.gate_plus.mean() > both.gate.mean() > both.gate_minus.mean()
    alone = fit(parts, toy, fallback, replace(SHORT, seeds=1))
    assert np.abs(both.gate_minus[:1] - alone.gate_minus).max() < 1e-3


def test_a_block_and_heads_of_the_wired_model_are_found() -> None:
    """Of induction, the first block matters by one head; the other parts let go."""
    one = wired("induction")
    model = Model.load(one.hf.float(), tokenizer=one.tokenizer)
    split = one.task.split(one.tokenizer, 64, 0)
    parts = tied(model, ["L0.block", "L1.h*", "L1.mlp"])
    settings = gating_settings("default", seeds=2, batch=12)
    gated = fit(parts, split.fit, parts.fallback("resample"), settings)
    said = calls(gated)
    for number, site in enumerate(gated.labels):
        assert getattr(said, "facilitating" if str(site) in ("L0.block", "L1.h2") else "irrelevant")[:, number].all(), site


def test_closed_gates_pass_the_other_models_values(llama: Model, toy: Examples) -> None:
    other = deepcopy(llama.hf)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight += 0.1
        other.model.layers[1].self_attn.v_proj.weight += 0.1
    base = Model.load(other, tokenizer=Digits())
    parts, batch = nodes(llama), toy.batch()
    fallback = parts.fallback("model", other=base)
    closed = parts.measure(batch, parts.closed(), fallback)
    of_base = parts.on(base)
    assert torch.allclose(closed, of_base.measure(batch, of_base.open(), of_base.fallback("zero")), atol=1e-10)
    opened = parts.measure(batch, parts.open(), fallback)
    assert (closed - opened).abs().min() > 1e-3
    with pytest.raises(GateError, match="no value on new tokens"):
        fallback.at(None)


def test_what_the_gates_cannot_see_of_another_model_is_said(llama: Model) -> None:
    """A head's gate stands before its output projection, a neuron's before the down projection."""
    other = deepcopy(llama.hf)
    with torch.no_grad():
        other.model.layers[1].self_attn.o_proj.weight += 0.1
        other.model.layers[0].mlp.down_proj.weight += 0.1
    base = Model.load(other, tokenizer=Digits())
    with pytest.warns(UserWarning, match=r"layers 1 .*add L\*.attn.write"):
        nodes(llama).fallback("model", other=base)
    with pytest.warns(UserWarning, match=r"layers 0 .*add L\*.mlp"):
        gated(llama, ["L*.mlp.n*"]).fallback("model", other=base)
    gated(llama, ["L*.attn.write", "L*.mlp"]).fallback("model", other=base)  # sees both, and warns of nothing


def test_models_of_another_anatomy_are_refused(llama: Model) -> None:
    for family, said in (("gpt2", "its family is gpt2, and here it is llama"), ("qwen3", "its family is qwen3")):
        with pytest.raises(GateError, match=said):
            nodes(llama).fallback("model", other=Model.load(tiny(family)))
    with pytest.raises(GateError, match="takes another model's values: give it"):
        nodes(llama).fallback("model")
    with pytest.raises(GateError, match="takes none: ask for 'model'"):
        nodes(llama).fallback("zero", other=llama)


@pytest.mark.parametrize("planted", ["L0.h1", "L1.mlp"])
def test_what_was_fine_tuned_in_one_part_is_found_and_nothing_else(planted: str) -> None:
    """The wired fact model, and a copy in which one part was made wrong: gates say which part carries the difference.

    In the copy the part writes what it would for the next person; closed gates pass that copy's values.
    """
    one = wired("facts" if planted == "L1.mlp" else "interfering")
    model = Model.load(one.hf.float(), tokenizer=one.tokenizer)
    before = deepcopy(model.hf)
    with torch.no_grad():
        if planted == "L1.mlp":
            before.transformer.h[1].mlp.c_proj.weight.copy_(before.transformer.h[1].mlp.c_proj.weight.roll(1, 0))
        else:
            wide, width = before.config.n_embd, before.config.n_embd // before.config.n_head
            values = slice(2 * wide + width, 2 * wide + 2 * width)
            before.transformer.h[0].attn.c_attn.weight[:, values] *= -0.5
            before.transformer.h[0].attn.c_attn.bias[values] *= -0.5
    base = Model.load(before, tokenizer=one.tokenizer)
    split = one.task.split(one.tokenizer, 128, 0)
    parts = nodes(model)
    fallback = parts.fallback("model", other=base)
    gated = fit(parts, split.fit, fallback, gating_settings("default", seeds=3, batch=12))
    evidence = judge(parts, gated, split.select, fallback)
    number = [str(site) for site in gated.labels].index(planted)
    said = evidence.calls
    assert said.facilitating[:, number].all() and said.facilitating.sum() == 3 and not said.interfering.any()
    assert evidence.stands("facilitating").tolist() == [site == number for site in range(len(gated.labels))]
    effects = evidence.exact.values()
    assert effects[number] > 0.5 and np.abs(np.delete(effects, number)).max() < 1e-4
