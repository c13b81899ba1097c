"""Acts that repair: which gates, set to which values, make failing prompts succeed; greedily."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchclamp.metrics import Metric
from patchclamp.parts import Fallback, Parts, benefits
from patchclamp.scores import Part
from patchclamp.tasks import Examples


@dataclass(frozen=True)
class Act:
    """One part's gate, set to a value."""

    site: Part
    gate: float

    def __str__(self) -> str:
        return f"{self.site}={self.gate:g}"


def of_their_own(
    parts: Parts, failing: Examples, before: Float[Tensor, " example"], fallback: Fallback, metric: Metric, tries: Sequence[Act],
    most: int, told: Callable[[str, int, int], None],
) -> tuple[list[list[Act]], Float[Tensor, " example"]]:  # fmt: skip
    """For each failing prompt, the acts that it needs by itself, and its benefit under them; none where every act makes it worse."""
    columns = torch.tensor([_column(parts, act) for act in tries])
    values = torch.tensor([act.gate for act in tries])
    found, after, done = list[list[Act]](), list[Tensor](), 0
    for batch in failing.batches(32):
        base = parts.open().expand(1, len(batch), 1, -1).clone()
        best = before[done : done + len(batch)].clone()
        acts: list[list[Act]] = [[] for _ in range(len(batch))]
        for _ in range(most):
            gates = base.expand(len(tries), -1, -1, -1).clone()
            gates[torch.arange(len(tries)), :, 0, columns] = values[:, None].to(gates)
            m = metric.sign * parts.measure(batch, gates, fallback, metric).cpu()
            top, which = m.max(0)
            better = (top > best) & (best <= 0)
            for row in torch.nonzero(better)[:, 0].tolist():
                acts[row].append(tries[int(which[row])])
                base[0, row, 0, columns[which[row]]] = float(values[which[row]])
            best = torch.where(better, top, best)
            if not bool((best <= 0).any()):
                break
        found += acts
        after.append(best)
        done += len(batch)
        told("failing prompts, each by itself", done, len(failing))
    return found, torch.cat(after)


def together(
    parts: Parts, search: Examples, fallback: Fallback, metric: Metric, tries: Sequence[Act], most: int,
    right: Bool[np.ndarray, " example"], told: Callable[[str, int, int], None],
) -> tuple[tuple[Act, ...], pl.DataFrame]:  # fmt: skip
    """The acts that repair most, one after the other."""
    chosen, rows, best = list[Act](), list[dict[str, object]](), 0.5  # as it is: none repaired, all kept
    for step in range(most):
        gates = torch.cat([gates_of(parts, [*chosen, act]) for act in tries])
        good = (benefits(parts, search, gates, fallback, metric) > 0).numpy()
        mended, kept = good[:, ~right].mean(1), good[:, right].mean(1)
        number = int(np.argmax((mended + kept) / 2))
        told("all prompts together", step + 1, most)
        if (mended[number] + kept[number]) / 2 <= best + 1e-12:
            break
        best = (mended[number] + kept[number]) / 2
        chosen.append(tries[number])
        rows.append({"k": len(chosen), "act": str(tries[number]), "repaired": float(mended[number]), "kept": float(kept[number])})
    return tuple(chosen), pl.DataFrame(rows, schema={"k": pl.Int64, "act": pl.String, "repaired": pl.Float64, "kept": pl.Float64})


def _column(parts: Parts, act: Act) -> int:
    return parts.labels.index(act.site)


def gates_of(parts: Parts, acts: Sequence[Act]) -> Float[Tensor, "1 1 1 part"]:
    gates = parts.open()
    for act in acts:
        gates[..., _column(parts, act)] = act.gate
    return gates
