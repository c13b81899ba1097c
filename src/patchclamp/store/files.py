"""Encoded results as files: the tree as JSON, frames as Parquet, tensors as safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from patchclamp.files import check, write_atomically
from patchclamp.store.codec import Encoded, dumps


def write_encoded(folder: Path, stem: str, encoded: Encoded, frames: Mapping[str, str] | None = None, tensors: str | None = None
                  ) -> dict[str, str]:  # fmt: skip
    """Write a result into `folder`; returns name -> SHA-256 of each file.

    The tree goes into STEM.json, each frame into STEM.FRAME.parquet, all tensors into STEM.safetensors; `frames` and
    `tensors` give other names. Frames of fewer than 2 columns are kept as they are: nothing is merged.
    """
    written: dict[str, str] = {}
    places = {key: (frames or {}).get(key, f"{stem}.{i}.parquet") for i, key in enumerate(encoded.frames)}
    for key, frame in encoded.frames.items():
        written[places[key]] = write_atomically(folder / places[key], frame.write_parquet)
    tensor_file = tensors or f"{stem}.safetensors"
    if encoded.tensors:
        written[tensor_file] = write_atomically(folder / tensor_file, _tensor_bytes(encoded.tensors))
    head = {"frames": places, "tensors": _tensor_head(encoded, tensor_file), "value": encoded.tree}
    written[f"{stem}.json"] = write_atomically(folder / f"{stem}.json", dumps(head).encode())
    return written


def read_encoded(folder: Path, stem: str, files: Mapping[str, str]) -> Encoded:
    """Read what `write_encoded` wrote, after checking every file's hash; raises `StoreError` naming the file that is damaged."""
    for name, wanted in files.items():
        check(folder / name, wanted)
    head: dict[str, Any] = json.loads((folder / f"{stem}.json").read_text())
    frames = {key: pl.read_parquet(folder / name) for key, name in head["frames"].items()}
    return Encoded(head["value"], frames, _read_tensors(folder, head["tensors"]))


def _tensor_head(encoded: Encoded, name: str) -> dict[str, Any] | None:
    numpy = all(isinstance(value, np.ndarray) for value in encoded.tensors.values())
    return {"file": name, "torch": not numpy} if encoded.tensors else None


def _tensor_bytes(tensors: Mapping[str, Any]) -> bytes:
    if all(isinstance(value, np.ndarray) for value in tensors.values()):
        from safetensors.numpy import save

        return save({key: np.asarray(value, order="C") for key, value in tensors.items()})
    import torch
    from safetensors.torch import save as save_torch

    # a copy each: safetensors refuses tensors that share memory
    return save_torch({key: torch.as_tensor(value).detach().cpu().clone().contiguous() for key, value in tensors.items()})


def _read_tensors(folder: Path, head: Mapping[str, Any] | None) -> dict[str, Any]:
    if head is None:
        return {}
    if head["torch"]:  # numpy does not know bfloat16
        from safetensors.torch import load_file as load_torch

        return dict(load_torch(folder / head["file"]))
    from safetensors.numpy import load_file

    return dict(load_file(folder / head["file"]))
