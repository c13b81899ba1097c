"""Nodes: attention heads and MLPs as gated parts.

A head's gate sits on z (the input of the output projection), an MLP's on what it adds to the residual stream, and the
embedding's on the input of the first block.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchclamp.edits import Mix
from patchclamp.errors import GateError
from patchclamp.metrics import Metric, metric_named
from patchclamp.models.editing import Edits
from patchclamp.models.model import Model
from patchclamp.models.recording import Recorder
from patchclamp.models.replay import reference, why_plain
from patchclamp.models.standing import Start
from patchclamp.parts.fallbacks import FALLBACKS, Fallback, Resample, Values, Zero, expand_to_rows, learn_mean
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

MEMORY = 1 << 30
"""Bytes that the activations of one folded pass may take."""


def nodes(
    model: Model, positions: Sequence[int | str] = (), heads: bool = True, mlps: bool = True, memory: int = MEMORY
) -> "Nodes":
    """Heads and MLPs of a model as parts.

    Args:
        model: the model.
        positions: a part per position or named span (`L9.h6@S2`) instead of one for all positions.
        heads: whether heads are parts.
        mlps: whether MLPs are parts.
        memory: bytes that one folded pass may take; more settings than fit run one after the other.
    """
    return Nodes(model, tuple(positions), heads, mlps, memory)


class Nodes:
    """`Parts` for heads and MLPs; make with `nodes`."""

    def __init__(
        self, model: Model, positions: tuple[int | str, ...] = (), heads: bool = True, mlps: bool = True, memory: int = MEMORY
    ):
        self.model, self.positions, self.memory = model, positions, memory
        plain = [Site("embed")]
        for layer, sizes in enumerate(model.anatomy.sizes):
            plain += [Site("head", layer, head) for head in range(sizes.heads)] if heads else []
            plain += [Site("mlp", layer)] if mlps else []
        self.plain = tuple(plain)
        each = [site.at(position) for site in plain[1:] for position in positions] if positions else plain[1:]
        self.labels: tuple[Site, ...] = (plain[0], *each)
        """The embedding, then heads and MLP of each layer (each at every position asked for)."""
        self.counted: tuple[int, ...] = tuple(range(1, len(self.labels)))
        """All but the embedding."""

    @cached_property
    def index(self) -> dict[Site, int]:
        """Where each label's gate is."""
        return {site: number for number, site in enumerate(self.labels)}

    def __repr__(self) -> str:
        return f"Nodes({self.model.name!r}: {len(self.counted)} heads and MLPs)"

    def on(self, model: Model) -> "Nodes":
        """The same parts of another model of the same anatomy."""
        other = copy(self)
        other.model = model
        return other

    def open(self, settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates of 1."""
        return torch.ones(settings, 1, 1, len(self.labels), device=self.model.device)

    def closed(self, settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates of 0, the embedding open."""
        gates = torch.zeros(settings, 1, 1, len(self.labels), device=self.model.device)
        gates[..., 0] = 1
        return gates

    def only(self, sites: Sequence[Site], settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates open for `sites` (and the embedding), closed for the rest: a circuit."""
        gates = self.closed(settings)
        for site in sites:
            gates[..., self._find(site)] = 1
        return gates

    def without(self, sites: Sequence[Site], settings: int = 1) -> Float[Tensor, "setting 1 1 part"]:
        """Gates closed for `sites`, open for the rest."""
        gates = self.open(settings)
        for site in sites:
            gates[..., self._find(site)] = 0
        return gates

    def _check(self, gates: Tensor, batch: Batch | None) -> None:
        if gates.dim() != 4 or gates.shape[-1] != len(self.labels):
            raise GateError(
                f"gates are [setting, example, position, part] with {len(self.labels)} parts, not {tuple(gates.shape)}"
            )
        if batch is not None and gates.shape[1] not in (1, len(batch)):
            raise GateError(f"gates for {gates.shape[1]} examples were given, and the batch has {len(batch)}")
        if batch is not None and gates.shape[2] not in (1, batch.tokens.shape[1]):
            raise GateError(f"gates for {gates.shape[2]} columns were given, and the batch has {batch.tokens.shape[1]}")

    def _find(self, site: Site) -> int:
        if site not in self.index:
            raise GateError(f"{site} is not among the {len(self.labels)} parts ({self.labels[1]}, ... {self.labels[-1]})")
        return self.index[site]

    @cached_property
    def places(self) -> tuple[Site, ...]:
        """Whole-layer sites on which the gates act, in forward order."""
        found = {Site("embed")}
        for site in self.plain[1:]:
            found.add(Site("z", site.layer) if site.kind == "head" else Site("mlp.write", site.layer))
        return tuple(sorted(found))

    def record(self, batch: Batch) -> Values:
        """What the places hold when the batch runs."""
        batch = batch.to(self.model.device)
        recorder = Recorder(self.model.anatomy, self.places)
        with torch.no_grad(), recorder.session().open():
            self.model.forward(batch, columns=torch.zeros(1, dtype=torch.long, device=self.model.device))
        return dict(recorder.kept)

    def fallback(self, kind: str, fit: Examples | None = None) -> Fallback:
        """The rule called `kind`: resample, mean (learned on `fit`), zero.

        Raises:
            GateError: no such rule, or mean without a fit set.
        """
        if kind == "zero":
            return Zero(self.places, self.model.device)
        if kind == "resample":
            return Resample(self.record)
        if kind.partition(":")[0] == "mean":
            if fit is None or len(fit) == 0:
                raise GateError("the fallback 'mean' is learned: give the fit set, fit=")
            return learn_mean(self.record, fit, by=kind.partition(":")[2] or None)
        raise GateError(f"there is no fallback {kind!r}: choose from {', '.join(FALLBACKS)} (mean:position, mean:span, mean:all)")

    def edits(
        self, gates: Float[Tensor, "setting #example #position part"], fallback: Fallback, batch: Batch | None = None
    ) -> Edits:
        """Gates as one `Mix` per place; places whose gates are all 1 get none (unless the gates want gradients).

        Raises:
            GateError: shapes that do not fit, or a fallback that has no value without a batch.
        """
        return self._edits(gates, fallback, batch, 0)

    def _edits(
        self, gates: Float[Tensor, "setting #example #position part"], fallback: Fallback, batch: Batch | None, column: int
    ) -> Edits:
        """`edits` for runs that start at `column`."""
        self._check(gates, batch)
        if batch is None and (gates.shape[1] > 1 or self.positions):
            raise GateError("gates per example or position need the batch")
        rows = gates if batch is None else expand_to_rows(gates, batch)
        wanted = {place: self._columns_of(place) for place in self.places}
        moved = {
            place: columns for place, columns in wanted.items() if gates.requires_grad or bool((gates[..., columns] != 1).any())
        }
        if not moved:
            return {}
        values = fallback.at(batch)
        return {place: self._mix(place, rows[..., columns], values[place], batch, column) for place, columns in moved.items()}

    def _columns_of(self, place: Site) -> list[int]:
        if place.kind == "embed":
            return [0]
        kind = "head" if place.kind == "z" else "mlp"
        return [number for number, site in enumerate(self.labels) if site.kind == kind and site.layer == place.layer]

    def _mix(
        self,
        place: Site,
        gates: Float[Tensor, "setting row #position gate"],
        value: Tensor,
        batch: Batch | None,
        column: int,
    ) -> Mix:
        if self.positions and place.kind != "embed":
            gates = self._spread(gates, batch)
        gate = (gates[:, :, column:] if gates.shape[2] > 1 else gates).flatten(0, 1)
        value = value[:, column:] if value.dim() > 1 and value.shape[1] > 1 else value
        return Mix(gate[..., None] if place.kind == "z" else gate, value)

    def _spread(
        self, gates: Float[Tensor, "setting row #position gate"], batch: Batch | None
    ) -> Float[Tensor, "setting row position unit"]:
        """Gates of parts at positions as gates at every column: 1 where no part stands."""
        assert batch is not None  # edits() has checked
        split = gates.unflatten(-1, (-1, len(self.positions)))
        spread = torch.ones(*gates.shape[:2], batch.tokens.shape[1], split.shape[-2], device=gates.device, dtype=gates.dtype)
        for number, position in enumerate(self.positions):
            where = batch.columns(position).to(gates.device)[None, :, :, None]
            spread = spread * torch.where(where, split[..., number], torch.ones_like(spread))
        return spread

    def measure(
        self,
        batch: Batch,
        gates: Float[Tensor, "setting #example #position part"],
        fallback: Fallback,
        metric: Metric | None = None,
    ) -> Float[Tensor, "setting example"]:
        """The metric for each setting and example, in float32 or wider, without gradient.

        Settings are folded into the rows, as many as `memory` allows at once. Each starts at the first block and column at
        which it differs from the model itself (`models.replay`).

        Cost: per setting, one forward pass over the batch from there on; one pass for the model itself; what the fallback
        costs (once per batch).
        """
        batch, metric = batch.to(self.model.device), metric or metric_named(batch.metric)
        self._check(gates, batch)
        with torch.no_grad():
            first, out = self._first_layers(gates), dict[int, Tensor]()
            opened = (first == self.model.layers).nonzero()[:, 0].tolist()
            itself = self.model.target_logits(batch) if metric.reference or opened else None
            plain = itself[0] if metric.reference and itself is not None else None
            if itself is not None:
                out = dict.fromkeys(opened, metric(itself, batch, plain)[0])
            begins = sorted(set(first.tolist()) - {self.model.layers})
            start = self._start(batch, fallback, gates, layers=len(gates) > 1 and max(begins, default=0) > 0)
            for layer in begins if start.inputs else begins[:1]:
                where = (first == layer if start.inputs else first < self.model.layers).nonzero()[:, 0]
                for numbers in where.split(self.fold(batch)):
                    some = gates[numbers]
                    edits = self._edits(some, fallback, batch, start.column)
                    logits = self.model.target_logits(batch, edits, len(some), start.at(layer if start.inputs else 0))
                    out |= zip(numbers.tolist(), metric(logits, batch, plain), strict=True)
        return torch.stack([out[number] for number in range(len(gates))])

    def _first_layers(self, gates: Float[Tensor, "setting #example #position part"]) -> Int[Tensor, " setting"]:
        """The first block at which each setting's gates are not all open; the number of blocks where all are."""
        layers = torch.tensor([0 if site.layer is None else site.layer for site in self.labels], device=gates.device)
        closed = (gates != 1).flatten(1, 2).any(1)
        return torch.where(closed, layers, self.model.layers).amin(1).cpu()

    def _start(
        self,
        batch: Batch,
        fallback: Fallback,
        gates: Float[Tensor, "setting #example #position part"] | None = None,
        layers: bool = False,
    ) -> Start:
        """Where runs of these gates (None: of any) may start at the earliest, and what the model's own run holds there."""
        column, last = fallback.since(batch), int(batch.target_position.min())
        if self.positions and gates is not None and bool((gates[..., 0] == 1).all()):
            columns = torch.stack([batch.columns(position).any(0) for position in self.positions]).any(0)
            column = max(column, int(columns.int().argmax()))
        column = min(column, last)
        if 4 * column < batch.tokens.shape[1]:
            column = 0  # keys and values of so few columns cost more than they spare
        if not (column or layers) or why_plain(self.model):
            return Start()
        return reference(self.model, batch, column, layers)

    def gradient(
        self,
        batch: Batch,
        gates: Float[Tensor, "setting #example #position part"],
        fallback: Fallback,
        metric: Metric | None = None,
    ) -> tuple[Float[Tensor, "setting example"], Float[Tensor, "setting example *position part"]]:
        """The metric and its slope in every gate, per example.

        Returns:
            values [setting, example] and slopes [setting, example, part]; where gates differ by position, slopes have that axis
            too. Gates that are shared over examples or positions get each example's own slope, summed over positions.

        Cost: one forward and one backward pass over the batch per setting, from the first column at which the fallback differs
        from the model itself. Only gates require gradients: weights never do.
        """
        batch, metric = batch.to(self.model.device), metric or metric_named(batch.metric)
        values: list[Tensor] = []
        slopes: list[Tensor] = []
        with frozen(self.model), torch.no_grad():
            plain = self.model.target_logits(batch)[0] if metric.reference else None
            start = self._start(batch, fallback)
            for some in gates.split(self.fold(batch, backward=True)):
                with torch.enable_grad():
                    leaf = some.detach().expand(-1, len(batch), -1, -1).clone().requires_grad_()
                    edits = self._edits(leaf, fallback, batch, start.column)
                    logits = self.model.target_logits(batch, edits, len(some), start)
                    value = metric(logits, batch, plain)
                    (slope,) = torch.autograd.grad(value.sum(), leaf)
                values.append(value.detach())
                slopes.append(slope.squeeze(2) if slope.shape[2] == 1 else slope)
        return torch.cat(values), torch.cat(slopes)

    def fold(self, batch: Batch, backward: bool = False) -> int:
        """How many settings run at once: as many as `memory` allows."""
        anatomy, width = self.model.anatomy, self.model.width
        rows, length = batch.tokens.shape
        size = max(size.heads * size.head_width for size in anatomy.sizes)
        neurons = max((size.neurons or 4 * width) for size in anatomy.sizes)
        heads = max(size.heads for size in anatomy.sizes)
        per_layer = 8 * width + 4 * size + 3 * neurons + 3 * heads * length
        per_token = per_layer * (len(anatomy.sizes) if backward else 2)
        vocabulary = int(anatomy.config.vocab_size) * len(batch.target_row) * 3
        return max(1, self.memory // (4 * (rows * length * per_token + vocabulary)))


@contextmanager
def frozen(model: Model) -> Generator[None]:
    """No weight requires a gradient while this is open; what did before does again after it."""
    wanted = [parameter for parameter in model.hf.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
