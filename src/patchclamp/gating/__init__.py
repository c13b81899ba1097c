"""Gating: learned gates. Causal head gating over heads and MLPs, and the roles that stand when one intervenes."""

from patchclamp.gating.fit import Descent, Gated, fit, refit
from patchclamp.gating.judge import Evidence, judge
from patchclamp.gating.objective import PRESETS, GatingSettings, Stage, gating_settings
from patchclamp.gating.roles import Null, Roles, roles
from patchclamp.gating.toggle import toggle

__all__ = [
    "PRESETS",
    "Descent",
    "Evidence",
    "Gated",
    "GatingSettings",
    "Null",
    "Roles",
    "Stage",
    "fit",
    "gating_settings",
    "judge",
    "refit",
    "roles",
    "toggle",
]
