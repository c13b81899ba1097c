"""Dependence: how parts go together, a row per pair, with what produced it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from patchclamp.errors import NumericsError, PatchclampError
from patchclamp.scores import ArrayLike, Part, parse_part
from patchclamp.scores.statistics import judged

SEPARATOR = " & "
RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class Dependence:
    """A number per pair of parts, with interval and provenance.

    Args:
        table: a row per pair with columns `a`, `b` (parts, as text), `score`, and where there are samples `low`, `high`, `p`
            and `q`; more columns as the method has. Directed: `a` acts on `b`, and (a, b) and (b, a) are two rows. Otherwise
            every pair is there once, `a` before `b` in forward order.
        parts: every part that was looked at, in forward order, whether or not a pair of it is in the table.
        about: what produced it: method, metric, fallback, n, seed, `directed`.
    """

    table: pl.DataFrame
    parts: tuple[str, ...]
    about: Mapping[str, Any]

    def __post_init__(self) -> None:
        if missing := [name for name in ("a", "b", "score") if name not in self.table.columns]:
            raise PatchclampError(f"a table of pairs needs the columns a, b and score: {missing[0]} is missing")
        known = set(self.parts)
        if strange := [name for name in (*self.table["a"], *self.table["b"]) if name not in known]:
            raise PatchclampError(f"{strange[0]} is in a pair and not among the {len(known)} parts that were looked at")

    @classmethod
    def from_samples(
        cls,
        parts: Sequence[Part],
        pairs: Sequence[tuple[int, int]],
        samples: ArrayLike,
        about: Mapping[str, Any],
        groups: Sequence[object] | None = None,
        *,
        seed: int = 0,
        directed: bool = False,
        **columns: Any,
    ) -> "Dependence":
        """Mean, interval, p and q of each pair from one number per pair and example; see `Scores.from_samples`.

        Args:
            parts: every part, in forward order.
            pairs: of indices into `parts`, one per row of `samples`.
            samples: [pair, example].
            about: what produced it; n, groups, resamples and `directed` are added.
            groups: of examples.
            seed: of the bootstrap and the sign flips.
            directed: whether `a` acts on `b`.
            columns: more columns, a value per pair.
        """
        values = np.asarray(samples, dtype=np.float64)
        if values.ndim != 2 or len(values) != len(pairs):
            raise PatchclampError(f"samples of {len(pairs)} pairs have shape [{len(pairs)}, examples], not {list(values.shape)}")
        if not np.isfinite(values).all():
            pair, example = np.argwhere(~np.isfinite(values))[0]
            a, b = (parts[number] for number in pairs[pair])
            raise NumericsError(f"the pair {a}, {b} is {values[pair, example]} on example {example}: expected a number")
        found = judged(values, groups, seed, RESAMPLES)
        known = {name: pl.Series(getattr(found, name), dtype=pl.Float64).fill_nan(None) for name in ("low", "high", "p", "q")}
        facts = {**about, "n": values.shape[1], "groups": found.groups, "resamples": RESAMPLES}
        return cls.of(parts, pairs, found.mean, facts, directed=directed, **known, **columns)

    @classmethod
    def of(
        cls, parts: Sequence[object], pairs: Sequence[tuple[int, int]], score: Sequence[float] | ArrayLike | pl.Series,
        about: Mapping[str, Any], *, directed: bool = False, **columns: Any,
    ) -> "Dependence":  # fmt: skip
        """A table from one number per pair, where there are no samples to get intervals from."""
        names = tuple(str(part) for part in parts)
        body = {
            "a": pl.Series([names[i] for i, _ in pairs], dtype=pl.String),
            "b": pl.Series([names[j] for _, j in pairs], dtype=pl.String),
            "score": pl.Series(score if isinstance(score, pl.Series) else np.asarray(score, dtype=np.float64), dtype=pl.Float64),
        }
        return cls(pl.DataFrame({**body, **columns}), names, {**about, "directed": directed})

    # --- reading

    def __len__(self) -> int:
        return self.table.height

    @property
    def directed(self) -> bool:
        """Whether `a` acts on `b`."""
        return bool(self.about.get("directed", False))

    @cached_property
    def sites(self) -> tuple[Part, ...]:
        """The parts, parsed."""
        return tuple(parse_part(name) for name in self.parts)

    def matrix(self, column: str = "score") -> Float[np.ndarray, "part part"]:
        """A column as a matrix [a, b]; NaN where a pair is not in the table, and on the diagonal."""
        index = {name: number for number, name in enumerate(self.parts)}
        out = np.full((len(self.parts), len(self.parts)), np.nan)
        values = self.table[column].cast(pl.Float64).fill_null(np.nan).to_numpy()
        rows, columns = ([index[name] for name in self.table[end]] for end in ("a", "b"))
        out[rows, columns] = values
        if not self.directed:
            out[columns, rows] = values
        return out

    def pair(self, a: Part | str, b: Part | str) -> dict[str, Any]:
        """The row of one pair, in either order unless directed."""
        first, second = str(a), str(b)
        same = (pl.col("a") == first) & (pl.col("b") == second)
        turned = (pl.col("a") == second) & (pl.col("b") == first)
        found = self.table.filter(same if self.directed else same | turned)
        if not found.height:
            raise PatchclampError(f"the pair {first}, {second} is not among the {len(self)} pairs of {len(self.parts)} parts")
        return found.row(0, named=True)

    def top(self, k: int = 10) -> pl.DataFrame:
        """The `k` pairs of largest |score|, largest first."""
        return self.table.sort(pl.col("score").abs(), descending=True, nulls_last=True, maintain_order=True).head(k)

    # --- keeping

    def save(self, path: str | Path) -> Path:
        """Write `.parquet`, with parts and `about` in its metadata."""
        path = Path(path)
        if path.suffix != ".parquet":
            raise PatchclampError(f"{path.name}: pairs are saved as .parquet")
        kept = json.dumps({"parts": self.parts, "about": dict(self.about)})
        self.table.write_parquet(path, metadata={"patchclamp": kept})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Dependence":
        """Read what `save` wrote."""
        kept = json.loads(pl.read_parquet_metadata(path).get("patchclamp", "{}"))
        if "parts" not in kept:
            raise PatchclampError(f"{path} was not written by Dependence.save: it does not say its parts")
        return cls(pl.read_parquet(path), tuple(kept["parts"]), kept["about"])

    # --- showing

    def __str__(self) -> str:
        told = ", ".join(
            f"{name} {self.about[name]}" for name in ("method", "metric", "fallback", "n", "seed") if name in self.about
        )
        lines = [f"{len(self)} pairs of {len(self.parts)} parts" + (f" ({told})" if told else "")]
        arrow = " -> " if self.directed else SEPARATOR
        for row in self.top(10).iter_rows(named=True):
            span = f"  [{row['low']:+.3f}, {row['high']:+.3f}]" if row.get("low") is not None else ""
            sure = f"  q {row['q']:.3f}" if row.get("q") is not None else ""
            lines.append(f"  {row['a'] + arrow + row['b']:<24} {row['score']:+.4f}{span}{sure}")
        return "\n".join(lines)

    __repr__ = __str__
