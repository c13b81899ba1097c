"""Anatomy: a family's row resolved on a loaded model, with sizes read from tensors."""

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from patchclamp.errors import FamilyError, SiteError
from patchclamp.models.families import Family, family_of
from patchclamp.sites import GROUPS, KINDS, PER_HEAD, PER_KV, Site


@dataclass(frozen=True)
class Layer:
    """The modules of one block."""

    block: nn.Module
    attention: nn.Module
    output: nn.Module
    attn: nn.Module
    mlp: nn.Module
    down: nn.Module | None
    first: nn.Module | None
    attn_post: nn.Module | None
    mlp_post: nn.Module | None
    router: nn.Module | None
    scale: float


@dataclass(frozen=True)
class Sizes:
    """Sizes of one layer, from the tensors of a probe."""

    heads: int
    kv_heads: int
    head_width: int
    neurons: int | None
    experts: int | None


@dataclass(frozen=True)
class Anatomy:
    """Where this model keeps its parts."""

    hf: nn.Module
    family: Family
    layers: tuple[Layer, ...]
    norm: nn.Module
    unembed: nn.Module
    parallel: bool
    causal: bool
    takes_positions: bool
    keeps_logits: bool
    sizes: tuple[Sizes, ...] = ()
    """Per layer; empty until probed."""

    @cached_property
    def config(self) -> Any:
        """The language model's configuration (of a multimodal model: its text part)."""
        config: Any = self.hf.config
        return getattr(config, "text_config", None) or config

    def why_not(self, site: Site) -> str | None:
        """Why the model has no such site, or None where it has."""
        if site.layer is not None and not 0 <= site.layer < len(self.layers):
            return f"the model has layers 0 to {len(self.layers) - 1}"
        if site.layer is None:
            return None
        if site.kind in GROUPS:
            return f"it names {GROUPS[site.kind].obtained}, which is a part with one gate (parts.tied) and no place of its own"
        layer = self.layers[site.layer]
        if site.kind == "resid.mid" and self.parallel:
            return KINDS["resid.mid"].absent
        if site.kind in ("router", "expert") and layer.router is None:
            return KINDS[site.kind].absent
        if site.kind == "neuron" and layer.down is None:
            return KINDS["neuron"].absent
        if site.sub is not None:
            return KINDS["neuron"].absent
        if site.feature is not None:
            return "no dictionary is attached to the model"
        if self.sizes and site.index is not None:
            return _out_of_range(site, self.sizes[site.layer])
        return None

    def require(self, site: Site) -> None:
        """Raise `SiteError` where the model has no such site."""
        if reason := self.why_not(site):
            raise SiteError(f"this model ({self.family.name}) has no {site}: {reason}")


def _out_of_range(site: Site, sizes: Sizes) -> str | None:
    if site.kind == "head" or site.kind in PER_HEAD:
        count, noun = sizes.heads, "heads"
    elif site.kind in PER_KV:
        count, noun = sizes.kv_heads, "key/value heads"
    elif site.kind == "neuron":
        count, noun = sizes.neurons, "neurons"
    elif site.kind == "expert":
        count, noun = sizes.experts, "experts"
    else:
        return f"{site.kind} has no parts to number"
    assert site.index is not None
    return None if count is not None and site.index < count else f"layer {site.layer} has {noun} 0 to {(count or 0) - 1}"


def input_device(hf: nn.Module) -> torch.device:
    """Where token ids go: to the embedding, or where accelerate brings its weights when it is called."""
    embedding: Any = hf.get_input_embeddings()  # type: ignore[operator]
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return torch.device(embedding.weight.device if device is None else device)


def find(root: nn.Module, path: str) -> Any:
    """The attribute at a dotted path, or None."""
    here: Any = root
    for name in path.split("."):
        here = getattr(here, name, None)
        if here is None:
            return None
    return here


def dissect(hf: nn.Module) -> Anatomy:
    """Resolve the family's row on the model; raises `FamilyError` with what is missing.

    An adapter's wrapper (peft) is looked through: its base model carries the modules, adapted ones in place.
    """
    base = _unwrapped(hf)
    config: Any = base.config
    family = family_of(config)
    text = getattr(config, "text_config", None) or config
    parallel = family.parallel(text)

    def must(root: nn.Module, path: str, what: str) -> Any:
        found = find(root, path)
        if found is None:
            raise FamilyError(f"{family.name}: {type(root).__name__} has no {path!r} ({what}); is this a causal language model?")
        return found

    def layer(block: nn.Module) -> Layer:
        def maybe(path: str | None) -> Any:
            return None if path is None else find(block, path)

        router = maybe(family.router)
        return Layer(
            block=block,
            attention=must(block, family.attention, "attention"),
            output=must(block, family.output, "output projection"),
            attn=must(block, family.attn, "attention output"),
            mlp=must(block, family.mlp, "MLP"),
            down=maybe(family.down),
            first=None if parallel else must(block, family.first, "first reader of the residual stream"),
            attn_post=maybe(family.attn_post),
            mlp_post=maybe(family.mlp_post),
            router=router,
            scale=1.0 if family.scale is None else float(must(block, family.scale, "residual multiplier")),
        )

    blocks: Any = must(base, family.blocks, "blocks")
    parameters = inspect.signature(type(base).forward).parameters
    return Anatomy(
        hf=base,
        family=family,
        layers=tuple(layer(block) for block in blocks),
        norm=must(base, family.norm, "final norm"),
        unembed=must(base, family.unembed, "unembedding"),
        parallel=parallel,
        causal=family.causal(text),
        takes_positions="position_ids" in parameters,
        keeps_logits="logits_to_keep" in parameters,
    )


def _unwrapped(hf: nn.Module) -> nn.Module:
    if hasattr(hf, "peft_config"):
        get_base = getattr(hf, "get_base_model", None)
        if get_base is not None:
            return get_base()
    return hf
