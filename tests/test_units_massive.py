"""Massive activations planted in embeddings; loops over what models return; curves of known parameters."""

import numpy as np
import pytest
import torch

import cases
from patchclamp.edits import Put
from patchclamp.errors import MeasureError
from patchclamp.models.inputs import token_batch
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.units.context import losses
from patchclamp.units.growth import foretell, growth
from patchclamp.units.massive import intervene, massive, places


def spiked(bias: float = 5000.0) -> Model:
    """A tiny Llama whose token 1 has one huge coordinate, 7, from the first layer on; norms make of it a direction."""
    hf = cases.tiny("llama")
    with torch.no_grad():
        hf.model.embed_tokens.weight[1, 7] = bias
    return Model.load(hf)


def numbers(table) -> dict[tuple[str, str], float]:  # type: ignore[no-untyped-def]
    return {(part, name): value for part, name, value, *_ in table.rows()}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "bloom", "mixtral"])
def test_ratios_are_loops_over_hidden_states(name: str) -> None:
    model = cases.model_of(name)
    rows = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16]]
    found = numbers(massive(model, token_batch(rows)))
    values = [
        {
            str(site): value[0].detach().double().abs()
            for site, value in model.record(torch.tensor([row]), ["embed", "L*.resid.post"]).items()
        }
        for row in rows
    ]
    largest = []
    for part in values[0]:
        tops = [float(one[part].max()) for one in values]
        medians = [float(one[part].flatten().median()) for one in values]
        ratios = [top / median for top, median in zip(tops, medians, strict=True)]
        largest.append(ratios)
        assert found[part, "top"] == pytest.approx(np.mean(tops), rel=1e-4)
        assert found[part, "median"] == pytest.approx(np.mean(medians), rel=1e-4)
        assert found[part, "ratio"] == pytest.approx(np.mean(ratios), rel=1e-4)
        assert found[part, "massive"] == 0
    assert found["model", "ratio"] == pytest.approx(np.mean(np.max(largest, 0)), rel=1e-4)


def test_planted_spikes_are_found_where_they_are() -> None:
    model = spiked()
    rows = torch.tensor([[1, 5, 6, 7, 8, 9], [10, 11, 1, 12, 13, 14]])
    found = numbers(massive(model, rows))
    for part in ("embed", "L0.resid.post", "L1.resid.post"):
        assert found[part, "massive"] == 1 and found[part, "ratio"] > 1000
    table = places(model, rows, top=1)
    assert table["coordinate"].to_list() == [7] * 6 and table["token"].to_list() == [1] * 6
    assert table["position"].to_list() == [0, 0, 0, 2, 2, 2] and table["part"].to_list()[:3] == [
        "embed",
        "L0.resid.post",
        "L1.resid.post",
    ]
    assert table["value"][0] == 5000


def test_zero_and_mean_are_what_values_put_there_give() -> None:
    model = spiked()
    rows = torch.tensor([[1, 5, 6, 7, 8, 9], [10, 11, 1, 12, 13, 14]])
    table = intervene(model, rows, ways=("zero", "mean", "others"))
    found = numbers(table)
    site = Site.parse("L0.resid.post")
    stream = model.record(rows, [site])[site].detach().clone()
    spikes = [(0, 0), (1, 2)]
    mean = float(np.mean([float(stream[at][7]) for at in spikes]))
    before = np.nanmean(losses(model, rows), 1)
    for way, new in (("zero", 0.0), ("mean", mean)):
        other = stream.clone()
        for at in spikes:
            other[(*at, 7)] = new
        after = np.nanmean(losses(model, rows, {site: Put(other)}), 1)
        assert found[str(site), f"loss.{way}"] == pytest.approx(after.mean(), abs=1e-5)
        assert found[str(site), f"change.{way}"] == pytest.approx((after - before).mean(), abs=1e-5)
    # the stream's norm there is the spike's: without it the token says something else; with its mean, nothing new
    assert abs(found[str(site), "change.zero"]) > 0.01 > 10 * abs(found[str(site), "change.mean"])
    assert found[str(site), "massive"] == 1 and found[str(site), "loss.others"] != found[str(site), "loss"]


def test_what_has_no_massive_activations_says_so() -> None:
    rows = torch.tensor([[1, 5, 6]])
    with pytest.raises(MeasureError, match="above="):
        intervene(cases.model_of("llama"), rows)
    with pytest.raises(MeasureError, match="behind block 1"):
        intervene(cases.model_of("llama"), rows, layer=1)
    with pytest.raises(MeasureError, match="not median"):
        intervene(cases.model_of("llama"), rows, ways=("median",))


def curve(t: np.ndarray, a: float, decay: float, g: float, t0: float, k: float) -> np.ndarray:
    x = g * t + t0
    return a * np.exp(-decay * x) * np.log(x) + k


STEPS = np.unique(np.round(np.logspace(0, np.log10(2000), 30)))


def test_a_curve_of_known_parameters_is_fitted() -> None:
    """Without noise the five parameters come back (the search ends at a relative step of 1e-8 of the sum of squares)."""
    known = (40.0, 0.05, 0.02, 1.5, 6.0)
    fit = growth(STEPS, curve(STEPS, *known), resamples=0)
    np.testing.assert_allclose((fit.amplitude, fit.decay, fit.rate, fit.start, fit.offset), known, rtol=1e-2)
    assert fit.r2 > 1 - 1e-8 and fit.low == {}
    every = np.arange(0, 2000.0)
    assert abs(fit.peak - every[curve(every, *known).argmax()]) < 20  # in steps; the top is flat
    np.testing.assert_allclose(fit.at(STEPS), curve(STEPS, *known), atol=1e-3)


def test_intervals_of_a_noisy_curve_hold_what_made_it() -> None:
    known = (40.0, 0.05, 0.02, 1.5, 6.0)
    noise = np.random.default_rng(0).normal(0, 0.3, len(STEPS))
    fit = growth(STEPS, curve(STEPS, *known) + noise, resamples=40)
    assert fit.r2 > 0.99 and fit.n == len(STEPS)
    for name, value in zip(("amplitude", "decay", "rate", "start", "offset"), known, strict=True):
        spread = fit.high[name] - fit.low[name]
        assert fit.low[name] - spread < value < fit.high[name] + spread, name  # one draw of noise: twice the interval's width


def test_too_few_checkpoints_are_refused() -> None:
    with pytest.raises(MeasureError, match="at least 8"):
        growth([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    with pytest.raises(MeasureError, match="not all alike"):
        growth(STEPS, np.ones(len(STEPS)))


def test_parameters_that_follow_from_the_architecture_are_foretold() -> None:
    rng = np.random.default_rng(0)
    built = rng.normal(size=(12, 3))
    known = np.stack([built @ [1.0, 2.0, -1.0] + 4.0, rng.normal(size=12)], 1)
    said, r2 = foretell(built, known, ridge=1e-9)
    np.testing.assert_allclose(said[:, 0], known[:, 0], atol=1e-5)
    assert r2[0] > 0.999 and r2[1] < 0.5
    with pytest.raises(MeasureError, match="at least 4"):
        foretell(built[:3], known[:3])
