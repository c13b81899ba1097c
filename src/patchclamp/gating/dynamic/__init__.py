"""Dynamic gates: gates that are a function of the input, judged against static ones on prompts they were not fitted to."""

from patchclamp.gating.dynamic.controller import Controller
from patchclamp.gating.dynamic.controls import LabelControl, arbitrary, blind, label_control, untrained_control
from patchclamp.gating.dynamic.experts import force, forced_effect, relevance
from patchclamp.gating.dynamic.families import families_held_out
from patchclamp.gating.dynamic.features import Inputs, inputs_of, probe
from patchclamp.gating.dynamic.fit import Dynamic, fit_dynamic, without_wrong
from patchclamp.gating.dynamic.judge import Judged, judge_dynamic
from patchclamp.gating.dynamic.objective import DynamicSettings
from patchclamp.gating.dynamic.roles import DynamicRoles, dynamic_roles
from patchclamp.gating.dynamic.sight import Sight, look
from patchclamp.gating.dynamic.switching import Switching, best_strength, switching
from patchclamp.gating.dynamic.voids import VoidMap, skip_curve, skip_live, void_map

__all__ = [
    "Controller",
    "Dynamic",
    "DynamicRoles",
    "DynamicSettings",
    "Inputs",
    "Judged",
    "LabelControl",
    "Sight",
    "Switching",
    "VoidMap",
    "arbitrary",
    "best_strength",
    "blind",
    "dynamic_roles",
    "families_held_out",
    "fit_dynamic",
    "force",
    "forced_effect",
    "inputs_of",
    "judge_dynamic",
    "label_control",
    "look",
    "probe",
    "relevance",
    "skip_curve",
    "skip_live",
    "switching",
    "untrained_control",
    "void_map",
    "without_wrong",
]
