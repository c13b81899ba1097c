"""Gating: learned gates. Causal head gating over parts of any kind, the roles that stand when one intervenes, sets of a wanted size or
price, and the several solutions that there are."""

from patchclamp.gating.contrast import Behaviour, Contrast, contrast
from patchclamp.gating.descent import Descent
from patchclamp.gating.exactly import Exactly, fit_exactly
from patchclamp.gating.finder import Sets, find_sets
from patchclamp.gating.fit import Gated, fit, refit
from patchclamp.gating.hard import Hard, fit_hard
from patchclamp.gating.judge import Evidence, judge
from patchclamp.gating.objective import PRESETS, GatingSettings, Stage, gating_settings
from patchclamp.gating.roles import Null, Roles, roles
from patchclamp.gating.solutions import Solutions, solutions
from patchclamp.gating.sufficiency import Shares, shares
from patchclamp.gating.toggle import toggle

__all__ = [
    "PRESETS",
    "Behaviour",
    "Contrast",
    "Descent",
    "Evidence",
    "Exactly",
    "Gated",
    "GatingSettings",
    "Hard",
    "Null",
    "Roles",
    "Sets",
    "Shares",
    "Solutions",
    "Stage",
    "contrast",
    "find_sets",
    "fit",
    "fit_exactly",
    "fit_hard",
    "gating_settings",
    "judge",
    "refit",
    "roles",
    "shares",
    "solutions",
    "toggle",
]
