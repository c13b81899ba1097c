"""Shares of variance against sums written out; a stream that was given what it holds; by chance next to nothing."""

import numpy as np
import pytest
import torch

import cases
from patchclamp.errors import MeasureError
from patchclamp.models.model import Model
from patchclamp.units.explained import explained, variances


def test_shares_are_sums_written_out() -> None:
    """Rows counted twice are rows that are there twice; to 1e-12."""
    rng = np.random.default_rng(0)
    values, labels, counts = rng.normal(size=(40, 5)), rng.integers(0, 3, 40), rng.integers(0, 3, 40)
    chosen = np.repeat(np.arange(40), counts)
    found = explained(values, labels, np.stack([np.ones(40), counts.astype(float)]))
    for rows, share in zip((np.arange(40), chosen), found, strict=True):
        x, own = values[rows], labels[rows]
        mean, total, between = x.mean(0), 0.0, 0.0
        for row, label in zip(x, own, strict=True):
            total += float(((row - mean) ** 2).sum())
            between += float(((x[own == label].mean(0) - mean) ** 2).sum())
        assert share == pytest.approx(between / total, abs=1e-12)


def test_two_features_of_known_size_share_the_variance() -> None:
    """A coordinate of size 3 and one of size 1: 9 and 1 of 10, in closed form, and all of it together."""
    one, two = np.array([0, 0, 1, 1] * 4), np.array([0, 1, 0, 1] * 4)
    values = np.stack([3.0 * one, 1.0 * two], 1)
    shares = [float(explained(values, labels, np.ones((1, 16)))[0]) for labels in (one, two, 2 * one + two)]
    assert shares == pytest.approx([0.9, 0.1, 1.0])
    assert np.isnan(explained(np.zeros((16, 2)), one, np.ones((1, 16)))).all()


def test_the_last_token_explains_the_embedding_and_a_random_label_nothing() -> None:
    """In a tiny model whose last tokens are two: all of the embedding's variance; a coin explains about 1 / rows."""
    model = Model.load(cases.tiny("llama"))
    draw = torch.Generator().manual_seed(0)
    last, coin = (torch.randint(0, 2, (200,), generator=draw) for _ in range(2))
    tokens = torch.cat([torch.randint(3, 90, (200, 5), generator=draw), (5 + last)[:, None]], 1)
    table = variances(model, tokens, {"last": last, "coin": coin})
    assert table["part"].unique(maintain_order=True).to_list() == ["embed", "L0.resid.post", "L1.resid.post"]
    rows = {(part, name): (value, low, high) for part, name, value, low, high, _ in table.rows()}
    assert rows["embed", "last"][0] == pytest.approx(1.0, abs=1e-6)
    assert all(value < 0.04 and low <= high for (_, name), (value, low, high) in rows.items() if name == "coin")
    assert all(low <= value + 0.02 and value <= high + 1e-9 for (_, name), (value, low, high) in rows.items() if name == "last")


def test_what_cannot_be() -> None:
    model, tokens = cases.model_of("llama"), torch.full((8, 3), 5)
    with pytest.raises(MeasureError, match="give 8 or more"):
        variances(model, tokens[:4], {"x": torch.arange(4)})
    with pytest.raises(MeasureError, match="'x' has one label"):
        variances(model, tokens, {"x": torch.zeros(8, dtype=torch.long)})
