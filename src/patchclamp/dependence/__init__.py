"""Dependence: how parts go together, causally and statistically."""

from patchclamp.dependence.table import Dependence

__all__ = ["Dependence"]
