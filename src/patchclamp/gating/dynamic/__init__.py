"""Dynamic gates: gates that are a function of the input, judged against static ones on prompts they were not fitted to."""

from patchclamp.gating.dynamic.controller import Controller
from patchclamp.gating.dynamic.fit import Dynamic, fit_dynamic, without_wrong
from patchclamp.gating.dynamic.objective import DynamicSettings
from patchclamp.gating.dynamic.sight import Sight, look

__all__ = ["Controller", "Dynamic", "DynamicSettings", "Sight", "fit_dynamic", "look", "without_wrong"]
