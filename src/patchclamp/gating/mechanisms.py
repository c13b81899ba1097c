"""Families of mechanism: examples that one average would hide, for the model does them with different parts.

Every example has a vector of exact effects, one per part (`methods.effects`). Its direction says which parts do it, its length how
much there is to do: directions are clustered. Two nulls say whether there are clusters at all. Under the first, each part's
effects are permuted over examples on their own: what parts do together is gone. Under the second, examples are drawn from one Gaussian
with the same mean and covariance: parts go together, and there is one cloud. Families are said where the data are more clustered than both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float, Int

from patchclamp.errors import TaskError
from patchclamp.gating.dynamic.features import SHOWN, Inputs, probe
from patchclamp.scores import ArrayLike, Part, Scores

MOST = 6  # families at most
DRAWS = 99  # of each null
P = 0.05
STARTS = 8  # of k-means
FLAT = 1e-4  # share of the largest effect below which a part's effects differ by rounding
ROUNDS = 25
Units = Float[np.ndarray, "example part"]
Batched = Float[np.ndarray, "draw example part"]


@dataclass(frozen=True, eq=False)
class Mechanisms:
    """Examples by how the model does them.

    Args:
        family: [example], its family, 0 the largest; all 0 where there is one.
        curve: a row per k: silhouette of k-means, its mean under both nulls (permuted, gaussian), and how many of the permuted
            null's standard deviations it lies above (gap).
        p: of the largest gap over all k, under each null: "permuted", "gaussian".
        reason: in words, why there are so many families.
        effects: each family's exact effects with intervals, in the order of families.
        table: a row per part: site, and per family its mean effect (family_0, ...) and its share of that family's total size.
        about: n, parts, seed, draws.
        centres: [family, part], mean direction of each family's vectors.
    """

    family: Int[np.ndarray, " example"]
    curve: pl.DataFrame
    p: Mapping[str, float]
    reason: str
    effects: tuple[Scores, ...]
    table: pl.DataFrame
    about: Mapping[str, Any]
    centres: Float[np.ndarray, "family part"]

    @property
    def count(self) -> int:
        """How many families."""
        return len(self.effects)

    def assign(self, samples: ArrayLike) -> Int[np.ndarray, " example"]:
        """The family of other examples, by their exact effects [part, example]: that of the nearest centre."""
        units, _ = directions(np.asarray(samples, dtype=np.float64))
        return np.argmin(((units[:, None] - self.centres[None]) ** 2).sum(-1), 1)


def mechanisms(
    sites: Sequence[Part],
    samples: ArrayLike,
    about: Mapping[str, Any],
    groups: Sequence[object] | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Mechanisms:
    """Cluster examples by their exact effects, against both nulls.

    k from 2 to 6 is chosen where the silhouette lies furthest above the permuted null, in its standard deviations; p is of that
    largest gap, each null draw having its own largest over k. There are families where p < .05 under both nulls.

    Args:
        sites: the parts.
        samples: [part, example], exact effects.
        about: what they are (for `Scores.about`).
        groups: of examples, for intervals.
        draws: of each null.
        seed: of nulls, k-means and intervals.

    Cost: (1 + 2 x draws) x 5 runs of k-means with 8 starts, side by side: a second or so; no pass of the model.

    Raises:
        TaskError: fewer than 8 examples.
    """
    values = np.asarray(samples, dtype=np.float64)
    n = values.shape[1]
    if n < 8:
        raise TaskError(f"families of mechanism were asked of {n} examples: give 8 or more")
    units, flat = directions(values)
    facts = {**about, "n": n, "parts": len(sites), "draws": draws, "seed": seed}
    none = pl.DataFrame(schema={name: pl.Float64 for name in ("k", "silhouette", "permuted", "gaussian", "gap")})
    ways = len(np.unique(units.round(6), axis=0))
    if flat or ways < 2:
        reason = "no part's effect differs between examples" if flat else "the effects of all examples have one direction"
        return _mapped(sites, values, np.zeros(n, dtype=int), none, {}, reason, facts, groups, units)
    ks = [k for k in range(2, MOST + 1) if k < n / 2 and k <= ways]
    chance = np.random.default_rng([seed, 31])
    labels = {k: cluster(units[None], k, chance) for k in ks}
    real = np.array([silhouette(units[None], labels[k])[0] for k in ks])
    null: dict[str, np.ndarray] = {}
    for name, draw in (("permuted", _permuted), ("gaussian", _gaussian)):
        sets = np.stack([draw(units, chance) for _ in range(draws)])
        null[name] = np.stack([silhouette(sets, cluster(sets, k, chance)) for k in ks], 1)
    gaps = {name: (real - some.mean(0)) / (some.std(0) + 1e-9) for name, some in null.items()}
    p = {name: _p(real, some) for name, some in null.items()}
    best = int(np.argmax(gaps["permuted"]))
    curve = pl.DataFrame(
        {"k": [float(k) for k in ks], "silhouette": real, "permuted": null["permuted"].mean(0),
         "gaussian": null["gaussian"].mean(0), "gap": gaps["permuted"]}
    )  # fmt: skip
    together = max(p.values())
    if together >= P:
        weak = max(p, key=lambda name: p[name])
        family, reason = np.zeros(n, dtype=int), f"examples are no more clustered than the {weak} null (p = {p[weak]:.2f})"
    else:
        family = _by_size(labels[ks[best]][0])
        reason = f"{ks[best]} families: silhouette {real[best]:.2f}, {null['permuted'].mean(0)[best]:.2f} permuted (p = {together:.2f})"
    return _mapped(sites, values, family, curve, p, reason, facts, groups, units)


def directions(values: Float[np.ndarray, "part example"]) -> tuple[Units, bool]:
    """Each example's effects over their length; and whether no part's effects differ by more than rounding (1e-4 of the largest).

    An example whose effects are all rounding is at the origin.
    """
    size = np.abs(values).max(initial=0.0)
    if size == 0 or not (values.std(1) > FLAT * size).any():
        return np.zeros(values.T.shape), True
    length = np.linalg.norm(values, axis=0, keepdims=True)
    return np.where(length > FLAT * size, values / np.maximum(length, 1e-30), 0.0).T, False


def cluster(units: Batched, k: int, chance: np.random.Generator) -> Int[np.ndarray, "draw example"]:
    """k-means of many sets of points at once: labels of the best of 8 starts (k-means++), 25 rounds each."""
    x = units[:, None]
    size = (x**2).sum(-1)
    first = chance.integers(0, units.shape[1], (len(units), STARTS, 1))
    centres = np.take_along_axis(x, first[..., None], 2)
    for _ in range(1, k):
        apart = _distances(x, size, centres).min(-1)
        lot = np.log(apart + 1e-12) + chance.gumbel(size=apart.shape)  # drawn with probability as the squared distance
        centres = np.concatenate([centres, np.take_along_axis(x, lot.argmax(-1)[..., None, None], 2)], 2)
    for _ in range(ROUNDS):
        member = _distances(x, size, centres).argmin(-1)[..., None] == np.arange(k)
        count = member.sum(2)[..., None]
        centres = np.where(count > 0, np.einsum("dsnk,dnp->dskp", member, units) / np.maximum(count, 1), centres)
    apart = _distances(x, size, centres)
    best = apart.min(-1).sum(-1).argmin(-1)
    return np.take_along_axis(apart.argmin(-1), best[:, None, None], 1)[:, 0]


def _distances(x: Any, size: Any, centres: Any) -> Float[np.ndarray, "draw start example k"]:
    """Squared distances of every point to every centre."""
    return np.maximum(size[..., None] - 2 * x @ centres.swapaxes(-1, -2) + (centres**2).sum(-1)[:, :, None], 0)


def silhouette(units: Batched, labels: Int[np.ndarray, "draw example"]) -> Float[np.ndarray, " draw"]:
    """Mean silhouette of each set of points; -1 where fewer than two clusters are left."""
    size = (units**2).sum(-1)
    apart = np.sqrt(np.maximum(size[:, :, None] + size[:, None] - 2 * units @ units.swapaxes(1, 2), 0))
    apart[:, np.arange(apart.shape[1]), np.arange(apart.shape[1])] = 0
    member = (labels[..., None] == np.arange(int(labels.max()) + 1)).astype(float)
    count = member.sum(1)[:, None]
    total, own = apart @ member, member.astype(bool)
    here = total[own].reshape(labels.shape) / np.maximum(np.broadcast_to(count, total.shape)[own].reshape(labels.shape) - 1, 1)
    other = np.where(own | (count == 0), np.inf, total / np.maximum(count, 1)).min(-1)
    alone = np.broadcast_to(count, total.shape)[own].reshape(labels.shape) == 1
    several = (count[:, 0] > 0).sum(-1) > 1
    other = np.where(several[:, None], other, 0)
    value = np.where(alone, 0.0, (other - here) / np.maximum(np.maximum(here, other), 1e-30))
    return np.where(several, value.mean(1), -1.0)


def _permuted(units: Units, chance: np.random.Generator) -> Units:
    """Each part's effects in an order of their own over examples."""
    return np.stack([chance.permutation(column) for column in units.T], 1)


def _gaussian(units: Units, chance: np.random.Generator) -> Units:
    """As many draws from one Gaussian with the same mean and covariance."""
    centred = units - units.mean(0)
    return units.mean(0) + chance.standard_normal((len(units), len(units))) @ centred / len(units) ** 0.5


def _p(real: Float[np.ndarray, " k"], null: Float[np.ndarray, "draw k"]) -> float:
    """Of the largest standardised silhouette over k: each draw against the others, as the data."""
    mean, deviation = null.mean(0), null.std(0) + 1e-9
    seen = ((real - mean) / deviation).max()
    drawn = ((null - mean) / deviation).max(1)
    return float((1 + (drawn >= seen).sum()) / (1 + len(drawn)))


def _by_size(labels: Int[np.ndarray, " example"]) -> Int[np.ndarray, " example"]:
    """The same clusters, the largest first."""
    kinds, counts = np.unique(labels, return_counts=True)
    order = {int(kind): place for place, kind in enumerate(kinds[np.argsort(-counts, kind="stable")].tolist())}
    return np.array([order[int(label)] for label in labels])


def _mapped(
    sites: Sequence[Part], values: np.ndarray, family: np.ndarray, curve: pl.DataFrame, p: Mapping[str, float], reason: str,
    about: Mapping[str, Any], groups: Sequence[object] | None, units: Units,
) -> Mechanisms:  # fmt: skip
    """Each family's effects, with intervals."""
    found: list[Scores] = []
    columns: dict[str, object] = {"site": [str(site) for site in sites]}
    for number in range(int(family.max()) + 1):
        rows = np.flatnonzero(family == number)
        named = None if groups is None else [groups[row] for row in rows.tolist()]
        found.append(Scores.from_samples(sites, values[:, rows], {**about, "family": number}, named, seed=int(about["seed"])))
        mean = values[:, rows].mean(1)
        columns |= {f"family_{number}": mean, f"share_{number}": np.abs(mean) / max(float(np.abs(mean).sum()), 1e-30)}
    centres = np.stack([units[family == number].mean(0) for number in range(len(found))])
    return Mechanisms(family, curve, p, reason, tuple(found), pl.DataFrame(columns), about, centres)


def told_by(
    fitted: Int[np.ndarray, " fitted"], inputs: Inputs, held: Int[np.ndarray, " held"], unseen: Inputs, seed: int = 0
) -> pl.DataFrame:
    """Which inputs each family is of, in words: a probe per family, of it against the others (`dynamic.features.probe`).

    Args:
        fitted, inputs: families of some examples, and their named features, to fit on.
        held, unseen: those of others (`Mechanisms.assign`), to judge on.
        seed: of intervals.

    Returns:
        A row per family: family, n, feature, auroc, low, high, on, off (that feature's values), examples.
    """
    rows: list[dict[str, object]] = []
    for number in range(int(fitted.max()) + 1):
        told = probe(inputs, fitted == number, unseen, held == number, seed)
        names = [unseen.names[row] for row in np.flatnonzero(held == number)[:SHOWN]]
        rows.append(
            {"family": number, "n": int((held == number).sum()), "feature": told.feature, "auroc": told.auroc, "low": told.low,
             "high": told.high, "on": list(told.on), "off": list(told.off), "examples": names}
        )  # fmt: skip
    texts = {name: pl.List(pl.String) for name in ("on", "off", "examples")}
    numbers = {name: pl.Float64 for name in ("auroc", "low", "high")}
    return pl.DataFrame(rows, schema={"family": pl.Int64, "n": pl.Int64, "feature": pl.String, **numbers, **texts})
