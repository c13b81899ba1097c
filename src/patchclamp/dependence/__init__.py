"""Dependence: how parts go together, causally and statistically."""

from patchclamp.dependence.closings import Closings, close_pairs
from patchclamp.dependence.conditional import changed_roles, conditional_roles
from patchclamp.dependence.interactions import interaction_table, interactions, named, relations
from patchclamp.dependence.table import Dependence

__all__ = [
    "Closings", "Dependence", "changed_roles", "close_pairs", "conditional_roles", "interaction_table", "interactions", "named",
    "relations",
]  # fmt: skip
