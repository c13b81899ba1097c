"""Cases that the conformance suites walk: tiny seeded models of every family."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from patchclamp.models.model import Model

import patchclamp.models.normless  # noqa: F401 (imported, it is known to AutoConfig and AutoModelForCausalLM)

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64, "head_dim": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT: dict[str, Any] = {
    "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_OLD: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN: dict[str, Any] = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT,
    "gpt_neox": _PLAIN,
    "gpt_neox-sequential": _PLAIN | {"use_parallel_residual": False},
    "llama": SIZES,
    "qwen2": SIZES,
    "qwen3": SIZES,
    "gemma2": SIZES | {"sliding_window": 4},
    "gemma3_text": SIZES | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3": {"text_config": SIZES | {"sliding_window": 4}, "vision_config": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 28,
        "patch_size": 14}},
    "mistral": SIZES | {"sliding_window": 4},
    "mixtral": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": SIZES | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
    "opt": _PLAIN | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": SIZES | {"num_key_value_heads": 4},
    "phi3": SIZES,
    "olmo2": SIZES,
    "olmo3": SIZES | {"sliding_window": 4},
    "gpt_oss": SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "cohere": SIZES,
    "granite": SIZES | {"residual_multiplier": 0.3, "embedding_multiplier": 2.0, "logits_scaling": 1.5,
                        "attention_multiplier": 0.4},
    "smollm3": SIZES,
    "bloom": _OLD | {"n_layer": 2, "n_head": 4, "pad_token_id": 0},
    "falcon": _OLD | {"num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon-new": _OLD | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "new_decoder_architecture": True},
    "falcon-alibi": _OLD | {"num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True, "parallel_attn": False,
                            "multi_query": False},
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_neo": _OLD | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4,
                       "max_position_embeddings": 64},
    "normless": _PLAIN | {"head_dim": 8, "causal": True},
}  # fmt: skip
"""Configurations by family; a name after a dash is a variant. Weights are drawn large enough for every part to matter."""


def tiny(name: str, attention: str = "eager", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A seeded tiny transformers model of the family."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config: Any = AutoConfig.for_model(name.partition("-")[0], **CONFIGS[name])
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).eval()


_LOADED: dict[tuple[str, str, torch.dtype], "Model"] = {}


def model_of(name: str, attention: str = "eager", dtype: torch.dtype = torch.float32) -> "Model":
    """The family's tiny model, loaded once for all tests of a process: none may change it, and `changed` sees to it.

    What is proved of a model at its first use (that it can run from its middle) is proved once, too.
    """
    from patchclamp.models.model import Model

    key = (name, attention, dtype)
    if key not in _LOADED:
        _LOADED[key] = Model.load(tiny(name, attention, dtype=dtype))
    return _LOADED[key]


def changed() -> Iterator[str]:
    """Which of the shared models are not as they were made: weights, hooks, modes, whether gradients are asked for."""
    for (name, attention, dtype), model in _LOADED.items():
        fresh, own = tiny(name, attention, dtype=dtype), model.hf
        if own.config.to_dict() != fresh.config.to_dict() or own.generation_config.to_dict() != fresh.generation_config.to_dict():
            yield f"{name}: config"
        for (path, weight), (_, made) in zip(own.state_dict().items(), fresh.state_dict().items(), strict=True):
            if not torch.equal(weight, made):
                yield f"{name}: {path}"
        for (path, weight), made in zip(own.named_parameters(), fresh.parameters(), strict=True):
            if weight.requires_grad != made.requires_grad or weight.grad is not None:
                yield f"{name}: gradient of {path}"
        for (path, module), made in zip(own.named_modules(), fresh.modules(), strict=True):
            hooks = [(len(one._forward_hooks), len(one._forward_pre_hooks), "forward" in vars(one)) for one in (module, made)]
            if hooks[0] != hooks[1] or module.training:
                yield f"{name}: hooks or mode of {path or 'the model'}"
