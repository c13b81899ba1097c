"""plans.toml: what a sweep asks, as a table of axes and tables of single plans.

::

    [sweep]
    models = ["zoo/small", "EleutherAI/pythia-70m"]
    tasks = ["ioi", "mine.jsonl"]
    seeds = [0, 1, 2]
    n = 128                       # any field of Plan, any way of loading; a list makes an axis of it

    [[plan]]
    model = "zoo/small"
    task = "greater_than"

Every combination of the axes is a plan. Names may be singular or plural; `checkpoints` are revisions of a hub model, or folders
inside a model's folder. Files are looked for beside plans.toml.
"""

import difflib
import itertools
import tomllib
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from patchclamp.errors import SweepError
from patchclamp.study.plan import STEPS, Plan
from patchclamp.sweep.case import ASKED, LOADING, Case

PLAN = {name: hint for name, hint in get_type_hints(Plan).items() if name in {field.name for field in fields(Plan)}}
KEYS = ("model", "task", *PLAN, "steps", *LOADING, *ASKED)
"""What a plan may say, in the singular."""
ALIASES = {
    "checkpoint": "revision",
    "lambda": "pressure",
    "trust_remote_code": "trust",
}
WHOLE = ("steps", *(name for name, hint in PLAN.items() if get_origin(hint) is tuple))
"""Keys whose value is a list by itself: a list of lists makes an axis."""


def read_plans(path: str | Path) -> tuple[Case, ...]:
    """The cases that a plans.toml asks for, each once, in its order.

    Raises:
        SweepError: the file is not there or no TOML, a key is not known (with the nearest that is), a value is of another kind,
            or nothing is asked.
        PatchclampError: what a `Plan` does not accept.
    """
    path = Path(path)
    try:
        body = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise SweepError(
            f"there is no readable file {path} ({getattr(error, 'strerror', None) or error}): give a plans.toml"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise SweepError(f"{path} is not TOML: {error}") from None
    if unknown := [key for key in body if key not in ("sweep", "plan")]:
        raise SweepError(
            f"{path} has {unknown[0]!r}: it may have [sweep], with axes, and [[plan]], single plans{_near(unknown[0])}"
        )
    found: list[Case] = []
    for name in ("sweep", "plan"):
        for number, table in enumerate(_tables(body.get(name, []), name, path)):
            where = f"{path}, [{name}]" if name == "sweep" else f"{path}, [[plan]] number {number + 1}"
            found += _cases(_singular(table, where), where, path.resolve().parent)
    if not found:
        raise SweepError(f"{path} asks for nothing: give [sweep] with models and tasks, or [[plan]] tables with model and task")
    return tuple({case.key: case for case in found}.values())


def _tables(given: object, name: str, path: Path) -> list[dict[str, Any]]:
    tables = given if isinstance(given, list) else [given]
    if not all(isinstance(table, dict) for table in tables):
        raise SweepError(f"{path} says {name} = {given!r:.60}: write a table, [{name}]")
    return cast(list[dict[str, Any]], tables)


def _singular(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The table with every key in its one spelling."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        one = key if key in KEYS else ALIASES.get(key, key)
        if one not in KEYS and key.endswith("s"):
            one = ALIASES.get(key[:-1], key[:-1])
        if one not in KEYS:
            raise SweepError(f"{where} has {key!r}{_near(key)}: it may have {', '.join(KEYS)}, and lists of these")
        if one in found:
            raise SweepError(f"{where} has {one!r} twice, the second time as {key!r}: leave one out")
        found[one] = value
    return found


def _near(key: str) -> str:
    known = [*KEYS, *(f"{name}s" for name in KEYS if not name.endswith("s")), *ALIASES, "checkpoints", "sweep", "plan"]
    near = difflib.get_close_matches(key, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _cases(table: Mapping[str, Any], where: str, beside: Path) -> Iterator[Case]:
    """Every combination of the axes of one table, the last axis fastest."""
    if missing := [name for name in ("model", "task") if name not in table]:
        raise SweepError(f'{where} names no {missing[0]}: give {missing[0]} = "..." or {missing[0]}s = [...]')
    axes: list[list[Any]] = []
    for name, value in table.items():
        several = isinstance(value, list) and (name not in WHOLE or any(isinstance(one, list) for one in value))
        if several and not value:
            raise SweepError(f"{where} says {name} = []: give at least one, or leave it out")
        axes.append([_fitting(name, one, where) for one in (value if several else [value])])
    for chosen in itertools.product(*axes):
        yield _case(dict(zip(table, chosen, strict=True)), where, beside)


def _case(given: Mapping[str, Any], where: str, beside: Path) -> Case:
    loading = {name: given[name] for name in LOADING if name in given}
    model = _found(given["model"], beside)
    revision = loading.get("revision")
    if revision is not None and Path(model).is_dir():  # checkpoints of a training run lie in folders
        if not (Path(model) / revision / "config.json").is_file():
            raise SweepError(
                f"{where} asks for checkpoint {revision!r} of the folder {model}, which has no {revision}/config.json"
            )
        model = str(Path(model) / loading.pop("revision"))
    return Case(
        model=model,
        task=_found(given["task"], beside),
        plan=Plan(**{name: given[name] for name in PLAN if name in given}),
        steps=tuple(given.get("steps", STEPS)),
        loading=loading,
        asked={name: given[name] for name in ASKED if name in given},
    )


def _found(name: str, beside: Path) -> str:
    """A file or folder beside plans.toml by its full path, so that workers find it; other names as they are."""
    place = beside / Path(name).expanduser()
    return (
        str(place.resolve()) if place.is_file() or (place / "config.json").is_file() or (place.is_dir() and "/" in name) else name
    )


def _fitting(name: str, value: Any, where: str) -> Any:
    """The value in the kind that is wanted; raises `SweepError` naming the kind."""
    if name in PLAN:
        return _as(PLAN[name], value, f"{where} says {name} = {value!r}")
    wanted: Any = {**LOADING, **ASKED, "model": str, "task": str, "steps": list}[name]
    if name == "steps" and isinstance(value, str):
        return [value]
    if not isinstance(value, wanted):
        kinds = wanted if isinstance(wanted, tuple) else (wanted,)
        raise SweepError(f"{where} says {name} = {value!r}: give {' or '.join(_KINDS[kind] for kind in kinds)}")
    return value


_KINDS: dict[Any, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a table",
    list: "a list",
}


def _as(hint: Any, value: Any, said: str) -> Any:
    """`value` as one of Plan's types; a whole number is a number, so that 1 and 1.0 are the same question."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise SweepError(f"{said}: choose from {', '.join(get_args(hint))}")
        return value
    if get_origin(hint) is tuple:
        return tuple(_as(get_args(hint)[0], one, said) for one in (value if isinstance(value, list) else [value]))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise SweepError(f"{said}: give {_KINDS[hint]}")
    return value
