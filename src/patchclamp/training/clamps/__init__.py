"""Clamps: what is held while a model learns, on a schedule, inside the autograd graph."""

from patchclamp.training.clamps.copies import Copy
from patchclamp.training.clamps.patterns import Forbid, Force
from patchclamp.training.clamps.reference import Match, Preserve
from patchclamp.training.clamps.schedule import Schedule
from patchclamp.training.clamps.values import Ablate, Hold
from patchclamp.training.clamps.weights import Freeze, Graft

__all__ = ["Ablate", "Copy", "Forbid", "Force", "Freeze", "Graft", "Hold", "Match", "Preserve", "Schedule"]
