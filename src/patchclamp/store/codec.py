"""What a result may hold, and how it becomes JSON, Parquet and safetensors (never pickle).

JSON holds the tree. A data frame in it is `{"$frame": name}` and an array or tensor `{"$tensor": name}`, both in files of
their own; a frozen dataclass or named tuple of Patchclamp is `{"$type": "patchclamp.circuit:Circuit", ...}`. Only types
inside the package are looked up when reading, so a file cannot make a reader run anything else.
"""

import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from patchclamp.errors import StoreError


@dataclass
class Encoded:
    """A tree for JSON, and the frames and tensors that it names."""

    tree: Any = None
    frames: dict[str, pl.DataFrame] = field(default_factory=dict[str, pl.DataFrame])
    tensors: dict[str, Any] = field(default_factory=dict[str, Any])


def encode(value: Any) -> Encoded:
    """Take a result apart: scalars, text, lists, tuples, sets, mappings, polars frames, numpy arrays, torch tensors, and
    dataclasses and named tuples of Patchclamp, in any nesting.

    Raises:
        StoreError: something else is in it; says what and where.
    """
    out = Encoded()
    out.tree = _encode(value, "", out)
    return out


def decode(encoded: Encoded) -> Any:
    """Put together what `encode` took apart: numbers bit for bit, tensors on the CPU."""
    return _decode(encoded.tree, encoded)


def dumps(tree: Any) -> str:
    """JSON as it is written everywhere: readable, the same text for the same tree."""
    return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """`value` as plain JSON, for identities and plan.json: dataclasses as dicts, tuples as lists, paths and sites as text.

    Raises:
        StoreError: it holds something that has no such form.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(str(item) for item in value)
    if isinstance(value, Path) or type(value).__module__ == "patchclamp.sites":
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    raise StoreError(f"a plan is made of numbers, text, lists and mappings: it holds a {type(value).__name__} ({value!r:.60})")


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _encode(value: Any, at: str, out: Encoded) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, pl.DataFrame):
        out.frames[at or "value"] = value
        return {"$frame": at or "value"}
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biuf":
        raise StoreError(f"an array of {value.dtype} at {at or 'the top'} cannot be kept: arrays hold numbers or truth values")
    if isinstance(value, np.ndarray) or _is_torch(value):
        out.tensors[at or "value"] = value
        return {"$tensor": at or "value", "torch": not isinstance(value, np.ndarray)}
    kind = type(value)
    fields = _field_names(kind)
    if fields is not None and kind.__module__.split(".")[0] == "patchclamp":
        tree = {name: _encode(getattr(value, name), f"{at}.{name}".lstrip("."), out) for name in fields}
        return {"$type": f"{kind.__module__}:{kind.__qualname__}", **tree}
    if isinstance(value, Mapping):
        items = [(key, _encode(item, f"{at}.{key}".lstrip("."), out)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        return {"$dict": [[_encode(key, at, out), item] for key, item in items]}
    if kind in (list, tuple, set, frozenset):
        members = sorted(value, key=str) if kind in (set, frozenset) else value
        listed = [_encode(item, f"{at}.{i}".lstrip("."), out) for i, item in enumerate(members)]
        return listed if kind is list else {f"${kind.__name__}": listed}
    raise StoreError(
        f"a {kind.__module__}.{kind.__qualname__} at {at or 'the top'} cannot be kept: results are numbers, text, lists, tuples, "
        "sets, mappings, polars frames, arrays, tensors and Patchclamp's own dataclasses"
    )


def _field_names(kind: type) -> tuple[str, ...] | None:
    """Fields of a dataclass or a named tuple; None for any other type."""
    if dataclasses.is_dataclass(kind):
        return tuple(item.name for item in dataclasses.fields(kind) if item.init)
    return getattr(kind, "_fields", None)


_MAKERS = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}


def _decode(tree: Any, source: Encoded) -> Any:
    if isinstance(tree, list):
        return [_decode(item, source) for item in tree]
    if not isinstance(tree, dict):
        return tree
    tag = next(iter(tree), "")
    if tag == "$type":
        return _type_named(tree["$type"])(**{name: _decode(item, source) for name, item in tree.items() if name != "$type"})
    if tag == "$frame":
        return source.frames[tree["$frame"]]
    if tag == "$tensor":
        return _tensor(source.tensors[tree["$tensor"]], tree["torch"])
    if tag == "$float":
        return float(tree["$float"])
    if tag == "$dict":
        return {_decode(key, source): _decode(item, source) for key, item in tree["$dict"]}
    if tag in _MAKERS:
        return _MAKERS[tag](_decode(item, source) for item in tree[tag])
    return {key: _decode(item, source) for key, item in tree.items()}


def _tensor(value: Any, torch_wanted: bool) -> Any:
    if torch_wanted:
        import torch

        return torch.from_numpy(value) if isinstance(value, np.ndarray) else value.detach().cpu()
    return value.numpy() if _is_torch(value) else value


def _type_named(name: str) -> type:
    module, _, path = name.partition(":")
    found: Any = None
    if module.split(".")[0] == "patchclamp" and path.isidentifier():
        try:
            found = getattr(importlib.import_module(module), path, None)
        except ModuleNotFoundError:
            found = None
    if not isinstance(found, type) or _field_names(found) is None:
        raise StoreError(f"{name!r} is not a result of this version of Patchclamp: read the run with the version that wrote it")
    return found
