"""Self-repair: what is written, read by formulas of the tests' own; the identity; planted backups; erasure."""

from functools import cache
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from cases import tiny
from patchclamp.dependence import close_pairs, erasure, joint_backups, relations, self_repair
from patchclamp.dependence.closings import closed_gates
from patchclamp.dependence.direct import factor, shares
from patchclamp.errors import GateError, MetricError
from patchclamp.models.model import Model
from patchclamp.parts import Nodes, gated, nodes
from patchclamp.tasks import Examples
from patchclamp.zoo import wired
from test_parts import examples

FAMILIES = (
    "gpt2",
    "llama",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "olmo2",
    "granite",
    "cohere",
    "opt",
    "mixtral",
    "falcon",
    "bloom",
)
"""Both kinds of norm, post-norms, parallel blocks, scaled residuals and logits, a cap, flat MLPs, experts, MLPs added in place."""


@cache
def built(name: str, family: str = "gpt2") -> tuple[Nodes, Examples, Any]:
    one = wired(name, family)
    return nodes(Model.load(one.hf, tokenizer=one.tokenizer)), one.task.examples(one.tokenizer, 24, seed=3), one.truth


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_shares_are_what_a_formula_gives(name: str) -> None:
    """A part's write at the answer position, centred where the norm centres, times the norm's gain over the own run's divisor,
    times the difference of two columns of the unembedding: from the model's weights and values recorded at sites."""
    parts, some = nodes(Model.load(tiny(name))), examples(3)
    model, batch, rule = parts.model, some.batch(), parts.fallback("resample")
    norm: Any = model.anatomy.norm
    centred = name == "gpt2"

    def centre(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True) if centred else x

    last = centre(model.record(batch, "L1.resid.post")[model.find("L1.resid.post")[0]][:, -1])
    size = (last.square().mean(-1, keepdim=True) + (norm.eps if centred else norm.variance_epsilon)).sqrt()
    weight = model.anatomy.unembed.weight
    assert batch.wrong is not None
    u = weight[batch.answers[:, 0]] - weight[batch.wrong[:, 0]]
    settings = [(), (0,), (4,), (2, 7), range(10)]
    found = shares(parts, some, rule, settings, batch_size=2)
    for row, shut in enumerate(settings):
        edits = parts.edits(closed_gates(parts, [shut]), rule, batch)
        for part, site in enumerate(parts.labels[1:]):
            place = f"{site}.write"
            write = model.record(batch, place, edits)[model.find(place)[0]][:, -1]
            expected = (centre(write) / size * norm.weight * u).sum(-1)
            np.testing.assert_allclose(found.shares[row, part], expected.detach().numpy(), atol=1e-5)  # llama's norm is float32
    assert (found.moved[0] == 0).all() and found.moved[1, 0].min() > 0 and found.moved[2, :4].max() < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_direct_and_compensation_add_up_to_the_total(name: str) -> None:
    """total with the norm held = direct - compensation, to 1e-5; and it is what replay measures with the norm held."""
    parts, some = nodes(Model.load(tiny(name))), examples(4, lengths=(7, 5))
    rule = parts.fallback("resample")
    found = self_repair(parts, some, rule, batch_size=3)
    frame = found.parts
    assert frame["rest"].abs().max() < 1e-5
    frozen, labels = parts.frozen_norm(), parts.labels[1:]
    gates = closed_gates(parts, [(), *((number,) for number in range(len(labels)))])
    held, free = (one.measure(some.batch(), gates, rule).mean(1).numpy() for one in (frozen, parts))
    scale = 1e-5 * max(1, float(np.abs(held).max()))
    np.testing.assert_allclose(frame["total"], free[0] - free[1:], atol=scale)
    if factor(parts.model) is not None:
        np.testing.assert_allclose(frame["total_held"], held[0] - held[1:], atol=scale)
    else:
        assert found.about["readout"] == "difference, before the cap"
    assert frame["compensation"].abs().max() > 1e-3
    np.testing.assert_allclose(frame["compensation"], frame["heads"] + frame["mlps"], atol=1e-9)
    np.testing.assert_allclose(frame["norm"], frame["total_held"] - frame["total"], atol=1e-9)
    rows = found.table.table.group_by("a", maintain_order=True).agg(pl.col("score").sum())
    by_pair = dict(rows.iter_rows())
    assert all(
        by_pair.get(row["site"], 0.0) == pytest.approx(row["compensation"], abs=1e-6) for row in frame.iter_rows(named=True)
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_planted_backup_is_named_with_its_numbers(family: str) -> None:
    """The speaker's own share is A = 6.5; closed, the backup gives all of it back, so the total is 0. In the model itself the backup
    gives nothing."""
    parts, some, _ = built("backup", family)
    rules = [parts.fallback("zero"), parts.fallback("resample")]
    repairs = [self_repair(parts, some, rule) for rule in rules]
    near = 1e-4 if family == "llama" else 1e-5
    for found in repairs:
        row = found.table.pair("L0.h1", "L1.h2")
        assert row["score"] == pytest.approx(6.5, abs=near) and row["backup"] and row["q"] < 0.05
        assert row["direct"] == pytest.approx(0, abs=near) and row["direct_closed"] == pytest.approx(6.5, abs=near)
        assert found.backups().select("a", "b").rows() == [("L0.h1", "L1.h2")]
        speaker = found.parts.row(by_predicate=pl.col("site") == "L0.h1", named=True)
        for name, value in (("direct", 6.5), ("compensation", 6.5), ("heads", 6.5), ("mlps", 0), ("total_held", 0), ("total", 0)):
            assert speaker[name] == pytest.approx(value, abs=near), name
        assert speaker["repaired"] == pytest.approx(1, abs=1e-5)
    closings = [close_pairs(parts, some, rule) for rule in rules]
    named = relations(*closings, repair=[found.table for found in repairs])
    assert named.pair("L0.h1", "L1.h2")["relation"] == "backup" and named.pair("L0.h1", "L1.h2")["word"] == "OR"
    assert (named.table["relation"] != "").sum() == 1


def test_parts_that_are_only_redundant_are_no_backups() -> None:
    """Two heads that vote whatever the other does: neither writes more when the other is closed."""
    parts, some, _ = built("redundant")
    found = self_repair(parts, some, parts.fallback("zero"))
    assert not found.backups().height
    assert found.table.pair("L0.h1", "L1.h2")["moved"] < 1e-6


def test_a_suppressor_that_falls_silent_shows_as_repair() -> None:
    """Closing the speaker takes its own 8; the suppressor stops taking 5 off: 3 in all."""
    parts, some, _ = built("suppressor")
    found = self_repair(parts, some, parts.fallback("zero"), closed=["L0.h1"])
    (row,) = found.parts.iter_rows(named=True)
    assert [round(row[name], 4) for name in ("direct", "compensation", "total_held", "total")] == [8, 5, 3, 3]
    pair = found.table.pair("L0.h1", "L1.h3")
    assert pair["score"] == pytest.approx(5, abs=1e-4) and not pair["backup"]  # it does not come to help: it stops hindering
    assert pair["moved"] == pytest.approx(1, abs=1e-5)


def test_joint_ablation_finds_the_backup() -> None:
    parts, some, _ = built("backup")
    scores = joint_backups(parts, some, parts.fallback("zero"), ["L0.h1", "L0.h0"])
    assert scores["L1.h2"]["score"] == pytest.approx(6.5, abs=1e-5)
    assert scores.table.filter("backup")["site"].to_list() == ["L1.h2"] and "L0.h1" not in scores.table["site"]
    with pytest.raises(GateError, match="no part was named"):
        joint_backups(parts, some, parts.fallback("zero"), [])


def test_an_mlp_that_turns_down_the_likeliest_token_is_found() -> None:
    """The last MLP of a tiny GPT-2 is made to write against the last norm's reading of the likeliest token, by its bias."""
    hf = tiny("gpt2")
    parts, some = nodes(Model.load(hf)), examples(16)
    rule = parts.fallback("zero")
    with torch.no_grad():
        logits = parts.model.target_logits(some.batch())[0]
        best = int(logits.mean(0).argmax())
        weight = hf.lm_head.weight
        hf.transformer.h[0].mlp.c_proj.bias += 40 * (weight[best] - weight.mean(0))  # now the likeliest everywhere
        hf.transformer.h[1].mlp.c_proj.bias -= 15 * (weight[best] - weight.mean(0))
        assert (parts.model.target_logits(some.batch())[0].argmax(-1) == best).all()
    scores = erasure(parts, some, rule)
    assert scores.table.filter("erases")["site"].to_list() == ["L1.mlp"]
    assert scores["L1.mlp"]["high"] < 0 < scores["L0.mlp"]["low"]


def test_erasure_is_the_last_mlps_exact_effect_on_the_likeliest_token() -> None:
    """Of the last MLP nothing lies behind but the norm: its share is what the likeliest token's centred logit loses, norm held."""
    parts, some = nodes(Model.load(tiny("gpt2"))), examples(6)
    rule, batch = parts.fallback("resample"), some.batch()
    norm: Any = parts.model.anatomy.norm
    seen: list[torch.Tensor] = []

    def hook(_module: object, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        x = args[0] - args[0].mean(-1, keepdim=True)
        seen.append((x.square().mean(-1, keepdim=True) + norm.eps).sqrt())
        return x / seen[0] * norm.weight + norm.bias

    handle = norm.register_forward_hook(hook)
    with torch.no_grad():
        own = parts.model.target_logits(batch)[0]
        shut = parts.model.target_logits(batch, parts.edits(parts.without([parts.labels[-1]]), rule, batch))[0]
    handle.remove()
    top = own.argmax(-1, keepdim=True)
    expected = [(one.gather(-1, top)[:, 0] - one.mean(-1)) for one in (own, shut)]
    assert erasure(parts, some, rule)["L1.mlp"]["score"] == pytest.approx(float((expected[0] - expected[1]).mean()), abs=1e-5)


def test_what_has_no_direct_effect_is_refused() -> None:
    model = Model.load(tiny("gpt2"))
    some = examples(4)
    neurons = gated(model, ["L*.mlp.n*"])
    with pytest.raises(GateError, match="whole heads and MLPs"):
        self_repair(neurons, some, neurons.fallback("zero"))
    parts = nodes(model)
    with pytest.raises(MetricError, match="one right and one wrong token"):
        self_repair(parts, examples(4, answers=2), parts.fallback("zero"))
    heads = nodes(model, mlps=False)
    with pytest.raises(GateError, match="there is none among the parts"):
        erasure(heads, some, heads.fallback("zero"))


def test_frozen_routing_is_frozen_for_direct_effects_too() -> None:
    """The identity against what is measured with routers held: total_held is replay's, and with free routing it is another number."""
    model, some = Model.load(tiny("mixtral")), examples(4)
    parts = nodes(model, routing="frozen")
    rule = parts.fallback("resample")
    frame = self_repair(parts, some, rule, closed=["L0.h1", "L0.mlp"]).parts
    gates = closed_gates(parts, [(), (1,), (4,)])
    held = parts.frozen_norm().measure(some.batch(), gates, rule).mean(1).numpy()
    np.testing.assert_allclose(frame["total_held"], held[0] - held[1:], atol=1e-5)
    assert frame["rest"].abs().max() < 1e-5
    free = nodes(model)
    other = self_repair(free, some, rule, closed=["L0.h1", "L0.mlp"]).parts
    assert (frame["total_held"] - other["total_held"]).abs().max() > 1e-4


def test_noise_on_the_embeddings_has_no_direct_effects() -> None:
    parts, some = gated(Model.load(tiny("gpt2")), ["L*.h*", "L*.mlp"]), examples(2)
    noisy = parts.under(torch.zeros(2, 7, 32))
    with pytest.raises(GateError, match="leave it out"):
        self_repair(noisy, some, parts.fallback("zero"))
