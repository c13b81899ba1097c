"""Loading a task: by the name of a file in this folder, a dotted name, a path, or rows."""

import importlib
import inspect
import types
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from patchclamp.errors import TaskError
from patchclamp.tasks._chat import Chat
from patchclamp.tasks._task import Task

_HERE = Path(__file__).parent


def task_names() -> tuple[str, ...]:
    """Names of the built-in tasks, sorted: the files of this folder whose names do not begin with `_`."""
    return tuple(sorted(path.stem for path in _HERE.glob("[!_]*.py")))


def load_task(
    source: str | Path | Iterable[Mapping[str, Any]] | Any,
    *,
    columns: Mapping[str, str] | None = None,
    bos: bool | None = None,
    chat: bool = False,
    system: str | None = None,
    template: Mapping[str, object] | None = None,
    window: int | None = None,
    **options: object,
) -> Task:
    """The task called `source`.

    Args:
        source: name of a built-in task; `.jsonl`, `.csv`, `.parquet` or `.txt` file; Python file or dotted name (`name` or
            `name:attribute`) with `TASK` or `task(**options)`; or rows: a list of mappings, a Hugging Face dataset, a polars
            or pandas frame.
        columns: our name -> name of the column in a file or in rows (`{"clean": "sentence_good"}`).
        bos: None: special tokens as the tokenizer does; True: exactly one BOS; False: none.
        chat: whether text prompts become chats, through the tokenizer's template.
        system: system message of a chat.
        template: further arguments of the chat template.
        window: tokens in a window of plain text.
        options: of the task itself; values may be strings, as the command line gives them.

    Raises:
        TaskError: there is no such task, it cannot be read (with the line), or an option is not one of those there are.
    """
    task = _found(source, columns, options)
    changes: dict[str, Any] = {}
    if bos is not None:
        changes["bos"] = bos
    if chat or system is not None or template:
        changes["chat"] = Chat(chat or task.chat.wrap, system, dict(template or {}))
    if window is not None:
        changes["window"] = window
    return replace(task, **changes)


def _found(source: Any, columns: Mapping[str, str] | None, options: Mapping[str, object]) -> Task:
    if isinstance(source, str) and source in task_names():
        return _built(importlib.import_module(f"patchclamp.tasks.{source}"), source, "task", options)
    raise TaskError(f"there is no task {source!r}: built in are {', '.join(task_names())}")


def _built(module: types.ModuleType, name: str, attribute: str, options: Mapping[str, object]) -> Task:
    """A task from a module: what its factory makes of the options, or its `TASK`."""
    factory = getattr(module, attribute, None)
    if callable(factory):
        made = factory(**parsed_options(factory, name, options))
    else:
        made = getattr(module, "TASK", None)
        if options and made is not None:
            raise TaskError(f"the task {name!r} has no options, and {', '.join(options)} was given")
    if not isinstance(made, Task):
        raise TaskError(f"{name!r} holds no task: give it TASK, or a function {attribute}(**options) that returns a Task")
    return made


def parsed_options(factory: Any, name: str, options: Mapping[str, object]) -> dict[str, Any]:
    """Options as the factory's annotations want them; raises `TaskError` naming those there are."""
    parameters = inspect.signature(factory, eval_str=True).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(options)
    there = ", ".join(f"{key}={parameter.default}" for key, parameter in parameters.items()) or "none"
    unknown = [key for key in options if key not in parameters]
    if unknown:
        raise TaskError(f"{name!r} has no option {unknown[0]!r}: there are {there}")
    return {key: _parsed(value, parameters[key].annotation, f"option {key!r} of {name!r}") for key, value in options.items()}


def _parsed(value: object, wanted: Any, what: str) -> object:
    """A value as `wanted` (a Literal, int, float, bool, str, or one of these or None)."""
    if get_origin(wanted) in (Union, types.UnionType):
        if value is None:
            return None
        wanted = next(kind for kind in get_args(wanted) if kind is not type(None))
    if get_origin(wanted) is Literal:
        for choice in get_args(wanted):
            if str(value) == str(choice):
                return choice
        raise TaskError(f"{what} cannot be {value!r}: choose from {', '.join(map(str, get_args(wanted)))}")
    if wanted is bool and str(value).lower() in ("true", "yes", "1", "false", "no", "0"):
        return str(value).lower() in ("true", "yes", "1")
    if wanted in (int, float) and not isinstance(value, bool):
        try:
            return wanted(str(value))
        except ValueError:
            pass
    if wanted in (bool, int, float):
        raise TaskError(f"{what} must be of type {wanted.__name__}, not {value!r}")
    return value
