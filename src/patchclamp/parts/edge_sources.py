"""Sources: what the embedding, heads and MLPs add to the residual stream, and how far that is from their fallbacks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchclamp.edits import Add
from patchclamp.models.anatomy import Anatomy
from patchclamp.models.model import Model
from patchclamp.models.recording import Recorder, gain_at
from patchclamp.models.scope import unobserved
from patchclamp.models.stand_ins import themselves
from patchclamp.parts.fallbacks import Values
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

Difference = Float[Tensor, "source row position width"]


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
        places: `place_of` those sources that are asked for, in forward order.
        memory: bytes that sources' writes may take at once.
    """

    model: Model
    places: tuple[Site, ...]
    memory: int
    matrices: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """Of output projections that something wraps: [input, width], by layer."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """All that a run must keep so that the values at the places are known."""
        return tuple(site for place in self.places for site in self.seen(place))

    def record(self, batch: Batch, added: Float[Tensor, "row position width"] | None = None) -> Values:
        """What a fallback holds: the values at the places when the batch runs, `added` to its embeddings. One forward pass."""
        kept = self.own(batch, added)
        with torch.no_grad():
            return {place: self.value(place, kept) for place in self.places}

    def own(self, batch: Batch, added: Float[Tensor, "row position width"] | None = None) -> Values:
        """The values at all that is `seen`. One forward pass."""
        batch = batch.to(self.model.device)
        recorder, edits = Recorder(self.model.anatomy, self.sites), {} if added is None else {Site("embed"): Add(added)}
        with torch.no_grad(), self.model.editing(edits, batch), recorder.session().open():
            self.model.forward(batch, columns=torch.zeros(1, dtype=torch.long, device=self.model.device))
        return dict(recorder.kept)

    def seen(self, place: Site) -> tuple[Site, ...]:
        """The places of a run from which a place's values are had."""
        return (Site("z", place.layer), Site("attn", place.layer)) if place.kind == "write" else (place,)

    def value(self, place: Site, run: Mapping[Site, Tensor]) -> Tensor:
        """A place's value [row, position, ...] in a run, from what is `seen` of it."""
        if place.kind != "write":
            return run[place]
        z, attn = (run[site] for site in self.seen(place))
        return self._through(place, z) * self._gain(place, attn)[:, :, None]

    def difference(self, place: Site, units: Sequence[int], first: Tensor, second: Tensor) -> Difference:
        """first - second of what sources of a place write.

        Args:
            place: one of `places`.
            units: the heads; one number of no meaning where the place is one source.
            first: the place's values, of which one at least has all rows and positions.
            second: the others; both may broadcast.
        """
        like = second if second.dim() > 1 else first
        apart = first.to(like) - second.to(like)
        if place.kind not in ("z", "write"):
            return apart[None]
        apart = apart[:, :, list(units)]
        if place.kind == "write":
            return apart.permute(2, 0, 1, 3)
        layer, rows = self.model.anatomy.layers[place.layer or 0], apart.shape[:2]
        matrix = self.matrix(place, apart).unflatten(0, (like.shape[2], -1))[list(units)]
        found = torch.bmm(apart.permute(2, 0, 1, 3).flatten(1, 2), matrix).unflatten(1, rows)
        return found if layer.scale == 1 else found * layer.scale

    def mixed(
        self, place: Site, units: Sequence[int], shares: Float[Tensor, "read #row #position unit"], fallback: Tensor,
        run: Mapping[Site, Tensor], origins: Sequence[int], rows: int,
    ) -> Float[Tensor, "read row position width"]:  # fmt: skip
        """sum over sources of a place of share * (fallback - value), each read taking values from a run of its own.

        Args:
            place: one of `places`.
            units: as in `difference`.
            shares: by unit.
            fallback: the place's, broadcastable to one run's values.
            run: what is seen of the place, runs side by side in the rows.
            origins: by read, which run.
            rows: of one run.
        """
        chosen = torch.tensor(list(origins), device=shares.device)
        own, *more = (run[site].unflatten(0, (-1, rows))[chosen] for site in self.seen(place))
        fallback, shares = fallback.to(own), shares.to(own)
        if place.kind not in ("z", "write"):
            return (fallback - own) * shares
        picked, given, layer = list(units), shares[..., None], self.model.anatomy.layers[place.layer or 0]
        matrix = self.matrix(place, own).unflatten(0, (own.shape[3], -1))[picked].flatten(0, 1)
        own = own[:, :, :, picked]
        fallback = fallback if fallback.dim() == 1 else fallback[..., picked, :]
        if place.kind == "z":
            return ((fallback - own) * given).flatten(-2) @ matrix * layer.scale
        gain = self._gain(place, more[0].flatten(0, 1)).unflatten(0, more[0].shape[:2])
        return (fallback * given).sum(-2) - (own * given).flatten(-2) @ matrix * gain

    def pieces(self, units: Sequence[int], tokens: int) -> Iterable[Sequence[int]]:
        """Some of a place's sources, as many at once as memory allows for `tokens` rows x positions."""
        most = max(1, self.memory // (8 * tokens * self.model.width))
        return [units[start : start + most] for start in range(0, len(units), most)]

    def matrix(self, place: Site, like: Tensor) -> Float[Tensor, "inner width"]:
        """The output projection as a matrix: its weights, or what it makes of unit vectors (whatever wraps or transposes it)."""
        number = place.layer
        assert number is not None
        output = self.model.anatomy.layers[number].output
        if "_hf_hook" not in vars(output):
            if type(output) is nn.Linear:
                return output.weight.T
            if type(output).__name__ == "Conv1D":
                return output.weight  # type: ignore[return-value]
        if number in self.matrices and not torch.is_grad_enabled():
            return self.matrices[number]
        sizes = self.model.anatomy.sizes[number]
        inner = sizes.heads * sizes.head_width
        with unobserved(), themselves():
            units = torch.cat([torch.eye(inner, dtype=like.dtype, device=like.device), like.new_zeros(1, inner)])[None]
            out = output(units)[0]
        matrix = out[:-1] - out[-1:]
        if not torch.is_grad_enabled():
            self.matrices[number] = matrix
        return matrix

    def _through(self, place: Site, z: Tensor) -> Float[Tensor, "row position head width"]:
        """Each head's z through the output projection."""
        matrix = self.matrix(place, z).unflatten(0, (z.shape[2], -1))
        return torch.einsum("rphe,hew->rphw", z, matrix)

    def _gain(self, place: Site, attn: Tensor) -> Tensor:
        """What a post-norm multiplies with in a run in which attention gives `attn`, and the block's own multiplier."""
        layer = self.model.anatomy.layers[place.layer or 0]
        assert layer.attn_post is not None
        with unobserved(), themselves():
            return gain_at(layer.attn_post, attn) * layer.scale
