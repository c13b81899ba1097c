"""Patchclamp: a causal-role laboratory for transformer language models.

>>> import patchclamp as pc
>>> model = pc.Model.load("zoo/small")
>>> study = pc.map(model, "ioi")          # doctest: +SKIP

Names are loaded when they are first used, so that `import patchclamp` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchclamp.circuit import Circuit
    from patchclamp.methods import attribute
    from patchclamp.metrics import METRICS, Metric
    from patchclamp.models.doctor import examine
    from patchclamp.models.model import Model
    from patchclamp.parts import edges, gated, neurons, nodes
    from patchclamp.patching import patch
    from patchclamp.paths import path_patching
    from patchclamp.scores import Scores
    from patchclamp.sites import Edge, Site
    from patchclamp.study import Plan, Study, map
    from patchclamp.tasks import Pair, Task, load_task, task_names
    from patchclamp.tracing import trace

_HOMES = {
    "Circuit": "circuit", "Edge": "sites", "METRICS": "metrics", "Metric": "metrics", "Model": "models.model", "Pair": "tasks",
    "Plan": "study", "Scores": "scores", "Site": "sites", "Study": "study", "Task": "tasks", "attribute": "methods",
    "edges": "parts", "examine": "models.doctor", "gated": "parts", "load_task": "tasks", "map": "study", "neurons": "parts", "nodes": "parts",
    "patch": "patching", "path_patching": "paths", "task_names": "tasks", "trace": "tracing",
}  # fmt: skip

__all__ = [
    "METRICS", "Circuit", "Edge", "Metric", "Model", "Pair", "Plan", "Scores", "Site", "Study", "Task", "attribute",
    "edges", "examine", "gated", "load_task", "map", "neurons", "nodes", "patch", "path_patching", "task_names", "trace",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"patchclamp.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'patchclamp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
