"""Family: one frozen row per architecture, saying where it keeps its parts. Adding a family means adding a row.

Paths are attribute paths: `blocks`, `norm` and `unembed` from the model, all others from a block. A row claims nothing about
sizes: those are read from tensors when the model is probed, and `patchclamp doctor` proves the row on the loaded weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patchclamp.errors import FamilyError

Config = Any  # transformers' configs have no common typed base for these attributes


def _never(config: Config) -> bool:
    return False


def _always(config: Config) -> bool:
    return True


@dataclass(frozen=True)
class Family:
    """Where one architecture keeps its parts, and what is special about it."""

    name: str
    types: tuple[str, ...]
    """`config.model_type` values that this row serves."""
    blocks: str = "model.layers"
    norm: str = "model.norm"
    """Final norm."""
    unembed: str = "lm_head"
    attention: str = "self_attn"
    """The module in which attention happens (its softmax, its call of the attention function)."""
    output: str = "self_attn.o_proj"
    """The attention's output projection: its input is z, its weights are [out, in] or Conv1D."""
    attn: str = "self_attn"
    """The module whose output is the site L.attn."""
    mlp: str = "mlp"
    """The module whose output is the site L.mlp."""
    down: str | None = "mlp.down_proj"
    """The MLP's down projection; None where it is fused (experts)."""
    first: str = "input_layernorm"
    """The first module in a block that reads the residual stream (only needed where attention and MLP follow each other)."""
    attn_post: str | None = None
    """A norm between the attention's output and the residual stream."""
    mlp_post: str | None = None
    """A norm between the MLP's output and the residual stream."""
    scale: str | None = None
    """Attribute of the block by which both outputs are multiplied before they are added."""
    parallel: Callable[[Config], bool] = _never
    """Whether attention and MLP read the same residual stream."""
    router: str | None = None
    """The router of a mixture-of-experts layer (absent in dense layers of the same model)."""
    interface: bool = True
    """Whether attention goes through transformers' AttentionInterface."""
    flat_mlp: bool = False
    """Whether the MLP sees [row x position, width]."""
    mlp_mutated: bool = False
    """Whether the block adds into the MLP's output in place."""
    causal: Callable[[Config], bool] = _always
    """Whether positions see none that come after them."""
    refuse: Callable[[Config], str | None] = lambda config: None
    """A reason why this configuration is not understood, or None."""

    @property
    def may_be_parallel(self) -> bool:
        """Whether some configuration has parallel blocks."""
        return self.parallel is not _never


def _gpt2_refuses(config: Config) -> str | None:
    if getattr(config, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn=True computes attention outside the attention function (set it to False)"
    if getattr(config, "add_cross_attention", False):
        return "add_cross_attention=True: blocks have a second attention"
    return None


def _opt_refuses(config: Config) -> str | None:
    if not config.do_layer_norm_before:
        return "do_layer_norm_before=False: the norm sits on the residual stream itself, so contributions do not add up to it"
    return None


def _bloom_refuses(config: Config) -> str | None:
    if config.apply_residual_connection_post_layernorm:
        return "apply_residual_connection_post_layernorm=True: the residual stream is replaced by its norm in every block"
    return None


def _falcon_parallel(config: Config) -> bool:
    return bool(config.new_decoder_architecture or config.parallel_attn)


_SANDWICH: dict[str, Any] = {
    "attn_post": "post_attention_layernorm",
    "mlp_post": "post_feedforward_layernorm",
}

FAMILIES: tuple[Family, ...] = (
    Family("llama", ("llama", "mistral", "qwen2", "qwen3", "smollm3")),
    Family("phi3", ("phi3",)),
    Family("gemma2", ("gemma2",), **_SANDWICH),
    Family("gemma3_text", ("gemma3_text",), **_SANDWICH),
    Family("gemma3", ("gemma3",), blocks="model.language_model.layers", norm="model.language_model.norm", **_SANDWICH),
    Family("olmo2", ("olmo2", "olmo3"), first="self_attn", **_SANDWICH),
    Family("granite", ("granite",), scale="residual_multiplier"),
    Family("cohere", ("cohere",), parallel=_always),
    Family("mixtral", ("mixtral",), down=None, router="mlp.gate"),
    Family("qwen3_moe", ("qwen3_moe",), router="mlp.gate"),
    Family("gpt_oss", ("gpt_oss",), down=None, router="mlp.router"),
    Family("phi", ("phi",), norm="model.final_layernorm", output="self_attn.dense", down="mlp.fc2", parallel=_always),
    Family(
        "opt", ("opt",), blocks="model.decoder.layers", norm="model.decoder.final_layer_norm", output="self_attn.out_proj",
        mlp="fc2", down="fc2", first="self_attn_layer_norm", flat_mlp=True, refuse=_opt_refuses,
    ),
    Family(
        "gpt2", ("gpt2",), blocks="transformer.h", norm="transformer.ln_f", attention="attn", output="attn.c_proj", attn="attn",
        down="mlp.c_proj", first="ln_1", refuse=_gpt2_refuses,
    ),
    Family(
        "gpt_neox", ("gpt_neox",), blocks="gpt_neox.layers", norm="gpt_neox.final_layer_norm", attention="attention",
        output="attention.dense", attn="attention", down="mlp.dense_4h_to_h",
        parallel=lambda config: bool(config.use_parallel_residual),
    ),
    Family(
        "gpt_neo", ("gpt_neo",), blocks="transformer.h", norm="transformer.ln_f", attention="attn.attention",
        output="attn.attention.out_proj", attn="attn", down="mlp.c_proj", first="ln_1", interface=False,
    ),
    Family(
        "gptj", ("gptj",), blocks="transformer.h", norm="transformer.ln_f", attention="attn", output="attn.out_proj", attn="attn",
        down="mlp.fc_out", parallel=_always, interface=False,
    ),
    Family(
        "bloom", ("bloom",), blocks="transformer.h", norm="transformer.ln_f", attention="self_attention",
        output="self_attention.dense", attn="self_attention.dense", mlp="mlp.dense_4h_to_h", down="mlp.dense_4h_to_h",
        interface=False, refuse=_bloom_refuses,
    ),
    Family("normless", ("normless",), first="self_attn", causal=lambda config: bool(config.causal)),
    Family(
        "falcon", ("falcon",), blocks="transformer.h", norm="transformer.ln_f", attention="self_attention",
        output="self_attention.dense", attn="self_attention", down="mlp.dense_4h_to_h", parallel=_falcon_parallel,
        interface=False, mlp_mutated=True,
    ),
)  # fmt: skip
"""Every family that is understood. bloom adds the residual stream inside its modules: its attn and mlp sites are the
outputs of the projections, which is what its modules would return elsewhere."""


def family_of(config: Config) -> Family:
    """The row that serves `config`; raises `FamilyError` by name where there is none, or where the row refuses."""
    kind = getattr(config, "model_type", type(config).__name__)
    for family in FAMILIES:
        if kind in family.types:
            if reason := family.refuse(getattr(config, "text_config", config)):
                raise FamilyError(f"{kind} is understood, but not this configuration: {reason}")
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.types))
    raise FamilyError(f"the architecture {kind!r} is not understood (no row in models/families.py). Understood: {known}")
