"""Trust: how far a circuit is to be believed, on prompts that chose nothing.

Faithfulness with both ends, completeness, minimality, circuits of the same size and shape drawn at random (`trust`); the
hypotheses that a circuit stands for, each with its p-value (`hypotheses`); whether it holds when only some of the rest is closed
(`fragility`); whether it is found again (`stability`).
"""

from patchclamp.trust.draws import Shape, chance
from patchclamp.trust.fragile import Fragility, fragility
from patchclamp.trust.hypotheses import Hypotheses, Tested, hypotheses
from patchclamp.trust.judge import Trusted, band_sizes, curve_sizes, resampled_circuits, trust
from patchclamp.trust.stable import Find, Stability, stability

__all__ = [
    "Find", "Fragility", "Hypotheses", "Shape", "Stability", "Tested", "Trusted", "band_sizes", "chance", "curve_sizes", "fragility",
    "hypotheses", "resampled_circuits", "stability", "trust",
]  # fmt: skip
