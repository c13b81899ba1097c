"""Case: one plan of a sweep, asked of one model on one task, as plain data that any worker can take up."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchclamp.errors import SweepError
from patchclamp.store.codec import plain
from patchclamp.study.plan import EXTRA, STEPS, Plan

if TYPE_CHECKING:
    from patchclamp.models.model import Model
    from patchclamp.tasks import Task

LOADING = {
    "dtype": str, "device": str, "device_map": (str, dict), "revision": str, "tokenizer": str, "trust": bool,
}  # fmt: skip
"""How a model is loaded, with the types of the values: see `Model.load` (trust: trust_remote_code)."""
ASKED = {"options": dict, "columns": dict, "chat": bool, "bos": bool}
"""How a task is loaded: its own options, columns of a table, whether prompts become chats, with or without a first BOS."""


@dataclass(frozen=True)
class Case:
    """One plan of a sweep.

    Args:
        model: a hub name, a folder or zoo/NAME.
        task: name or file of a task.
        plan: the question.
        steps: which steps of the map are done.
        loading: how the model is loaded, keys as in `LOADING`.
        asked: how the task is loaded, keys as in `ASKED`.

    Raises:
        SweepError: a key that there is not, or no such step.
    """

    model: str
    task: str
    plan: Plan = field(default_factory=Plan)
    steps: tuple[str, ...] = STEPS
    loading: Mapping[str, Any] = field(default_factory=dict[str, Any])
    asked: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        for what, given, known in (("loading", self.loading, LOADING), ("asked", self.asked, ASKED)):
            if unknown := sorted(set(given) - set(known)):
                raise SweepError(f"there is no {what} option {unknown[0]!r}: there are {', '.join(known)}")
        if not self.steps or (unknown := sorted(set(self.steps) - {*STEPS, *EXTRA})):
            raise SweepError(f"the steps {list(self.steps)} were asked for: choose from {', '.join((*STEPS, *EXTRA))}")

    @property
    def weights(self) -> str:
        """What a worker has to hold to take this case up: equal for cases of the same loaded model."""
        return json.dumps([self.model, plain(self.loading)], sort_keys=True)

    @property
    def key(self) -> str:
        """Equal for equal cases."""
        return json.dumps([self.weights, self.task, plain(self.asked), plain(self.plan), sorted(self.steps)], sort_keys=True)

    def __str__(self) -> str:
        model = Path(self.model).name if Path(self.model).is_dir() else self.model
        task = Path(self.task).stem if Path(self.task).suffix else self.task
        at = f"@{self.loading['revision']}" if self.loading.get("revision") else ""
        return f"{model}{at} on {task}, seed {self.plan.seed}"

    def load_model(self) -> "Model":
        """The model; raises `ModelError`."""
        from patchclamp.models.model import Model

        options = {("trust_remote_code" if name == "trust" else name): value for name, value in self.loading.items()}
        return Model.load(self.model, **options)

    def load_task(self) -> "Task":
        """The task; raises `TaskError`."""
        from patchclamp.tasks import load_task

        asked = dict(self.asked)
        return load_task(self.task, **(asked.pop("options", None) or {}), **asked)

    def check(self) -> None:
        """What can be known without weights: raises where the task, or the model's folder, is not there."""
        from patchclamp.models.load import resolve

        resolve(self.model)
        self.load_task()

    @property
    def source(self) -> dict[str, Any]:
        """How model and task were named, in the form in which the command line asks a run's question again."""
        asked: dict[str, Any] = dict(self.asked)
        if options := asked.get("options"):
            asked["options"] = [f"{name}={json.dumps(value)}" for name, value in options.items()]
        if columns := asked.get("columns"):
            asked["columns"] = ",".join(f"{name}={column}" for name, column in columns.items())
        return {"model": self.model, "task": self.task, "loading": dict(self.loading), "asked": asked}
