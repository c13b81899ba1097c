"""From a wiring to real `GPT2LMHeadModel` and `LlamaForCausalLM` weights.

The norms are made harmless by one constant coordinate C: with the abstract stream u beside it the norm divides by
C * sqrt(1 + |u|^2 / C^2) up to a known factor, which the norm's own weight takes back. What is left is a relative error of
|u|^2 / 2C^2, about 1e-7. GPT-2's norm also takes off the mean, so there the stream is written twice, as (u, -u): its mean is 0.
"""

from typing import TYPE_CHECKING

import numpy as np

from patchclamp.zoo._wiring import CONTENT, GROUP, HEAD_WIDTH, ROPE_BASE, SHIFTED, Array, Head, Wiring, angles, slots

if TYPE_CHECKING:
    import torch
    from transformers import GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

CONSTANT = 8192.0
HALF = 160  # coordinates of the stream: the abstract ones, then positions (gpt2), the last one is C
POSITIONS = 32


def gpt2(wiring: Wiring) -> "GPT2LMHeadModel":
    """The wiring as a GPT-2 in float64: width 320, 4 heads of 80 per layer, learned positions."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    width, head_width = 2 * HALF, HEAD_WIDTH["gpt2"]
    neurons = max(mlp.read.shape[1] for mlp in wiring.mlps)
    config = GPT2Config(
        vocab_size=len(wiring.vocabulary), n_positions=POSITIONS, n_embd=width, n_layer=len(wiring.heads), n_head=4,
        n_inner=neurons, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    norm = np.full(width, CONSTANT * np.sqrt(2 / width))
    norm[[HALF - 1, width - 1]] = 0.0
    for name, value in state.items():
        if ".ln_" in name and name.endswith("weight"):
            _put(value, norm)
    _put(state["transformer.wte.weight"], _twice(_with_constant(wiring.embed)))
    _put(state["transformer.wpe.weight"], _twice(_place(np.eye(POSITIONS), wiring.space.width)))
    _put(state["lm_head.weight"], _halves(_pad(wiring.unembed)).T)
    for layer, (heads, mlp) in enumerate(zip(wiring.heads, wiring.mlps, strict=True)):
        block = f"transformer.h.{layer}."
        for h, head in enumerate(heads):
            query, key = _gpt2_match(head, wiring.space.width)
            for part, matrix in enumerate((query * np.sqrt(head_width), key, _pad(head.read))):
                start = part * width + h * head_width
                _put(state[block + "attn.c_attn.weight"][:, start : start + matrix.shape[1]], _halves(matrix))
            start = h * head_width
            out = state[block + "attn.c_proj.weight"][start : start + len(head.write)]
            _put(out, _twice(_pad(head.write.T).T))
        _put(state[block + "mlp.c_fc.weight"][:, : mlp.read.shape[1]], _halves(_pad(mlp.read)))
        _put(state[block + "mlp.c_proj.weight"][: len(mlp.write)], _twice(_pad(mlp.write.T).T))
    model.load_state_dict(state)
    return model


def llama(wiring: Wiring) -> "LlamaForCausalLM":
    """The wiring as a Llama in float64 (its norms compute in float32): width 160, 4 heads of 128, 2 key/value heads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    head_width, group = HEAD_WIDTH["llama"], GROUP["llama"]
    neurons = max(mlp.read.shape[1] for mlp in wiring.mlps)
    config = LlamaConfig(
        vocab_size=len(wiring.vocabulary), hidden_size=HALF, intermediate_size=neurons, num_hidden_layers=len(wiring.heads),
        num_attention_heads=4, num_key_value_heads=4 // group, head_dim=head_width, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE}, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    norm = np.full(HALF, CONSTANT / np.sqrt(HALF))
    norm[HALF - 1] = 0.0
    for name, value in state.items():
        if "norm" in name:
            _put(value, norm)
    _put(state["model.embed_tokens.weight"], _with_constant(wiring.embed))
    _put(state["lm_head.weight"], _pad(wiring.unembed).T)
    one = _pad(wiring.space.basis("one"))
    for layer, (heads, mlp) in enumerate(zip(wiring.heads, wiring.mlps, strict=True)):
        block = f"model.layers.{layer}."
        match, place = slots(heads, group)
        for h, head in enumerate(heads):
            query, key = _llama_match(head, match[h], one)
            query_row, shared_row = h * head_width, (h // group) * head_width
            _put(state[block + "self_attn.q_proj.weight"][query_row : query_row + head_width], query.T * np.sqrt(head_width))
            state[block + "self_attn.k_proj.weight"][shared_row : shared_row + head_width] += torch.from_numpy(key.T)
            rows = slice(shared_row + place[h], shared_row + place[h] + head.read.shape[1])
            _put(state[block + "self_attn.v_proj.weight"][rows], _pad(head.read).T)
            columns = slice(query_row + place[h], query_row + place[h] + len(head.write))
            _put(state[block + "self_attn.o_proj.weight"][:, columns], _pad(head.write.T))
        neuron = slice(0, mlp.read.shape[1])
        _put(state[block + "mlp.gate_proj.weight"][neuron], _pad(mlp.read).T)
        _put(state[block + "mlp.up_proj.weight"][neuron], np.repeat(one, mlp.read.shape[1], 1).T)
        _put(state[block + "mlp.down_proj.weight"][:, neuron], _pad(mlp.write.T))
    model.load_state_dict(state)
    return model


def tokenizer(vocabulary: tuple[str, ...]) -> "PreTrainedTokenizerFast":
    """One token a word, split at spaces, `<bos>` put first; ids are places in `vocabulary`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocabulary.index("<bos>"))])
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<bos>", pad_token="<pad>", unk_token="<unk>")


def _gpt2_match(head: Head, width: int) -> tuple[Array, Array]:
    """Query and key maps; the predecessor is found through one-hot positions: query of position i is key of i - 1."""
    query, key = _pad(head.query), _pad(head.key)
    if head.shift:
        ahead, here = np.eye(POSITIONS, k=-1), np.eye(POSITIONS)
        query = np.hstack([query, head.shift * _place(ahead.T, width).T])
        key = np.hstack([key, _place(here, width).T])
    return query, key


def _llama_match(head: Head, slot: int, one: Array) -> tuple[Array, Array]:
    """Query and key maps over rotary pairs (f, f + half): content on slow frequencies, the predecessor on the fastest ones."""
    head_width = HEAD_WIDTH["llama"]
    query, key = np.zeros((HALF, head_width)), np.zeros((HALF, head_width))
    start = CONTENT + slot
    query[:, start : start + head.query.shape[1]] = _pad(head.query)
    key[:, start : start + head.key.shape[1]] = _pad(head.key)
    if head.shift:  # the query is turned back by one position, so that the product peaks one position back
        turn = angles(0, SHIFTED)
        query[:, :SHIFTED] = head.shift / SHIFTED * one * np.cos(turn)
        query[:, head_width // 2 : head_width // 2 + SHIFTED] = -head.shift / SHIFTED * one * np.sin(turn)
        key[:, :SHIFTED] = np.repeat(one, SHIFTED, 1)
    return query, key


def _put(target: "torch.Tensor", value: Array) -> None:
    import torch

    target.copy_(torch.from_numpy(np.ascontiguousarray(value)))


def _pad(matrix: Array) -> Array:
    """Coordinates of the abstract stream -> all coordinates of the stream (the rest zero)."""
    return np.vstack([matrix, np.zeros((HALF - len(matrix), matrix.shape[1]))])


def _place(rows: Array, start: int) -> Array:
    """Rows written at coordinates start, start + 1, ..."""
    out = np.zeros((len(rows), HALF))
    out[:, start : start + rows.shape[1]] = rows
    return out


def _with_constant(embed: Array) -> Array:
    out = _pad(embed.T).T
    out[:, HALF - 1] = CONSTANT
    return out


def _twice(writes: Array) -> Array:
    return np.hstack([writes, -writes])


def _halves(reads: Array) -> Array:
    return np.vstack([reads, -reads]) / 2
