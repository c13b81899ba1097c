"""Measures of a model's units: pure functions of a model and rows of tokens, a number per part and example.

    from patchclamp.units import MEASURES
    MEASURES["heads"](model, rows)       # part, name, value, low, high, n

Every measure reads the model through `record`, so that it serves every family; none leaves anything behind.
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING

from patchclamp.units.condition import changes, chosen, condition, frozen
from patchclamp.units.context import in_context, losses
from patchclamp.units.copying import copying
from patchclamp.units.fourier import fourier
from patchclamp.units.growth import foretell, growth
from patchclamp.units.heads import fitting, heads, repeated
from patchclamp.units.instability import foreseen, instability, rate_sensitivity
from patchclamp.units.massive import intervene, massive, places
from patchclamp.units.outliers import int8, outliers
from patchclamp.units.recall import recall, serial_recall, without
from patchclamp.units.sinks import dormancy, sinks
from patchclamp.units.table import Numbers, tidy
from patchclamp.units.three_logits import three_logits

if TYPE_CHECKING:
    import polars as pl

    from patchclamp.models.model import Inputs, Model

    Measure = Callable[[Model, Inputs | None], pl.DataFrame]


def own(measure: "Callable[[Model, Inputs], pl.DataFrame]") -> "Measure":
    """A measure of any rows, with random tokens said twice where none are given."""

    @wraps(measure)
    def measured(model: "Model", inputs: "Inputs | None" = None) -> "pl.DataFrame":
        return measure(model, repeated(model, length=fitting(model)) if inputs is None else inputs)

    return measured


MEASURES: "Mapping[str, Measure]" = {
    "heads": heads,
    "sinks": own(sinks),
    "massive": own(massive),
    "outliers": own(outliers),
    "int8": own(int8),
    "recall": recall,
    "three_logits": three_logits,
    "instability": own(instability),
    "condition": condition,
    "fourier": fourier,
}
"""By name: (model, rows or None for the measure's own) -> part, name, value, low, high, n."""

__all__ = [
    "MEASURES", "Numbers", "changes", "chosen", "condition", "copying", "dormancy", "foreseen", "foretell", "fourier", "frozen",
    "growth", "heads", "in_context", "instability", "int8", "intervene", "losses", "massive", "outliers", "places",
    "rate_sensitivity", "recall", "repeated", "serial_recall", "sinks", "three_logits", "tidy", "without",
]  # fmt: skip
