"""Probe: a short forward pass at load that shows that every layer can be observed, and reads sizes from tensors."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from patchclamp.errors import FamilyError
from patchclamp.models.anatomy import Anatomy, Sizes, dissect
from patchclamp.models.session import Session
from patchclamp.sites import Site


def probed(hf: Any) -> Anatomy:
    """The anatomy with sizes, from one forward pass over three tokens.

    Raises:
        FamilyError: no row for the architecture, or a place that did not fire, by name.
    """
    from patchclamp.models.model import still

    anatomy = dissect(hf)
    shapes: dict[Site, tuple[int, ...]] = {}
    wanted = [
        Site(kind, layer) for layer in range(len(anatomy.layers)) for kind in ("q", "k", "v", "pattern", "neuron", "router")
    ]
    wanted = [site for site in wanted if anatomy.why_not(site) is None]

    def keep(site: Site) -> Any:
        def visit(value: Tensor) -> Tensor:
            shapes[site] = tuple(value.shape)
            return value

        return visit

    tokens = torch.zeros(1, 3, dtype=torch.long, device=hf.get_input_embeddings().weight.device)
    with torch.no_grad(), still(hf), Session(anatomy, {site: keep(site) for site in wanted}).open():
        hf(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    if silent := [str(site) for site in wanted if site not in shapes]:
        raise FamilyError(
            f"{anatomy.family.name}: the invariant 'every site fires in every layer' fails: {', '.join(silent[:6])} stayed silent"
        )
    return replace(anatomy, sizes=tuple(_sizes(shapes, layer) for layer in range(len(anatomy.layers))))


def _sizes(shapes: dict[Site, tuple[int, ...]], layer: int) -> Sizes:
    def last(kind: str) -> int | None:
        shape = shapes.get(Site(kind, layer))
        return None if shape is None else shape[-1]

    return Sizes(
        heads=shapes[Site("q", layer)][2],
        kv_heads=shapes[Site("k", layer)][2],
        head_width=shapes[Site("v", layer)][3],
        neurons=last("neuron"),
        experts=last("router"),
    )
