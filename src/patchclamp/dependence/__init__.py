"""Dependence: how parts go together, causally and statistically."""

from patchclamp.dependence.closings import Closings, close_pairs
from patchclamp.dependence.conditional import changed_roles, conditional_roles
from patchclamp.dependence.curvature import Fit, agreement, curvature
from patchclamp.dependence.interactions import interaction_table, interactions, named, relations
from patchclamp.dependence.repair import SelfRepair, erasure, joint_backups, self_repair
from patchclamp.dependence.screen import Missed, Screened, screen
from patchclamp.dependence.shapley import Shapley, shapley
from patchclamp.dependence.table import Dependence

__all__ = [
    "Closings", "Dependence", "Fit", "Missed", "Screened", "SelfRepair", "Shapley", "agreement", "changed_roles", "close_pairs",
    "conditional_roles", "curvature", "erasure", "interaction_table", "interactions", "joint_backups", "named", "relations",
    "screen", "self_repair", "shapley",
]  # fmt: skip
