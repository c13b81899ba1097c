"""Sources: what the embedding, heads and MLPs add to the residual stream, and how far that is from their fallbacks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchclamp.models.anatomy import Anatomy
from patchclamp.models.model import Model
from patchclamp.models.recording import Recorder, head_writes
from patchclamp.models.scope import unobserved
from patchclamp.parts.fallbacks import Values
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

Difference = Float[Tensor, "row position source width"]


def place_of(anatomy: Anatomy, source: Site) -> Site:
    """The place whose values say what a source writes: of heads z, behind a post-norm (which is not linear) the writes themselves."""
    if source.kind == "head":
        layer = source.layer
        assert layer is not None
        return Site("z" if anatomy.layers[layer].attn_post is None else "write", layer)
    return Site("mlp.write", source.layer) if source.kind == "mlp" else source


@dataclass(frozen=True, eq=False)
class Sources:
    """What sources write, in runs of one model.

    Args:
        model: the model.
        places: `place_of` those sources that are asked for.
        memory: bytes that heads' writes may take at once.
    """

    model: Model
    places: tuple[Site, ...]
    memory: int
    matrices: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """Of output projections that something wraps: [input, width], by layer."""

    def record(self, batch: Batch) -> Values:
        """What a fallback holds: the values at the places when the batch runs. One forward pass."""
        return self._run(batch, self.places)

    def own(self, batch: Batch) -> Values:
        """What differences are taken from: the values at all that is `seen`. One forward pass."""
        return self._run(batch, tuple(site for place in self.places for site in self.seen(place)))

    def _run(self, batch: Batch, sites: Sequence[Site]) -> Values:
        batch = batch.to(self.model.device)
        recorder = Recorder(self.model.anatomy, sites)
        with torch.no_grad(), recorder.session().open():
            self.model.forward(batch, columns=torch.zeros(1, dtype=torch.long, device=self.model.device))
        return recorder.values(batch)

    def seen(self, place: Site) -> tuple[Site, ...]:
        """The places of a run from which a place's values are had."""
        return (Site("z", place.layer), Site("attn", place.layer)) if place.kind == "write" else (place,)

    def difference(self, place: Site, units: Sequence[int], fallback: Tensor, run: Mapping[Site, Tensor]) -> Difference:
        """fallback - value of what sources of a place write.

        Args:
            place: one of `places`.
            units: the heads; one number of no meaning where the place is one source.
            fallback: the place's, broadcastable to the run's values.
            run: what `seen(place)` holds: [row, position, ...].
        """
        own = run[self.seen(place)[0]]
        fallback = fallback.to(own)
        if place.kind not in ("z", "write"):
            return (fallback - own)[:, :, None]
        number, chosen = place.layer, torch.tensor(units, device=own.device)
        assert number is not None
        layer = self.model.anatomy.layers[number]
        if place.kind == "write":
            with unobserved():
                writes = head_writes(layer, own, run[Site("attn", number)])
            return fallback.expand_as(writes)[:, :, chosen] - writes[:, :, chosen]
        apart = (fallback - own)[:, :, chosen]
        matrix = self._matrix(number, own).unflatten(0, (own.shape[2], -1))[chosen]
        return torch.einsum("rphe,hew->rphw", apart, matrix) * layer.scale

    def pieces(self, units: Sequence[int], tokens: int) -> Iterable[Sequence[int]]:
        """Some of a place's sources, as many at once as memory allows for `tokens` rows x positions."""
        most = max(1, self.memory // (8 * tokens * self.model.width))
        return [units[start : start + most] for start in range(0, len(units), most)]

    def _matrix(self, number: int, like: Tensor) -> Float[Tensor, "inner width"]:
        """The output projection as a matrix: its weights, or what it makes of unit vectors (whatever wraps or transposes it)."""
        output = self.model.anatomy.layers[number].output
        if "_hf_hook" not in vars(output):
            if type(output) is nn.Linear:
                return output.weight.T
            if type(output).__name__ == "Conv1D":
                return output.weight  # type: ignore[return-value]
        if number in self.matrices and not torch.is_grad_enabled():
            return self.matrices[number]
        inner = like.shape[2] * like.shape[3]
        with unobserved():
            units = torch.cat([torch.eye(inner, dtype=like.dtype, device=like.device), like.new_zeros(1, inner)])[None]
            out = output(units)[0]
        matrix = out[:-1] - out[-1:]
        if not torch.is_grad_enabled():
            self.matrices[number] = matrix
        return matrix
