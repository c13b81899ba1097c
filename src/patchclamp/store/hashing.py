"""Hashes: of weights (cached), of files, of a whole question."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchclamp.errors import StoreError
from patchclamp.files import cache, write_atomically
from patchclamp.store.codec import plain

if TYPE_CHECKING:
    from torch import Tensor

# What a configuration says of where it came from, not of what it computes.
_INCIDENTAL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_attn_implementation", "use_cache")


def digest(model_hash: str, task_hash: str, plan: Any, revisions: Mapping[str, int]) -> str:
    """The identity of a run: SHA-256 (hex) of the model's and the task's hash, the plan and the revisions of the methods used.

    Versions of libraries, device and memory are no part of it: they are provenance.
    """
    body = {"model": model_hash, "task": task_hash, "plan": plain(plan), "revisions": plain(revisions)}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def weights_hash(
    tensors: "Mapping[str, Tensor]",
    config: Mapping[str, Any] | None = None,
    files: Iterable[Path] = (),
    load: "Callable[[str], Tensor] | None" = None,
) -> str:
    """SHA-256 (hex) of named weights, their dtypes and shapes, and of the configuration where given; tied weights count once.

    Where `files` names the files that the weights were read from, unchanged, the result is cached by their paths, sizes and
    times, in PATCHCLAMP_CACHE (default: `patchclamp` in the user's cache folder). Cost: one pass over the weights, about 1 GB/s.

    Args:
        tensors: a state dict.
        config: the configuration's dict; what says only where it came from is left out.
        files: leave empty for a model that was changed after loading.
        load: gives the values of a weight that is on the device meta (it is elsewhere), one at a time.
    """
    settings = {key: value for key, value in (config or {}).items() if key not in _INCIDENTAL}
    names = [(name, str(value.dtype), list(value.shape)) for name, value in _untied(tensors)]
    outline = json.dumps([names, settings], sort_keys=True, default=str)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    key = hashlib.sha256(json.dumps([outline, stats]).encode()).hexdigest()
    cached = cache() / f"{key}.hash"
    if stats and cached.is_file() and len(known := cached.read_text()) == 64:
        return known
    state = hashlib.sha256(outline.encode())
    for name, value in _untied(tensors):
        state.update(_bytes(load(name) if load is not None and value.is_meta else value))
    if stats:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cached, state.hexdigest().encode())
        except (OSError, StoreError):
            pass  # a cache that cannot be written only costs time
    return state.hexdigest()


def _untied(tensors: "Mapping[str, Tensor]") -> "list[tuple[str, Tensor]]":
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    kept: list[tuple[str, Tensor]] = []
    for name in sorted(tensors):
        value = tensors[name].detach()
        place = (value.data_ptr(), tuple(value.shape), tuple(value.stride()))
        if value.is_meta or not value.numel() or place not in seen:
            kept.append((name, value))
        seen.add(place)
    return kept


def _bytes(value: "Tensor") -> Any:
    """The buffer of a tensor of any dtype."""
    import torch

    return value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
