"""Reproduce: what a paper reports, measured again on any model. The folder is the registry: `ioi-heads` is reproduce/ioi_heads.py.

A reproduction says of each claim what the paper has, what comes out here with its interval, and whether that agrees (all of the interval
lies where the claim allows), differs (none of it does) or is undecided (more prompts would tell). The numbers of a paper are of the
paper's model: on another model only what is said of models in general can agree or differ.
"""

import importlib
import pkgutil
from collections.abc import Callable

from patchclamp.errors import PatchclampError
from patchclamp.models.model import Model
from patchclamp.reproduce._result import Reproduction, Row

__all__ = ["Reproduction", "Row", "reproduce", "reproduction_names"]


def reproduction_names() -> tuple[str, ...]:
    """What can be reproduced."""
    found = (module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return tuple(sorted(name.replace("_", "-") for name in found))


def reproduce(
    name: str, model: Model, n: int = 96, seed: int = 0, progress: Callable[[str, int, int], None] | None = None
) -> Reproduction:
    """Run one.

    Args:
        name: one of `reproduction_names()`.
        model: the model.
        n: prompts of each task (fit : select : confirm = 2 : 1 : 1).
        seed: of the draw and the intervals.
        progress: told what runs, and how much is done.

    Raises:
        PatchclampError: there is no such reproduction; the model cannot do the task.
    """
    if name not in reproduction_names():
        raise PatchclampError(f"there is nothing called {name!r} to reproduce: choose from {', '.join(reproduction_names())}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    return module.run(model, n, seed, progress or (lambda what, done, of: None))
