"""Weights of parts: what a slice moves and what it does not, in every family; frozen bit for bit; grafted."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import cases
from drawn import Drawn
from patchclamp.errors import SiteError, TrainingError
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.training import Training, train
from patchclamp.training.clamps import Freeze, Graft, Schedule
from patchclamp.training.clamps.slices import Slice, slices

TOKENS = torch.tensor([[5, 7, 5, 9, 7, 5, 7], [3, 3, 4, 8, 3, 4, 6]])


def small(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 20, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return Model.load(GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval())


def grouped(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=16)  # fmt: skip
    return Model.load(LlamaForCausalLM(config).eval())


class Nudged:
    """While open, every weight of an attention module (or an MLP) is changed but those of a slice; or those alone."""

    def __init__(self, weights: list[torch.nn.Parameter], pieces: tuple[Slice, ...], inside: bool) -> None:
        self.weights, self.pieces, self.inside = weights, pieces, inside
        self.before = [w.detach().clone() for w in weights]

    def __enter__(self) -> None:
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for weight, before in zip(self.weights, self.before, strict=True):
                new = before + 0.5 * torch.randn(before.shape, generator=draw)
                start, other = (before, new) if self.inside else (new, before)
                weight.copy_(start)
                for piece in self.pieces:
                    if piece.parameter is weight:
                        piece.put(weight.data, piece.of(other))

    def __exit__(self, *error: object) -> None:
        with torch.no_grad():
            for weight, before in zip(self.weights, self.before, strict=True):
                weight.copy_(before)


MIXED = ("olmo2", "olmo3")
"""Norms over all heads at once: a head's queries depend on the other heads' weights, too."""
SHARED = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text")
"""Norms of queries and keys that serve all heads: they are no head's, and are left alone where all else is changed."""


@pytest.mark.parametrize("family", cases.CONFIGS)
def test_a_heads_weights_are_what_it_depends_on_and_no_more(family: str):
    """Its slice of the first layer changed: only it changes. All else in the layer's attention changed: it stays as it is."""
    model = cases.model_of(family)
    sizes, layer = model.anatomy.sizes[0], model.anatomy.layers[0]
    weights = list({id(p): p for p in (*layer.attention.parameters(), *layer.output.parameters())}.values())
    if family in SHARED:
        weights = [p for p in weights if p.shape != (sizes.head_width,)]
    head = 1
    group = head // (sizes.heads // sizes.kv_heads)
    at = {"q": (Site("q", 0), head), "k": (Site("k", 0), group), "v": (Site("v", 0), group)}
    if layer.attn_post is None:  # a norm behind them makes heads' writes depend on each other
        at["write"] = (Site("write", 0), head)
    sites = [site for site, _ in at.values()]
    plain = model.record(TOKENS, sites)
    pieces = slices(model, (f"L0.h{head}",))
    with Nudged(weights, pieces, inside=True):
        found = model.record(TOKENS, sites)
        for kind, (site, mine) in at.items():
            for number in range(plain[site].shape[2]):
                same = torch.equal(found[site][:, :, number], plain[site][:, :, number])
                shares = torch.equal(plain[site][:, :, number], plain[site][:, :, mine])  # keys that several heads read
                key = plain[at["k"][0]]
                follows = kind == "write" and torch.equal(key[:, :, number * key.shape[2] // sizes.heads], key[:, :, group])
                assert same != shares or (not same and (follows or family in MIXED)), (kind, number)
    if family in MIXED:
        return
    with Nudged(weights, pieces, inside=False):
        found = model.record(TOKENS, sites)
        for site, mine in at.values():
            torch.testing.assert_close(found[site][:, :, mine], plain[site][:, :, mine], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [name for name in cases.CONFIGS if name not in ("mixtral", "gpt_oss")])
def test_a_neurons_weights_are_what_it_depends_on(family: str):
    model = cases.model_of(family)
    plain = model.record(TOKENS, ["L0.mlp.n", "L0.mlp"])
    pieces = slices(model, ("L0.mlp.n5",))
    weights = list({id(p.parameter): p.parameter for p in slices(model, ("L0.mlp",))}.values())
    with Nudged(weights, pieces, inside=True):
        found = model.record(TOKENS, ["L0.mlp.n", "L0.mlp"])
        changed = (found[Site("neuron", 0)] != plain[Site("neuron", 0)]).flatten(0, 1).any(0)
        assert changed.nonzero().flatten().tolist() == [5]
    down = [p for p in pieces if p.axis == (0 if "Conv1D" in str(type(model.anatomy.layers[0].down)) else 1)]
    assert down, "the column of the down projection"
    with Nudged(weights, pieces, inside=False):
        again = model.record(TOKENS, "L0.mlp.n")[Site("neuron", 0)]
        torch.testing.assert_close(again[..., 5], plain[Site("neuron", 0)][..., 5], atol=1e-5, rtol=1e-4)


def test_an_experts_share_is_the_experts():
    for family in ("mixtral", "gpt_oss", "qwen3_moe"):
        model = cases.model_of(family)
        pieces = slices(model, ("L1.mlp.e2",))
        assert pieces and all(p.index is not None and p.index.tolist() == [2] for p in pieces)
        router = {p.name for p in slices(model, ("L1.router",))}
        assert router and not router & {p.name for p in pieces}
        assert {p.name for p in slices(model, ("L1.mlp",))} == router | {p.name for p in pieces}


def test_wholes_share_out_every_weight_of_a_model():
    """Embeddings, blocks, final norm and unembedding are all there is; attention, MLP and norms are all of a block."""
    for family in cases.CONFIGS:
        model = cases.model_of(family)
        every = {name for name, _ in model.anatomy.hf.named_parameters()}
        named = {p.name for p in slices(model, ("embed", "L*.block", "final", "logits"))}
        assert named == every, family
        block, inner = ({p.name for p in slices(model, parts)} for parts in (("L0.block",), ("L0.attn", "L0.mlp")))
        assert inner < block or inner == block
        assert all("norm" in name or "ln_" in name for name in block - inner), block - inner
        assert not {p.name for p in slices(model, ("L0.attn",))} & {p.name for p in slices(model, ("L0.mlp",))}


@pytest.mark.parametrize("part", ["L0.resid.mid", "L0.h0.pattern", "L0.h0@-1"])
def test_what_has_no_weights_is_refused_with_what_has(part: str):
    with pytest.raises(TrainingError, match="weights are held by"):
        slices(cases.model_of("gpt2"), (part,))


def test_parts_that_are_not_there_are_refused():
    for part in ("L0.h9", "L9.mlp", "L0.mlp.e1", "L*.h9"):
        with pytest.raises(SiteError):
            slices(cases.model_of("gpt2"), (part,))
    with pytest.raises(SiteError, match="fused kernel"):
        slices(cases.model_of("qwen3_moe"), ("L1.mlp.n1",))


# --- frozen


PARTS = ("L0.h1", "L1.mlp", "embed", "L0.mlp.n3", "L1.kv1.v")


@pytest.mark.parametrize("make", [small, grouped])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_weights_stay_bit_for_bit(make, optimizer: str, tmp_path: Path):
    """From step 3 to 6 of 8, with moments from before, momentum and weight decay; all else learns on."""
    model, kept = make(), {}

    def keep(model: Model, step: int) -> dict[str, float]:
        kept[step] = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
        return {}

    numbers = Training(8, batch=4, rate=0.01, decay=0.1, evaluate=1, optimizer=optimizer)
    train(model, Drawn(), numbers, tmp_path, clamps=[Freeze(PARTS, Schedule(3, 6))], measures=[keep])
    pieces = slices(model, PARTS)
    for a, b in ((2, 3), (3, 4), (5, 6), (6, 7)):
        frozen = a in (3, 5)
        for piece in pieces:
            assert torch.equal(piece.of(kept[a][piece.name]), piece.of(kept[b][piece.name])) == frozen, (a, piece.name)
        mask = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in kept[a].items()}
        for piece in pieces:
            piece.put(mask[piece.name], torch.ones_like(piece.of(mask[piece.name])))
        for name, value in kept[a].items():
            free = ~mask[name]
            assert not free.any() or (value[free] != kept[b][name][free]).any(), name


def test_a_frozen_gradient_counts_for_nothing_where_gradients_are_clipped(tmp_path: Path):
    """One step of SGD with a frozen MLP is the step of a model whose MLP does not require gradients."""
    ours, theirs = small(), small()
    for weight in theirs.hf.transformer.h[1].mlp.parameters():
        weight.requires_grad_(False)
    numbers = Training(3, batch=4, rate=0.1, clip=0.05, optimizer="sgd")
    train(ours, Drawn(), numbers, tmp_path / "ours", clamps=[Freeze("L1.mlp")])
    train(theirs, Drawn(), numbers, tmp_path / "theirs")
    for a, b in zip(ours.hf.parameters(), theirs.hf.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


def test_half_frozen_weights_go_half_the_way(tmp_path: Path):
    ends = {s: train(small(), Drawn(), Training(1, batch=4, rate=0.01, clip=None), tmp_path / str(s),
                     clamps=[Freeze("L0.attn", Schedule(strength=s))]).model.hf.transformer.h[0].attn.c_attn.weight
            for s in (0.25, 0.0)}  # fmt: skip
    start = small().hf.transformer.h[0].attn.c_attn.weight
    torch.testing.assert_close(ends[0.25] - start, 0.75 * (ends[0.0] - start), atol=1e-7, rtol=0)


# --- grafted


@pytest.mark.parametrize("frozen", [False, True])
def test_a_graft_is_the_checkpoints_weights_from_its_step_on(frozen: bool, tmp_path: Path):
    other = train(grouped(5), Drawn(), Training(2, batch=4), tmp_path / "other")
    donor = other.out / "checkpoints/step-0000002"
    weights, kept = dict(other.model.hf.named_parameters()), {}

    def keep(model: Model, step: int) -> dict[str, float]:
        kept[step] = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
        return {}

    model, parts = grouped(), ("L0.h2", "L1.mlp")
    clamp = Graft(parts, donor, step=3, frozen=frozen)
    train(
        model, Drawn(), Training(6, batch=4, rate=0.01, decay=0.1, evaluate=1), tmp_path / "run", clamps=[clamp], measures=[keep]
    )
    for piece in slices(model, parts):
        theirs = piece.of(weights[piece.name])
        assert not torch.equal(piece.of(kept[2][piece.name]), theirs)
        assert torch.equal(piece.of(kept[3][piece.name]), theirs)
        assert torch.equal(piece.of(kept[6][piece.name]), theirs) == frozen
    at_start = grouped()
    train(at_start, Drawn(), Training(1, batch=4), tmp_path / "start", clamps=[Graft("L0.attn", donor)], measures=[keep])
    for piece in slices(at_start, ("L0.attn",)):
        assert torch.equal(kept[0][piece.name], weights[piece.name])


def test_a_graft_of_another_shape_is_refused(tmp_path: Path):
    with pytest.raises(TrainingError, match="no checkpoint"):
        Graft("L0.h0", tmp_path)
    donor = train(grouped(), Drawn(), Training(1, batch=2), tmp_path / "other").out / "checkpoints/step-0000001"
    with pytest.raises(TrainingError, match="has nothing of that name"):
        train(small(), Drawn(), Training(1, batch=2), tmp_path / "run", clamps=[Graft("L0.h0", donor)])
