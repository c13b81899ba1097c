"""Scores: a table with one row per part, with intervals, p-values and what produced it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import polars as pl
from numpy.typing import NDArray

from patchclamp.errors import NumericsError, PatchclampError
from patchclamp.scores._heat import heat_table
from patchclamp.scores.statistics import bootstrap, grouped, names_of, sign_flip, smallest_p
from patchclamp.sites import Edge, Site

Part = Site | Edge


@runtime_checkable
class ArrayLike(Protocol):
    """A numpy array, or a torch tensor on the CPU without gradient."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __array__(self, *args: Any, **kwargs: Any) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Agreement:
    """How far a table agrees with a reference, over the parts that both score.

    `spearman` and `kendall` are rank correlations, None where a side is constant or fewer than 3 parts are shared.
    `wrong_signs` counts parts whose score points the other way although the reference's interval (where it has one)
    excludes zero; `clear` is how many parts could have been wrong so. `worst` is the part with the largest difference of
    ranks, None where none differs.
    """

    spearman: float | None
    kendall: float | None
    wrong_signs: int
    clear: int
    worst: str | None
    n: int

    def __str__(self) -> str:
        rank = (
            "rank correlation undefined"
            if self.spearman is None
            else f"Spearman {self.spearman:+.2f}, Kendall {self.kendall:+.2f}"
        )
        worst = "" if self.worst is None else f", worst {self.worst}"
        return f"{rank}, {self.wrong_signs} of {self.clear} clear signs wrong{worst} (n = {self.n} parts)"


@dataclass(frozen=True, eq=False)
class Scores:
    """One row per part.

    Args:
        table: columns `site` (str), `score`; `layer`, `kind`, `index` are read off the site where absent; `low`, `high` (95 %
            interval), `p`, `q` (Benjamini-Hochberg), `below_noise` where known; any other column is kept.
        about: what produced it: method, metric, fallback, n, seed, direction, model, task, as far as known.
    """

    table: pl.DataFrame
    about: Mapping[str, Any]

    def __post_init__(self) -> None:
        missing = [name for name in ("site", "score") if name not in self.table.columns]
        if missing:
            raise PatchclampError(f"a table of scores needs the columns site and score: {' and '.join(missing)} not there")
        sites = [parse_part(text) for text in self.table["site"]]
        if len(set(sites)) < len(sites):
            twice = self.table["site"].filter(self.table["site"].is_duplicated())[0]
            raise PatchclampError(f"a table of scores has one row per part, and {twice} has several")
        read = pl.DataFrame(_columns(sites))
        table = self.table.with_columns(read.select(name for name in read.columns if name not in self.table.columns))
        first = [name for name in ("site", "layer", "kind", "index", "score", "low", "high", "p", "q") if name in table.columns]
        object.__setattr__(self, "table", table.select(*first, pl.exclude(first)))
        object.__setattr__(self, "about", dict(self.about))

    # --- making

    @classmethod
    def of(
        cls, sites: Sequence[Part], score: Sequence[float | int] | ArrayLike, about: Mapping[str, Any], **columns: Any
    ) -> "Scores":
        """A table from columns of numbers, one per site, where there are no samples to get intervals from."""
        body = {"site": [str(site) for site in sites], "score": np.asarray(score, dtype=np.float64), **columns}
        return cls(pl.DataFrame(body), about)

    @classmethod
    def from_samples(
        cls,
        sites: Sequence[Part],
        samples: ArrayLike,
        about: Mapping[str, Any],
        groups: Sequence[object] | None = None,
        resamples: int = 1000,
        seed: int = 0,
        noise: float | None = None,
    ) -> "Scores":
        """Mean, interval, p-value and q-value of each part from one number per part and example.

        The interval is the 95 % percentile bootstrap of the mean over examples, or over groups of examples where `groups`
        names one per example (examples of a template are not independent). p is two-sided, from flipping the sign of each
        group: an effect is open minus closed, and if closing the gate did nothing the two would be exchangeable, so that
        each sign would be as likely as the other. That holds at any n (a bootstrap's p is too small at small n). All
        2^groups flips are tried up to 12 groups; above, as many random ones as resolve .05 / parts. q is Benjamini and
        Hochberg's over the parts. With fewer than 2 groups interval, p and q are empty.

        Args:
            sites: one per row.
            samples: [part, example]; numpy, or torch on the CPU.
            about: what produced it; `n` (examples), `groups` and `resamples` are added.
            groups: one name per example; None, or all names empty: every example on its own.
            noise: a score no larger than this is marked `below_noise`.

        Raises:
            NumericsError: a sample is not finite; names the part.
        """
        values = np.asarray(samples, dtype=np.float64)
        if values.shape[:1] != (len(sites),) or values.ndim != 2 or not values.size:
            raise PatchclampError(f"samples of {len(sites)} parts have shape [{len(sites)}, examples], not {list(values.shape)}")
        if not np.isfinite(values).all():
            part, example = np.argwhere(~np.isfinite(values))[0]
            raise NumericsError(f"the score of {sites[part]} on example {example} is {values[part, example]}: expected a number")
        named = names_of(groups)
        if named is not None and len(named) != values.shape[1]:
            raise PatchclampError(f"{len(named)} groups were named for {values.shape[1]} examples")
        sums, sizes = grouped(values, named)
        score = values.mean(1)
        body: dict[str, Any] = {"site": [str(site) for site in sites], "score": score}
        if len(sizes) > 1:
            from scipy.stats import false_discovery_control

            low, high = bootstrap(sums, sizes, resamples, seed)
            p = sign_flip(sums, seed)
            body |= {"low": low, "high": high, "p": p, "q": false_discovery_control(p)}
        else:
            body |= {name: pl.Series([None] * len(sites), dtype=pl.Float64) for name in ("low", "high", "p", "q")}
        if noise is not None:
            body["below_noise"] = np.abs(score) <= noise
        counts = {"n": values.shape[1], "groups": len(sizes), "resamples": resamples}
        return cls(pl.DataFrame(body), {**about, **counts})

    # --- reading

    def __len__(self) -> int:
        return self.table.height

    @property
    def sites(self) -> tuple[Part, ...]:
        """The parts, in the table's order."""
        return tuple(parse_part(text) for text in self.table["site"])

    def __getitem__(self, site: Part | str) -> dict[str, Any]:
        """The row of one part, as a dict."""
        found = self.table.filter(pl.col("site") == str(site))
        if not found.height:
            raise PatchclampError(
                f"{site} has no score here: there are {len(self)} parts, {', '.join(self.table['site'][:4])} ..."
            )
        return found.row(0, named=True)

    def values(self, sites: Sequence[Part] | None = None, column: str = "score") -> NDArray[np.float64]:
        """One column as numbers, in the order of `sites` (default: the table's); NaN where empty."""
        frame = self.table if sites is None else pl.DataFrame({"site": [str(site) for site in sites]}).join(
            self.table, on="site", how="left", maintain_order="left")  # fmt: skip
        return frame[column].cast(pl.Float64).fill_null(np.nan).to_numpy()

    def top(self, k: int = 10) -> pl.DataFrame:
        """The `k` parts of largest |score|, largest first."""
        return self.table.sort(pl.col("score").abs(), descending=True, nulls_last=True, maintain_order=True).head(k)

    def share(self) -> pl.DataFrame:
        """site, score, and each part's share of the sum of |score| with the running sum, largest first (0 where all are 0)."""
        frame = self.top(len(self)).select("site", "score")
        size = frame["score"].abs()
        share = size / (total if (total := size.sum()) else 1.0)
        return frame.with_columns(share.alias("share"), share.cum_sum().alias("cumulative"))

    def agreement(self, reference: "Scores") -> Agreement:
        """How far these scores agree with `reference` over the parts that both have; see `Agreement`."""
        from scipy.stats import kendalltau, rankdata, spearmanr

        columns = [name for name in ("low", "high") if name in reference.table.columns]
        both = self.table.select("site", "score").join(
            reference.table.select("site", pl.col("score").alias("true"), *columns), on="site", how="inner", maintain_order="left"
        ).drop_nulls(["score", "true"])  # fmt: skip
        mine, true = both["score"].to_numpy(), both["true"].to_numpy()
        known = len(columns) == 2
        clear = (pl.col("low") > 0) | (pl.col("high") < 0) if known else pl.col("true") != 0
        clear = both.select(clear.fill_null(False)).to_series().to_numpy() if both.height else np.zeros(0, dtype=bool)
        wrong = clear & (np.sign(mine) * np.sign(true) < 0)
        ranked = both.height > 2 and np.ptp(mine) > 0 and np.ptp(true) > 0
        distance = np.abs(rankdata(mine) - rankdata(true)) if both.height else np.zeros(0)
        return Agreement(
            spearman=_rank(spearmanr(mine, true)) if ranked else None,
            kendall=_rank(kendalltau(mine, true)) if ranked else None,
            wrong_signs=int(wrong.sum()),
            clear=int(clear.sum()),
            worst=str(both["site"][int(distance.argmax())]) if distance.size and distance.max() > 0 else None,
            n=both.height,
        )

    @property
    def too_few(self) -> str | None:
        """Why no part could pass a correction for this many parts at .05, or None where one could."""
        groups = self.about.get("groups")
        if "p" not in self.table.columns or groups is None:
            return None
        n, smallest, needed = self.about.get("n"), smallest_p(groups), 0.05 / len(self)
        if smallest <= needed:
            return None
        return (
            f"n = {n} examples in {groups} groups is too small for {len(self)} parts: the smallest p there can be is "
            f"{smallest:.2g}, and one part alone passes below {needed:.2g}. Use more examples or fewer parts"
        )

    def significant(self, q: float = 0.05) -> pl.DataFrame:
        """The parts with q-value at most `q`, largest |score| first: none where n is too small (`too_few` says why)."""
        if "q" not in self.table.columns:
            raise PatchclampError("these scores have no q-values: make them from samples (Scores.from_samples)")
        return self.top(len(self)).filter((pl.col("q") <= q) & (self.too_few is None))

    # --- keeping

    def save(self, path: str | Path) -> Path:
        """Write `.parquet` (with `about` in its metadata) or `.csv` (the table alone)."""
        path = Path(path)
        if path.suffix == ".parquet":
            self.table.write_parquet(path, metadata={"patchclamp": json.dumps(self.about)})
        elif path.suffix == ".csv":
            self.table.write_csv(path)
        else:
            raise PatchclampError(f"{path.name}: scores are saved as .parquet or .csv")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read what `save` wrote; `about` is empty from CSV, which has no room for it."""
        path = Path(path)
        if path.suffix == ".csv":
            return cls(pl.read_csv(path, infer_schema_length=None), {})
        return cls(pl.read_parquet(path), json.loads(pl.read_parquet_metadata(path).get("patchclamp", "{}")))

    # --- showing

    def __str__(self) -> str:
        known = ", ".join(
            f"{name} {self.about[name]}" for name in ("method", "metric", "fallback", "n", "seed") if name in self.about
        )
        lines = [f"{len(self)} parts" + (f" ({known})" if known else "")]
        for row in self.top(10).iter_rows(named=True):
            span = f"  [{row['low']:+.3f}, {row['high']:+.3f}]" if row.get("low") is not None else ""
            value = "     -" if row["score"] is None else f"{row['score']:+.4f}"
            lines.append(f"  {row['site']:<12} {value}{span}" + (f"  q {row['q']:.3f}" if row.get("q") is not None else ""))
        return "\n".join([*lines, *([self.too_few] if self.too_few else [])])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The heat map and the ten largest, for a notebook."""
        head, *lines = str(self).split("\n")
        return (
            f"<div><p>{escape(head)}</p>{heat_table(self.table)}"
            f"<pre style='line-height:1.35'>{escape(chr(10).join(lines))}</pre></div>"
        )  # fmt: skip


def parse_part(text: str) -> Part:
    """A site, or an edge where the text has `>` or `..` in it."""
    return Edge.parse(text) if ">" in text or ".." in text else Site.parse(text)


def _rank(result: Any) -> float:
    """scipy's stubs do not know its result's type."""
    return float(result.statistic)


def _columns(sites: Sequence[Part]) -> dict[str, pl.Series]:
    ends = [site.target if isinstance(site, Edge) else site for site in sites]
    kinds = ["edge" if isinstance(site, Edge) else site.kind for site in sites]
    return {
        "layer": pl.Series([site.layer for site in ends], dtype=pl.Int64),
        "kind": pl.Series(kinds, dtype=pl.String),
        "index": pl.Series([site.index for site in ends], dtype=pl.Int64),
    }
