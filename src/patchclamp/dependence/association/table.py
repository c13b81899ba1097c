"""Association: a table of pairs that never stands without what intervention says of them."""

from dataclasses import dataclass

import polars as pl

from patchclamp.dependence.table import SEPARATOR, Dependence

CAUSAL = ("causal", "causal_low", "causal_high")


@dataclass(frozen=True, eq=False)
class Association(Dependence):
    """A statistical association per pair, beside its causal counterpart.

    Columns beyond those of `Dependence`: `p` and `q` by permutation, `null_mean` and `null_95` of the statistic under
    permutations, `raw` (the score before the null's mean was taken off it, where that is done), `idle` (nothing of one side was left
    to compare), `causal`, `causal_low`, `causal_high`: the pair's causal dependence, empty where it was not measured.
    """

    @property
    def compared(self) -> bool:
        """Whether any pair has a causal counterpart."""
        return self.table["causal"].is_not_null().any()

    def misleading(self, alpha: float = 0.05, floor: float = 0.0) -> pl.DataFrame:
        """Pairs that are associated (q <= alpha) and whose causal interval lies within +- `floor` or holds 0: no causal link seen."""
        none = ((pl.col("causal_low") <= 0) & (pl.col("causal_high") >= 0)) | (pl.col("causal").abs() <= floor)
        return self.table.filter((pl.col("q") <= alpha) & pl.col("causal").is_not_null() & none)

    def __str__(self) -> str:
        told = ", ".join(
            f"{name} {self.about[name]}" for name in ("method", "what", "given", "lag", "n", "units") if name in self.about
        )
        lines = [f"{len(self)} pairs of {len(self.parts)} parts ({told})"]
        if not self.compared:
            lines.append("  not compared with intervention: an association alone says nothing of what acts on what")
        arrow = " -> " if self.directed else SEPARATOR
        for row in self.top(10).iter_rows(named=True):
            null = f"null {row['null_mean']:+.3f}, 95 % below {row['null_95']:.3f}, q {row['q']:.3f}"
            causal = f"causal {row['causal']:+.4f}" if row["causal"] is not None else "causal: not measured"
            lines.append(f"  {row['a'] + arrow + row['b']:<24} {row['score']:+.4f}  {null}  {causal}")
        return "\n".join(lines)

    __repr__ = __str__


def beside(table: pl.DataFrame, causal: Dependence | None) -> pl.DataFrame:
    """The columns `causal`, `causal_low`, `causal_high`, from another table's pairs.

    A directed causal table gives a -> b for pairs in forward order (the later part cannot act on the earlier one).
    """
    if causal is None:
        return table.with_columns(*(pl.lit(None, dtype=pl.Float64).alias(name) for name in CAUSAL))
    there = causal.table
    ends = [pl.col(old) if old in there.columns else pl.lit(None, dtype=pl.Float64) for old in ("score", "low", "high")]
    known = there.select("a", "b", *(one.cast(pl.Float64).alias(new) for one, new in zip(ends, CAUSAL, strict=True)))
    if not causal.directed:
        turned = known.select(pl.col("b").alias("a"), pl.col("a").alias("b"), *CAUSAL)
        known = pl.concat([known, turned])
    return table.join(
        known.unique(["a", "b"], keep="first", maintain_order=True), on=["a", "b"], how="left", maintain_order="left"
    )
