"""Probe: a short forward pass at load that reads sizes from tensors and proves that the family's row fits the model."""

from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from patchclamp.errors import FamilyError
from patchclamp.models.anatomy import Anatomy, Sizes, dissect, input_device
from patchclamp.models.invariants import RULES, rounding
from patchclamp.models.recording import Recorder
from patchclamp.models.scope import still
from patchclamp.sites import KINDS, Site

LENGTH = 5


def probed(hf: Any) -> Anatomy:
    """The anatomy with sizes, from two forward passes over two rows of five tokens.

    Raises:
        FamilyError: no row for the architecture, or the row is wrong about this model: the invariant that fails, by name.
    """
    anatomy = dissect(hf)
    tokens = probe_tokens(anatomy)
    attention = [Site(kind, layer) for layer in range(len(anatomy.layers)) for kind in ("q", "k", "v")]
    shapes = {site: tuple(value.shape) for site, value in observed(anatomy, attention, tokens).items()}
    anatomy = replace(anatomy, sizes=tuple(_sizes(anatomy, shapes, layer) for layer in range(len(anatomy.layers))))
    values = observed(anatomy, places(anatomy), tokens)
    anatomy = replace(anatomy, sizes=tuple(_with_widths(size, values, layer) for layer, size in enumerate(anatomy.sizes)))
    if bool(values[Site("logits")].isfinite().all()):  # else the weights are at fault, not the row: runs will say so
        _prove(anatomy, values)
    return anatomy


def probe_tokens(anatomy: Anatomy) -> Int[Tensor, "row position"]:
    """Five different ordinary tokens, and the same from behind: two rows, so that rows cannot pass for positions."""
    config: Any = anatomy.hf.config
    special = {getattr(config, name, None) for name in ("pad_token_id", "image_token_id", "boi_token_id", "eoi_token_id")}
    count = int(anatomy.config.vocab_size)
    ordinary = (token for i in range(count) if (token := (7919 * i + 3) % count) not in special)
    row = list(islice(cycle(islice(ordinary, LENGTH)), LENGTH))
    return torch.tensor([row, row[::-1]], device=input_device(anatomy.hf))


def places(anatomy: Anatomy) -> list[Site]:
    """Every whole-layer place of the model that is computed (not derived)."""
    found = [Site(kind) for kind in ("embed", "final", "logits")]
    layered = [kind for kind in KINDS if kind not in ("embed", "final", "logits", "head", "write")]
    found += [Site(kind, layer) for layer in range(len(anatomy.layers)) for kind in layered]
    return [site for site in found if anatomy.why_not(site) is None]


def observed(anatomy: Anatomy, sites: list[Site], tokens: Int[Tensor, "row position"]) -> dict[Site, Tensor]:
    """Values at whole-layer places; raises `FamilyError` where one stays silent or cannot be read."""
    recorder = Recorder(anatomy, sites)
    kept = recorder.kept
    try:
        with torch.no_grad(), still(anatomy.hf), recorder.session().open():
            anatomy.hf(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        name = f"{anatomy.family.name}: the invariant 'every site fires in every layer' fails"
        raise FamilyError(f"{name}: the probe stopped with {type(error).__name__}: {error}") from error
    if silent := [str(site) for site in sites if site not in kept]:
        shown = ", ".join(silent[:6]) + (f" and {len(silent) - 6} more" if len(silent) > 6 else "")
        raise FamilyError(f"{anatomy.family.name}: the invariant 'every site fires in every layer' fails: {shown} stayed silent")
    return kept


def _prove(anatomy: Anatomy, values: dict[Site, Tensor]) -> None:
    tolerance = rounding(values[Site("logits")].dtype)
    for rule in RULES:
        if not rule.at_load:
            continue
        try:
            with torch.no_grad():
                worst = rule.check(anatomy, values)
        except RuntimeError as error:
            raise FamilyError(f"{anatomy.family.name}: the invariant {rule.name!r} cannot be computed: {error}") from error
        if not worst.measured <= tolerance:
            raise FamilyError(
                f"{anatomy.family.name}: the invariant {rule.name!r} fails at {worst.where}: off by {worst.measured:.1e}, "
                f"where rounding allows {tolerance:.1e}. The row in models/families.py does not fit this model"
            )


def _sizes(anatomy: Anatomy, shapes: dict[Site, tuple[int, ...]], layer: int) -> Sizes:
    q, k, v = (shapes[Site(kind, layer)] for kind in ("q", "k", "v"))
    return Sizes(heads=q[2], kv_heads=k[2], head_width=v[3], neurons=None, experts=None)


def _with_widths(size: Sizes, values: dict[Site, Tensor], layer: int) -> Sizes:
    neurons, experts = (values.get(Site(kind, layer)) for kind in ("neuron", "router"))
    return replace(
        size, neurons=None if neurons is None else neurons.shape[-1], experts=None if experts is None else experts.shape[-1]
    )
