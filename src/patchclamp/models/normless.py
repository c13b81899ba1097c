"""Normless: a transformer without norms, for models whose every weight is known (compiled programs, and their imitations).

    x = tokens + positions;    x += attention(x);  x += mlp(x)   in every block;    logits = unembed(x)

Queries, keys, values, outputs and both MLP layers have biases; scores are query . key, unscaled. Attention looks both ways unless
`causal` is set: then position i sees positions up to i. Imported, the class is known to `AutoModelForCausalLM` as "normless".

With `gated`, what a head gives is multiplied, query by query, by a gate of its own, 1 / (1 + e^-(w . x + b)) of what attention reads: it can
give nothing and rest nowhere (Bondarenko et al. 2023, https://arxiv.org/abs/2306.12929; there w reads the head's own slice of x). The gate
is in the pattern, whose rows sum to it; attention is eager.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class NormlessConfig(PreTrainedConfig):
    """Sizes, and whether attention is causal; `gated=True` is kept where it is given, so that a model without gates is told as before."""

    model_type = "normless"

    vocab_size: int = 16
    hidden_size: int = 32
    intermediate_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    head_dim: int = 8
    hidden_act: str = "relu"
    max_position_embeddings: int = 16
    causal: bool = False
    initializer_range: float = 0.02
    use_cache: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = None
    tie_word_embeddings: bool = False


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    gate: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax in the queries' own precision, so that in float64 nothing is rounded to float32.

    With the logits of gates [row, query, head] beside the keys stands a place to rest, whose score lets exactly the gate's share go to keys:
    softmax over keys and it is gate * softmax over keys.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    if gate is None:
        pattern = nn.functional.softmax(scores, dim=-1)
    else:
        rest = scores.logsumexp(-1, keepdim=True) - gate.transpose(1, 2)[..., None]
        pattern = nn.functional.softmax(torch.cat([scores, rest], -1), dim=-1)[..., :-1]
    mixed = torch.matmul(nn.functional.dropout(pattern, p=dropout, training=module.training), value)
    return mixed.transpose(1, 2).contiguous(), pattern


class NormlessAttention(nn.Module):
    """Multi-head attention with biases and unscaled scores, and a gate on each head where the config says so."""

    def __init__(self, config: NormlessConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.is_causal, self.scaling = config.causal, 1.0
        inner = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner)
        self.k_proj = nn.Linear(config.hidden_size, inner)
        self.v_proj = nn.Linear(config.hidden_size, inner)
        self.o_proj = nn.Linear(inner, config.hidden_size)
        gated = bool(getattr(config, "gated", False))
        self.gate = nn.Linear(config.hidden_size, config.num_attention_heads) if gated else None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, past_key_values: Cache | None = None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[row, position, width] to the same, and the pattern where attention is eager."""
        rows, columns = hidden_states.shape[:2]
        query, key, value = (
            projection(hidden_states).view(rows, columns, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        kind = str(self.config._attn_implementation)  # pyright: ignore[reportPrivateUsage]
        if self.gate is not None:
            if kind != "eager":
                raise ValueError(
                    f"the attention kernel is {kind}, and gates are known to eager alone: set_attn_implementation('eager')"
                )
            options = {**options, "gate": self.gate(hidden_states)}
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
        mixed, pattern = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **options)
        return self.o_proj(mixed.reshape(rows, columns, -1)), pattern


class NormlessMLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, config: NormlessConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[row, position, width] to the same."""
        return self.down_proj(self.act(self.up_proj(hidden_states)))


class NormlessLayer(GradientCheckpointingLayer):
    """x + attention(x), then + mlp of that."""

    def __init__(self, config: NormlessConfig, layer_idx: int):
        super().__init__()
        self.self_attn = NormlessAttention(config, layer_idx)
        self.mlp = NormlessMLP(config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """[row, position, width] to the same."""
        mixed, _ = self.self_attn(hidden_states, attention_mask=attention_mask, **options)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(hidden_states)


class NormlessPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the class."""

    config_class = NormlessConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True


class NormlessModel(NormlessPreTrainedModel):
    """Embeddings and blocks; `norm` is the identity, so that there is a place where the unembedding reads."""

    def __init__(self, config: NormlessConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([NormlessLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = nn.Identity()
        self.gradient_checkpointing = False
        if getattr(config, "gated", False):  # other kernels, and the masks made for them, know no gates
            self.set_attn_implementation("eager")
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The final residual stream [row, position, width]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        stream = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + stream.shape[1], device=stream.device)[None]
        mask = create_causal_mask if self.config.causal else create_bidirectional_mask
        seeing = mask(
            config=self.config, inputs_embeds=stream, attention_mask=attention_mask, past_key_values=past_key_values
        )  # fmt: skip
        hidden = stream + self.embed_positions(position_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=seeing, past_key_values=past_key_values, **options)
        return self.norm(hidden)


class NormlessForCausalLM(NormlessPreTrainedModel, GenerationMixin):
    """Logits at every position: what follows where `causal` is set, else what the position is to be labelled."""

    def __init__(self, config: NormlessConfig):
        super().__init__(config)
        self.model = NormlessModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [row, position, token], at the last `logits_to_keep` columns (0: all) or at those that a tensor names.

        Raises:
            ValueError: a cache is asked of a model that looks both ways: what is kept would change with every token.
        """
        if use_cache and past_key_values is None:
            if not self.config.causal:
                raise ValueError("this model looks both ways, so that keys and values of a prefix are not final: no cache")
            past_key_values = DynamicCache(config=self.config)
        hidden = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, **options)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.lm_head(hidden[:, kept]), past_key_values=past_key_values)


AutoConfig.register("normless", NormlessConfig, exist_ok=True)
AutoModelForCausalLM.register(NormlessConfig, NormlessForCausalLM, exist_ok=True)
