"""Loading: from a hub name, a folder, the zoo, or a model object."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from patchclamp.errors import ModelError
from patchclamp.files import cache

VOCABULARY = ("tokenizer*", "vocab*", "merges.txt", "*.model")
"""Files of a tokenizer. A folder with none of them is a model without one, which runs on token ids (transformers would make up a
tokenizer that knows no words)."""


def load(
    source: Any, *, tokenizer: Any, dtype: Any, device: Any, device_map: Any, revision: str | None, trust_remote_code: bool,
    quantization_config: Any,
) -> tuple[Any, Any, str]:  # fmt: skip
    """The transformers model, its tokenizer and its name."""
    if not isinstance(source, str | os.PathLike):
        if not hasattr(source, "config") or not hasattr(source, "get_input_embeddings"):
            raise ModelError(f"{type(source).__name__} is neither a transformers model nor a name or folder of one")
        for option, given in {"dtype": dtype, "device": device, "device_map": device_map, "revision": revision}.items():
            if given is not None:
                raise ModelError(
                    f"{option}={given!r} was asked of a model object, which stays as it is: move it yourself, then load it"
                )
        name = str(getattr(source.config, "_name_or_path", "") or type(source).__name__)
        _refuse_split(source, name)
        return source, _tokenizer(tokenizer, None, name, None, trust_remote_code), name
    name = str(source)
    if device is not None and device_map is not None:
        raise ModelError(f"device={device!r} and device_map={device_map!r} were both asked: give one of them")
    where = resolve(name)
    model = _model(where, name, dtype, device, device_map, revision, trust_remote_code, quantization_config)
    return model, _tokenizer(tokenizer, where, name, revision, trust_remote_code), name


def _refuse_split(model: Any, name: str) -> None:
    """Raise where this process holds a share of each weight only, as in tensor parallel."""
    for weight in model.parameters() if hasattr(model, "parameters") else ():
        mesh = getattr(weight, "device_mesh", None)
        if mesh is not None and mesh.size() > 1:
            raise ModelError(
                f"{name}: the model is split over {mesh.size()} processes (tensor parallel), so that each sees some heads only, "
                "under numbers of its own: load it whole on one device, or with device_map over several"
            )


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model by name, without its weights; raises `ModelError` where there is none."""
    return _tokenizer(None, _tokenizer_place(name), name, None, False)


def resolve(name: str) -> str:
    """`zoo/NAME` becomes the folder that ships, or that was trained here and is cached; an existing folder stays; the rest are hub names."""
    if name.startswith("zoo/"):
        own = name.removeprefix("zoo/")
        places = [Path(str(files("patchclamp"))) / "zoo", cache() / "zoo"]
        folder = next((place / own for place in places if (place / own / "config.json").is_file()), None)
        if folder is None or Path(own).name != own:
            there = sorted({f"zoo/{path.parent.name}" for place in places for path in place.glob("*/config.json")})
            raise ModelError(
                f"there is no model {name!r} that ships or was trained here: there is {', '.join(there) or 'none'}; `patchclamp zoo list` "
                "says which others can be trained"
            )
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} is a folder without config.json: give the folder that a model was saved to")
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no folder {name}: give a folder with config.json and weights, a hub name, or zoo/small")
    return name


def _model(
    where: str, name: str, dtype: Any, device: Any, device_map: Any, revision: str | None, trust: bool, quantization: Any
) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    import_module("patchclamp.models.normless")  # which makes it known to AutoModelForCausalLM

    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ModelError(f"there is no dtype {dtype!r}: give float32, bfloat16, float16 or float64")
    asked = {"revision": revision, "device_map": device_map, "quantization_config": quantization}
    options: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    options |= {"trust_remote_code": trust, "dtype": dtype or "auto"}
    if Path(where).is_dir():
        _only_safetensors(Path(where), name)
    try:
        with no_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(where, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the model {name!r} could not be loaded: {_reason(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        raise ModelError(f"the checkpoint of {name!r} lacks {len(missing)} weights ({shown}), which would be random")
    model.eval()
    if getattr(model, "hf_quantizer", None) is not None:
        if device is not None:
            raise ModelError(
                f"device={device!r} was asked of the quantised model {name!r}, which cannot be moved: give device_map"
            )
    elif device_map is None:
        try:
            model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except (RuntimeError, AssertionError) as error:
            raise ModelError(f"device {device!r} was asked for: {_reason(error)}") from error
    return model


@contextmanager
def no_bar() -> Generator[None, None, None]:
    """No bar while weights are put in place or written: it takes no time (a download from the hub still shows)."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _only_safetensors(folder: Path, name: str) -> None:
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        if pickled:
            raise ModelError(
                f"{name} holds weights as {pickled[0]} only: pickle files are not read; save it again with safe_serialization"
            )
        raise ModelError(f"{name} holds no *.safetensors weights")


def _tokenizer_place(name: str) -> str:
    """Where a tokenizer is: a folder may hold one and no model."""
    path = Path(name).expanduser()
    return str(path) if path.is_dir() and _has_vocabulary(path) else resolve(name)


def _has_vocabulary(folder: Path) -> bool:
    return any(any(folder.glob(name)) for name in VOCABULARY)


def _tokenizer(given: Any, where: str | None, name: str, revision: str | None, trust: bool) -> Any:
    if given is not None and not isinstance(given, str | os.PathLike):
        return given
    place = _tokenizer_place(str(given)) if given is not None else where
    if place is None or (given is None and Path(place).is_dir() and not _has_vocabulary(Path(place))):
        return None
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust}
    if revision is not None and given is None:
        options["revision"] = revision
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(
            f"the tokenizer of {name!r} could not be loaded: {_reason(error)}; give a tokenizer (--tokenizer)"
        ) from error


def _reason(error: Exception) -> str:
    """The first sentence or so of what a library says."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return "it needs code of its own to be run; read that code, and if you trust it, give trust_remote_code=True"
    return text.splitlines()[0].rstrip(".: ") if text else type(error).__name__
