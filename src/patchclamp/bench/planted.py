"""Planted models: attribution against a circuit that is known, as InterpBench does it (Gupta et al. 2024, https://arxiv.org/abs/2407.14494)."""

from collections.abc import Collection, Sequence

import polars as pl

from patchclamp.discover.evaluation import SHARES, benchmark_auroc, group_of
from patchclamp.discover.pruning import grown, rank_auroc
from patchclamp.errors import MetricError, PatchclampError
from patchclamp.methods import attribute
from patchclamp.parts import Edges, Fallback
from patchclamp.sites import Edge
from patchclamp.tasks import Examples


def live(parts: Edges, examples: Examples, fallback: Fallback, least: float = 1e-4) -> tuple[Edge, ...]:
    """The edges whose closing alone changes what is measured, by more than `least` on some prompt: a truth that needs no wiring plan.

    Cost: one forward pass over the examples per edge. Of a redundant pair neither is live.
    """
    from patchclamp.methods import effects

    table = effects(parts, examples, fallback, "exact").abs().amax(1)
    return tuple(edge for edge, effect in zip(parts.labels, table.tolist(), strict=True) if effect > least)


def planted(
    parts: Edges,
    examples: Examples,
    fallback: Fallback,
    truth: Collection[Edge | str],
    methods: Sequence[str],
    *,
    metric: str | None = None,
    seed: int = 0,
) -> pl.DataFrame:
    """How well methods rank a planted circuit's edges above the others.

    Args:
        parts: the edges.
        examples: prompts.
        fallback: what closed edges pass.
        truth: the planted edges.
        methods: attributions by name.
        metric: by default the task's.
        seed: of methods that draw.

    Returns:
        A row per method: auroc (by rank, ties half), benchmark (the benchmark's own, from circuits grown from the logits at ten sizes;
        about .44 for a random ranking), and why where the method has none.

    Cost: that of the methods.

    Raises:
        PatchclampError: planted edges that are not among the parts, or none, or all.
    """
    true = {Edge.parse(edge) if isinstance(edge, str) else edge for edge in truth}
    if strange := sorted(map(str, true - set(parts.labels))):
        raise PatchclampError(f"{strange[0]} is planted and not among the {len(parts.labels)} edges: name edges of this model")
    counts = [max(1, int(share * len(parts.labels) + 1e-9)) for share in SHARES]
    rows: list[dict[str, object]] = []
    for name in methods:
        try:
            scores = attribute(parts, examples, fallback, name, metric=metric, seed=seed)
        except MetricError as error:
            rows.append({"method": name, "auroc": None, "benchmark": None, "why": str(error)})
            continue
        size, flags = abs(scores.values()), [edge in true for edge in scores.sites]
        by_size = grown(scores, counts, group_of(parts))
        area = benchmark_auroc([by_size[count] for count in counts], sorted(true), len(parts.labels))
        rows.append({"method": name, "auroc": rank_auroc(size, flags), "benchmark": area, "why": ""})
    return pl.DataFrame(rows, schema={"method": pl.String, "auroc": pl.Float64, "benchmark": pl.Float64, "why": pl.String})
