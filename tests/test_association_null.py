"""Permutation tests reject at their level: .05 of draws without any link, whatever the measure.

With 99 permutations p <= .05 has probability .05 exactly if the null is exchangeable. Of 1,000 draws the rate then lies within .029
to .074 with 99.9 % probability (binomial), and so do all nine rates here with 99 %; the short tests take 200 draws, whose bounds at
99.9 % are .01 to .11.
"""

import numpy as np
import pytest

from patchclamp.dependence.association import MEASURES, composed
from patchclamp.dependence.association.measuring import _conditioned, _slots, null_of, p_values
from patchclamp.dependence.association.units import units_of
from test_association import drawn

WIDE = (0.029, 0.074)
PLAIN = ("correlation", "mutual information", "gaussian information", "hsic", "coco", "cka", "debiased cka")


def null_draw(measure: str, seed: int):
    """Outputs of two parts (five where others are given) without a link between the first two, as each measure is used.

    Rows of a prompt share a random level (so rows are not independent, prompts are); outputs follow position and token too, which is
    given; partial correlations have a common driver among the other parts.
    """
    rng = np.random.default_rng([seed, 11])
    prompts, tokens = (40, 3) if measure == "correlation" else (36, 1)
    rows = prompts * tokens
    level = np.repeat(rng.normal(size=(prompts, 2)), tokens, 0) if tokens > 1 else np.zeros((rows, 2))
    values = rng.normal(size=(rows, 2)) + level
    if measure == "partial correlation":
        others = rng.normal(size=(rows, 3))
        return drawn(np.hstack([values + others[:, :1], others]))
    if measure != "correlation":
        return drawn(values)
    token = rng.integers(0, 4, rows)
    return drawn(values + rng.normal(size=(4, 2))[token] + np.tile(rng.normal(size=(tokens, 2)), (prompts, 1)), tokens, token)


def rejections(measure: str, draws: int, permutations: int) -> float:
    """Share of draws whose p for the first pair is at most .05."""
    found = 0
    for seed in range(draws):
        outputs = null_draw(measure, seed)
        given = ("position", "token") if measure == "correlation" else ()
        clean, freedom, _ = _conditioned(outputs, given)
        units = units_of([outputs.groups[e] for e in outputs.example], _slots(outputs, np.arange(len(outputs))))
        ready = MEASURES[measure].prepare(clean, clean, [(0, 1)], freedom, seed)
        null = null_of(ready, units, permutations, seed)
        found += p_values(ready.statistic(), null, MEASURES[measure].two_sided)[0] <= 0.05
    return found / draws


@pytest.mark.parametrize("measure", ["correlation", "partial correlation", "gaussian information", "hsic"])
def test_nulls_are_calibrated_in_short(measure: str):
    assert 0.01 <= rejections(measure, 200, 99) <= 0.11


@pytest.mark.long
@pytest.mark.parametrize("measure", [*PLAIN, "partial correlation"])
def test_nulls_are_calibrated(measure: str):
    assert WIDE[0] <= rejections(measure, 1000, 99) <= WIDE[1]


@pytest.mark.long
def test_the_neural_null_is_calibrated():
    """100 draws of 19 permutations: p <= .05 where the draw is the largest of 20."""
    assert 0.01 <= rejections("neural information", 100, 19) <= 0.11


def null_composition(seed: int):
    """A logistic-normal composition whose first two parts have partial correlation exactly 0 (K_12 = 0)."""
    rng = np.random.default_rng([seed, 12])
    half = rng.normal(size=(5, 5))
    precision = half @ half.T + 5 * np.eye(5)
    frame = np.eye(5) - 1 / 5
    # the inverse covariance of log(x_i / x_5) is a block of K: set its (1, 2) entry to 0
    alr = precision[:4, :4].copy()
    alr[0, 1] = alr[1, 0] = 0.0
    logs = rng.multivariate_normal(np.zeros(4), np.linalg.inv(alr), size=40)
    logs = np.hstack([logs, np.zeros((40, 1))]) @ frame
    return composed(drawn(np.exp(logs)))


def composition_rejections(draws: int) -> float:
    found = 0
    for seed in range(draws):
        outputs = null_composition(seed)
        clean, freedom, _ = _conditioned(outputs, ())
        units = units_of(outputs.groups, ["0"] * len(outputs))
        ready = MEASURES["log-ratio partial correlation"].prepare(clean, clean, [(0, 1)], freedom, seed)
        found += p_values(ready.statistic(), null_of(ready, units, 99, seed), True)[0] <= 0.05
    return found / draws


def test_the_null_of_compositions_is_calibrated_in_short():
    assert 0.01 <= composition_rejections(200) <= 0.11


@pytest.mark.long
def test_the_null_of_compositions_is_calibrated():
    assert WIDE[0] <= composition_rejections(1000) <= WIDE[1]
