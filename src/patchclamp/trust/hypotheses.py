"""Tests of what a circuit stands for, each against a null hypothesis, with its p-value and a sentence.

Shi et al. 2024, Hypothesis Testing the Circuit Hypothesis in LLMs, https://arxiv.org/abs/2410.13032. With s the benefit of one
prompt, M the model, C the circuit, C' everything but C, R a random circuit of C's size and shape:

    equivalence         P(s(C) > s(M)) is 1/2 to within a margin                         sign test, both ways
    independence        s(C') tells nothing of s(M)                                      HSIC, permuted
    sufficiency         C is closer to the model than a quantile of the R are            binomial
    partial necessity   closing C takes more than closing R outside of it, likewise      binomial
    minimality          each part of C matters more than parts outside of it, likewise   binomial, Holm over the parts

Where this differs from the authors' code: prompts of one group (a pair and its mirror) count once; their equivalence test puts the
mean difference of scores where the share of prompts belongs; and not being shown to differ is no sign of being the same, so that
equivalence itself is tested too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float

from patchclamp.circuit import Circuit
from patchclamp.errors import PatchclampError
from patchclamp.methods import groups_of
from patchclamp.metrics import metric_named
from patchclamp.parts import Fallback, Gates, Parts, benefits
from patchclamp.scores import Part
from patchclamp.scores.kernels import centred, gaussian_gram
from patchclamp.scores.ratios import Shares
from patchclamp.scores.statistics import grouped, names_of
from patchclamp.tasks import Examples
from patchclamp.trust.draws import Shape, chance, kind_of, pick

PERMUTATIONS = 1000


@dataclass(frozen=True)
class Tested:
    """One hypothesis.

    Args:
        name: what is tested.
        null: the hypothesis that a small p speaks against.
        p: how probable what was seen, or more, is under it.
        statistic: what was seen.
        n: prompts' groups, or random circuits.
        level: below which p the null is rejected.
        good: whether rejecting it speaks for the circuit (True) or against it (False).
        evidence: what was seen, in words.
    """

    name: str
    null: str
    p: float
    statistic: float
    n: int
    level: float
    good: bool
    evidence: str

    @property
    def rejected(self) -> bool:
        """Whether p is at most the level."""
        return self.p <= self.level

    @property
    def passed(self) -> bool:
        """Whether the outcome speaks for the circuit, or at least not against it."""
        return self.rejected == self.good

    def __str__(self) -> str:
        verdict = "rejected" if self.rejected else "not rejected"
        way = "for" if self.rejected and self.good else "against" if self.rejected else "neither for nor against"
        return f"{self.name}: {self.evidence}; the null ({self.null}) is {verdict}, p = {self.p:.3g}: {way} the circuit"


@dataclass(frozen=True, eq=False)
class Hypotheses:
    """What was tested of one circuit.

    Attributes:
        tests: in the order of this file.
        parts: a row per part of the circuit: site, effect (|f(C) - f(C without it)|), beats (share of parts outside whose effect
            on the circuit is smaller), p of its not mattering more than parts outside do, q (Holm).
        about: metric, fallback, n, groups, draws, quantile, seed.
    """

    tests: tuple[Tested, ...]
    parts: pl.DataFrame
    about: dict[str, Any]

    def __getitem__(self, name: str) -> Tested:
        """A test by name; raises `PatchclampError` naming those there are."""
        for one in self.tests:
            if one.name == name:
                return one
        raise PatchclampError(f"there is no test {name!r}: choose from {', '.join(one.name for one in self.tests)}")

    def __str__(self) -> str:
        return "\n".join(map(str, self.tests))


def hypotheses(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    circuit: Circuit,
    *,
    metric: str | None = None,
    draws: int = 200,
    quantile: float = 0.9,
    margin: float = 0.1,
    level: float = 0.05,
    seed: int = 0,
    batch_size: int = 64,
) -> Hypotheses:
    """Test a circuit on prompts that chose nothing.

    Args:
        parts: what the circuit is made of.
        examples: the prompts.
        fallback: what parts outside it pass.
        circuit: the circuit.
        metric: by default the task's.
        draws: random circuits, and random parts outside, that it is compared with.
        quantile: of them, how many it has to beat.
        margin: how far from one half counts as equivalent.
        level: of each test.
        seed: of the draws.
        batch_size: examples at once.

    Cost: one forward pass over the examples per part of the circuit, two per draw, and one per part outside, up to `draws`.

    Raises:
        PatchclampError: the circuit is empty or holds every part, or numbers that are no shares.
        MetricError: closing everything changes nothing.
    """
    members, inside = [*circuit], set(circuit.sites)
    outside = [parts.labels[number] for number in parts.counted if parts.labels[number] not in inside]
    if not members or not outside:
        raise PatchclampError(
            f"a circuit of {len(members)} of {len(parts.counted)} parts was given: test one that leaves some out"
        )
    for name, value in (("quantile", quantile), ("margin", margin), ("level", level)):
        if not 0 < value < 1:
            raise PatchclampError(f"a {name} of {value} was asked for: choose a number between 0 and 1")
    rng, chosen = np.random.default_rng([seed, 11]), metric_named(metric or examples.metric)
    shape, apart = Shape.of(parts, members), Shape.of(parts, members, outside=True)
    enough = apart.size == len(members)
    others = pick(rng, outside, draws) if len(outside) > draws else outside
    plan: list[Gates] = [parts.open(), parts.closed(), parts.only(members), parts.without(members)]
    plan += [parts.only(shape.another(rng, members)) for _ in range(draws)]
    plan += [parts.without((apart if enough else shape).draw(rng)) for _ in range(draws)]
    plan += [parts.only([one for one in members if one != part]) for part in members]
    plan += [parts.only([*members, part]) for part in others]
    values = benefits(parts, examples, torch.cat(plan), fallback, chosen, batch_size).double().numpy()
    groups = groups_of(examples)
    opened, closed, kept, rest, *more = values
    ratio = Shares.of(opened, closed, groups, metric=chosen.name, seed=seed)
    faithful, taken, left, added = (ratio.point(np.array(some)) for some in _cut(more, draws, draws, len(members), len(others)))
    own, without = float(ratio.point(kept)), float(ratio.point(rest))
    table = minimality(members, np.abs(own - left), others, np.abs(own - added), quantile)
    random = f"{draws} random circuits of its size and shape" + ("" if enough else " (drawn from all parts: too few are outside)")
    tests = (
        *equivalence(opened, kept, groups, margin, level),
        independence(opened, rest, groups, level, seed),
        _beats("sufficiency", np.abs(1 - faithful) > abs(1 - own) + 1e-9, quantile, level, shape.combinations,
               f"faithfulness {own:.2f}, closer to 1 than", f"{draws} random circuits of its size and shape",
               f"at most {quantile:.0%} of circuits of its size and shape are less faithful"),
        _beats("partial necessity", taken > without + 1e-9, quantile, level, 1 + apart.combinations if enough else shape.combinations,
               f"closing it leaves {without:.2f}, less than is left without", random,
               f"at most {quantile:.0%} of circuits of its size and shape would be missed less"),
        _minimal(table, quantile, level, len(others)),
    )  # fmt: skip
    about = {**circuit.about, "metric": chosen.name, "fallback": fallback.kind, "n": len(examples), "groups": ratio.groups,
             "draws": draws, "quantile": quantile, "margin": margin, "level": level, "seed": seed}  # fmt: skip
    return Hypotheses(tests, table, about)


def equivalence(
    model: Float[np.ndarray, " example"],
    circuit: Float[np.ndarray, " example"],
    groups: Sequence[str],
    margin: float,
    level: float,
) -> tuple[Tested, Tested]:
    """Whether circuit and model are as likely to be above each other: shown to differ, and shown to be the same.

    k of n groups have s(C) > s(M); ties (to a millionth of the scores' spread) are dealt out evenly. Differ: null |P - 1/2| <=
    margin, p = max over both ends of the null of P(|K/n - 1/2| >= |k/n - 1/2|). Same: null |P - 1/2| >= margin, p = the larger of
    the two one-sided binomial tails (TOST).
    """
    from scipy.stats import binom

    sums, sizes = grouped(np.stack([circuit, model]), names_of(groups))
    above, n = (sums[0] - sums[1]) / sizes, len(sizes)
    near = 1e-6 * float(np.ptp(np.concatenate([circuit, model]))) + 1e-12
    ties = int((np.abs(above) <= near).sum())
    k = int((above > near).sum()) + ties // 2
    counts = np.arange(n + 1)
    far = np.abs(counts / n - 0.5) >= abs(k / n - 0.5) - 1e-12
    differ = min(1.0, float(binom.pmf(counts, n, 0.5 + margin)[far].sum()))
    same = max(float(binom.sf(k - 1, n, 0.5 - margin)), float(binom.cdf(k, n, 0.5 + margin)))
    seen = f"on {k / n:.0%} of {n} prompts the circuit alone is above the model" + (f" ({ties} ties dealt out)" if ties else "")
    return (
        Tested("non-equivalence", f"the share is within {margin:.2f} of one half", differ, k / n, n, level, False, seen),
        Tested("equivalence", f"the share is {margin:.2f} or more from one half", same, k / n, n, level, True, seen),
    )


def independence(
    model: Float[np.ndarray, " example"], rest: Float[np.ndarray, " example"], groups: Sequence[str], level: float, seed: int
) -> Tested:
    """Whether what is left without the circuit still tells of what the model does: HSIC of the two, against permutations.

    The kernel is as wide as scores are apart, however little that is: so they are rounded to 1e-5 of what both span first.
    """
    fine = 1e-5 * float(np.ptp(np.concatenate([model, rest]))) + 1e-12
    sums, sizes = grouped(np.stack([model, rest]), names_of(groups))
    one, two = (centred(gaussian_gram(np.round(row / sizes / fine)[:, None])) for row in sums)
    seen, rng, n = float((one * two).sum()), np.random.default_rng([seed, 13]), len(sizes)
    orders = (rng.permutation(n) for _ in range(PERMUTATIONS))  # centring commutes with them: it is done once
    above = sum(float((one * two[order][:, order]).sum()) >= seen * (1 - 1e-12) for order in orders)
    p = (1 + above) / (1 + PERMUTATIONS)
    words = f"HSIC of the model's score and of what is left without the circuit is {seen / n**2:.2g} on {n} prompts"
    return Tested("independence", "what is left tells nothing of the model's score", p, seen / n**2, n, level, False, words)


def _beats(
    name: str, below: np.ndarray, quantile: float, level: float, combinations: int, seen: str, random: str, null: str
) -> Tested:
    """Whether more than a quantile of random circuits do worse (binomial tail), with the chance of doing as well as one of them."""
    from scipy.stats import binomtest

    k, n = int(below.sum()), len(below)
    tail = float(binomtest(k, n, quantile, alternative="greater").pvalue)
    rank = chance(n - k, n, combinations)
    words = f"{seen} {k / n:.0%} of {random} (rank p = {rank:.3g})"
    return Tested(name, null, tail, k / n, n, level, True, words)


def minimality(
    members: Sequence[Part],
    effects: Float[np.ndarray, " member"],
    others: Sequence[Part],
    added: Float[np.ndarray, " other"],
    quantile: float,
) -> pl.DataFrame:
    """By part of the circuit, how its effect compares with what parts outside do when they are added (of its own kind, where there are
    five of them).

    p: the probability of beating as few of them, or fewer, had it truly beaten a `quantile`; q is Holm's.
    """
    from scipy.stats import binomtest
    from statsmodels.stats.multitest import multipletests

    kinds = np.array([kind_of(part) for part in others])
    rows: list[dict[str, object]] = []
    for part, effect in zip(members, effects, strict=True):
        alike = kinds == kind_of(part)
        reference = added[alike] if alike.sum() >= 5 else added
        beaten = int((effect > reference + 1e-9).sum())
        p = float(binomtest(beaten, len(reference), quantile, alternative="less").pvalue)
        rows.append({"site": str(part), "effect": float(effect), "beats": beaten / len(reference), "of": len(reference), "p": p})
    table = pl.DataFrame(rows)
    q = multipletests(table["p"].to_numpy(), method="holm")[1]
    return table.with_columns(pl.Series("q", np.asarray(q, dtype=np.float64)))


def _minimal(table: pl.DataFrame, quantile: float, level: float, others: int) -> Tested:
    idle = table.filter(pl.col("q") <= level)["site"].to_list()
    share, smallest = 1 - len(idle) / table.height, min(table["q"].to_list())
    words = f"{table.height - len(idle)} of {table.height} parts are not shown to matter less than parts outside ({others} tried)"
    words += f"; idle: {', '.join(idle[:6])}" + (" ..." if len(idle) > 6 else "") if idle else ""
    null = f"each part matters more to the circuit than {quantile:.0%} of parts outside would"
    return Tested("minimality", null, smallest, share, table.height, level, False, words)


def _cut(values: Sequence[np.ndarray], *sizes: int) -> list[Sequence[np.ndarray]]:
    """Consecutive pieces of these sizes."""
    return [values[stop - size : stop] for size, stop in zip(sizes, accumulate(sizes), strict=True)]
