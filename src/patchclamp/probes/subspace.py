"""Subspaces of what a site holds: exchanging them between prompts, and which part of them is read by what comes next."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError, SiteError
from patchclamp.models.editing import Seen
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch


@dataclass(frozen=True, eq=False)
class Swap:
    """Interchange on a subspace: value' = value + B' B (other - value), with B's rows orthonormal.

    Args:
        basis: [rank, width], orthonormal rows; gradients flow to it.
        other: another prompt's value there, [row, position, width].
    """

    basis: Float[Tensor, "rank width"]
    other: Float[Tensor, "row position width"]

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        basis, other = self.basis.to(value), self.other.to(value)
        if value.shape[-1] != basis.shape[-1] or len(value) % len(other):
            raise GateError(f"a subspace of width {basis.shape[-1]} was put at {seen.site}, whose value is {tuple(value.shape)}")
        apart = other.repeat(len(value) // len(other), 1, 1) - value
        return value + apart @ basis.T @ basis


def orthonormal(vectors: Float[Tensor, "rank width"]) -> Float[Tensor, "rank width"]:
    """Orthonormal rows that span the same space; raises `GateError` where they span less."""
    if vectors.dim() != 2 or len(vectors) > vectors.shape[1]:
        raise GateError(f"a subspace is spanned by [rank, width] with rank at most width, not by {tuple(vectors.shape)}")
    found, upper = torch.linalg.qr(vectors.T)
    rounding = 16 * torch.finfo(vectors.dtype).eps * vectors.detach().norm(dim=1).max()
    if bool((upper.detach().diagonal().abs() < rounding).any()):
        raise GateError(f"the {len(vectors)} vectors span less than {len(vectors)} dimensions: leave out those that add none")
    return (found * upper.diagonal().sign()).T


def values_at(model: Model, batch: Batch, site: Site) -> Float[Tensor, "row position width"]:
    """What a site holds at every position; raises `SiteError` where it is no vector per position."""
    plain = site.at(None)
    value = model.record(batch, plain)[plain]
    if value.dim() != 3 or site.kind in ("scores", "pattern"):
        raise SiteError(f"{site} holds {tuple(value.shape)}: a subspace is of a vector per position, such as L3.mlp.n or L3.h1.z")
    return value


def reader_of(model: Model, site: Site) -> Float[Tensor, "out width"]:
    """The linear map that reads a site next: of neurons the down projection, of a head's z its slice of the output projection.

    Raises:
        SiteError: what reads there is no single linear map (the residual stream): give one.
    """
    if site.layer is not None and site.kind in ("neuron", "z", "head"):
        layer, sizes = model.anatomy.layers[site.layer], model.anatomy.sizes[site.layer]
        module = layer.down if site.kind == "neuron" else layer.output
        if module is not None and (site.kind == "neuron" or site.index is not None):
            inner = (sizes.neurons or 0) if site.kind == "neuron" else sizes.heads * sizes.head_width
            like = next(module.parameters())
            units = torch.cat([torch.eye(inner, dtype=like.dtype, device=like.device), like.new_zeros(1, inner)])[None]
            with torch.no_grad():
                out = module(units)[0]
            matrix = (out[:-1] - out[-1:]).T
            if site.kind == "neuron":
                return matrix
            assert site.index is not None
            return matrix[:, site.index * sizes.head_width : (site.index + 1) * sizes.head_width]
    raise SiteError(
        f"no single linear map reads {site}: name neurons (L3.mlp.n) or a head's z (L3.h1.z), or give the map, reader="
    )


def split(
    direction: Float[Tensor, " width"], reader: Float[Tensor, "out width"], tolerance: float = 1e-5
) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"]]:
    """A direction's part in the row space of what reads it, and its part in the null space; they add up to it.

    Singular values below `tolerance` of the largest count as zero.
    """
    _, values, rows = torch.linalg.svd(reader.double(), full_matrices=False)
    rows = rows[values > tolerance * values.max()]
    inside = (rows.T @ (rows @ direction.double())).to(direction)
    return inside, direction - inside
