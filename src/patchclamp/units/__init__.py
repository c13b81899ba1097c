"""Measures of a model's units: pure functions of a model and rows of tokens, a number per part and example.

    from patchclamp.units import MEASURES
    MEASURES["heads"](model, rows)       # part, name, value, low, high, n

Every measure reads the model through `record`, so that it serves every family; none leaves anything behind.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from patchclamp.units.fourier import fourier
from patchclamp.units.heads import copying, heads, in_context, losses, repeated
from patchclamp.units.table import Numbers, tidy

if TYPE_CHECKING:
    import polars as pl

    from patchclamp.models.model import Inputs, Model

    Measure = Callable[[Model, Inputs | None], pl.DataFrame]

MEASURES: "Mapping[str, Measure]" = {
    "heads": heads,
    "fourier": fourier,
}
"""By name: (model, rows or None for the measure's own) -> part, name, value, low, high, n."""

__all__ = ["MEASURES", "Numbers", "copying", "fourier", "heads", "in_context", "losses", "repeated", "tidy"]
