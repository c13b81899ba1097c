"""Nodes: attention heads and MLPs as gated parts.

A head's gate sits on z (the input of the output projection), an MLP's on what it adds to the residual stream, and the
embedding's on the input of the first block.
"""

from collections.abc import Sequence

from patchclamp.models.model import Model
from patchclamp.parts.gated import Gated, Routing
from patchclamp.sites import Site


def nodes(
    model: Model,
    positions: Sequence[int | str] = (),
    heads: bool = True,
    mlps: bool = True,
    memory: int | None = None,
    routing: Routing = "free",
) -> "Nodes":
    """Heads and MLPs of a model as parts.

    Args:
        model: the model.
        positions: a part per position or named span (`L9.h6@S2`) instead of one for all positions.
        heads: whether heads are parts.
        mlps: whether MLPs are parts.
        memory: bytes that one folded pass may take, by default a share of what is free (`models.memory`); more settings than fit
            run one after the other.
        routing: of a mixture of experts: "free", or "frozen" to what it is in the model's own run of the same prompts.
    """
    return Nodes(model, tuple(positions), heads, mlps, memory, routing)


class Nodes(Gated):
    """`Parts` for heads and MLPs, the embedding first; make with `nodes`."""

    def __init__(
        self,
        model: Model,
        positions: tuple[int | str, ...] = (),
        heads: bool = True,
        mlps: bool = True,
        memory: int | None = None,
        routing: Routing = "free",
    ):
        plain: list[Site] = []
        for layer, sizes in enumerate(model.anatomy.sizes):
            plain += [Site("head", layer, head) for head in range(sizes.heads)] if heads else []
            plain += [Site("mlp", layer)] if mlps else []
        each = [site.at(position) for site in plain for position in positions] if positions else plain
        super().__init__(model, (Site("embed"), *each), memory, routing)
        self.positions = positions

    def __repr__(self) -> str:
        return f"Nodes({self.model.name!r}: {len(self.counted)} heads and MLPs)"
