"""Edges one at a time, in every family, by hooks of the tests' own on the model's own modules.

The gate of one edge stands on what its reader is given: the reader's norm and map, called on another stream, give the columns
(or the MLP's output) that are put in its place. The gate at 0 is the edge closed; autograd through the hooks gives its slope.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CONFIGS, tiny
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import edges
from patchclamp.parts.edge_maps import maps_of
from patchclamp.sites import Edge, Site
from test_parts import examples

DIFF = METRICS["logit_diff"]


@dataclass(frozen=True)
class Row:
    """Where a family keeps what reads and writes the stream; written here again, apart from the package's own table."""

    blocks: str = "model.layers"
    first: str | None = "input_layernorm"
    second: str | None = "post_attention_layernorm"
    """The MLP's norm; the attention's where it has none of its own."""
    attn: str = "self_attn"
    maps: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    layout: str = "apart"
    output: str = "self_attn.o_proj"
    mlp: str = "mlp"
    inside: str | None = None
    """What the MLP's last map is called, where the MLP module adds the residual stream itself or is nothing but that map."""
    attn_post: str | None = None
    mlp_post: str | None = None
    scale: float = 1.0
    parallel: bool = False
    turned: tuple[str, ...] = field(default=())
    """Norms of whole queries and keys: what is read is what these give."""


_SANDWICH: dict[str, Any] = {"attn_post": "post_attention_layernorm", "mlp_post": "post_feedforward_layernorm"}
_GEMMA: dict[str, Any] = {"second": "pre_feedforward_layernorm", **_SANDWICH}
_OLMO = Row(first=None, second=None, turned=("self_attn.q_norm", "self_attn.k_norm"), **_SANDWICH)
_BLOOM: dict[str, Any] = {
    "blocks": "transformer.h", "attn": "self_attention", "maps": ("self_attention.query_key_value",) * 3,
    "output": "self_attention.dense",
}  # fmt: skip
_NEOX: dict[str, Any] = {
    "blocks": "gpt_neox.layers", "attn": "attention", "maps": ("attention.query_key_value",) * 3, "layout": "heads",
    "output": "attention.dense",
}  # fmt: skip
ROWS: dict[str, Row] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe", "smollm3", "gpt_oss"), Row()),
    "granite": Row(scale=0.3),
    "gpt2": Row(
        "transformer.h", "ln_1", "ln_2", "attn", ("attn.c_attn",) * 3, "slots", "attn.c_proj"
    ),
    "gpt_neox": Row(parallel=True, **_NEOX),
    "gpt_neox-sequential": Row(**_NEOX),
    "gemma2": Row(**_GEMMA),
    "gemma3_text": Row(**_GEMMA),
    "gemma3": Row("model.language_model.layers", **_GEMMA),
    "opt": Row(
        "model.decoder.layers", "self_attn_layer_norm", "final_layer_norm", output="self_attn.out_proj", mlp="", inside="fc2"
    ),
    "phi": Row(second="input_layernorm", output="self_attn.dense", parallel=True),
    "phi3": Row(maps=("self_attn.qkv_proj",) * 3, layout="slots"),
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "cohere": Row(second="input_layernorm", parallel=True),
    "bloom": Row(layout="heads", mlp="mlp", inside="mlp.dense_4h_to_h", **_BLOOM),
    "falcon": Row(second="input_layernorm", layout="slots", parallel=True, **_BLOOM),
    "falcon-new": Row(first="ln_attn", second="ln_mlp", layout="groups", parallel=True, **_BLOOM),
    "falcon-alibi": Row(layout="heads", **_BLOOM),
    "gptj": Row(
        "transformer.h", "ln_1", "ln_1", "attn", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "apart", "attn.out_proj",
        parallel=True,
    ),
    "gpt_neo": Row(
        "transformer.h", "ln_1", "ln_2", "attn", tuple(f"attn.attention.{slot}_proj" for slot in "qkv"), "apart",
        "attn.attention.out_proj",
    ),  # type: ignore[arg-type]
}  # fmt: skip


class Hooked:
    """A model, its clean and its corrupt run, and runs in which one edge has a gate."""

    def __init__(self, model: Model, row: Row, batch):
        self.hf, self.row, self.batch = model.hf, row, batch
        self.blocks = self.hf.get_submodule(row.blocks)
        sizes = model.anatomy.sizes[0]
        self.heads, self.kv, self.width = sizes.heads, sizes.kv_heads, sizes.head_width
        self.clean, self.streams = self.watched(batch.tokens)
        self.corrupt, _ = self.watched(batch.corrupt)

    def at(self, layer: int, path: str | None) -> Any:
        return (lambda x: x) if path is None else self.blocks[layer].get_submodule(path) if path else self.blocks[layer]

    def call(self, tokens: Tensor) -> Tensor:
        ids = (self.batch.mask.long().cumsum(-1) - 1).clamp(min=0)
        given = {} if self.row.attn == "self_attention" and "bloom" in type(self.hf).__name__.lower() else {"position_ids": ids}
        return self.hf(input_ids=tokens, attention_mask=self.batch.mask.long(), use_cache=False, **given).logits

    def watched(self, tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What each source writes, and each stream."""
        kept: dict[str, Tensor] = {}
        handles = []

        def before(name: str, module) -> None:
            def keep(_, args, kwargs):
                kept[name] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))

        def after(name: str, module) -> None:
            def keep(_, args, out):
                kept[name] = (out[0] if isinstance(out, tuple) else out).detach().clone()

            handles.append(module.register_forward_hook(keep))

        for layer, block in enumerate(self.blocks):
            before(f"L{layer}.pre", block)
            before(f"L{layer}.z", self.at(layer, self.row.output))
            after(f"L{layer}.attn", self.at(layer, self.row.output))
            after(f"L{layer}.mlp", self.at(layer, self.row.inside or self.row.mlp))
        after("post", self.blocks[-1])
        with torch.no_grad():
            self.call(tokens)
        for handle in handles:
            handle.remove()
        return self.contributions(kept), kept

    @torch.no_grad()
    def contributions(self, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {"embed": kept["L0.pre"]}
        shape, row = kept["L0.pre"].shape, self.row
        for layer in range(len(self.blocks)):
            z, attn, mlp = kept[f"L{layer}.z"], kept[f"L{layer}.attn"], kept[f"L{layer}.mlp"].reshape(shape)
            output = self.at(layer, row.output)
            total = kept[f"L{layer}.pre"]
            for head in range(self.heads):
                alone = torch.zeros_like(z)
                cut = slice(head * self.width, (head + 1) * self.width)
                alone[..., cut] = z[..., cut]
                found[f"L{layer}.h{head}"] = self.through(layer, row.attn_post, attn, output(alone) - output(0 * z))
            bias = self.through(layer, row.attn_post, attn, output(0 * z))
            found[f"L{layer}.mlp"] = (mlp if row.mlp_post is None else self.at(layer, row.mlp_post)(mlp)) * row.scale
            total = total + sum(found[f"L{layer}.h{head}"] for head in range(self.heads)) + bias
            kept[f"L{layer}.mid"] = kept[f"L{layer}.pre"] if row.parallel else total
        return found

    def through(self, layer: int, post: str | None, at: Tensor, share: Tensor) -> Tensor:
        """A share of what attention gives, through a post-norm whose scale is that of the whole."""
        gain = 1 if post is None else self.at(layer, post)(at) / at
        return share * gain * self.row.scale

    def stream(self, target: Site) -> Tensor:
        if target.kind == "logits":
            return self.streams["post"]
        return self.streams[f"L{target.layer}.{'mid' if target.kind == 'mlp' else 'pre'}"]

    def columns(self, target: Site) -> list[int]:
        """Which outputs of the map are the reader's."""
        index, heads, kv, width = target.index or 0, self.heads, self.kv, self.width
        if self.row.layout == "apart":
            start = index * width
        elif self.row.layout == "heads":  # query, key, value of each head
            start = (3 * index + "qkv".index(target.kind)) * width
        elif self.row.layout == "slots":  # all queries, all keys, all values
            kv = 1 if "falcon" in type(self.hf).__name__.lower() else kv
            start = {"q": 0, "k": heads, "v": heads + kv}[target.kind] * width + (
                index if kv > 1 or target.kind == "q" else 0
            ) * width
        else:  # of each group its queries, its key, its value
            groups = self.hf.config.num_kv_heads
            each = heads // groups
            group = index // each if target.kind == "q" else index if kv == groups else index // each
            start = (group * (each + 2) + {"q": index % each, "k": each, "v": each + 1}[target.kind]) * width
        return list(range(start, start + width))

    def gated(self, edge: Edge, gate: Tensor) -> Tensor:
        """The metric by example, the edge's gate being `gate`."""
        source, target, row = str(edge.source), edge.target, self.row
        stream = self.stream(target) + (1 - gate) * (self.corrupt[source] - self.clean[source])
        if target.kind == "logits":
            return self.measured(self.blocks[-1], lambda out: stream)
        layer = target.layer or 0
        if target.kind == "mlp":
            given = self.at(layer, row.second)(stream)
            module = self.at(layer, row.inside or row.mlp)
            made = inside(self.blocks[layer], row, given) if row.inside else module(given)
            made = made[0] if isinstance(made, tuple) else made
            return self.measured(module, lambda out: made.reshape(out.shape))
        path = row.maps["qkv".index(target.kind)]
        made, module, columns = (
            self.at(layer, path)(self.at(layer, row.first)(stream)),
            self.at(layer, path),
            self.columns(target),
        )
        if row.turned and target.kind != "v":
            module = self.at(layer, row.turned["qk".index(target.kind)])
            made = module(made)

        def put(out: Tensor) -> Tensor:
            out = out.clone()
            out[..., columns] = made[..., columns]
            return out

        return self.measured(module, put)

    def measured(self, module, change: Callable[[Tensor], Tensor]) -> Tensor:
        def hook(_, args, out):
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        handle = module.register_forward_hook(hook)
        try:
            logits = self.call(self.batch.tokens)
        finally:
            handle.remove()
        return DIFF(logits[self.batch.target_row, self.batch.target_position][None], self.batch)[0]


def inside(block, row: Row, given: Tensor) -> Tensor:
    """The MLPs of bloom and opt up to their last map."""
    if row.inside == "fc2":
        return block.fc2(block.activation_fn(block.fc1(given)))
    return block.mlp.dense_4h_to_h(block.mlp.gelu_impl(block.mlp.dense_h_to_4h(given)))


def by_hand(model: Model, row: Row, batch, some: list[Edge]) -> tuple[Tensor, Tensor]:
    """Each edge's closed metric and its slope at the model itself: [edge, example]."""
    hooked = Hooked(model, row, batch)
    values, slopes = [], []
    for edge in some:
        with torch.no_grad():
            values.append(hooked.gated(edge, torch.zeros(())))
        gate = torch.ones(len(batch), 1, 1, dtype=torch.float64, requires_grad=True)
        value = hooked.gated(edge, gate.to(model.dtype)[batch.example])
        (slope,) = torch.autograd.grad(value.sum(), gate)
        slopes.append(slope[:, 0, 0])
    return torch.stack(values), torch.stack(slopes)


def copies(edge: Edge, model: Model) -> list[Edge]:
    """An edge into keys or values of one map's columns: of falcon's new blocks those are copied to each head of a group first."""
    groups = (
        getattr(model.hf.config, "num_kv_heads", None) if getattr(model.hf.config, "new_decoder_architecture", False) else None
    )
    if groups is None or edge.target.kind not in ("k", "v"):
        return [edge]
    each = model.anatomy.sizes[0].heads // groups
    first = (edge.target.index or 0) // each * each
    return [Edge(edge.source, replace(edge.target, index=first + number)) for number in range(each)]


SINGLE = ("mixtral", "qwen3_moe", "gpt_oss")
"""Their kernels take no float64."""
WHOLE = ("gpt2", "llama", "gemma2")


@cache
def model_of(name: str) -> Model:
    return Model.load(tiny(name, dtype=torch.float32 if name in SINGLE else torch.float64))


@pytest.mark.parametrize("name", list(ROWS))
def test_edges_one_by_one_are_what_hooks_give(name: str):
    """All edges of three families, some into every kind of reader of the others; closed and slopes, to 1e-5.

    (Models in float64, where most norms and softmaxes compute in float32 all the same. Edges into copies of a key are taken
    together.)
    """
    model = model_of(name)
    parts, batch = edges(model), examples(3, lengths=(5,)).batch()
    rule = parts.fallback("resample")
    draw = torch.Generator().manual_seed(len(name))
    some = list(parts.labels)
    if name not in WHOLE:
        some = []
        for kind in ("q", "k", "v", "mlp", "logits"):
            mine = [edge for edge in parts.labels if edge.target.kind == kind]
            some += [mine[number] for number in torch.randperm(len(mine), generator=draw)[:3].tolist()]
    closed, slopes = by_hand(model, ROWS[name], batch, some)
    alike = [copies(edge, model) for edge in some]
    gates = torch.cat([parts.without(several) for several in alike])
    torch.testing.assert_close(parts.measure(batch, gates, rule), closed.float() if name in SINGLE else closed, rtol=0, atol=1e-5)
    every = parts.gradient(batch, parts.open(), rule)[1][0]
    found = torch.stack([every[:, [parts.index[edge] for edge in several]].sum(1) for several in alike])
    torch.testing.assert_close(found.double(), slopes, rtol=0, atol=1e-5)
    assert float(slopes.abs().max()) > 1e-2


def test_every_family_is_in_the_table():
    assert set(CONFIGS) - set(ROWS) <= {"normless"}, "its own tests compare it with programs"


def test_which_families_are_read_in_closed_form():
    """Those whose queries are normed as a whole, or whose keys are shared by groups of copies, are read under autograd."""
    slow = {name for name in ROWS if not all(maps_of(model_of(name)).attention)}
    assert slow == {"olmo2", "olmo3", "falcon-new"}
    assert all(all(maps_of(model_of(name)).mlp) for name in ROWS)
