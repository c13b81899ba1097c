"""A blueprint as a transformers model, and its tokenizer."""

from typing import TYPE_CHECKING

import numpy as np

from patchclamp.zoo._compile import tokenizer
from patchclamp.zoo._wiring import Array
from patchclamp.zoo.compiled.weights import Blueprint

if TYPE_CHECKING:
    import torch

    from patchclamp.models.normless import NormlessForCausalLM

__all__ = ["tokenizer", "transformer"]


def transformer(blueprint: Blueprint) -> "NormlessForCausalLM":
    """The model in float64 (its weights are the same in float32), in evaluation mode.

    Layers without heads or with fewer than others get silent ones, whose weights are zero.
    """
    from patchclamp.models.normless import NormlessConfig, NormlessForCausalLM

    each = [head for layer in blueprint.heads for head in layer]
    head_width = max(max(head.query.shape[1], head.read.shape[1]) for head in each)
    config = NormlessConfig(
        vocab_size=len(blueprint.vocabulary), hidden_size=blueprint.space.width, num_hidden_layers=len(blueprint.heads),
        num_attention_heads=max(map(len, blueprint.heads)), head_dim=head_width, hidden_act="relu",
        intermediate_size=max(1, *(mlp.read.shape[1] for mlp in blueprint.mlps)),
        max_position_embeddings=len(blueprint.positions), causal=blueprint.program.causal,
    )  # fmt: skip
    model = NormlessForCausalLM(config).double().eval()
    state = {name: value.new_zeros(value.shape) for name, value in model.state_dict().items()}
    _put(state["model.embed_tokens.weight"], blueprint.embed)
    _put(state["model.embed_positions.weight"], blueprint.positions)
    _put(state["lm_head.weight"], blueprint.unembed.T)
    for layer, (heads, mlp) in enumerate(zip(blueprint.heads, blueprint.mlps, strict=True)):
        block = f"model.layers.{layer}."
        for number, head in enumerate(heads):
            for slot, matrix in (("q", head.query), ("k", head.key), ("v", head.read)):
                start = number * head_width
                _put(state[f"{block}self_attn.{slot}_proj.weight"][start : start + matrix.shape[1]], matrix.T)
            start = number * head_width
            _put(state[block + "self_attn.o_proj.weight"][:, start : start + len(head.write)], head.write.T)
        _put(state[block + "mlp.up_proj.weight"][: mlp.read.shape[1]], mlp.read.T)
        _put(state[block + "mlp.down_proj.weight"][:, : len(mlp.write)], mlp.write.T)
    model.load_state_dict(state)
    return model


def _put(target: "torch.Tensor", value: Array) -> None:
    import torch

    target.copy_(torch.from_numpy(np.ascontiguousarray(value)))
