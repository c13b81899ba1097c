"""What a reproduction gives: claims with the paper's number, ours, an interval and a verdict; a table and a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import polars as pl

from patchclamp.errors import BaselineError
from patchclamp.metrics import metric_named
from patchclamp.models.model import Model
from patchclamp.parts import benefits, nodes
from patchclamp.scores.statistics import Interval
from patchclamp.tasks import load_task
from patchclamp.tasks._split import Split

Verdict = Literal["agrees", "undecided", "differs", "not comparable"]


@dataclass(frozen=True)
class Row:
    """One claim.

    Args:
        what: what is measured.
        paper: what the paper has, in words or as a number, and of which model.
        ours: what comes out here.
        low: of its 95 % interval, where it has one.
        high: of the same.
        verdict: "agrees" where the whole interval lies in the range that the claim allows, "differs" where none of it does, "undecided"
            where a part does; of a number without an interval, the number itself; or "not comparable".
        why: that range, or why there is none.
    """

    what: str
    paper: str
    ours: float
    low: float | None
    high: float | None
    verdict: Verdict
    why: str

    def __str__(self) -> str:
        ends = "" if self.low is None or self.high is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.what}: paper {self.paper}; here {self.ours:.2f}{ends}: {self.verdict} ({self.why})"


@dataclass(frozen=True, eq=False)
class Reproduction:
    """What came out.

    Attributes:
        name: what was reproduced.
        paper: its title and address.
        model: on which model.
        rows: the claims.
        table: the measurements behind them.
        figure: an Altair chart of the table.
        about: task, metric, fallback, n, seed.
    """

    name: str
    paper: str
    model: str
    rows: tuple[Row, ...]
    table: pl.DataFrame
    figure: Any
    about: dict[str, Any]

    def __str__(self) -> str:
        return "\n".join([f"{self.name} ({self.paper}) on {self.model}:", *map(str, self.rows)])


def claim(
    what: str, paper: str, found: Interval | float, low: float | int, high: float | int, same_model: bool | None = True
) -> Row:
    """A row that agrees where its interval lies in [low, high], differs where the two are disjoint, and is undecided between.

    It is not comparable where the paper's number is of another model only.

    Args:
        what: what is measured.
        paper: the paper's number, in words.
        found: ours.
        low: of the range that the claim allows.
        high: of the same.
        same_model: whether this is the paper's model; None: the claim is about models in general.
    """
    mean, ends = (found.mean, (found.low, found.high)) if isinstance(found, Interval) else (float(found), (None, None))
    least, most = (mean if end is None else end for end in ends)
    verdict: Verdict = "undecided"
    why = f"{low:g} or more would agree" if high == inf else f"from {low:g} to {high:g} would agree"
    if low <= least and most <= high:
        verdict = "agrees"
    elif most < low or least > high:
        verdict = "differs"
    else:
        why += ", and the interval is only partly there"
    if same_model is False:
        verdict, why = "not comparable", "the paper's number is of its own model"
    return Row(what, paper, mean, *ends, verdict, why)


def prompts(model: Model, task: str, n: int, seed: int, least: float = 0.75, **options: Any) -> Split:
    """The task's three sets.

    Raises:
        BaselineError: the model does not do the task.
    """
    split = load_task(task, **options).split(model.tokenizer, n, seed=seed)
    parts = nodes(model)
    right = benefits(parts, split.confirm, parts.open(), parts.fallback("zero"), metric_named("logit_diff"))[0]
    share = float((right > 0).double().mean())
    if share < least:
        raise BaselineError(
            f"{model.name} is right on {share:.0%} of {task}, and {least:.0%} is needed: what a paper says of a behaviour cannot be seen "
            "where there is none. Choose a model that does it"
        )
    return split


def is_called(model: Model, names: Sequence[str]) -> bool:
    """Whether this is one of the paper's models, by name."""
    return model.name.rstrip("/").rpartition("/")[2].lower() in names
