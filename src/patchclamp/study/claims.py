"""Claims: what a study says, each sentence with its scope, its evidence and the intervention that would refute it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from patchclamp.circuit import Circuit
from patchclamp.scores import Agreement, Scores
from patchclamp.scores.statistics import Interval
from patchclamp.store.record import Baseline, Claim, Null, Verdict
from patchclamp.store.sections import Relations
from patchclamp.trust import Trusted

WORTH_TELLING = 0.01
"""Of what closing everything takes: no sentence is made of a part that takes less, however sure it is."""


def shown(interval: Interval, digits: int = 2) -> str:
    """`mean [low, high]`."""
    mean, low, high = (None if x is None else f"{x:z.{digits}f}" for x in (interval.mean, interval.low, interval.high))
    return str(mean) if low is None or high is None else f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Found:
    """What the steps of a map have found, as far as they were done."""

    model: str
    task: str
    n: int
    fallback: str
    baseline: Baseline
    parts: int
    noun: str = "heads and MLPs"
    exact: Scores | None = None
    second: Scores | None = None
    second_fallback: str = ""
    shifted: Scores | None = None
    shift_reason: str = ""
    agreement: Mapping[str, Agreement] | None = None
    roles: pl.DataFrame | None = None
    nulls: Sequence[Null] = ()
    circuit: Circuit | None = None
    wanted: float = 0.0
    trusted: Trusted | None = None
    relations: Relations | None = None

    @property
    def scope(self) -> str:
        """For what the claims hold."""
        return f"{self.model} on {self.n} prompts of {self.task} that nothing was fitted to; {self.baseline.metric}; fallback {self.fallback}"


def claims(found: Found) -> tuple[Claim, ...]:
    """Every sentence that the report makes."""
    made = [_behaviour(found)]
    if found.exact is not None:
        made += _parts(found, found.exact)
        made += _content(found, found.exact)
    if found.circuit is not None:
        made += _circuit(found, found.circuit)
    if found.agreement:
        made += _agreements(found, found.agreement)
    if found.roles is not None:
        made += _roles(found)
    if found.relations is not None:
        made += _relations(found, found.relations)
    return tuple(made)


def _verdict(held: bool) -> Verdict:
    return "supported" if held else "not supported"


def _behaviour(found: Found) -> Claim:
    base = found.baseline
    accuracy = "top-1 accuracy " + f"{base.top1:.0%}" if base.accuracy is None else f"right in {base.accuracy:.0%} of pairs"
    return Claim(
        f"The model shows the behaviour, and it goes away when {_all_of(found)} passes its fallback",
        found.scope,
        f"{accuracy} (always saying the most frequent answer: {base.majority:.0%}); {base.metric} {shown(base.open)} with every part "
        f"open, {shown(base.closed)} with every part closed",
        "run prompts of the same kind on which the model is wrong, or on which closing every part changes nothing",
        _verdict(_apart(base.open, base.closed)),
    )


def _all_of(found: Found) -> str:
    return "every one of the parts" if found.noun == "parts" else "every head and MLP"


def _apart(one: Interval, two: Interval) -> bool:
    if one.low is None or one.high is None or two.low is None or two.high is None:
        return one.mean != two.mean
    return one.low > two.high or one.high < two.low


def _parts(found: Found, exact: Scores) -> list[Claim]:
    made: list[Claim] = []
    if reason := exact.too_few:
        made.append(Claim("Some part has an effect of its own", found.scope, reason, "more prompts", "not tested"))
        return made
    material = WORTH_TELLING * abs(found.baseline.open.mean - found.baseline.closed.mean)
    ranked = exact.table.filter(pl.col("score").abs() >= material).sort(pl.col("score").abs(), descending=True).head(5)
    for row in ranked.iter_rows(named=True):
        word = "facilitates" if row["score"] > 0 else "interferes with"
        other = _row(found.second, row["site"])
        same = other is None or other["score"] * row["score"] > 0
        evidence = f"closing it alone takes {_effect(row)} (q = {row['q']:.2g} over {len(exact)} parts)"
        if other is not None:
            evidence += f"; under the fallback {found.second_fallback} {_effect(other)}"
        made.append(
            Claim(
                f"{row['site']} {word} the behaviour",
                found.scope,
                evidence,
                f"close {row['site']} alone on new prompts and see the {found.baseline.metric} unchanged or moved the other way",
                _verdict(row["q"] <= 0.05 and same),
            )
        )
    return made


def _row(scores: Scores | None, site: str) -> dict[str, Any] | None:
    if scores is None or site not in set(scores.table["site"]):
        return None
    return scores[site]


def _effect(row: Mapping[str, Any]) -> str:
    interval = "" if row["low"] is None else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return f"{row['score']:+.2f}{interval}"


def _content(found: Found, exact: Scores) -> list[Claim]:
    statement = "The largest effects follow what the prompt says, not where it stands"
    refute = "put random tokens before the prompts and see the effects vanish or turn"
    if found.shifted is None:
        if not found.shift_reason:
            return []
        return [Claim(statement, found.scope, found.shift_reason, refute, "not tested")]
    rows = [(row, exact[row["site"]]["score"]) for row in found.shifted.table.iter_rows(named=True)]
    kept = [row["score"] / before for row, before in rows if before]
    held = all(share > 0.5 for share in kept)
    texts = [f"{row['site']} {before:+.2f} becomes {_effect(row)}" for row, before in rows]
    return [Claim(statement, found.scope, "behind 1 to 6 random tokens: " + "; ".join(texts), refute, _verdict(held))]


def _circuit(found: Found, circuit: Circuit) -> list[Claim]:
    trusted = found.trusted
    name = f"{len(circuit)} of {found.parts} parts"
    sufficient, necessary, minimal = (
        f"{name} are enough for {found.wanted:.0%} of the behaviour",
        f"Without these {len(circuit)} parts little of the behaviour is left",
        f"None of the {len(circuit)} parts can be left out",
    )
    refutes = (
        "find a random set of the same size and shape that does as well, or new prompts on which the set alone fails",
        "close the set and see the behaviour stay",
        "close a part inside the circuit and see the faithfulness stay",
    )
    if trusted is None:
        return [Claim(text, found.scope, "no circuit was judged", refute, "not tested")
                for text, refute in zip((sufficient, necessary, minimal), refutes, strict=True)]  # fmt: skip
    faithful, random = trusted.faithfulness, trusted.random
    idle = [site for site, (_, below, _) in trusted.minimality.items() if below <= 0]
    # the wanted share was chosen on other prompts: it holds here where the interval does not lie below it
    reached = (faithful.mean if faithful.high is None else faithful.high) >= found.wanted
    # of a small model there may be fewer than 20 circuits of a shape: then p cannot fall to .05, and to be the best of them must do
    few = trusted.p > 0.05 and trusted.beats == 1 and random.n >= 20
    return [
        Claim(sufficient, found.scope,
              f"faithfulness {shown(faithful)} on the confirm set; {random.n} random circuits of the same size and shape "
              f"{shown(random)} (mean and 95 % of draws), {trusted.beats:.0%} of them below (p = {trusted.p:.2g})"
              + ("; there are too few of that shape for a smaller p" if few else ""), refutes[0],
              _verdict(reached and (trusted.p <= 0.05 or few))),
        Claim(necessary, found.scope, f"with the circuit closed {shown(trusted.rest)} of the behaviour is left", refutes[1],
              _verdict((trusted.rest.mean if trusted.rest.high is None else trusted.rest.high) < 0.2)),
        Claim(minimal, found.scope,
              f"{len(trusted.minimality) - len(idle)} of {len(trusted.minimality)} parts each carry faithfulness of their own (95 % "
              "intervals above 0)" + (f"; not shown for {', '.join(idle)}" if idle else ""), refutes[2], _verdict(not idle)),
    ]  # fmt: skip


def _agreements(found: Found, agreement: Mapping[str, Agreement]) -> list[Claim]:
    made: list[Claim] = []
    for name in ("gradient", "integrated", "second fallback"):
        if name not in agreement:
            continue
        same = agreement[name]
        made.append(
            Claim(
                f"The effects under the fallback {found.second_fallback} rank the parts as the exact ones do"
                if name == "second fallback"
                else f"The {name} scores rank the parts as exact effects do",
                found.scope,
                str(same),
                "parts whose exact effect and score differ in sign or rank",
                _verdict((same.spearman or 0.0) > 0.7 and same.wrong_signs <= 0.1 * same.clear) if same.clear else "not tested",
            )
        )
    return made


def _roles(found: Found) -> list[Claim]:
    assert found.roles is not None
    counts = {
        role: int((found.roles["role"] == role).sum())
        for role in ("facilitating", "interfering", "irrelevant", "redundant", "undecided")
    }
    spoken = ", ".join(f"{count} {role}" for role, count in counts.items() if count)
    made = [
        Claim(
            "Learned gates give parts roles that hold on prompts they were not fitted to",
            found.scope,
            f"{spoken} (irrelevant means: while the others are open)",
            "fit again with other seeds, or on shuffled answers, and see as many roles",
            _verdict(counts["facilitating"] + counts["interfering"] + counts["redundant"] > 0) if found.nulls else "not tested",
        )
    ]
    for null in found.nulls:
        share = null.facilitating + null.interfering
        made.append(
            Claim(
                f"Gates fitted to {null.name} find no roles",
                found.scope,
                f"of {null.parts} parts {share:.0%} are called facilitating or interfering ({null.raw_facilitating + null.raw_interfering:.0%} "
                "by the gates alone, without the safeguards)",
                "a null fit that gives more roles than 5 % of parts",
                _verdict(share <= 0.05),
            )
        )
    return made


TOLD = {
    "redundancy": "{a} and {b} stand in for each other: either alone is enough",
    "backup": "{b} is a backup of {a}: it works once {a} is closed",
    "suppression": "{b} works against what {a} writes, and is idle without it",
    "AND": "{a} and {b} need each other",
    "OR": "{a} and {b} stand in for each other in part",
}


def _relations(found: Found, relations: Relations) -> list[Claim]:
    """Pairs with a relation of a name, and the largest interaction of each sign; then whether hubs matter more than others."""
    about, pairs = relations.about, relations.pairs.filter(pl.col("word").is_in(["AND", "OR"]))
    size = pl.col("interaction").abs()
    chosen = [*pairs.filter(pl.col("relation") != "").sort(size, descending=True).head(5).iter_rows(named=True)]
    for word in ("AND", "OR"):
        chosen += (
            pairs.filter((pl.col("word") == word) & (pl.col("relation") == "")).sort(size, descending=True).head(1).to_dicts()
        )
    made = [
        Claim(
            TOLD[row["relation"] or row["word"]].format(**row),
            found.scope,
            f"interaction {_effect({**row, 'score': row['interaction']})} under {about['fallback']}, "
            f"{_effect({'score': row['other'], 'low': row['other_low'], 'high': row['other_high']})} under {about['second']} "
            f"(of {relations.pairs.height} pairs)",
            f"close {row['a']}, {row['b']} and both on new prompts and see the effect of both equal the sum of the two",
            "supported",
        )
        for row in chosen
    ]  # fmt: skip
    if (hubs := about["hubs"]) is not None:
        made.append(
            Claim(
                f"The hubs {', '.join(hubs['parts'])} matter more together than random ones of these parts",
                found.scope,
                f"closing them takes {hubs['effect']:.2f} on prompts that did not choose them as hubs, random sets of the same size "
                f"{hubs['random_mean']:.2f} (p = {hubs['p']:.3f})",
                "random sets that take as much",
                _verdict(hubs["p"] <= 0.05),
            )
        )
    return made


def headline(found: Found) -> str:
    """What was found, in one sentence."""
    base = found.baseline
    if base.accuracy is not None:
        right = f"is right on {base.accuracy:.0%} of {found.n} unseen pairs of {found.task}"
    elif base.metric == "nll":
        right = f"predicts the targets of {found.task} at {base.open.mean:.2f} nats each"
    else:
        right = f"gives the answer of {found.task} first in {base.top1:.0%} of {found.n} unseen prompts"
    text = f"{found.model} {right}"
    if found.circuit is not None and found.trusted is not None:
        text += (f"; {len(found.circuit)} of its {found.parts} {found.noun} keep {found.trusted.faithfulness.mean:.0%} of that "
                 f"(random sets of the same size {found.trusted.random.mean:.0%})")  # fmt: skip
    elif found.circuit is not None:
        text += (
            f"; a circuit of {len(found.circuit)} of its {found.parts} {found.noun} was found and not judged on unseen prompts"
        )
    if found.exact is not None and not found.exact.too_few:
        best = found.exact.table.sort(pl.col("score").abs(), descending=True).row(0, named=True)
        text += f"; closing {best['site']} alone {'takes' if best['score'] > 0 else 'adds'} most ({abs(best['score']):.2f} of {base.metric})"
    return text + "."
