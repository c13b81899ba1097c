"""Evaluation: how faithful circuits of every size are, when parts are taken in the order of their scores.

The sizes and areas are those of the MIB circuit-localisation track (Mueller et al. 2025, https://arxiv.org/abs/2504.13151):

    f(C)  = (m(C) - m(nothing)) / (m(everything) - m(nothing))        ratio of means
    CPR   = integral of f over the share k of parts, .001 to 1        by the trapezoid rule, linear in k; parts by signed score
    CMD   = integral of |1 - f| likewise                              parts by |score|

As the rule is linear in k, sizes from 50 to 100 % carry half of the weight: `log_area`, the mean of f over log k, treats every
factor of k alike, and `reaches` says how small a circuit is enough. A share of k is as many parts as are whole in it, as the
benchmark's code counts (`int(share * parts)`), but at least one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float

from patchclamp.discover.pruning import grown, pruned
from patchclamp.discover.threshold import Order, ranked
from patchclamp.errors import PatchclampError
from patchclamp.methods import groups_of
from patchclamp.metrics import metric_named
from patchclamp.parts import Fallback, Parts, benefits
from patchclamp.scores import Part, Scores
from patchclamp.scores.ratios import Shares
from patchclamp.sites import Edge
from patchclamp.tasks import Examples

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Of all parts, how many are in each circuit."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How faithful the circuits of one ranking are.

    Attributes:
        table: a row per size: share (nominal), parts (of it), realised (edges on a path from input to output; parts, for nodes),
            faithfulness (ratio of means) with low and high, mean_of_ratios with its own, left_out (examples whose ratio has no
            scale), completeness = 1 - f of everything but the circuit.
        areas: a row per area: name (CPR or CMD by the order, log_area), value with low and high; and the same over realised sizes.
        about: order, metric, fallback, n, seed.
    """

    table: pl.DataFrame
    areas: pl.DataFrame
    about: dict[str, Any]

    def area(self, name: str, over: str = "nominal") -> float:
        """One area by name; raises `PatchclampError` where it is none."""
        found = self.areas.filter((pl.col("name") == name) & (pl.col("over") == over))
        if not found.height:
            raise PatchclampError(
                f"there is no area {name!r} over {over} sizes: choose from {', '.join(self.areas['name'].unique())}"
            )
        return float(found["value"][0])

    def reaches(self, faithfulness: float = 0.85) -> float | None:
        """The smallest share of parts from which on every larger circuit measured is so faithful, or None."""
        good = (self.table["faithfulness"] >= faithfulness).to_list()
        first = next((i for i in range(len(good)) if all(good[i:])), None)
        return None if first is None else float(self.table["share"][first])

    def __str__(self) -> str:
        rows = self.areas.filter(pl.col("over") == "nominal").iter_rows(named=True)
        return "; ".join(f"{row['name']} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" for row in rows)


def evaluate(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    scores: Scores,
    *,
    shares: Sequence[float] = SHARES,
    by: Order = "signed",
    metric: str | None = None,
    grow: bool = False,
    seed: int = 0,
    batch_size: int = 64,
) -> Evaluation:
    """Faithfulness at every size, with intervals over groups of examples, and the areas under it.

    Args:
        parts: what circuits are made of.
        examples: prompts that chose nothing.
        fallback: what parts outside the circuit pass: resample (counterfactual), zero, mean, mean:position.
        scores: the ranking.
        shares: of all parts, ascending, the last of them 1.
        by: "signed" (CPR: what helps first) or "magnitude" (CMD: what matters first).
        metric: by default the task's.
        grow: take edges from the logits up (`grown`), as the benchmark does for information flow routes, not the best of all.
        seed: of the bootstrap.
        batch_size: examples at once.

    Cost: two forward passes over the examples per size, for the circuit and for everything else.

    Raises:
        MetricError: closing everything changes nothing.
        PatchclampError: shares that do not ascend to 1.
    """
    if not len(shares) or list(shares) != sorted(set(shares)) or not shares[0] > 0 or shares[-1] != 1:
        raise PatchclampError(
            f"circuits of the shares {list(shares)} were asked for: give ascending ones above 0, the last of them 1"
        )
    order = ranked(scores, by)
    counts = [max(1, int(share * len(order) + 1e-9)) for share in shares]
    if grow:
        found = grown(scores, counts, group_of(parts))
        circuits: list[Sequence[Part]] = [found[count] for count in counts]
    else:
        circuits = [order[:count] for count in counts]
    about = {**scores.about, "selected": "grown" if grow else "top"}
    return evaluate_circuits(
        parts, examples, fallback, circuits, shares, by=by, metric=metric, seed=seed, batch_size=batch_size, about=about
    )


def evaluate_circuits(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    circuits: Sequence[Sequence[Part]],
    shares: Sequence[float],
    *,
    by: Order = "signed",
    metric: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    about: Mapping[str, Any] | None = None,
) -> Evaluation:
    """What `evaluate` gives, of circuits that are given: one for each share of the parts, ascending.

    Args:
        parts: what circuits are made of.
        examples: prompts that chose nothing.
        fallback: what parts outside a circuit pass.
        circuits: as many as there are shares.
        shares: the nominal sizes.
        by: "signed" for CPR, "magnitude" for CMD.
        metric: by default the task's.
        seed: of the bootstrap.
        batch_size: examples at once.
        about: provenance to add.

    Cost: two forward passes over the examples per circuit.
    """
    if len(circuits) != len(shares):
        raise PatchclampError(f"{len(circuits)} circuits were given for {len(shares)} shares: give one for each")
    chosen, count, of = metric_named(metric or examples.metric), len(circuits), len(parts.counted)
    gates = torch.cat([parts.open(), parts.closed(), *(parts.only(c) for c in circuits), *(parts.without(c) for c in circuits)])
    values = benefits(parts, examples, gates, fallback, chosen, batch_size).double().numpy()
    opened, closed, kept, rest = values[0], values[1], values[2 : 2 + count], values[2 + count :]
    ratio = Shares.of(opened, closed, groups_of(examples), metric=chosen.name, seed=seed)
    point, draws = ratio.point(kept), ratio.draws(kept)
    realised = [_realised(parts, circuit) for circuit in circuits]
    each, low, high, left_out = ratio.each(kept)
    ends = np.percentile(draws, [2.5, 97.5], axis=0)
    table = pl.DataFrame(
        {"share": list(shares), "parts": [*map(len, circuits)], "realised": realised, "faithfulness": point, "low": ends[0],
         "high": ends[1], "mean_of_ratios": each, "mean_of_ratios_low": low, "mean_of_ratios_high": high, "left_out": left_out,
         "completeness": 1 - ratio.point(rest)}
    )  # fmt: skip
    over = {"nominal": np.array(shares), "realised": np.maximum(np.array(realised), 1e-9) / of}
    facts = {"by": by, "metric": chosen.name, "fallback": fallback.kind, "n": len(examples), "seed": seed, "of": of}
    return Evaluation(table, _areas(point, draws, over, by), {**(about or {}), **facts})


def areas(faithfulness: Float[np.ndarray, "*draw size"], shares: Float[np.ndarray, " size"], by: Order) -> dict[str, Any]:
    """CPR or CMD (by the order), and the mean of f over log k; one number per draw."""
    main = faithfulness if by == "signed" else np.abs(1 - faithfulness)
    log = np.log(shares)
    span = log[-1] - log[0]
    flat = np.trapezoid(faithfulness, log, axis=-1) / span if span > 0 else faithfulness[..., -1]
    return {"CPR" if by == "signed" else "CMD": np.trapezoid(main, shares, axis=-1), "log_area": flat}


def _areas(point: np.ndarray, draws: np.ndarray, over: dict[str, np.ndarray], by: Order) -> pl.DataFrame:
    rows: list[dict[str, object]] = []
    for which, shares in over.items():
        values, drawn = areas(point, shares, by), areas(draws, shares, by)
        for name, value in values.items():
            low, high = np.percentile(drawn[name], [2.5, 97.5])
            rows.append({"name": name, "over": which, "value": float(value), "low": float(low), "high": float(high)})
    return pl.DataFrame(rows)


def group_of(parts: Parts) -> int:
    """Query heads per key/value head."""
    sizes = parts.model.anatomy.sizes[0]
    return sizes.heads // sizes.kv_heads


def _realised(parts: Parts, circuit: Sequence[Part]) -> int:
    """How many edges of a circuit lie on a path from input to output; nodes as they are."""
    found = [edge for edge in circuit if isinstance(edge, Edge)]
    return len(pruned(found, group_of(parts))) if found else len(circuit)


def benchmark_auroc(circuits: Sequence[Sequence[Part]], true: Sequence[Part], of: int) -> float:
    """The AUROC of the InterpBench cell of MIB: TPR against FPR of circuits of growing size, FPR divided by its last value, no (0, 0).

    A random ranking does not give .5 (about .44 with its ten sizes): give `rank_auroc` beside it.

    Args:
        circuits: of growing size (`grown`).
        true: the edges of the truth.
        of: how many edges there are.

    Raises:
        PatchclampError: the truth is empty or holds every edge.
    """
    truth = {str(part) for part in true}
    if not truth or len(truth) >= of:
        raise PatchclampError(f"the truth holds {len(truth)} of {of} edges: an AUROC needs some true and some false ones")
    found = [{str(part) for part in circuit} for circuit in circuits]
    tpr = np.array([len(one & truth) / len(truth) for one in found])
    fpr = np.array([len(one - truth) / (of - len(truth)) for one in found])
    last = fpr[-1] if fpr[-1] > 0 else 1.0
    return float(np.trapezoid(tpr, fpr / last))
