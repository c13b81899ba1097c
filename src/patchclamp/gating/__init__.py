"""Gating: learned gates. Causal head gating over heads and MLPs, and the roles that it gives them."""

from patchclamp.gating.fit import Descent, Gated, fit
from patchclamp.gating.objective import PRESETS, GatingSettings, Stage, gating_settings

__all__ = ["PRESETS", "Descent", "Gated", "GatingSettings", "Stage", "fit", "gating_settings"]
