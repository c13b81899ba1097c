"""Subspaces: the illusion wired by hand, a subspace that is known and learned, mediation by its formula."""

import copy

import numpy as np
import pytest
import torch

from cases import tiny
from patchclamp.edits import Put
from patchclamp.errors import GateError, SiteError
from patchclamp.gating.nulls import reinitialised
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.probes import Swap, align, illusion, mediation, orthonormal, reader_of, split
from patchclamp.probes.mediation import contrast
from patchclamp.sites import Site
from patchclamp.tasks import Example, Examples, Pair
from patchclamp.zoo import wired
from patchclamp.zoo._designs import CONCEPTS, FILLERS, A
from test_parts import examples

HEAD, WIDTH = 2, 80
"""L1.h2 copies the concept: coordinate c of its z is 1 where it attends to concept c. Coordinates from 24 on are empty."""
HIDDEN, ASLEEP = 60, 61


def two_concepts(n: int, seed: int) -> Examples:
    """`X apple filler X` against `X bear filler X`, both ways round: one direction tells all pairs apart."""
    made, draw = wired("induction"), np.random.default_rng(seed)
    ids = made.tokenizer.convert_tokens_to_ids
    apple, bear, bos = ids([CONCEPTS[0], CONCEPTS[1], "<bos>"])
    items = []
    for number in range(n):
        cue, filler = ids([CONCEPTS[int(draw.integers(2, 24))], FILLERS[int(draw.integers(len(FILLERS)))]])
        right, wrong = (apple, bear) if number % 2 else (bear, apple)
        clean, corrupt = (tuple(map(int, (bos, cue, said, filler, cue))) for said in (right, wrong))
        pair = Pair(clean=clean, corrupt=corrupt, answer=((right,),), wrong=((wrong,),), group=f"{cue} {filler} {number % 2}")
        items.append(Example(clean, ((right,),), pair, corrupt, ((wrong,),), {"end": (4, 5)}, group=pair.group))
    return Examples(tuple(items), made.tokenizer, "two concepts", "logit_diff")


def with_sleeper() -> Model:
    """Induction with two coordinates more in the head's z. One tells the answers apart and is not read; one is read, in the very way in
    which the answer is said (and into a place that nobody reads, so that it is a direction of its own), and always 0."""
    hf = copy.deepcopy(wired("induction").hf)
    attention = hf.transformer.h[1].attn
    values, outputs = 2 * 4 * WIDTH + HEAD * WIDTH, HEAD * WIDTH
    with torch.no_grad():
        reads, writes = attention.c_attn.weight, attention.c_proj.weight
        reads[:, values + HIDDEN] = reads[:, values] - reads[:, values + 1]
        unread = next(row for head in (0, 1, 3) if float((row := writes[head * WIDTH]).norm()) > 0)
        writes[outputs + ASLEEP] = writes[outputs] - writes[outputs + 1] + unread
    return Model.load(hf, tokenizer=wired("induction").tokenizer)


def unit(*coordinates: int, signs: tuple[float, ...] = (1.0, 1.0)) -> torch.Tensor:
    vector = torch.zeros(WIDTH, dtype=torch.float64)
    for coordinate, sign in zip(coordinates, signs, strict=False):
        vector[coordinate] = sign
    return vector


def test_a_dormant_pathway_is_an_illusion_and_the_working_one_is_not():
    """Closed form: the exchange moves `hidden` from 1 to -1; along (hidden + asleep) it moves both by 1, and `asleep` says the other
    answer as loud as the head itself does: 2 A are lost, as with the whole site, through a pathway that never worked."""
    model, some = with_sleeper(), two_concepts(16, 0)
    found = illusion(model, some, f"L1.h{HEAD}.z@-1", unit(HIDDEN, ASLEEP))
    assert found.verdict == "illusory" and found.null_share == pytest.approx(0.5)
    assert found.effect("direction") == pytest.approx(2 * A, rel=1e-4) == pytest.approx(found.effect("whole site"), rel=1e-4)
    assert found.effect("row space") == pytest.approx(0, abs=1e-6) == pytest.approx(found.effect("null space"), abs=1e-6)
    assert found.dormant < 1e-9 and "illusory" in str(found)
    genuine = illusion(model, some, f"L1.h{HEAD}.z@-1", unit(0, 1, signs=(1.0, -1.0)))
    assert genuine.verdict == "genuine" and genuine.null_share < 1e-9 and genuine.dormant == float("inf")
    assert genuine.effect("row space") == pytest.approx(2 * A, rel=1e-4)
    nothing = illusion(model, some, f"L1.h{HEAD}.z@-1", unit(5, 6))
    assert nothing.verdict == "no effect" and nothing.effect("direction") == pytest.approx(0, abs=1e-6)


def test_splitting_and_reading_are_linear_algebra():
    draw = torch.Generator().manual_seed(0)
    matrix, vector = torch.randn(3, 7, generator=draw).double(), torch.randn(7, generator=draw).double()
    inside, outside = split(vector, matrix)
    torch.testing.assert_close(inside + outside, vector)
    torch.testing.assert_close(matrix @ outside, torch.zeros(3).double())
    torch.testing.assert_close(inside, matrix.T @ torch.linalg.solve(matrix @ matrix.T, matrix @ vector))
    for name in ("gpt2", "llama"):  # Conv1D holds its weights the other way round
        model = Model.load(tiny(name))
        batch = examples(2).batch()
        seen = model.record(batch, ["L1.mlp.n", "L1.mlp", "L1.h2.z", "L1.h2.write"])
        bias = getattr(model.anatomy.layers[1].down, "bias", None)
        made = seen[Site("neuron", 1)] @ reader_of(model, Site("neuron", 1)).T + (0 if bias is None else bias)
        torch.testing.assert_close(made, seen[Site("mlp", 1)], rtol=0, atol=1e-5)
        made = seen[Site("z", 1, 2)] @ reader_of(model, Site("z", 1, 2)).T
        torch.testing.assert_close(made, seen[Site("write", 1, 2)], rtol=0, atol=1e-5)
    basis = orthonormal(torch.randn(3, 8, generator=draw).double())
    torch.testing.assert_close(basis @ basis.T, torch.eye(3).double())
    with pytest.raises(GateError, match="span less"):
        orthonormal(torch.ones(2, 5))


def test_exchanging_a_whole_site_is_patching_it():
    model, batch = Model.load(tiny("llama")), examples(3, (7, 5)).batch()
    site = Site.parse("L0.resid.post@fact")
    other = model.record(batch.swapped(), "L0.resid.post")[Site("resid.post", 0)]
    with torch.no_grad():
        swapped = model.target_logits(batch, {site: Swap(torch.eye(32), other)})
        patched = model.target_logits(batch, {site: Put(other)})
        plain = model.target_logits(batch)
    torch.testing.assert_close(swapped, patched, rtol=0, atol=1e-5)
    assert float((swapped - plain).abs().max()) > 1e-3


def test_a_known_subspace_is_learned_and_its_controls_fail():
    """The direction from one concept to the other. With arbitrary labels nothing holds on unseen pairs, a random direction of 80 turns no
    answer; in the untrained model, where two tokens differ in what a head holds as anywhere, the search does find one, a worse one."""
    made = wired("induction")
    model = Model.load(made.hf, tokenizer=made.tokenizer)
    fit, unseen = two_concepts(16, 1), two_concepts(16, 2)
    found = align(model, fit, unseen, f"L1.h{HEAD}.z@-1", updates=40, untrained=reinitialised(model, 0))
    truth = unit(0, 1, signs=(1.0, -1.0)) / 2**0.5
    assert float((found.basis[0].double() @ truth).abs()) > 0.9
    rows = {row["control"]: row for row in found.controls.iter_rows(named=True)}
    assert found.accuracy.mean == rows["learned"]["accuracy"] == rows["whole site"]["accuracy"] == 1.0
    assert rows["arbitrary labels"]["accuracy"] == 0.5 == found.selectivity
    assert rows["random subspace"]["accuracy"] == 0.0 and rows["untrained model"]["accuracy"] < 1.0
    assert "interchange accuracy" in str(found) and found.about["rank"] == 1
    with pytest.raises(GateError, match="rank 81"):
        align(model, fit, unseen, f"L1.h{HEAD}.z", rank=81)
    with pytest.raises(GateError, match="does not say"):
        align(model, fit, unseen, f"L1.h{HEAD}.z", metric="nll")
    with pytest.raises(SiteError, match="vector per position"):
        align(model, fit, unseen, "L1.h2.pattern")


def test_what_the_illusion_test_cannot_do_is_said():
    model, some = with_sleeper(), two_concepts(4, 0)
    with pytest.raises(GateError, match="width 80"):
        illusion(model, some, "L1.h2.z@-1", torch.ones(7))
    with pytest.raises(SiteError, match="no single linear map"):
        illusion(model, some, "L1.resid.pre", torch.ones(320))


def test_indirect_effects_are_their_formula():
    """Against probabilities from patched runs, part by part, prompt by prompt; and in a wired model the head that answers mediates all."""
    model, some = Model.load(tiny("gpt2", dtype=torch.float64)), examples(4, (7,))
    found = mediation(model, some, ["L*.mlp", "L1.attn"], ["end", "fact"])
    batch = some.batch()
    plain = model.target_logits(batch).detach()[0].softmax(-1)
    right, wrong = batch.answers[:, 0], batch.wrong[:, 0] if batch.wrong is not None else batch.answers[:, 0]
    rows = torch.arange(4)
    for site, value in zip(found.effects.sites, found.effects.values(), strict=True):
        assert isinstance(site, Site)
        other = model.record(batch.swapped(), site.at(None))[site.at(None)]
        patched = model.target_logits(batch, {site: Put(other)}).detach()[0].softmax(-1)
        gone = (patched[rows, wrong] - plain[rows, wrong]) / plain[rows, wrong]
        lost = (plain[rows, right] - patched[rows, right]) / patched[rows, right]
        assert value == pytest.approx(float(0.5 * (gone + lost).mean()), rel=1e-9, abs=1e-12)
    assert len(found.grid()) == 4 and METRICS["log_probability"].sign == 1
    made = wired("induction")
    one = mediation(Model.load(made.hf, tokenizer=made.tokenizer), two_concepts(8, 3), ["L*.mlp", "L*.h*"])
    shares = contrast([one], lambda part: str(part).startswith("L1.h2"))
    assert shares["two concepts"] == pytest.approx(1, abs=1e-3)
    with pytest.raises(GateError, match="'wrong'"):
        mediation(model, Examples(tuple(Example(**{**vars_of(item), "wrong": ()}) for item in some), some.tokenizer))


def vars_of(item: Example) -> dict[str, object]:
    return {name: getattr(item, name) for name in Example.__dataclass_fields__}
