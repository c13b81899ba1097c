"""Metrics: a row per step and number, in Parquet, written in pieces so that a long run pays for each row a few times only."""

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from patchclamp.errors import StoreError
from patchclamp.files import write_atomically

FILE, PIECES = "metrics.parquet", "metrics"
UPDATE = ("loss", "rate", "gradient", "tokens", "scale")
"""Of an update, under the number of updates before it: the loss of its rows, the learning rate, the norm of the whole gradient
before clipping, real tokens seen with it, and in float16 what the loss was multiplied by. Other names are measures'."""
SCHEMA = {"step": pl.Int64, "name": pl.String, "value": pl.Float64}


class Metrics:
    """The numbers of a run. Those since the last writing are in memory; `metrics.parquet` holds all of them at kept checkpoints.

    What is written depends on the run alone, never on when it was cut off: seconds are written elsewhere.
    """

    def __init__(self, out: Path, step: int) -> None:
        """Go on behind `step` updates: what was written of later ones is forgotten."""
        self.out = out
        found = read(out)
        update = pl.col("name").is_in(UPDATE)
        self.frame = found.filter((pl.col("step") < step) | ((pl.col("step") == step) & ~update))
        self.rows: list[tuple[int, str, float]] = []
        self.measured = set(self.frame.filter(~update)["step"].to_list())
        self.tokens = float(self.frame.filter(pl.col("name") == "tokens")["value"].max() or 0.0)  # type: ignore[arg-type]
        if len(found) > len(self.frame) or any((out / PIECES).glob("*.parquet")):
            self.whole()

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step."""
        self.rows += [(step, name, float(value)) for name, value in numbers.items()]

    def piece(self, step: int) -> None:
        """Write what is new as a piece of its own."""
        (self.out / PIECES).mkdir(exist_ok=True)
        write_atomically(self.out / PIECES / f"step-{step:07d}.parquet", self._gathered().write_parquet)

    def whole(self) -> pl.DataFrame:
        """Write everything as one file, then take the pieces away."""
        self._gathered()
        write_atomically(self.out / FILE, self.frame.write_parquet)
        for path in (self.out / PIECES).glob("*.parquet"):
            path.unlink()
        if (self.out / PIECES).is_dir():
            (self.out / PIECES).rmdir()
        return self.frame

    def _gathered(self) -> pl.DataFrame:
        new = pl.DataFrame(self.rows, schema=SCHEMA, orient="row")
        self.frame, self.rows = pl.concat([self.frame, new]), []
        return new


def read(out: Path) -> pl.DataFrame:
    """The numbers that are written in a run's folder, finished or not: step, name, value.

    Raises:
        StoreError: a file is damaged.
    """
    frames: list[pl.DataFrame] = []
    for path in [out / FILE, *sorted((out / PIECES).glob("*.parquet"))]:
        if path.is_file():
            try:
                frames.append(pl.read_parquet(path))
            except (OSError, pl.exceptions.PolarsError) as error:
                raise StoreError(f"{path} is damaged ({error}): delete the run's folder and train again") from None
    joined = pl.concat([pl.DataFrame(schema=SCHEMA), *frames])
    return joined.unique(["step", "name"], keep="last", maintain_order=True)
