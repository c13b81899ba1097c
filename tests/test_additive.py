"""Additivity of parts: wired models in closed form, the decomposition by its definition and as a regression."""

from itertools import combinations

import numpy as np
import pytest
import torch

from cases import tiny
from patchclamp.dependence.additive import additivity, walsh
from patchclamp.errors import GateError, PatchclampError
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.zoo.recipes._recipe import attention_only
from test_interactions import built
from test_parts import examples

SETS = {"redundant": ("L0.h1", "L1.h2", "L0.h0"), "and": ("L0.h1", "L0.h2", "L0.h3"), "interfering": ("L0.h1", "L1.h3", "L0.h0")}


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_the_closed_form_of_the_wiring(name: str) -> None:
    """Effects of all sets of three heads to 1e-5 of the plain numpy forward pass; the planted relation in `beyond` and in the orders."""
    one, parts, some = built(name)
    heads = SETS[name]
    found = additivity(parts, some, parts.fallback("zero"), heads[::-1], metric="logit_diff")
    assert found.parts == tuple(sorted(heads)) and found.about["fallback"] == "zero"

    def benefit(*shut: str) -> float:
        values = [one.logits(item.clean, dict.fromkeys(shut, 0.0), None)[-1] for item in some]
        return float(np.mean([v[i.answers[0][0]] - v[i.wrong[0][0]] for v, i in zip(values, some, strict=True)]))

    effects = {closed: benefit() - benefit(*closed) for size in (1, 2, 3) for closed in combinations(found.parts, size)}
    for row in found.sets.iter_rows(named=True):
        closed = tuple(row["closed"].split())
        assert len(closed) == row["size"] and row["effect"] == pytest.approx(effects[closed], abs=1e-5)
        assert row["beyond"] == pytest.approx(effects[closed] - sum(effects[part,] for part in closed), abs=1e-5)
        assert row["low"] - 1e-9 <= row["effect"] <= row["high"] + 1e-9
    for row in found.alone.iter_rows(named=True):
        others = tuple(part for part in found.parts if part != row["part"])
        assert row["first"] == pytest.approx(effects[row["part"],], abs=1e-5)
        assert row["last"] == pytest.approx(effects[found.parts] - effects[others], abs=1e-5)
    pair = found.sets.filter(closed=" ".join(sorted(heads[:2])))
    sign = {"redundant": 1, "and": -1, "interfering": 0}[name]
    assert np.sign(np.round(pair["beyond"][0], 4)) == sign
    share = dict(found.orders.select("order", "share").iter_rows())
    assert sum(share.values()) == pytest.approx(1)
    assert share[1] > 1 - 1e-9 if not sign else share[2] > 0.1


def test_shares_are_what_regressions_on_closings_explain() -> None:
    """All four heads of two layers of a random model: R2 of least squares on the closings alone, and with their products, to 1e-9; a
    part's effects are measured one by one."""
    parts, some = nodes(Model.load(tiny("gpt2", dtype=torch.float64))), examples(12)
    names = [label for label in parts.labels if str(label).count(".h")][:4]
    rule = parts.fallback("resample")
    found = additivity(parts, some, rule, names, batch_size=5, metric="nll")
    settings = [shut for size in range(5) for shut in combinations(names, size)]
    batch = some.batch()
    runs = [parts.measure(batch, parts.without(shut), rule, METRICS["nll"])[0] for shut in settings]
    values = -torch.stack(runs).double().numpy().mean(1)
    x = np.array([[part in shut for part in names] for shut in settings], dtype=float)
    pairs = np.stack([x[:, i] * x[:, j] for i, j in combinations(range(4), 2)], 1)
    explained = []
    for columns in (x, np.hstack([x, pairs])):
        design = np.hstack([np.ones((16, 1)), columns])
        left = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
        explained.append(1 - left.var() / values.var())
    share = found.orders["share"].to_numpy()
    np.testing.assert_allclose(np.cumsum(share)[:2], explained, atol=1e-9)
    assert share.sum() == pytest.approx(1) and (found.orders["low"] <= found.orders["high"]).all()
    effects = {" ".join(map(str, shut)): values[0] - value for shut, value in zip(settings, values, strict=True)}
    assert found.sets["effect"].to_list() == pytest.approx([effects[closed] for closed in found.sets["closed"]], abs=1e-9)
    assert found.about["open"] == pytest.approx(values[0])


def test_heads_that_are_read_by_the_logits_alone_add_up_where_the_norm_is_held() -> None:
    """A Llama whose MLPs write nothing, its last layer's four heads, logit difference: order 1 is all there is, to 1e-6 (norms compute in
    float32), with the norm held; free, it is not."""
    hf = attention_only(tiny("llama"))
    parts, some = nodes(Model.load(hf)), examples(12)
    heads = [str(label) for label in parts.labels if str(label).startswith("L1.h")]
    rule = parts.fallback("mean", fit=some)
    held, free = (additivity(parts, some, rule, heads, metric="logit_diff", frozen_norm=frozen) for frozen in (True, False))
    assert held.orders["share"][0] == pytest.approx(1, abs=1e-6) and held.about["norm"] == "frozen"
    assert held.sets["beyond"].abs().max() < 1e-5  # type: ignore[operator]
    assert free.sets["beyond"].abs().max() > 1e-4  # type: ignore[operator]
    assert 1 - free.orders["share"][0] > 100 * (1 - held.orders["share"][0])


def test_the_decomposition_is_its_definition() -> None:
    values = np.random.default_rng(0).normal(size=(16, 2))
    sign = np.array([[(-1.0) ** (s & t).bit_count() for s in range(16)] for t in range(16)])
    np.testing.assert_allclose(walsh(values), sign @ values / 16, atol=1e-12)


def test_what_cannot_be_closed_is_refused() -> None:
    _, parts, some = built("redundant")
    rule = parts.fallback("zero")
    with pytest.raises(GateError, match="not among"):
        additivity(parts, some, rule, ["L0.h0", "L9.h0"])
    for names in (["L0.h0"], ["L0.h0", "L0.h0"], None):
        if names is None and len(parts.counted) <= 12:
            continue
        with pytest.raises(PatchclampError, match="name 2 to 12 that differ"):
            additivity(parts, some, rule, names)
