"""Episodic memory: patterns of known lags, the wired induction model, and heads that are closed."""

import numpy as np
import pytest
import torch

import cases
from patchclamp.errors import MeasureError
from patchclamp.models.model import Model
from patchclamp.units import repeated
from patchclamp.units.recall import _of_layer, half_of, recall, recalled, second_times, serial_recall, shuffled, without
from patchclamp.zoo import wired


def numbers(table) -> dict[tuple[str, str], float]:  # type: ignore[no-untyped-def]
    return {(part, name): value for part, name, value, *_ in table.rows()}


def test_where_the_list_is() -> None:
    assert half_of(torch.tensor([[1, 5, 6, 7, 5, 6, 7], [1, 8, 9, 5, 8, 9, 5]])) == (1, 3)
    mixed = torch.tensor([[1, 5, 6, 7, 6, 7, 5], [1, 8, 9, 5, 5, 8, 9]])
    assert half_of(mixed) == (1, 3)
    assert second_times(mixed, 1, 3).tolist() == [[6, 4, 5], [5, 6, 4]]
    with pytest.raises(MeasureError, match="same order"):
        half_of(mixed, ordered=True)
    for rows in ([[5, 6, 7, 8]], [[5, 5, 5, 5]], [[5, 6, 5, 6], [5, 6, 6, 7]]):
        with pytest.raises(MeasureError, match="said twice"):
            half_of(torch.tensor(rows))


def test_shares_by_lag_are_loops() -> None:
    n, length, start, far, edge = 17, 8, 1, 3, 2
    pattern = torch.rand(2, 3, n, n, generator=torch.Generator().manual_seed(0)).tril()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    order = torch.stack([torch.randperm(length, generator=torch.Generator().manual_seed(seed)) for seed in range(2)])
    tokens = torch.cat([torch.ones(2, 1, dtype=torch.long), torch.arange(5, 13).expand(2, -1), order + 5], 1)
    found = _of_layer(recalled(pattern, second_times(tokens, start, length), start), far, edge)
    for row in range(2):
        where = {int(item): start + length + place for place, item in enumerate(order[row])}
        for h in range(3):
            block = np.array([[float(pattern[row, h, where[i], start + j]) for j in range(length)] for i in range(length)])
            by_lag = {}
            for lag in range(-far, far + 1):
                items = [i for i in range(length) if 0 <= i + lag < length]
                by_lag[lag] = sum(block[i, i + lag] for i in items) / sum(block[i].sum() for i in items)
            for lag, value in by_lag.items():
                assert float(found[f"crp.{lag:+d}" if lag else "crp.0"][row, h]) == pytest.approx(value)
            ahead, behind = sum(by_lag[k] for k in (1, 2, 3)), sum(by_lag[-k] for k in (1, 2, 3))
            assert float(found["asymmetry"][row, h]) == pytest.approx((ahead - behind) / (ahead + behind))
            distant = np.mean([by_lag[k] for k in (-3, -2, 2, 3)])
            assert float(found["contiguity"][row, h]) == pytest.approx((by_lag[1] + by_lag[-1]) / 2 - distant)
            place = []
            for j in range(length):
                items = [i for i in range(length) if j - i not in (0, 1)]
                place.append(sum(block[i, j] for i in items) / sum(block[i].sum() for i in items))
            assert float(found["primacy"][row, h]) == pytest.approx(np.mean(place[:2]) - np.mean(place[2:6]))
            assert float(found["recency"][row, h]) == pytest.approx(np.mean(place[6:]) - np.mean(place[2:6]))
            assert float(found["listed"][row, h]) == pytest.approx(block.sum(1).mean())


def test_attention_spread_evenly_has_no_memory() -> None:
    n, length = 21, 10
    even = torch.ones(1, 1, n, n).tril() / torch.arange(1, n + 1)[None, None, :, None]
    again = torch.arange(1 + length, n)[torch.randperm(length, generator=torch.Generator().manual_seed(0))][None]
    found = _of_layer(recalled(even, again, 1), 4, 3)
    assert all(float(value) == pytest.approx(0.1) for name, value in found.items() if name.startswith("crp"))
    for name in ("asymmetry", "contiguity", "primacy", "recency"):
        assert float(found[name]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_wired_induction_head_recalls_what_comes_next(family: str) -> None:
    made = wired("induction", family)
    model = Model.load(made.hf, tokenizer=made.tokenizer)
    concepts = [
        token for token in range(len(made.wiring.vocabulary)) if made.wiring.embed[token, made.wiring.space["concept"]].any()
    ]
    order = torch.stack([torch.randperm(len(concepts), generator=torch.Generator().manual_seed(seed))[:10] for seed in range(6)])
    mixed = torch.stack([row[torch.randperm(10, generator=torch.Generator().manual_seed(9))] for row in order])
    rows = torch.cat([torch.ones(6, 1, dtype=torch.long), torch.tensor(concepts)[order], torch.tensor(concepts)[mixed]], 1)
    found = numbers(recall(model, rows))
    assert found["L1.h2", "crp.+1"] > 0.9 and found["L1.h2", "asymmetry"] > 0.99 and found["L1.h2", "contiguity"] > 0.4
    assert found["model", "serial"] > 0.9 and found["model", "chance"] == pytest.approx(0.1)
    closed = without(model, ["L1.h2"], rows)
    after = numbers(closed)
    assert after["model", "serial"] > 0.9 and after["model", "serial.without"] < 0.3 and after["model", "change"] < -0.7
    assert len(closed) == 3 + 2 * 9
    idle = numbers(without(model, ["L1.h0"], rows, how="mean"))
    assert idle["model", "change"] == 0


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "gemma2", "bloom"])
def test_families_and_serial_recall_as_a_loop(name: str) -> None:
    model = cases.model_of(name)
    rows = shuffled(model, n=4, length=7)
    with torch.no_grad():
        best = model.hf(input_ids=rows).logits.argmax(-1)
    again = [[rows[row].tolist().index(int(rows[row, i]), 7) for i in range(6)] for row in range(4)]
    expected = [[float(best[row, again[row][i]] == rows[row, i + 1]) for i in range(6)] for row in range(4)]
    np.testing.assert_array_equal(serial_recall(model, rows), expected)
    found = recall(model, rows, edge=2)
    assert len(found.filter(name="asymmetry")) == 8 and found.filter(part="model", name="serial")["value"][0] == np.mean(expected)


def test_what_cannot_be_measured_is_refused() -> None:
    model = cases.model_of("gpt2")
    with pytest.raises(MeasureError, match="no middle"):
        recall(model, repeated(model, n=2, length=5))
    with pytest.raises(MeasureError, match="zero or mean"):
        without(model, [], None)
