"""Recording: keep what a pass computes at sites, and derive what no module returns (a head's write)."""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.models.anatomy import Anatomy, Layer
from patchclamp.models.editing import HEAD_AXIS
from patchclamp.models.scope import unobserved
from patchclamp.models.session import Session
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch


class Recorder:
    """Keeps whole-layer values of the places that `sites` need; `values` cuts and derives."""

    def __init__(self, anatomy: Anatomy, sites: Sequence[Site]) -> None:
        self.anatomy, self.sites = anatomy, tuple(sites)
        self.kept: dict[Site, Tensor] = {}

    def session(self) -> Session:
        """A session that records."""
        places: set[Site] = set()
        for site in self.sites:
            if site.kind == "write":
                places |= {Site("z", site.layer), Site("attn", site.layer)}
            else:
                places.add(site.place)
        return Session(self.anatomy, {place: partial(self._keep, place) for place in places})

    def _keep(self, place: Site, value: Tensor) -> Tensor:
        self.kept[place] = value
        return value

    def values(self, batch: Batch) -> dict[Site, Tensor]:
        """The recorded values, by site; a position keeps the one or several columns it names: [row, column, ...]."""
        return {site: self._value(site, batch) for site in self.sites}

    def _value(self, site: Site, batch: Batch) -> Tensor:
        if site.kind == "write":
            layer = self.anatomy.layers[site.layer or 0]
            with unobserved():  # z is as the sessions left it
                write = head_writes(layer, self.kept[Site("z", site.layer)], self.kept[Site("attn", site.layer)])
            value = write if site.index is None else write[:, :, site.index]
        else:
            value = self.kept[site.place]
            if site.index is not None:
                value = value.select(HEAD_AXIS[site.kind], site.index)
        if site.position is None:
            return value
        return _columns(value, site, batch)


def _columns(value: Tensor, site: Site, batch: Batch) -> Tensor:
    assert site.position is not None
    where = batch.columns(site.position).to(value.device)
    counts = where.sum(-1)
    if not bool((counts == counts[0]).all()):
        raise ValueError(f"{site}: the span has between {int(counts.min())} and {int(counts.max())} tokens; record it row by row")
    axis = value.dim() - 2 if site.kind in ("scores", "pattern") else 1
    moved = value.movedim(axis, 1)
    return moved[where].unflatten(0, (len(value), int(counts[0]))).movedim(1, axis)


def head_writes(
    layer: Layer, z: Float[Tensor, "row position head head_width"], attn: Float[Tensor, "row position width"]
) -> Float[Tensor, "row position head width"]:
    """What each head adds to the residual stream; with the output bias they sum to the site attn.write.

    A head's z alone goes through the output projection (whatever wraps it: quantisation, adapters), less the bias. A post-norm
    is linear once its scale is held at what this run has: it acts on each head's share.
    """
    heads = z.shape[2]
    alone = torch.eye(heads, dtype=z.dtype, device=z.device)[:, None, None, :, None] * z
    write = torch.stack([layer.output(part.flatten(-2)) for part in alone], 2) - _bias(layer, z)[:, :, None]
    if layer.attn_post is not None:
        write = write * gain_at(layer.attn_post, attn)[:, :, None]
    return write * layer.scale


def output_bias(
    layer: Layer, z: Float[Tensor, "row position head head_width"], attn: Float[Tensor, "row position width"]
) -> Float[Tensor, "#row #position width"]:
    """What the output projection's bias adds to the residual stream."""
    bias = _bias(layer, z)
    return (bias if layer.attn_post is None else bias * gain_at(layer.attn_post, attn)) * layer.scale


def _bias(layer: Layer, z: Tensor) -> Tensor:
    return layer.output(torch.zeros_like(z[:1, :1].flatten(-2)))


def gain_at(norm: torch.nn.Module, at: Float[Tensor, "row position width"]) -> Float[Tensor, "row position width"]:
    """The factor per coordinate that an RMS norm applies at `at` (0 where a coordinate is 0: it stays 0 whatever the factor)."""
    out = norm(at)
    return torch.where(at == 0, torch.zeros_like(at), out / torch.where(at == 0, torch.ones_like(at), at))
