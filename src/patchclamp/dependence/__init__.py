"""Dependence: how parts go together, causally and statistically."""

from patchclamp.dependence.additive import Additivity, additivity
from patchclamp.dependence.association import Association, Recorded, associate, recorded
from patchclamp.dependence.closings import Closings, close_pairs
from patchclamp.dependence.compensation import SelfRepair, erasure, joint_backups, self_repair
from patchclamp.dependence.conditional import changed_roles, conditional_roles
from patchclamp.dependence.curvature import Fit, agreement, curvature
from patchclamp.dependence.interactions import interaction_table, interactions, named, relations
from patchclamp.dependence.network import Communities, Connectome, communities, connectome, double_dissociation, lesion, overlap
from patchclamp.dependence.screen import Missed, Screened, screen
from patchclamp.dependence.shapley import Shapley, shapley
from patchclamp.dependence.table import Dependence

__all__ = [
    "Additivity", "Association", "Closings", "Communities", "Connectome", "Dependence", "Fit", "Missed", "Recorded", "Screened", "SelfRepair",
    "Shapley", "additivity", "agreement", "associate", "changed_roles", "close_pairs", "communities", "conditional_roles", "connectome",
    "curvature", "double_dissociation", "erasure", "interaction_table", "interactions", "joint_backups", "lesion", "named",
    "overlap", "recorded", "relations", "screen", "self_repair", "shapley",
]  # fmt: skip
