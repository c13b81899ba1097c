"""Greedy: a circuit built one part at a time, by what each does in the company of those chosen so far.

    grow     from nothing: add the part that raises the benefit most
    shrink   from everything: drop the part whose loss costs least

An order by effects one by one (`threshold`) knows nothing of company: of two parts that can replace each other it takes both or
none. Growing finds the first of them and then no use for the second; but where two parts are only good together (AND) neither is
any good alone, and growing takes them in the order of its ties: shrinking does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl
import torch

from patchclamp.circuit import Circuit
from patchclamp.discover.loss import Loss
from patchclamp.errors import MetricError, PatchclampError
from patchclamp.metrics import metric_named
from patchclamp.parts import Fallback, Parts
from patchclamp.scores import Part
from patchclamp.tasks import Examples

Way = Literal["grow", "shrink"]
GATES = 1 << 24
"""Gates held at once."""


@dataclass(frozen=True, eq=False)
class Greedy:
    """What a greedy search found.

    Args:
        circuit: the smallest one that reached the wanted faithfulness.
        order: parts in the order in which they were added (grow), or the reverse of that in which they were dropped (shrink).
        steps: a row per step: size, site (added or dropped), faithfulness of the circuit behind it.
        settings: how many were run.
    """

    circuit: Circuit
    order: tuple[Part, ...]
    steps: pl.DataFrame
    settings: int


def greedy(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    *,
    faithfulness: float = 0.85,
    way: Way = "grow",
    among: Sequence[Part] | None = None,
    most: int | None = None,
    metric: str | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Greedy:
    """Build a circuit part by part, until it is as faithful as wanted (grow), or until it would no longer be (shrink).

    Args:
        parts: what circuits are made of.
        examples: prompts; the circuit is to be judged on others.
        fallback: what parts outside the circuit pass.
        faithfulness: (m(circuit) - m(nothing)) / (m(everything) - m(nothing)), a ratio of means, that is wanted.
        way: grow or shrink.
        among: candidates, such as those that a screen ranks first; by default all. Growing leaves the others closed, shrinking open.
        most: steps at most.
        metric: by default the task's.
        batch_size: examples at once.
        progress: told (steps done, steps there may be).

    Cost: at every step one forward pass over the examples per candidate that is left (n (n + 1) / 2 in all at most); candidates
    of a step run together and share what they have in common (`models.tree`).

    Raises:
        MetricError: closing everything changes nothing.
        PatchclampError: a faithfulness that is not above 0 and up to 1, or a candidate that is no part.
    """
    if not 0 < faithfulness <= 1 or way not in ("grow", "shrink"):
        raise PatchclampError(
            f"{way!r} to a faithfulness of {faithfulness} was asked for: grow or shrink, to a share above 0 and up to 1"
        )
    index = {part: number for number, part in enumerate(parts.labels)}
    if unknown := [part for part in among or () if index.get(part) not in parts.counted]:
        raise PatchclampError(f"{unknown[0]} is not among the {len(parts.counted)} parts that a circuit can hold")
    chosen = metric_named(metric or examples.metric)
    loss = Loss.of(parts, examples, fallback, chosen, batch_size)
    opened, closed = (-one for one in loss(torch.cat([parts.open(), parts.closed()])))
    if abs(opened - closed) < 1e-9:
        raise MetricError(f"closing every part leaves {chosen.name} at {opened:.3g}: there is no behaviour to keep")
    left = list(parts.counted) if among is None else sorted({index[part] for part in among})
    now, value = (parts.closed(), closed) if way == "grow" else (parts.open(), opened)
    share = (value - closed) / (opened - closed)
    rows, taken, settings = list[dict[str, object]](), list[int](), 0
    for step in range(min(len(left), most if most is not None else len(left))):
        if way == "grow" and share >= faithfulness:
            break
        values = _tried(now, left, float(way == "grow"), loss)
        settings += len(left)
        best = max(range(len(left)), key=lambda at: (values[at] - closed) / (opened - closed))
        new = (values[best] - closed) / (opened - closed)
        if way == "shrink" and new < faithfulness:
            break
        now[..., left[best]] = float(way == "grow")
        taken.append(left.pop(best))
        share = new
        rows.append(
            {
                "size": int((now[0, 0, 0, list(parts.counted)] == 1).sum()),
                "site": str(parts.labels[taken[-1]]),
                "faithfulness": share,
            }
        )
        if progress is not None:
            progress(step + 1, len(left) + step + 1)
    members = [parts.labels[number] for number in parts.counted if now[0, 0, 0, number] == 1]
    about = {"method": f"greedy ({way})", "metric": chosen.name, "fallback": fallback.kind, "n": len(examples), "wanted": faithfulness,
             "reached": share, "size": len(members), "of": len(parts.counted), "model": parts.model.name, "task": examples.task}  # fmt: skip
    order = tuple(parts.labels[number] for number in (taken if way == "grow" else taken[::-1]))
    table = pl.DataFrame(rows, schema={"size": pl.Int64, "site": pl.String, "faithfulness": pl.Float64})
    return Greedy(Circuit(members, about), order, table, settings)


def _tried(now: torch.Tensor, left: Sequence[int], gate: float, loss: Loss) -> list[float]:
    """The benefit with each candidate's gate turned."""
    found: list[float] = []
    for some in torch.tensor(left).split(max(1, GATES // now.shape[-1])):
        gates = now.repeat(len(some), 1, 1, 1)
        gates[torch.arange(len(some)), :, :, some] = gate
        found += [-one for one in loss(gates)]
    return found
