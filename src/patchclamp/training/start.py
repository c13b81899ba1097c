"""Where a training begins: weights drawn for a configuration, or those of a pretrained model."""

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from patchclamp.errors import ModelError
from patchclamp.models.load import load_tokenizer
from patchclamp.models.model import Model


def begin(
    source: str | Path | Mapping[str, Any],
    *,
    seed: int = 0,
    tokenizer: Any = None,
    attention: str | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> Model:
    """A model to train.

    Args:
        source: of a model with random weights: a configuration, as a dict (with its `model_type`), a JSON file, or a folder with
            config.json and no weights. Of a pretrained one: a hub name, a folder with weights, `zoo/NAME`.
        seed: of random weights.
        tokenizer: a tokenizer, or where to load it from; by default the one beside the model.
        attention: the kernel, such as "eager" or "sdpa"; by default what transformers chooses. While a pattern, score, query, key or
            value is watched or edited, it is eager.
        dtype: of the weights. Lower precision of passes is `Training.precision`.
        device: where to put the model; by default CUDA where there is one.
        revision: on the hub.

    Raises:
        ModelError: no such model, kernel or tokenizer, or a configuration that transformers refuses.
        FamilyError: an architecture that is not understood.
    """
    config = _config(source)
    if config is None:
        model = Model.load(str(source), tokenizer=tokenizer, dtype=dtype, device=device, revision=revision)
        if attention is not None:
            _refused(
                lambda: model.hf.set_attn_implementation(attention), f"the attention kernel {attention!r} was asked of {source}"
            )
        return model
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(str(tokenizer))
    elif tokenizer is None and isinstance(source, str | Path) and Path(source).is_dir() and any(Path(source).glob("tokenizer*")):
        tokenizer = load_tokenizer(str(source))
    hf = _drawn(config, seed, attention, dtype)
    hf.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Model.load(hf.eval(), tokenizer=tokenizer)


def _config(source: str | Path | Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration, if the source is one."""
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source).expanduser()
    if path.is_dir() and (path / "config.json").is_file() and not any([*path.glob("*.safetensors"), *path.glob("*.bin")]):
        path = path / "config.json"
    if path.suffix != ".json":
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the configuration {path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no configuration: give a JSON object like a model's config.json")
    return found


def _drawn(config: Mapping[str, Any], seed: int, attention: str | None, dtype: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    import_module("patchclamp.models.normless")  # which makes it known to AutoConfig

    given = dict(config)
    kind = given.pop("model_type", None)
    if not isinstance(kind, str):
        raise ModelError("the configuration has no model_type: say which architecture it is of, such as gpt2 or llama")
    width = getattr(torch, dtype, None)
    if not isinstance(width, torch.dtype):
        raise ModelError(f"there is no dtype {dtype!r}: give float32, bfloat16, float16 or float64")
    for name in ("architectures", "transformers_version", "_name_or_path", "torch_dtype", "dtype"):
        given.pop(name, None)

    def draw() -> Any:
        made: Any = AutoConfig.for_model(kind, **given)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(made, attn_implementation=attention, dtype=width)

    return _refused(draw, f"a {kind} model of this configuration was asked")


def _refused(act: Callable[[], Any], asked: str) -> Any:
    """What a library does, with its refusal in our words."""
    try:
        return act()
    except (ValueError, TypeError, ImportError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{asked}, and transformers refuses: {reason}") from None
