"""Checkpoints: a folder a step, that loads as a model, with the optimizer's state beside it."""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.files import sha256, write_atomically
from patchclamp.models.load import no_bar
from patchclamp.models.model import Model

ROOM = "checkpoints"
STATE = "optimizer.safetensors"
ADAPTER = "adapter"
CONTENTS = "checkpoint.json"
"""SHA-256 of each file, and the loss scaler's numbers."""


def folder_of(out: Path, step: int) -> Path:
    """Where the checkpoint behind `step` updates lies."""
    return out / ROOM / f"step-{step:07d}"


def steps_of(out: Path) -> tuple[int, ...]:
    """The steps of the complete checkpoints in a run's folder, in order."""
    return tuple(sorted(int(path.name.removeprefix("step-")) for path in (out / ROOM).glob("step-*") if path.is_dir()))


def resumable(out: Path) -> int | None:
    """The last step that has an optimizer's state to go on from."""
    return max((step for step in steps_of(out) if (folder_of(out, step) / STATE).is_file()), default=None)


def keep(out: Path, model: Model, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int) -> Path:
    """Write a checkpoint: config, weights, tokenizer where there is one, the optimizer's state. It is there whole or not at all.

    Of an adapted model (LoRA) the weights are those with the adapter folded in, so that the folder loads as a model by itself;
    the adapter, from which training goes on, is beside them in `adapter/`, as peft writes it.
    """
    final = folder_of(out, step)
    if (final / STATE).is_file():
        return final
    drop(out, step)
    part = _hidden(final)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with no_bar():
        if adapted(model):
            model.hf.save_pretrained(part / ADAPTER, save_embedding_layers=False)
            copy.deepcopy(model.hf).merge_and_unload().save_pretrained(part)
        else:
            model.hf.save_pretrained(part)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(part)
    moments = {f"{i}.{name}": value for i, name, value in _moments(optimizer)}
    save_file(moments, part / STATE, metadata={"step": str(step)})
    files = {str(path.relative_to(part)): _flushed(path) for path in sorted(part.rglob("*")) if path.is_file()}
    write_json(part / CONTENTS, {"files": files, "scaler": scaler.state_dict()})
    part.replace(final)
    return final


def drop(out: Path, step: int) -> None:
    """Take a checkpoint away: first its name, so that half a one is never found."""
    gone = folder_of(out, step)
    if gone.is_dir():
        shutil.rmtree(_hidden(gone), ignore_errors=True)
        shutil.rmtree(gone.replace(_hidden(gone)))


def forget(out: Path, step: int) -> None:
    """Take away a checkpoint's optimizer state, and leave its weights."""
    (folder_of(out, step) / STATE).unlink(missing_ok=True)


def restore(out: Path, model: Model, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int) -> None:
    """Put a checkpoint's weights and moments into a model and its optimizer, which must be built alike.

    Raises:
        TrainingError: a file is damaged or missing, or it is of another model.
    """
    folder = folder_of(out, step)
    try:
        contents = json.loads((folder / CONTENTS).read_text())
        for name, wanted in contents["files"].items():
            if sha256(folder / name) != wanted:
                raise OSError(f"{name} is not what was written")
        moments = load_file(folder / STATE)
        _restore_weights(folder, model)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"{folder} is damaged ({error}): delete that folder, and the run goes on from the one before"
        ) from None
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in moments.items():
        index, _, moment = name.partition(".")
        state.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    scaler.load_state_dict(contents["scaler"])


def adapted(model: Model) -> bool:
    """Whether the model wears an adapter of peft."""
    return hasattr(model.hf, "peft_config")


def _restore_weights(folder: Path, model: Model) -> None:
    """By the model class's own loading: files keep the format of the hub, which need not be that of the modules."""
    if adapted(model):
        from peft import set_peft_model_state_dict

        found = load_file(folder / ADAPTER / "adapter_model.safetensors")
        if unexpected := set_peft_model_state_dict(model.hf, found).unexpected_keys:
            raise TrainingError(
                f"{folder} is of another adapter: {unexpected[0]} has no place here. Give the adapter that it began with"
            )
        return
    with no_bar():
        stored, info = type(model.hf).from_pretrained(
            folder, dtype=model.hf.dtype, use_safetensors=True, output_loading_info=True
        )
    wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *(str(key) for key in info["mismatched_keys"])})
    weights = stored.state_dict()
    wrong += sorted(
        name for name, value in model.hf.state_dict().items() if name not in weights or weights[name].shape != value.shape
    )
    if wrong:
        raise TrainingError(
            f"{folder} is of another model: {wrong[0]} does not fit. Give the model that the run began with, or another --out"
        )
    model.hf.load_state_dict(weights)


def _moments(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, str, Tensor]]:
    saved: Mapping[int, Mapping[str, Any]] = optimizer.state_dict()["state"]
    for index, moments in saved.items():
        yield from ((index, name, torch.as_tensor(value).contiguous()) for name, value in moments.items() if value is not None)


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.part")


def _flushed(path: Path) -> str:
    """SHA-256 of a file that is on the disk, so that a rename never names a hollow one."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return sha256(path)


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys, whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())
