"""Checkpoints: a folder a step, that loads as a model, with the optimizer's state beside it."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.files import write_atomically
from patchclamp.models.model import Model

ROOM = "checkpoints"
STATE = "optimizer.safetensors"


def folder_of(out: Path, step: int) -> Path:
    """Where the checkpoint behind `step` updates lies."""
    return out / ROOM / f"step-{step:07d}"


def steps_of(out: Path) -> tuple[int, ...]:
    """The steps of the complete checkpoints in a run's folder, in order."""
    return tuple(sorted(int(path.name.removeprefix("step-")) for path in (out / ROOM).glob("step-*") if path.is_dir()))


def keep(out: Path, model: Model, optimizer: torch.optim.Optimizer, step: int) -> Path:
    """Write a checkpoint: config, weights, tokenizer where there is one, the optimizer's state. It is there whole or not at all."""
    final = folder_of(out, step)
    if final.is_dir():
        return final
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model.hf.save_pretrained(part)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(part)
    moments = {f"{i}.{name}": value for i, name, value in _moments(optimizer)}
    write_atomically(part / STATE, lambda path: save_file(moments, path, metadata={"step": str(step)}))
    part.replace(final)
    return final


def drop(out: Path, step: int) -> None:
    """Take a checkpoint away: first its name, so that half a one is never found."""
    gone = folder_of(out, step)
    if gone.is_dir():
        shutil.rmtree(gone.replace(gone.with_name(f".{gone.name}.part")))


def restore(out: Path, model: Model, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Put a checkpoint's weights and moments into a model and its optimizer, which must be built alike."""
    folder = folder_of(out, step)
    try:
        weights = {name: value for file in sorted(folder.glob("model*.safetensors")) for name, value in load_file(file).items()}
        moments = load_file(folder / STATE)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{folder} is damaged ({error}): delete that folder, and the run goes on from the one before"
        ) from None
    missing, unexpected = model.hf.load_state_dict(weights, strict=False)
    tied = set(getattr(model.hf, "_tied_weights_keys", None) or ())
    if set(missing) - tied or unexpected:
        raise TrainingError(
            f"{folder} is of another model: it lacks {sorted(set(missing) - tied)[:3]} and has {sorted(unexpected)[:3]} too many. "
            "Give the model that the run began with, or another --out"
        )
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in moments.items():
        index, _, moment = name.partition(".")
        state.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _moments(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, str, Tensor]]:
    saved: Mapping[int, Mapping[str, Any]] = optimizer.state_dict()["state"]
    for index, moments in saved.items():
        yield from ((index, name, torch.as_tensor(value).contiguous()) for name, value in moments.items() if value is not None)


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys, whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())
