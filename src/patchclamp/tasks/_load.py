"""Loading a task: by the name of a file in this folder, a dotted name, a path, or rows."""

import difflib
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from patchclamp.errors import TaskError
from patchclamp.tasks._chat import Chat
from patchclamp.tasks._read import read_task, rows_task, suffixes
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
    chat_arguments: Mapping[str, object] | None = None,
    window: int | None = None,
    **options: object,
) -> Task:
    """The task called `source`.

    Args:
        source: name of a built-in task; `zoo/NAME`, the task of a compiled program; `.jsonl`, `.csv`, `.parquet` or `.txt`
            file; Python file or dotted name (`name` or `name:attribute`) with `TASK` or `task(**options)`; or rows: a list of
            mappings, a Hugging Face dataset, a polars or pandas frame.
        columns: our name -> name of the column in a file or in rows (`{"clean": "sentence_good"}`).
        bos: None: special tokens as the tokenizer does; True: exactly one BOS; False: none.
        chat: whether text prompts become chats, through the tokenizer's template.
        system: system message of a chat.
        chat_arguments: what the chat template takes besides, such as `enable_thinking`.
        window: tokens in a window of plain text.
        options: of the task itself; values may be strings, as the command line gives them.

    Raises:
        TaskError: there is no such task, it cannot be read (with the line), or an option is not one of those there are.
    """
    task = _found(source, columns, options)
    changes: dict[str, Any] = {}
    if bos is not None:
        changes["bos"] = bos
    if chat or system is not None or chat_arguments:
        changes["chat"] = Chat(chat or task.chat.wrap, system, dict(chat_arguments or {}))
    if window is not None:
        changes["window"] = window
    return replace(task, **changes)


def _found(source: Any, columns: Mapping[str, str] | None, options: Mapping[str, object]) -> Task:
    if isinstance(source, str) and source in task_names():
        module = importlib.import_module(f"patchclamp.tasks.{source}")
        return _built(module, source, "task", _no_columns(source, columns, options))
    if not isinstance(source, str | Path):
        return rows_task(source, columns, **parsed_options(_row_options, "rows", options))
    if isinstance(source, str) and source.startswith("zoo/"):
        programs = _dotted_module("patchclamp.zoo.compiled.tasks")  # by name, as a module of the user's own
        return _built(programs, source, "task", {"program": source.removeprefix("zoo/"), **_no_columns(source, columns, options)})
    path = Path(source)
    if path.suffix in suffixes():
        return read_task(path, columns, **parsed_options(_row_options, path.name, options))
    if path.suffix == ".py":
        return _built(_file_module(path), path.stem, "task", _no_columns(path.name, columns, options))
    name, _, attribute = str(source).partition(":")
    if attribute or "." in name:
        return _built(_dotted_module(name), name, attribute or "task", _no_columns(name, columns, options))
    near = difflib.get_close_matches(name, task_names(), 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise TaskError(
        f"there is no task {name!r}{hint}: built in are {', '.join(task_names())}; a task of your own is a file that ends in "
        f"{', '.join(suffixes())} or .py, or a dotted name"
    )


def _row_options(*, mirrors: bool = True) -> dict[str, bool]:
    """What a file of rows takes as options: whether `wrong` is right after `corrupt`."""
    return {"mirrors": mirrors}


def _no_columns(name: str, columns: Mapping[str, str] | None, options: Mapping[str, object]) -> Mapping[str, object]:
    if columns:
        raise TaskError(f"{name!r} is a program, not a table: it has no columns to be named")
    return options


def _file_module(path: Path) -> types.ModuleType:
    if not path.is_file():
        raise TaskError(f"there is no task file {str(path)!r}")
    name = f"patchclamp_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a file that ends in .py has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the file look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own code raises
        del sys.modules[name]
        raise TaskError(f"the task file {str(path)!r} fails when run: {type(error).__name__}: {error}") from error
    return module


def _dotted_module(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the user's own code raises
        raise TaskError(f"the task module {name!r} cannot be imported: {type(error).__name__}: {error}") from error


def _built(module: types.ModuleType, name: str, attribute: str, options: Mapping[str, object]) -> Task:
    """A task from a module: what its factory makes of the options, or its `TASK`."""
    factory = getattr(module, attribute, None)
    if isinstance(factory, Task):
        made = factory
    elif callable(factory):
        made = factory(**parsed_options(factory, name, options))
    else:
        made = getattr(module, "TASK", None)
    if options and not callable(factory):
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
