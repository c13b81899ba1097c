"""Experts of neurons, position dependence and simpler attention: closed forms, plain passes and wired models."""

from functools import cache

import numpy as np
import pytest
import torch

from cases import tiny
from patchclamp.dependence.network import (
    activity,
    balanced_partition,
    coactivation,
    cooperation,
    deconstruct,
    inside_share,
    moefied,
    position_dependence,
    similarity,
    suppress_recency,
)
from patchclamp.errors import PatchclampError
from patchclamp.models.model import Model
from patchclamp.parts import Nodes, nodes
from patchclamp.zoo import wired
from patchclamp.zoo._wired import Wired
from test_parts import examples


@cache
def built(name: str) -> tuple[Wired, Nodes]:
    one = wired(name)
    return one, nodes(Model.load(one.hf, tokenizer=one.tokenizer))


# --- experts


def test_neurons_that_fire_together_are_put_together():
    """Four sets of 6 neurons, each on for its own quarter of tokens, in mixed order: found whole, sizes equal."""
    rng, truth = np.random.default_rng(0), np.arange(24) % 4
    on = rng.integers(0, 4, 400)
    active = (truth[None] == on[:, None]) * rng.uniform(0.5, 1.5, (400, 24)) + 0.05 * rng.random((400, 24))
    weights = coactivation(active)
    assert weights[0, 4] == pytest.approx(
        (active[:, 0] @ active[:, 4]) / np.linalg.norm(active[:, 0]) / np.linalg.norm(active[:, 4])
    )
    found = balanced_partition(weights, 4)
    assert similarity(found, truth) == 1.0 and np.bincount(found).tolist() == [6, 6, 6, 6]
    assert inside_share(weights, found) > 2 * inside_share(weights, rng.permutation(found))
    assert np.bincount(balanced_partition(weights, 5)).tolist() == [5, 5, 5, 5, 4]
    with pytest.raises(PatchclampError, match="in 30 experts"):
        balanced_partition(weights, 30)


def test_all_experts_are_the_model_and_coactive_ones_keep_more_than_random_ones():
    """facts: a neuron per fact. The oracle keeps the answer with few experts; all of them are the model itself."""
    one, parts = built("facts")
    fit, _, confirm = one.task.split(one.tokenizer, 80, seed=0)
    rows = moefied(parts.model, fit, confirm, 1, 6, keeps=[1, 6])
    whole = rows.filter(rows["keep"] == 6)
    assert np.abs(whole["benefit"] - whole["open"]).max() < 1e-9
    oracle = rows.filter((rows["keep"] == 1) & (rows["router"] == "oracle"))
    assert oracle["benefit"].min() == pytest.approx(
        oracle["open"][0], abs=0.3
    )  # the one neuron that fires is always in the oracle's
    assert rows["share"].to_list().count(1 / 6) == 4 and set(rows["partition"]) == {"co-activation", "random"}
    with pytest.raises(PatchclampError, match="cannot be kept"):
        moefied(parts.model, fit, confirm, 1, 4, keeps=[5])


def test_what_is_not_chosen_is_zero():
    """One expert kept by the oracle, against a plain pass in which the other neurons are zeroed by this file's own hook."""
    hf = tiny("gpt2", dtype=torch.float64)
    model, some = Model.load(hf), examples(8)
    rows = moefied(model, some, some, 0, 4, keeps=[1], seed=3)
    label = torch.from_numpy(balanced_partition(coactivation(activity(model, some, 0)[0]), 4, seed=3))

    def hook(_module: object, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        value = args[0]
        sums = torch.stack([value[..., label == e].abs().sum(-1) for e in range(4)], -1)
        return (value * (label == sums.argmax(-1, keepdim=True)),)

    handle = hf.transformer.h[0].mlp.c_proj.register_forward_pre_hook(hook)
    batch = some.batch()
    with torch.no_grad():
        logits = hf(batch.tokens).logits[:, -1]
    handle.remove()
    wanted = (logits.gather(1, batch.answers) - logits.gather(1, batch.wrong)).mean()
    found = rows.filter((rows["partition"] == "co-activation") & (rows["router"] == "oracle"))["benefit"][0]
    assert found == pytest.approx(float(wanted), abs=1e-9)


def test_a_learned_router_follows_the_oracle_on_a_trained_model():
    """zoo/small, MLP of its first layer: half of 4 experts chosen by the learned router keep nearly what the oracle's half keeps."""
    from patchclamp.tasks import load_task

    model = Model.load("zoo/small")
    fit, _, confirm = load_task("ioi").split(model.tokenizer, 64, seed=0)
    rows = moefied(model, fit, confirm, 1, 4, keeps=[1, 3])
    opened = rows["open"][0]
    kept = {(row["keep"], row["partition"], row["router"]): row["benefit"] for row in rows.iter_rows(named=True)}
    oracle, learned = (kept[3, "co-activation", router] for router in ("oracle", "learned"))
    assert abs(oracle - opened) < 0.5 * abs(opened) and abs(learned - oracle) < 0.5 * abs(opened)
    inside = {row["partition"]: row["inside"] for row in rows.iter_rows(named=True)}
    assert inside["co-activation"] > inside["random"]


# --- position


def test_a_head_of_positions_and_a_head_of_contents_are_told_apart():
    """induction: L0.h1 attends to the token before, wherever; L1.h2 to where the content says (and rests on the first token else)."""
    one, parts = built("induction")
    rows = position_dependence(parts.model, one.task.examples(one.tokenizer, 40, seed=1))
    found = {row["site"]: row for row in rows.iter_rows(named=True)}
    assert found["L0.h1"]["dependence"] > 0.999 and found["L0.h1"]["recency"] > 0.3
    assert found["L1.h2"]["dependence"] < 0.95
    assert found["L0.h3"]["dependence"] is None or found["L0.h3"]["dependence"] > 0.999  # dead: spread evenly, by position alone
    recent = suppress_recency(parts, one.task.examples(one.tokenizer, 24, seed=2), parts.fallback("zero"), rows, heads=1, draws=7)
    assert recent.heads == ("L0.h1",) and recent.lesion.effect.mean == pytest.approx(one.truth.effects["zero"]["L0.h1"], abs=1e-4)
    assert recent.cohen_d < -10 and recent.random_d.mean() > recent.cohen_d
    with pytest.raises(PatchclampError, match="of one length"):
        position_dependence(parts.model, examples(4, lengths=(7, 5)))


# --- simpler attention


def test_simpler_attention_is_what_it_says():
    """Against a plain eager pass whose softmax is replaced: uniform and no mixing in layer 1; fixed equals the mean pattern put in."""
    hf = tiny("gpt2", dtype=torch.float64)
    model, some = Model.load(hf), examples(6)
    batch, kept = some.batch(), {}
    from patchclamp.models.model import Site

    for variant in ("uniform", "none", "fixed"):
        from patchclamp.dependence.network.attention_parts import simpler

        edits = simpler(model, variant, some)[1]
        kept[variant] = model.record(batch, ["L1.h0.pattern", "L1.h1.pattern"], edits)[Site("pattern", 1, 0)]
    n = batch.tokens.shape[1]
    even = torch.tril(torch.ones(n, n, dtype=torch.float64))
    torch.testing.assert_close(kept["uniform"], (even / even.sum(-1, keepdim=True)).expand(6, n, n))
    torch.testing.assert_close(kept["none"], torch.eye(n, dtype=torch.float64).expand(6, n, n))
    own = model.record(batch, "L1.h0.pattern")[Site("pattern", 1, 0)].detach()
    torch.testing.assert_close(kept["fixed"], own.mean(0, keepdim=True).expand(6, n, n))


def test_taking_attention_apart_breaks_what_it_carries():
    """induction: without mixing in either layer the answer is lost; the previous-token head is fixed by nature, the other is not."""
    one, parts = built("induction")
    fit, _, confirm = one.task.split(one.tokenizer, 64, seed=1)
    rows = deconstruct(parts.model, confirm, fit)
    lost = {(row["variant"], row["layer"]): row["lost"] for row in rows.iter_rows(named=True)}
    opened = one.truth.open
    for variant in ("uniform", "none"):
        assert lost[variant, "all"] == pytest.approx(opened, abs=0.15 * opened)
        assert lost[variant, "0"] > 0.7 * opened and lost[variant, "1"] > 0.7 * opened
        both = lost[variant, "all"] - lost[variant, "0"] - lost[variant, "1"]
        assert lost[variant, "cooperation"] == pytest.approx(both, abs=1e-9)
    assert abs(lost["fixed", "0"]) < 1e-3 and lost["fixed", "1"] > 0.7 * opened
    table = cooperation(parts.model, confirm, "none")
    assert table.pair("L0.attn", "L1.attn")["score"] == pytest.approx(-lost["none", "cooperation"], abs=1e-9)
    with pytest.raises(PatchclampError, match="have to be trained"):
        deconstruct(parts.model, confirm, variants=["static"])
