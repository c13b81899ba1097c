"""From what the steps found to the tables that the record keeps."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import polars as pl

from patchclamp.gating import Roles
from patchclamp.parts import Parts, sites_of
from patchclamp.scores import Scores
from patchclamp.store.record import Null, Trust
from patchclamp.study.plan import Plan
from patchclamp.trust import Trusted


def plan_of(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON."""
    return asdict(plan)


def table(parts: Parts, found: Mapping[str, Any]) -> pl.DataFrame:
    """One row per counted part, with every column that the steps have filled."""
    sites = sites_of(parts)
    rows = pl.DataFrame(
        {"site": [str(site) for site in sites], "layer": [site.layer for site in sites], "kind": [site.kind for site in sites],
         "index": [site.index for site in sites]},
        schema={"site": pl.String, "layer": pl.Int64, "kind": pl.String, "index": pl.Int64},
    )  # fmt: skip
    for name in ("exact", "second"):
        if name in found:
            rows = rows.join(_columns(found[name], name, with_p=name == "exact"), on="site", how="left", maintain_order="left")
    shifted = found.get("shifted")
    if shifted is not None and shifted.scores is not None:
        rows = rows.join(_columns(shifted.scores, "shifted", with_p=False), on="site", how="left", maintain_order="left")
    for name, scores in found.get("attributions", {}).items():
        rows = rows.join(scores.table.select("site", pl.col("score").alias(name)), on="site", how="left", maintain_order="left")
    if "roles" in found:
        frame: pl.DataFrame = found["roles"].table
        new = [column for column in frame.columns if column == "site" or column not in rows.columns]
        rows = rows.join(frame.select(new), on="site", how="left", maintain_order="left")
    return rows


def _columns(scores: Scores, name: str, with_p: bool) -> pl.DataFrame:
    chosen = [
        pl.col("site"),
        pl.col("score").alias(name),
        pl.col("low").alias(f"{name}_low"),
        pl.col("high").alias(f"{name}_high"),
    ]
    if with_p:
        chosen += [pl.col("p").alias(f"{name}_p"), pl.col("q").alias(f"{name}_q")]
        chosen += [pl.col("below_noise")] if "below_noise" in scores.table.columns else []
    return scores.table.select(chosen)


def nulls_of(roles: Roles) -> tuple[Null, ...]:
    """The nulls of the learned gates, as the record keeps them."""
    return tuple(
        Null(null.name, null.facilitating, null.interfering, null.raw_facilitating, null.raw_interfering, null.parts, null.seeds)
        for null in roles.nulls
    )


def trust_of(trusted: Trusted) -> Trust:
    """The numbers on the circuit, as the record keeps them."""
    rest = trusted.rest
    return Trust(
        faithfulness=trusted.faithfulness,
        random=trusted.random,
        draws=trusted.random.n,
        completeness=type(rest)(
            1 - rest.mean, None if rest.high is None else 1 - rest.high, None if rest.low is None else 1 - rest.low, rest.n
        ),
        minimality={site: loss for site, (loss, _, _) in trusted.minimality.items()},
        stability=trusted.stability,
    )
