"""Named features of prompts and tokens, and a probe that says which of them tells where a gate is open."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from patchclamp.methods import groups_of
from patchclamp.scores.statistics import mean_interval
from patchclamp.tasks import Examples
from patchclamp.tasks._examples import Example

Feature = Callable[[Example], str]
"""A feature of a prompt that a user names: what it is on this example, in a word."""
SHOWN = 6
"""Values and inputs that are named at most."""
MARK = "\u241f"  # between several values of one feature


@dataclass(frozen=True, eq=False)
class Inputs:
    """Inputs that gates look at: prompts, or tokens in them.

    Args:
        names: each input as a reader sees it; of a token, with what precedes it.
        values: feature -> what it is on each input; several values (the words of a prompt) are joined by a mark.
        example: [input], which example it belongs to.
        groups: of each input, which belong together.
    """

    names: tuple[str, ...]
    values: Mapping[str, tuple[str, ...]]
    example: tuple[int, ...]
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def inputs_of(examples: Examples, by_token: bool, named: Mapping[str, Feature] | None = None) -> Inputs:
    """The prompts, or all their tokens, with their features.

    Of a prompt: template (where the task names groups), answer, words (which tokens occur), pieces (of what letters they are: a
    word in two at its hyphen), last word, length. Of a token: token,
    the token before it, its position. Both: whatever `named` says of the prompt.
    """
    rows: list[tuple[str, dict[str, str], int]] = []
    for number, example in enumerate(examples):
        words = examples.texts(number)
        own = {name: feature(example) for name, feature in (named or {}).items()}
        own |= {"template": example.group} if example.group else {}
        if by_token:
            for at, word in enumerate(words):
                before = words[at - 1] if at else ""
                shown = "".join(words[max(0, at - 4) : at]) + f"[{word}]"
                rows.append((shown, {**own, "token": word, "token before": before, "position": str(at)}, number))
        else:
            answer = str(examples.tokenizer.decode(list(example.answers[0]))) if example.answers else ""
            told = {"answer": answer, "words": MARK.join(sorted(set(words))), "last word": words[-1], "length": str(len(words))}
            told["pieces"] = MARK.join(sorted({piece for word in words for piece in re.findall(r"\w+", word)}))
            rows.append(("".join(words), {**own, **told}, number))
    kinds = rows[0][1] if rows else {}
    groups = groups_of(examples)
    return Inputs(
        tuple(name for name, _, _ in rows),
        {kind: tuple(row[kind] for _, row, _ in rows) for kind in kinds},
        tuple(number for _, _, number in rows),
        tuple(groups[number] for _, _, number in rows),
    )


PHASES = ("prompt", "generation")


def phases_of(examples: Examples, named: Mapping[str, Feature] | None = None) -> Inputs:
    """Each prompt, and each answer's tokens that the model has before it as it goes on: two inputs of an example, told by their phase.

    An answer of one token leaves no generated token to run on, and its example one input. Features: phase, template (where the task
    names groups), and whatever `named` says of the prompt.
    """
    groups, decode = groups_of(examples), examples.tokenizer.decode
    rows: list[tuple[str, dict[str, str], int]] = []
    for number, example in enumerate(examples):
        own = {name: feature(example) for name, feature in (named or {}).items()}
        own |= {"template": example.group} if example.group else {}
        rows.append(("".join(examples.texts(number)), {"phase": PHASES[0], **own}, number))
        if behind := example.answers[0][:-1] if example.answers else ():
            rows.append((f"...[{decode(list(behind))}]", {"phase": PHASES[1], **own}, number))
    return Inputs(
        tuple(name for name, _, _ in rows),
        {kind: tuple(row[kind] for _, row, _ in rows) for kind in (rows[0][1] if rows else {})},
        tuple(number for _, _, number in rows),
        tuple(groups[number] for _, _, number in rows),
    )


@dataclass(frozen=True)
class Probed:
    """What tells where a gate is open.

    Args:
        feature: the one of highest AUROC on inputs that the probe was not fitted to; empty where no feature can be tried.
        auroc: of a logistic regression on that feature's values, there; with its 95 % interval over groups.
        each: every feature's AUROC.
        on, off: values on which the gate is open and closed, those that weigh most first.
    """

    feature: str
    auroc: float
    low: float
    high: float
    each: Mapping[str, float]
    on: tuple[str, ...]
    off: tuple[str, ...]


def probe(
    fitted: Inputs, opened: Bool[np.ndarray, " fitted"], held: Inputs, opened_held: Bool[np.ndarray, " held"], seed: int = 0
) -> Probed:
    """A logistic regression (L2, C = 1) per feature from its values, one-hot, to whether the gate is open.

    Args:
        fitted, opened: inputs to fit on, and whether the gate is open there.
        held, opened_held: inputs that are judged on.
        seed: of the bootstrap.
    """
    from sklearn.metrics import roc_auc_score

    nothing = Probed("", float("nan"), float("nan"), float("nan"), {}, (), ())
    if min(opened.sum(), (~opened).sum(), opened_held.sum(), (~opened_held).sum()) < 1:
        return nothing
    found: dict[str, tuple[float, np.ndarray, list[tuple[str, float]]]] = {}
    for name in fitted.values:
        scores, weights = _regress(fitted.values[name], opened, held.values[name])
        found[name] = float(roc_auc_score(opened_held, scores)), scores, weights
    best = max(found, key=lambda name: (round(found[name][0], 6), -len(found[name][2])))  # of equals, that with fewest values
    auroc, scores, weights = found[best]
    low, high = _interval(scores, opened_held, held.groups, seed)
    seen = {value for joined in held.values[best] for value in joined.split(MARK)}
    ranked = [(value, weight) for value, weight in weights if value in seen]
    on = tuple(value for value, weight in sorted(ranked, key=lambda pair: -pair[1]) if weight > 0)[:SHOWN]
    off = tuple(value for value, weight in sorted(ranked, key=lambda pair: pair[1]) if weight < 0)[:SHOWN]
    return Probed(best, auroc, low, high, {name: value[0] for name, value in found.items()}, on, off)


def _regress(
    values: Sequence[str], opened: Bool[np.ndarray, " fitted"], held: Sequence[str]
) -> tuple[Float[np.ndarray, " held"], list[tuple[str, float]]]:
    """Scores of held inputs, and the weight of each value. Values that the fit never saw count nothing."""
    from sklearn.linear_model import LogisticRegression

    kinds = sorted({value for joined in values for value in joined.split(MARK)})
    column = {value: number for number, value in enumerate(kinds)}

    def table(rows: Sequence[str]) -> Float[np.ndarray, "row value"]:
        out = np.zeros((len(rows), len(kinds)))
        for number, joined in enumerate(rows):
            for value in joined.split(MARK):
                if value in column:
                    out[number, column[value]] = 1
        return out

    model = LogisticRegression(C=1.0, max_iter=2000).fit(table(values), opened)
    return model.decision_function(table(held)), list(zip(kinds, model.coef_[0].tolist(), strict=True))


def _interval(
    scores: Float[np.ndarray, " held"], opened: Bool[np.ndarray, " held"], groups: Sequence[str], seed: int, resamples: int = 200
) -> tuple[float, float]:
    """95 % percentile bootstrap of the AUROC over groups; draws without both classes are left out."""
    from sklearn.metrics import roc_auc_score

    names, member = np.unique(groups, return_inverse=True)
    places = [np.flatnonzero(member == number) for number in range(len(names))]
    draws, found = np.random.default_rng(seed), list[float]()
    for _ in range(resamples):
        rows = np.concatenate([places[number] for number in draws.integers(0, len(names), len(names))])
        if 0 < opened[rows].sum() < len(rows):
            found.append(float(roc_auc_score(opened[rows], scores[rows])))
    if not found:
        return float("nan"), float("nan")
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def share_interval(values: Float[np.ndarray, " input"], groups: Sequence[str], seed: int = 0) -> tuple[float, float, float]:
    """Mean, low and high over groups (both ends the mean where there is one group only)."""
    found = mean_interval(values, groups, seed=seed)
    return found.mean, found.mean if found.low is None else found.low, found.mean if found.high is None else found.high
