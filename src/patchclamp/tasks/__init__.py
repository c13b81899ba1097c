"""Tasks: behaviours written down as prompts, in pairs that differ in one fact.

The folder is the registry: `load_task("ioi")` finds `ioi.py` here, whose `task(**options)` returns a `Task`. A file, a dotted
name or rows work the same way. `task.examples(tokenizer)` gives `Examples`, and these give a `Batch` for a model.
"""

from typing import TYPE_CHECKING, Any

from patchclamp.tasks._chat import Chat
from patchclamp.tasks._examples import Example, Examples
from patchclamp.tasks._load import load_task, task_names
from patchclamp.tasks._pairs import Message, Pair
from patchclamp.tasks._split import Split
from patchclamp.tasks._task import Task
from patchclamp.tasks._tokens import Tokenizer

if TYPE_CHECKING:
    from patchclamp.tasks._batch import Batch

__all__ = ["Batch", "Chat", "Example", "Examples", "Message", "Pair", "Split", "Task", "Tokenizer", "load_task", "task_names"]


def __getattr__(name: str) -> Any:
    if name == "Batch":  # loads torch, so it comes when asked for
        from patchclamp.tasks._batch import Batch

        return Batch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
