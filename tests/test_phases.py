"""Phase changes: curves whose middle is known, with noise, and curves that have none."""

import numpy as np
import pytest

from patchclamp.errors import TrainingError
from patchclamp.training.phases import crossing, phase_change

STEPS = np.arange(0, 2000, 20)


def turn(middle: float, factor: float, before: float = 4.0, after: float = 1.0) -> np.ndarray:
    """A sigmoid in log steps that takes from a tenth to nine tenths of its height within `factor`."""
    width = np.log(factor) / np.log(81)
    return before + (after - before) / (1 + np.exp(-(np.log1p(STEPS) - np.log1p(middle)) / width))


@pytest.mark.parametrize("middle", [100, 400, 1000])
@pytest.mark.parametrize("factor", [1.2, 2.0])
@pytest.mark.parametrize(("before", "after"), [(4.0, 1.0), (0.1, 0.9)])
def test_a_sigmoid_is_found_where_it_is(middle: float, factor: float, before: float, after: float):
    """Without noise: the middle to 0.5 %, the width to 5 % (in its logarithm), the plateaus to 1 % of the height."""
    found = phase_change(STEPS, turn(middle, factor, before, after), resamples=20)
    assert found.step == pytest.approx(middle, rel=0.005)
    assert np.log(found.width) == pytest.approx(np.log(factor), rel=0.05)
    assert (found.before, found.after) == pytest.approx((before, after), abs=0.01 * abs(before - after))
    assert found.direction == ("down" if before > after else "up")


def test_the_interval_holds_the_middle_as_often_as_it_says():
    """25 curves with independent noise of a tenth of the height: 95 % intervals hold the middle in at least 21 (p < 0.01 if true)."""
    hits = 0
    for seed in range(25):
        noise = np.random.default_rng(seed).normal(0, 0.3, len(STEPS))
        found = phase_change(STEPS, turn(500, 1.5) + noise, resamples=60, seed=seed)
        assert found.step == pytest.approx(500, rel=0.1)
        hits += found.low <= 500 <= found.high
    assert hits >= 21


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("a straight line", 4 - 0.3 * np.log1p(STEPS)),
        ("flat", np.full(len(STEPS), 4.0)),
        ("a power law", 1 + 3 * (STEPS + 1.0) ** -0.2),
        ("an early decline", 1 + 3 * np.exp(-STEPS / 5)),
        ("an end that is not seen", turn(6000, 3.0)),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_there_is_none_where_a_line_fits_as_well_or_the_turn_is_not_seen(name: str, values: np.ndarray, noise: float):
    drawn = values + np.random.default_rng(1).normal(0, 1, len(STEPS)) * noise
    found = phase_change(STEPS, drawn)
    assert found.step is None and found.low is None and found.width is None, (name, found)
    assert "no phase change" in str(found)


def test_noise_alone_is_no_phase_change():
    """Claimed in at most 2 of 100 curves of independent noise."""
    draw = np.random.default_rng(0)
    white = sum(phase_change(STEPS, draw.normal(0, 1, len(STEPS)), resamples=1).step is not None for _ in range(100))
    assert white <= 2


def test_the_same_curve_and_seed_have_the_same_interval():
    noisy = turn(300, 1.5) + np.random.default_rng(3).normal(0, 0.1, len(STEPS))
    assert phase_change(STEPS, noisy, resamples=40, seed=5) == phase_change(STEPS, noisy, resamples=40, seed=5)
    assert phase_change(STEPS, noisy, resamples=40, seed=5).low != phase_change(STEPS, noisy, resamples=40, seed=6).low


def test_a_crossing_is_where_the_sigmoid_is_half_way():
    values = turn(400, 1.5)
    assert crossing(STEPS, values, 2.5) == pytest.approx(400, rel=0.02)
    assert crossing(STEPS, -values, -2.5, downward=False) == pytest.approx(400, rel=0.02)
    assert crossing(STEPS, values, 0.5) is None
    assert crossing(STEPS, values, 5.0) == 0
    spiked = values.copy()
    spiked[5] = 0.0
    assert crossing(STEPS, spiked, 2.5) == pytest.approx(400, rel=0.02)


@pytest.mark.parametrize("steps", [range(5), [3, 2, *range(4, 10)], range(-1, 9)])
def test_what_is_no_curve_is_refused(steps):
    with pytest.raises(TrainingError):
        phase_change([float(s) for s in steps], [1.0] * len(steps))
    with pytest.raises(TrainingError, match="finite"):
        phase_change(STEPS, np.full(len(STEPS), np.nan))
