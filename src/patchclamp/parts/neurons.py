"""Neurons: the inputs of MLPs' down projections as gated parts."""

from collections.abc import Sequence

from patchclamp.errors import GateError
from patchclamp.models.model import Model
from patchclamp.parts.gated import Gated, Routing
from patchclamp.sites import Site


def neurons(
    model: Model,
    layers: Sequence[int] | None = None,
    positions: Sequence[int | str] = (),
    memory: int | None = None,
    routing: Routing = "free",
) -> Gated:
    """Single neurons of a model as parts, `L3.mlp.n127`: as `gated(model, ["L*.mlp.n*"])`.

    Slopes of all of them cost what any slopes do: one forward and one backward pass. Exact effects start each at its own block
    (`Gated.measure`); ten thousand cost ten thousand times one (docs/performance.md).

    Args:
        model: the model.
        layers: whose neurons; by default those of every MLP that has any of its own (experts keep theirs inside a fused kernel).
        positions: a part per position or named span (`L3.mlp.n127@S2`) instead of one for all positions.
        memory: bytes that one folded pass may take, by default a share of what is free (`models.memory`).
        routing: of a mixture of experts: "free", or "frozen" to what it is in the model's own run of the same prompts.

    Raises:
        SiteError: a layer that the model has not, or whose MLP has no neurons that can be reached.
        GateError: no layer has any.
    """
    anatomy = model.anatomy
    for layer in layers or ():
        anatomy.require(Site("neuron", layer))
    chosen = [layer for layer in range(model.layers) if not anatomy.why_not(Site("neuron", layer))] if layers is None else layers
    plain = [
        Site("neuron", layer, number) for layer in sorted(set(chosen)) for number in range(anatomy.sizes[layer].neurons or 0)
    ]
    if not plain:
        raise GateError(f"{model.name} ({model.family.name}) has no neurons that can be reached: take its experts, or nodes")
    return Gated(model, [site.at(one) for site in plain for one in positions] if positions else plain, memory, routing)
