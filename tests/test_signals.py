"""Signals: singular terms add up to the model's own scores, shares to the signal, and the planted head's signal is what it should be."""

import pytest
import torch

from cases import tiny
from patchclamp.discover.signals import removed, signals, trace
from patchclamp.errors import FamilyError, PatchclampError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.zoo import wired

IDS = torch.tensor([5, 11, 23, 42, 7, 31, 64])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_terms_add_up_to_the_scores_and_shares_to_the_signal(name: str):
    """Learned positions with a fused map; rotary with grouped keys; rotary on part of a head, interleaved fused map. In float64
    up to rotary embeddings, which are float32."""
    model = Model.load(tiny(name, dtype=torch.float64))
    found = signals(model, IDS, above=0.2)
    assert len(found) > 5
    kept = model.record(IDS[None], ["L*.scores", "L*.pattern"])
    for one in found:
        place = (0, one.head.index, one.query, one.key)
        assert one.terms.sum() == pytest.approx(float(kept[Site("scores", one.head.layer)][place]), abs=1e-4)
        assert one.weight == pytest.approx(float(kept[Site("pattern", one.head.layer)][place])) and one.weight > 0.2
        if one.score > 0:
            assert one.terms[: one.count].sum() >= one.score * (1 - 1e-6) > one.terms[: one.count - 1].sum()
            assert float((one.left @ one.read[0] * (one.right @ one.read[1])).sum()) == pytest.approx(one.strength)
    one = max((one for one in found if one.head.layer == 1 and one.score > 0), key=lambda one: one.score)
    table = trace(model, IDS, one)
    # by hand: what each part wrote, the norm's divisor held; the rest is the norm's bias, output biases and the appended 1
    sites = [Site("write", 0, head) for head in range(4)] + [Site("mlp.write", 0), Site("resid.pre", 0), Site("resid.pre", 1)]
    values = model.record(IDS[None], sites)
    stream = values[Site("resid.pre", 1)][0, one.key]
    norm = model.anatomy.layers[1].block.input_layernorm if name == "gpt_neox" else model.anatomy.layers[1].first
    with torch.no_grad():
        whole, nothing = norm(stream[None, None])[0, 0], norm(torch.zeros_like(stream)[None, None])[0, 0]
    centre = stream.mean() if name != "llama" else 0.0
    gain = (whole - nothing) / (stream - centre)
    functional = (one.left @ one.read[0]) @ one.right
    for part, site in (("L0.h2", sites[2]), ("L0.mlp", sites[4]), ("embed", sites[5])):
        value = values[site][0, one.key].detach()
        moved = gain * (value - (value.mean() if name != "llama" else 0.0))
        share = table.filter((table["side"] == "key") & (table["part"] == part))["share"][0]
        assert share == pytest.approx(float(functional[:-1] @ moved) / one.strength, abs=1e-6)
    for side in ("key", "query"):
        assert table.filter(table["side"] == side)["share"].sum() == pytest.approx(1)
    if name == "llama":  # nothing in it is constant
        assert abs(table.filter((table["part"] == "constant") & (table["side"] == "key"))["share"][0]) < 1e-6


def test_the_signal_taken_out_lowers_the_score_by_its_strength_and_nothing_else():
    for name in ("gpt2", "llama"):
        model = Model.load(tiny(name, dtype=torch.float64))
        one = max(signals(model, IDS, above=0.2), key=lambda one: one.score)
        site = Site("scores", one.head.layer)
        before, after = (model.record(IDS[None], [site], edits)[site][0] for edits in (None, removed(model, IDS, one)))
        assert float(after[one.head.index, one.query, one.key]) == pytest.approx(one.score - one.strength, abs=1e-4)
        others = [key for key in range(len(IDS)) if key != one.key]
        torch.testing.assert_close(after[:, :, others], before[:, :, others])


def test_the_planted_head_reads_one_signal_that_the_planted_writer_wrote():
    """The wired induction head: at each word that was there before it attends to what followed, for what L0.h1 wrote beside that."""
    truth = wired("induction")
    model = Model.load(truth.hf, tokenizer=truth.tokenizer)
    batch = truth.task.examples(truth.tokenizer, 1, seed=3).batch()
    ids = batch.tokens[0]
    head = Site("head", 1, 2)
    found = [one for one in signals(model, ids, [head]) if one.query == len(ids) - 1]
    assert len(found) == 1
    one = found[0]
    assert int(ids[one.key - 1]) == int(ids[one.query])  # what followed the same word
    assert one.count <= 4 and one.strength >= one.score
    table = trace(model, ids, one)
    writers = table.filter((table["side"] == "key") & (table["part"] != "constant"))
    assert writers["part"][0] == "L0.h1" and writers["share"][0] > 0.5
    readers = table.filter((table["side"] == "query") & (table["part"] != "constant"))
    assert readers["part"][0] == "embed"
    metric = METRICS["logit_diff"]
    plain, without, control = (
        float(metric(model.target_logits(batch, edits).detach(), batch)[0, 0])
        for edits in ({}, removed(model, ids, one), removed(model, ids, one, other=True))
    )
    assert plain - without > 0.5 * plain and abs(plain - control) < 0.1 * plain


def test_what_has_no_signals_is_refused_by_name():
    for name in ("qwen3", "bloom"):
        with pytest.raises(FamilyError, match="signals"):
            signals(Model.load(tiny(name)), IDS)
    model = Model.load(tiny("gpt2", dtype=torch.float64))
    low = next(one for one in signals(model, IDS, above=0.05) if one.score <= 0)
    with pytest.raises(PatchclampError, match="no signal"):
        trace(model, IDS, low)
