"""Identity: what tells one training from another, written before anything is trained and compared before going on."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from patchclamp.errors import TrainingError
from patchclamp.models.model import Model
from patchclamp.training import checkpoint
from patchclamp.training.clamp import Clamp
from patchclamp.training.data import Data, tensors_digest
from patchclamp.training.loss import Loss
from patchclamp.training.plan import Training

FILE = "training.json"
INCIDENTAL = ("_name_or_path", "transformers_version", "torch_dtype", "use_cache", "architectures")
"""What a configuration says of where it came from, not of what it computes."""


def identity(model: Model, data: Data, training: Training, clamps: Sequence[Clamp], loss: Loss) -> dict[str, Any]:
    """Everything that the final weights depend on, as JSON holds it. Cost: one pass over the weights, about 1 GB/s."""
    config = {key: value for key, value in model.hf.config.to_dict().items() if key not in INCIDENTAL}
    peft = {name: one.to_dict() for name, one in getattr(model.hf, "peft_config", {}).items()}
    held = [repr(clamp) for clamp in clamps]
    for clamp in held:
        if " object at 0x" in clamp:
            raise TrainingError(
                f"the clamp {clamp} does not say what it does: its repr must hold every number (a frozen dataclass has one)"
            )
    said = {
        "training": asdict(training),
        "data": data.name,
        "clamps": held,
        "loss": _named(loss),
        "model": config,
        "attention": getattr(model.anatomy.config, "_attn_implementation", None),
        "adapters": {
            name: {key: value for key, value in one.items() if key != "base_model_name_or_path"} for name, one in peft.items()
        },
        "weights": weights_digest(model),
    }
    return json.loads(json.dumps(said, sort_keys=True, default=_plain))


def weights_digest(model: Model) -> str:
    """SHA-256 of the weights by name, with dtypes, shapes, and which of them are trained."""
    trained = {name for name, weight in model.hf.named_parameters() if weight.requires_grad}
    return tensors_digest({f"{name} {name in trained}": value for name, value in model.hf.state_dict().items()})


def claim(out: Path, said: Mapping[str, Any]) -> None:
    """Make the run's folder and write what the run is, or see that what lies there is the same.

    Raises:
        TrainingError: the folder holds another training, or something else.
    """
    file = out / FILE
    if not file.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise TrainingError(f"{out} is there already and holds no training: give another --out, or an empty folder")
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(file, said)
        return
    try:
        there = json.loads(file.read_text())
    except ValueError:
        raise TrainingError(f"{file} is damaged: delete the run's folder {out}, or give another --out") from None
    if there != said:
        different = list(differences(there, said))
        more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
        note = "; the weights are not those that the run began with: load the model anew" if "weights" in str(different) else ""
        raise TrainingError(
            f"{out} holds another training: {'; '.join(different[:3])}{more}{note}. Give another --out, or delete that folder"
        )


def differences(there: Any, asked: Any, path: str = "") -> Iterator[str]:
    """Where two identities differ, in words."""
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in sorted({*there, *asked}):
            yield from differences(there.get(key), asked.get(key), f"{path}.{key}" if path else str(key))
    elif there != asked:
        yield f"{path} is {_short(there)} there, and {_short(asked)} was asked"


def provenance(model: Model, processes: int) -> dict[str, Any]:
    """What is not identity: versions, machine, device, processes."""
    found = {name: version(name) for name in ("torch", "transformers", "safetensors", "polars", "patchclamp")}
    device = (
        torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.processor() or platform.machine()
    )
    return {"versions": found, "device": f"{model.device.type}: {device}", "threads": torch.get_num_threads(), "processes": processes,
            "model": model.name}  # fmt: skip


def _named(loss: Any) -> str:
    if isinstance(loss, partial):
        given = [*map(repr, loss.args), *(f"{name}={value!r}" for name, value in sorted(loss.keywords.items()))]
        return f"{_named(loss.func)}({', '.join(given)})"
    if hasattr(loss, "__qualname__"):
        return f"{loss.__module__}.{loss.__qualname__}"
    return repr(loss)


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
