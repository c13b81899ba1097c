"""Neural mutual information against closed forms, and as a measure of association."""

import numpy as np
import pytest

from patchclamp.dependence.association import associate, neural_information
from patchclamp.errors import PatchclampError
from test_association import drawn, two_normal


@pytest.mark.long
def test_neural_information_is_extrapolated_towards_the_truth():
    """Five coordinates with rho .6 a side: 1.116 nat. The value at all rows falls short; the intercept must be nearer."""
    truth = -0.5 * 5 * np.log(1 - 0.36)
    found = neural_information(*two_normal(0.6, n=1200, width=5))
    assert found.plain < truth and abs(found.value - truth) < truth - found.plain
    assert found.value == pytest.approx(truth, abs=0.2)
    null = neural_information(*(np.random.default_rng(3).normal(size=(2, 1200, 5))))
    assert abs(null.value) < 0.1
    assert found.bound == pytest.approx(np.log(400)) and [rows for rows, _ in found.by_rows] == [1200, 600, 300]


def test_a_strong_link_is_seen_among_permutations():
    rng = np.random.default_rng(2)
    a, b, c = rng.normal(size=(3, 80))
    table = associate(drawn(np.stack([a, a + 0.3 * b, c], 1)), measure="neural information", given=(), permutations=19, blocks=0)
    linked, apart = table.pair("L0.mlp", "L1.mlp"), table.pair("L0.mlp", "L2.mlp")
    assert linked["p"] == 0.05 and linked["score"] > linked["null_95"] and linked["score"] > 2 * abs(apart["score"])


def test_few_rows_are_refused_or_not_extrapolated():
    x, y = two_normal(0.9, n=40)
    found = neural_information(x, y)
    assert found.value == found.plain and not found.consistent and len(found.by_rows) == 1
    with pytest.raises(PatchclampError, match="cannot be learned from 20 rows"):
        associate(drawn(np.hstack([x, y])[:20]), measure="neural information", given=(), permutations=9)
