"""Dynamic gates: gates that are a function of the input, judged against static ones on prompts they were not fitted to."""

from patchclamp.gating.dynamic.controller import Controller
from patchclamp.gating.dynamic.controls import LabelControl, arbitrary, blind, label_control, untrained_control
from patchclamp.gating.dynamic.features import Inputs, inputs_of, probe
from patchclamp.gating.dynamic.fit import Dynamic, fit_dynamic, without_wrong
from patchclamp.gating.dynamic.judge import Judged, judge_dynamic
from patchclamp.gating.dynamic.objective import DynamicSettings
from patchclamp.gating.dynamic.sight import Sight, look
from patchclamp.gating.dynamic.switching import Switching, best_strength, switching

__all__ = [
    "Controller",
    "Dynamic",
    "DynamicSettings",
    "Inputs",
    "Judged",
    "LabelControl",
    "Sight",
    "Switching",
    "arbitrary",
    "best_strength",
    "blind",
    "fit_dynamic",
    "inputs_of",
    "judge_dynamic",
    "label_control",
    "look",
    "probe",
    "switching",
    "untrained_control",
    "without_wrong",
]
