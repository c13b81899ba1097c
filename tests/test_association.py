"""Measures of association against closed forms and brute force; nulls, conditions and the causal column."""

from functools import cache

import numpy as np
import pytest
import torch

from cases import tiny
from patchclamp.dependence.association import (
    MEASURES,
    Recorded,
    associate,
    association,
    attention_row,
    cka,
    coco,
    composed,
    gaussian,
    gaussian_gram,
    hsic,
    ksg,
    linear_gram,
    log_ratio_partial,
    partial_correlations,
    recorded,
    stability,
    support,
    support_by_ebic,
    unbiased_hsic,
)
from patchclamp.dependence.association.units import residual
from patchclamp.dependence.table import Dependence
from patchclamp.errors import PatchclampError
from patchclamp.methods import attribute
from patchclamp.models.model import Model
from patchclamp.parts import Nodes, nodes
from patchclamp.zoo import wired
from patchclamp.zoo._wired import Wired
from test_parts import examples


def drawn(values: np.ndarray, tokens: int = 1, token: np.ndarray | None = None) -> Recorded:
    """Numbers [row, part] as outputs of made-up parts; `tokens` rows in a row are a prompt."""
    rows = len(values)
    number = np.arange(rows) // tokens
    names = tuple(f"L{part}.mlp" for part in range(values.shape[1]))
    return Recorded(
        names, tuple(column[:, None].astype(float) for column in values.T), number, np.arange(rows) % tokens,
        np.zeros(rows, dtype=int) if token is None else token, tuple(map(str, range(number[-1] + 1))), {}, {"what": "numbers"},
    )  # fmt: skip


@cache
def built(name: str) -> tuple[Wired, Nodes]:
    one = wired(name)
    return one, nodes(Model.load(one.hf, tokenizer=one.tokenizer))


def two_normal(rho: float, n: int = 2000, seed: int = 0, width: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width))
    return x, rho * x + np.sqrt(1 - rho**2) * rng.normal(size=(n, width))


# --- mutual information: bars


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("rho", [0.3, 0.6, 0.9])
def test_ksg_is_within_five_hundredths_of_the_truth(rho: float, width: int):
    """Each coordinate adds -1/2 log(1 - rho^2) nat; mean of 3 draws of n = 2000, whose spread is about .02."""
    truth = -0.5 * width * np.log(1 - rho**2)
    found = [ksg(*two_normal(rho, seed=seed, width=width)) for seed in range(3)]
    assert np.mean(found) == pytest.approx(truth, abs=0.05)


def test_ksg_null_is_small_and_rises_with_the_correlation():
    rng = np.random.default_rng(0)
    x, y = two_normal(0.9)
    assert abs(np.mean([ksg(x, y[rng.permutation(2000)]) for _ in range(10)])) < 0.03
    found = [ksg(*two_normal(rho, seed=4)) for rho in (0.0, 0.2, 0.4, 0.6, 0.8, 0.95)]
    assert found == sorted(found)


def test_ksg_by_trees_equals_ksg_by_all_distances():
    from patchclamp.dependence.association import information

    for width in (1, 2):
        x, y = two_normal(0.7, n=200, width=width)
        one, two = information._spread(x, 0), information._spread(y, 1)
        by_trees = information._by_trees(one, two, 3)
        assert by_trees == pytest.approx(information._by_distances(*map(information._distances, (one, two)), 3), abs=1e-12)


def test_gaussian_information_is_the_closed_form_once_its_null_is_taken_off():
    """One correlated coordinate of 10 on either side: truth .830 nat; 100 / 2n of bias is .025 in each of 5 draws."""
    rng, truth = np.random.default_rng(0), -0.5 * np.log(1 - 0.81)
    raw, corrected = [], []
    for seed in range(5):
        x, y = two_normal(0.9, seed=seed)
        x, y = (np.hstack([side, rng.normal(size=(2000, 9))]) for side in (x, y))
        raw.append(gaussian(x, y))
        corrected.append(raw[-1] - np.mean([gaussian(x, y[rng.permutation(2000)]) for _ in range(10)]))
    assert np.mean(raw) - truth > 0.015
    assert np.mean(corrected) == pytest.approx(truth, abs=0.02)
    with pytest.raises(PatchclampError, match="always correlate perfectly"):
        gaussian(rng.normal(size=(10, 6)), rng.normal(size=(10, 6)))


# --- partial correlation


def chain(n: int, parts: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of x_i = .6 x_(i-1) + noise; and which pairs are neighbours."""
    rng = np.random.default_rng(seed)
    x = [rng.normal(size=n)]
    for _ in range(parts - 1):
        x.append(0.6 * x[-1] + 0.8 * rng.normal(size=n))
    return np.stack(x, 1), np.abs(np.subtract.outer(np.arange(parts), np.arange(parts))) == 1


def auroc(score: np.ndarray, truth: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    upper = np.triu_indices(len(score), 1)
    return float(roc_auc_score(truth[upper], np.abs(score[upper])))


def test_partial_correlation_is_the_regression_of_residuals():
    """Against least squares by hand, with the empirical covariance; 1e-10 is rounding."""
    rows = np.random.default_rng(0).normal(size=(50, 5)) @ np.random.default_rng(1).normal(size=(5, 5))
    found = partial_correlations(rows, "empirical")
    rest = np.column_stack([np.ones(50), rows[:, 2:]])
    left = [rows[:, part] - rest @ np.linalg.lstsq(rest, rows[:, part], rcond=None)[0] for part in (0, 1)]
    assert found[0, 1] == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-10)
    many, _ = chain(2000, parts=5)  # shrunk by about 5 / 2000
    table = associate(drawn(many), measure="partial correlation", given=(), permutations=9, blocks=0)
    np.testing.assert_allclose(
        table.matrix()[~np.eye(5, dtype=bool)], partial_correlations(many, "empirical")[~np.eye(5, dtype=bool)], atol=0.02
    )


@pytest.mark.parametrize(("n", "bar"), [(60, 0.97), (200, 0.999)])
def test_a_chain_is_told_from_its_echoes(n: int, bar: float):
    """Bars of a chain of 40: measured .985 at 60 rows, 1.0 at 200; mean of 3 draws."""
    found = [auroc(partial_correlations(rows), truth) for rows, truth in (chain(n, seed=seed) for seed in range(3))]
    assert np.mean(found) > bar
    assert np.mean([auroc(partial_correlations(chain(n, seed=s)[0], "oas"), chain(n)[1]) for s in range(3)]) > bar


@pytest.mark.parametrize("how", ["ebic", "permutation"])
def test_the_chosen_support_is_right(how: str):
    """Cross-validated penalties have precision .22 to .29 here. Chain of 20 at 200 rows."""
    rows, truth = chain(200, parts=20, seed=1)
    chosen = support(rows, how)
    assert (chosen == chosen.T).all() and not chosen.diagonal().any()
    precision, recall = (chosen & truth).sum() / chosen.sum(), (chosen & truth).sum() / truth.sum()
    assert precision > 0.85 and recall > 0.85, (precision, recall)


def test_stable_pairs_are_true_ones():
    """By default at most one false pair on average, which bounds how many true ones can stand; with `edges` the user says."""
    rows, truth = chain(200, parts=20, seed=1)
    chosen, often = stability(rows)
    assert (chosen & truth).sum() / 2 >= 6 and (chosen & ~truth).sum() / 2 <= 1
    more = stability(rows, edges=22, threshold=0.75)[0]
    assert (more & truth).sum() / truth.sum() > 0.85 and (more & truth).sum() / more.sum() > 0.85
    assert often.max() <= 1 and (support(rows, "stability") == chosen).all()


def test_supports_are_empty_where_there_is_nothing():
    rows = np.random.default_rng(5).normal(size=(200, 15))
    assert support_by_ebic(rows).sum() == 0
    assert stability(rows, [str(row // 2) for row in range(200)])[0].sum() <= 2  # one false pair on average at most
    with pytest.raises(PatchclampError, match="cross-validation"):
        support(rows, "cv")


def test_a_fork_is_no_link_and_a_collider_is_one_only_given_its_effect():
    """a <- c -> b: correlated, not given c. a -> c <- b: not correlated, but given c."""
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 1500))
    fork = associate(drawn(np.stack([a + c, b + c, c], 1)), given=(), permutations=99, blocks=0)
    forked = associate(drawn(np.stack([a + c, b + c, c], 1)), measure="partial correlation", given=(), permutations=99, blocks=0)
    assert fork.pair("L0.mlp", "L1.mlp")["p"] == 0.01 and forked.pair("L0.mlp", "L1.mlp")["p"] > 0.05
    assert forked.pair("L0.mlp", "L2.mlp")["p"] == 0.01
    apart = associate(drawn(np.stack([a, b, a + b + c], 1)), given=(), permutations=99, blocks=0)
    collided = associate(
        drawn(np.stack([a, b, a + b + c], 1)), measure="partial correlation", given=(), permutations=99, blocks=0
    )
    assert apart.pair("L0.mlp", "L1.mlp")["p"] > 0.05 and collided.pair("L0.mlp", "L1.mlp")["p"] == 0.01
    assert collided.pair("L0.mlp", "L1.mlp")["score"] == pytest.approx(-0.5, abs=0.05)


# --- compositions


def test_log_ratio_partial_correlations_do_not_depend_on_the_reference():
    """K_ij is the inverse covariance of log(x_i / x_r), whichever part r is the reference; 1e-6 relative."""
    rng = np.random.default_rng(0)
    logs = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6))
    shares = np.exp(logs) / np.exp(logs).sum(1, keepdims=True)
    theta, variance = log_ratio_partial(shares, "empirical", floor=1e-300)
    for reference in (5, 2):
        others = [part for part in range(6) if part != reference]
        ratios = np.log(shares[:, others] / shares[:, [reference]])
        inverse = np.linalg.inv(np.cov(ratios.T, bias=True))
        scale = np.sqrt(np.diag(inverse))
        wanted = -inverse / np.outer(scale, scale) + 2 * np.eye(5)
        np.testing.assert_allclose(theta[np.ix_(others, others)], wanted, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(variance[others], 1 / np.diag(inverse), rtol=1e-6)


def test_shares_compete_and_log_ratios_do_not():
    """Independent amounts: their shares correlate because they sum to one, their log ratios have no partial correlation."""
    rng = np.random.default_rng(1)
    amounts = np.exp(rng.normal(size=(600, 8)) * np.array([2, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]))
    sizes = drawn(amounts / amounts.sum(1, keepdims=True))
    plain = associate(sizes, given=(), permutations=199, blocks=0).table
    ratio = associate(composed(sizes), measure="log-ratio partial correlation", given=(), permutations=199, blocks=0)
    assert (plain["q"] < 0.05).mean() > 0.5
    # against one common reference every ratio has the others' partial correlation 1 / (parts - 1) or less, not 0: so few are clear
    assert ratio.table["score"].abs().max() < plain["score"].abs().max()
    with pytest.raises(PatchclampError, match="no lag"):
        associate(drawn(amounts, tokens=2), measure="log-ratio partial correlation", lag=1, given=())


# --- kernels


def test_kernels_equal_sums_over_all_rows():
    """HSIC, its unbiased form, COCO and CKA by loops over indices and by singular values of features; 1e-12 is rounding."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 7, 3))
    k, m = gaussian_gram(x), gaussian_gram(y, 2.0)
    assert m[0, 1] == pytest.approx(np.exp(-((y[0] - y[1]) ** 2).sum() / 8))
    n = 7
    h = np.eye(n) - 1 / n
    assert hsic(k, m) == pytest.approx(np.trace(k @ h @ m @ h) / n**2, abs=1e-12)
    off = [(i, j) for i in range(n) for j in range(n) if i != j]
    first = sum(k[i, j] * m[i, j] for i, j in off) / (n * (n - 1))
    second = sum(k[i, j] * m[q, r] for i, j in off for q, r in off if len({i, j, q, r}) == 4)
    third = sum(k[i, j] * m[i, q] for i, j in off for q in range(n) if q not in (i, j))
    falling = n * (n - 1) * (n - 2)
    assert unbiased_hsic(k, m) == pytest.approx(first + second / (falling * (n - 3)) - 2 * third / falling, abs=1e-12)
    cx, cy = x - x.mean(0), y - y.mean(0)
    wanted = np.linalg.norm(cx.T @ cy) ** 2 / (np.linalg.norm(cx.T @ cx) * np.linalg.norm(cy.T @ cy))
    assert cka(x, y, debiased=False) == pytest.approx(wanted, abs=1e-12)
    assert coco(linear_gram(x), linear_gram(y)) == pytest.approx(np.linalg.norm(cx.T @ cy, 2) / n, abs=1e-9)


def test_debiased_cka_is_nothing_where_there_is_nothing_and_one_for_a_rotation():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 40))
    turn = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    assert cka(x, 3 * x @ turn) == pytest.approx(1, abs=1e-12)
    found = [cka(rng.normal(size=(60, 40)), rng.normal(size=(60, 40)), debiased=one) for one in (True, False)]
    assert abs(found[0]) < 0.1 and found[1] > 0.3


# --- recording


def test_contributions_are_the_direct_shares_of_the_logit_difference():
    """interfering: the helper gives 8 logits to the right word, the opponent takes 5, at the last token; nothing else gives any."""
    one, parts = built("interfering")
    outputs = recorded(parts, one.task.examples(one.tokenizer, 12, seed=3), last=1, batch_size=5)
    assert len(outputs) == 12 and set(outputs.position) == {7}
    np.testing.assert_allclose(outputs["L0.h1"], 8, atol=1e-5)
    np.testing.assert_allclose(outputs["L1.h3"], -5, atol=1e-5)
    np.testing.assert_allclose(outputs["L0.mlp"], 0, atol=1e-5)


def test_what_is_recorded_is_what_the_model_writes():
    one, parts = built("common")
    some = one.task.examples(one.tokenizer, 6, seed=1)
    vector, norm = (recorded(parts, some, what, batch_size=4) for what in ("vector", "norm"))
    kept = parts.model.record(some.batch(), ["L1.h1.write", "L1.mlp.write"])
    wanted = [value.detach().flatten(0, 1).double().numpy() for value in kept.values()]
    np.testing.assert_allclose(vector["L1.h1"], wanted[0], atol=1e-12)
    np.testing.assert_allclose(norm["L1.mlp"][:, 0], np.linalg.norm(wanted[1], axis=1), atol=1e-12)
    direction = torch.randn(parts.model.width, generator=torch.Generator().manual_seed(0)).double()
    np.testing.assert_allclose(recorded(parts, some, direction)["L1.h1"][:, 0], wanted[0] @ direction.numpy(), atol=1e-10)
    words = one.wiring.vocabulary
    assert [words[token] for token in vector.spans["cue"]] == [item.pair.clean[slice(*item.pair.spans["cue"])] for item in some]
    with pytest.raises(PatchclampError, match="not as 'loudness'"):
        recorded(parts, some, "loudness")


# --- where statistics mislead


def test_a_common_input_is_no_coupling():
    """Both hear the cue: correlated .5, not given the cue, and closing one changes nothing of what the other does."""
    one, parts = built("common")
    some = one.task.examples(one.tokenizer, 150, seed=2)
    outputs = recorded(parts, some, "norm", last=1).only(("L1.h1", "L1.h2"))
    effect = attribute(parts, some, parts.fallback("zero"), "exact")
    causal = Dependence.of(("L1.h1", "L1.h2"), [(0, 1)], [0.0], {"method": "interaction"}, low=[-1e-4], high=[1e-4])
    assert abs(effect["L1.h2"]["score"]) < 1e-4  # it is unread, so no closing of it can interact with anything
    naive = associate(outputs, causal=causal, permutations=199)
    row = naive.pair("L1.h1", "L1.h2")
    assert row["q"] == 0.005 and row["score"] == pytest.approx(0.5, abs=0.15) and row["low"] > 0.2
    assert row["causal"] == 0.0 and naive.misleading()["a"].to_list() == ["L1.h1"]
    given = associate(outputs, given=("cue",), causal=causal, permutations=199)
    assert given.pair("L1.h1", "L1.h2")["p"] > 0.05 and not len(given.misleading())


def test_an_association_is_not_shown_without_its_causal_counterpart():
    rows = np.random.default_rng(0).normal(size=(40, 3))
    alone = associate(drawn(rows), given=(), permutations=19)
    assert "not compared with intervention" in str(alone) and alone.table["causal"].null_count() == 3
    causal = Dependence.of(alone.parts, [(0, 1)], [0.5], {}, directed=True, low=[0.4], high=[0.6])
    both = associate(drawn(rows), given=(), permutations=19, causal=causal)
    assert "not compared" not in str(both) and "causal +0.5000" in str(both) and "causal: not measured" in str(both)
    assert both.pair("L0.mlp", "L1.mlp")["causal_high"] == 0.6


def test_a_lag_finds_what_comes_later():
    """b repeats a one token later: nothing at lag 0, all of it at lag 1, in that direction only."""
    rng = np.random.default_rng(0)
    a, noise = rng.normal(size=(2, 100, 6))
    b = np.concatenate([noise[:, :1], a[:, :-1]], 1) + 0.1 * noise
    outputs = drawn(np.stack([a.ravel(), b.ravel()], 1), tokens=6)
    now, then = (associate(outputs, lag=lag, permutations=99, given=("position",)) for lag in (0, 1))
    assert now.pair("L0.mlp", "L1.mlp")["p"] > 0.05 and not now.directed
    assert then.directed and then.pair("L0.mlp", "L1.mlp")["score"] > 0.95
    assert then.pair("L1.mlp", "L0.mlp")["p"] > 0.05


def test_token_identity_is_taken_off():
    """Both follow the token that stands there; given it, nothing is left."""
    rng = np.random.default_rng(1)
    token = rng.integers(0, 5, 400)
    values = rng.normal(size=5)[token][:, None] + 0.5 * rng.normal(size=(400, 2))
    outputs = drawn(values, tokens=4, token=token)
    assert associate(outputs, given=(), permutations=99).table["p"][0] == 0.01
    assert associate(outputs, given=("position", "token"), permutations=99).table["p"][0] > 0.05
    exact = associate(drawn(rng.normal(size=5)[token][:, None] * np.ones(2), token=token), permutations=9)
    assert exact.table["idle"].all() and exact.table["p"].to_list() == [1.0]


def test_what_cannot_be_asked_is_refused():
    rows = np.random.default_rng(0).normal(size=(40, 2))
    for options, match in (
        ({"measure": "vibes"}, "no measure of association 'vibes'"),
        ({"given": ("mood",)}, "given 'mood'"),
        ({"lag": 5}, "no prompt has two recorded tokens 5 apart"),
    ):
        with pytest.raises(PatchclampError, match=match):
            associate(drawn(rows), **options)
    with pytest.raises(PatchclampError, match="could not change places"):
        associate(drawn(rows, tokens=20), given=())
    wide = drawn(rows).with_values(tuple(np.random.default_rng(s).normal(size=(40, 4)) for s in range(2)))
    with pytest.warns(UserWarning, match="falls far short above 3 dimensions"):
        associate(wide, measure="mutual information", given=(), permutations=9, blocks=0)
    with pytest.raises(PatchclampError, match="compares single numbers"):
        associate(wide, given=())
    with pytest.raises(PatchclampError, match="one number per part"):
        composed(wide)
    with pytest.raises(PatchclampError, match=r"above \.5"):
        stability(rows, threshold=0.5)
    with pytest.raises(PatchclampError, match=r"a head's, and L0\.mlp is none"):
        attention_row(Model.load(tiny("gpt2")), "L0.mlp", examples(3))


def test_what_is_given_is_taken_off_by_least_squares():
    """Two factors whose levels hang together in one ring of 120, where means taken off in turn creep; and a third beside them."""
    one = np.repeat(np.arange(60), 2)
    codes = [one, np.roll(one, 1), np.arange(120) % 7]
    values = np.random.default_rng(0).normal(size=(120, 2))
    for some in (codes[:1], codes[:2], codes):
        design = np.hstack([np.eye(each.max() + 1)[each] for each in some])
        wanted = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
        np.testing.assert_allclose(residual(values, some), wanted, atol=1e-10)
    np.testing.assert_allclose(residual(values, []), values - values.mean(0), atol=1e-12)


def test_attention_rows_are_compositions():
    one, parts = built("induction")
    rows = attention_row(parts.model, "L0.h1", one.task.examples(one.tokenizer, 20, seed=1))
    np.testing.assert_allclose(np.hstack(rows.values).sum(1), 1, atol=1e-6)
    assert rows.parts[0] == "L0.h1@0" and float(rows[rows.parts[-2]].min()) > 0.99  # the previous token has it all
    with pytest.raises(PatchclampError, match="the same in every row"):
        associate(composed(rows), measure="log-ratio partial correlation", given=(), permutations=9)
    whole = attention_row(Model.load(tiny("gpt2")), "L0.h0", examples(60))
    table = associate(composed(whole, floor=1e-9), measure="log-ratio partial correlation", given=(), permutations=9, blocks=0)
    assert len(table) == len(whole.parts) * (len(whole.parts) - 1) // 2


# --- every measure, whole


@pytest.mark.parametrize(
    "measure", [name for name in MEASURES if name not in ("neural information", "log-ratio partial correlation")]
)
def test_every_measure_sees_a_strong_link_and_its_table_is_whole(measure: str, tmp_path):
    rng = np.random.default_rng(2)
    a, b, c = rng.normal(size=(3, 80))
    outputs = drawn(np.stack([a, a + 0.3 * b, c], 1))
    table = associate(outputs, measure=measure, given=(), permutations=19, blocks=5)
    linked, apart = table.pair("L0.mlp", "L1.mlp"), table.pair("L0.mlp", "L2.mlp")
    assert linked["p"] == 0.05 and linked["score"] > linked["null_95"] > apart["null_mean"]
    assert linked["score"] > 2 * abs(apart["score"])
    assert linked["low"] < linked["score"] < linked["high"]
    again = associate(outputs, measure=measure, given=(), permutations=19, blocks=5)
    assert again.table.equals(table.table)
    table.save(tmp_path / "pairs.parquet")
    loaded = Dependence.load(tmp_path / "pairs.parquet")
    assert loaded.table.equals(table.table) and loaded.about["units"] == 80


def test_association_from_parts_and_prompts():
    one, parts = built("common")
    table = association(parts, one.task.examples(one.tokenizer, 30, seed=1), what="norm", permutations=19, most_rows=120)
    assert table.about["rows"] <= 120 and table.about["given"] == "position, token" and table.about["n"] <= 30
    assert len(table) == 45 and table.table["idle"].sum() > 0  # heads that write nothing have nothing to compare


def test_groups_of_many_sizes_are_cut_to_one_so_that_the_null_moves_all_of_them():
    """Groups of 1 to 4 prompts, a strong link: the null's mean is 0 only if no unit stays beside its own."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(60, 1))
    outputs = drawn(np.hstack([a, a + 0.2 * rng.normal(size=(60, 1))]))
    names = [f"g{number}" for number in range(24) for _ in range(number % 4 + 1)]
    grouped = Recorded(outputs.parts, outputs.values, outputs.example, outputs.position, outputs.token, tuple(names), {}, {})
    table = associate(grouped, given=(), permutations=199)
    assert table.about["units"] == 18 and table.about["rows"] == 36  # 18 groups have 2 or more: 36 is the most that can be kept
    assert abs(table.table["null_mean"][0]) < 0.05 and table.table["p"][0] == 0.005


def test_the_null_of_few_rows_stays_within_bounds():
    """20 rows of 30 parts: theta by the shrunk inverse; null correlations of residuals do not run above 1."""
    table = associate(
        drawn(np.random.default_rng(1).normal(size=(20, 30))), measure="partial correlation", given=(), permutations=49, blocks=0
    )
    assert table.table["null_95"].max() < 1 and (table.table["q"] > 0.05).all()
