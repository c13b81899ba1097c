"""Families of mechanism: found where they were planted, on unseen prompts too, and none where there is one mechanism or one cloud."""

from functools import cache

import numpy as np
import pytest

from patchclamp.errors import TaskError
from patchclamp.gating.dynamic.features import inputs_of
from patchclamp.gating.mechanisms import cluster, directions, mechanisms, silhouette, told_by
from patchclamp.methods import counted, effects, groups_of
from patchclamp.models.model import Model
from patchclamp.parts import nodes
from patchclamp.sites import Site
from patchclamp.zoo import wired

DRAWS = 39  # p is .025 at least


@cache
def measured(name: str):
    one = wired(name)
    parts = nodes(Model.load(one.hf.float(), tokenizer=one.tokenizer))
    split = one.task.split(one.tokenizer, 96, 0)
    fallback = parts.fallback("resample")
    return one, parts, split, [effects(parts, some, fallback).double().numpy() for some in (split.fit, split.select)]


def test_two_kinds_of_prompt_are_two_families_told_by_their_cue() -> None:
    one, parts, split, (fitted, unseen) = measured("switch")
    found = mechanisms(counted(parts), fitted, {"method": "exact"}, groups_of(split.fit), draws=DRAWS)
    assert found.count == 2 and max(found.p.values()) < 0.05 and "2 families" in found.reason
    cues = [[one.truth.cue(example.pair.clean) for example in some] for some in (split.fit, split.select)]
    name = {number: cues[0][int(np.flatnonzero(found.family == number)[0])] for number in (0, 1)}
    assert [name[number] for number in found.family] == cues[0]
    other = found.assign(unseen)
    assert [name[number] for number in other] == cues[1], "unseen prompts join the right family"
    for number, scores in enumerate(found.effects):
        known = one.truth.by_cue[name[number]]["resample"]
        for row in scores.table.iter_rows(named=True):
            assert row["score"] == pytest.approx(known[row["site"]], abs=0.02)  # single precision at logits of hundreds
            assert row["low"] <= row["score"] + 1e-6 and row["score"] <= row["high"] + 1e-6
    words = told_by(found.family, inputs_of(split.fit, False), other, inputs_of(split.select, False))
    assert words["auroc"].min() >= 0.99 and set(words["feature"]) == {"pieces"}
    for row in words.iter_rows(named=True):
        assert row["on"][0] == name[row["family"]] and all(f"{name[row['family']]}-" in text for text in row["examples"])


@pytest.mark.parametrize("name", ["redundant", "interfering"])
def test_one_mechanism_is_one_family(name: str) -> None:
    _, parts, split, (fitted, _) = measured(name)
    found = mechanisms(counted(parts), fitted, {}, groups_of(split.fit), draws=DRAWS)
    assert found.count == 1 and not found.family.any() and "no part" in found.reason
    assert len(found.effects) == 1 and len(found.effects[0]) == 10


@pytest.mark.parametrize("kind", ["independent", "correlated", "difficulty"])
def test_one_cloud_is_one_family_at_the_nominal_rate(kind: str) -> None:
    """Correlated effects, and effects that differ by how hard an example is, look clustered to a permuted null alone."""
    draws = np.random.default_rng(5)
    said = 0
    for seed in range(6):
        noise = draws.standard_normal((6, 60))
        values = {
            "independent": 1 + 0.3 * noise,
            "correlated": 1 + 0.3 * (draws.standard_normal((6, 6)) @ noise),
            "difficulty": np.abs(draws.standard_normal(60)) * (1 + 0.05 * noise),
        }[kind]
        said += mechanisms([Site("head", 0, h) for h in range(6)], values, {}, draws=19, seed=seed).count > 1
    assert said <= 1  # of 6 at .05: two or more with probability .03


def test_three_planted_families_are_three() -> None:
    draws = np.random.default_rng(1)
    family = draws.integers(0, 3, 90)
    values = 0.1 * draws.standard_normal((6, 90))
    values[2 * family, np.arange(90)] += 1 + draws.random(90)
    values[2 * family + 1, np.arange(90)] += 1
    found = mechanisms([Site("head", 0, h) for h in range(6)], values, {}, draws=DRAWS)
    assert found.count == 3
    from sklearn.metrics import adjusted_rand_score

    assert adjusted_rand_score(family, found.family) > 0.98
    sizes = np.bincount(found.family)
    assert list(sizes) == sorted(sizes, reverse=True)


def test_silhouettes_and_clusters_are_those_of_a_peer() -> None:
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    draws = np.random.default_rng(2)
    sets = draws.standard_normal((4, 40, 3)) + 4 * draws.integers(0, 2, (4, 40, 3))
    for k in (2, 3, 5):
        labels = cluster(sets, k, draws)
        for points, mine, value in zip(sets, labels, silhouette(sets, labels), strict=True):
            assert value == pytest.approx(silhouette_score(points, mine), abs=1e-9)
            peer = KMeans(k, n_init=8, random_state=0).fit(points)
            inertia = sum(((points[mine == j] - points[mine == j].mean(0)) ** 2).sum() for j in range(k))
            assert inertia < 1.1 * peer.inertia_  # both are local optima
    assert silhouette(np.zeros((1, 9, 2)), np.zeros((1, 9), dtype=int))[0] == -1


def test_directions_leave_size_out_and_few_examples_are_refused() -> None:
    values = np.array([[1.0, 2.0, 0.0], [1.0, 2.0, 3.0]])
    units, flat = directions(values)
    assert not flat and units[0] == pytest.approx(units[1]) and units[2] == pytest.approx([0, 1])
    assert directions(np.ones((3, 4)))[1] and directions(np.zeros((3, 4)))[1]
    with pytest.raises(TaskError, match="8 or more"):
        mechanisms([Site("mlp", 0)] * 2, values, {})


def test_examples_that_differ_in_size_alone_are_one_family() -> None:
    """One part does it all, more on some prompts than on others: a single direction, which cannot be parted in two."""
    values = np.zeros((3, 20))
    values[1] = np.linspace(1, 2, 20)
    found = mechanisms([Site("head", 0, h) for h in range(3)], values, {}, draws=3)
    assert found.count == 1 and "one direction" in found.reason and found.curve.height == 0
