"""The gradient engine: the metric's slope in every gate, from backward passes in which gates alone require gradients.

A gate's slope is <value - fallback, d metric / d value'> at its place, so a pass keeps the places' values and what the model's own
operations need; weights never require gradients. A gate at 1 passes its value as it is: nothing is mixed in the forward pass.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.edits import Mix
from patchclamp.metrics import Metric
from patchclamp.models.checkpointing import Room, checkpointed, ran_out
from patchclamp.models.editing import Seen
from patchclamp.models.held import HOLDER, Undo
from patchclamp.models.model import Model
from patchclamp.models.replay import reference, trimmed, why_plain
from patchclamp.models.scope import still
from patchclamp.models.session import Session
from patchclamp.models.standing import Start, why_whole_vocabulary
from patchclamp.models.tree import grow
from patchclamp.parts.fallbacks import Fallback
from patchclamp.parts.limits import Limits, limits_of
from patchclamp.parts.pieces import pieces
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch

if TYPE_CHECKING:
    from patchclamp.parts.gated import Gated


def slopes(
    parts: "Gated", batch: Batch, gates: Float[Tensor, "setting #example #position part"], fallback: Fallback, metric: Metric
) -> tuple[Float[Tensor, "setting example"], Float[Tensor, "setting example *position part"]]:
    """What `Gated.gradient` gives.

    As many settings run side by side as `parts.memory` allows, by what a pass before them kept. Where one setting alone needs
    more, blocks are computed again in the backward pass (`models.checkpointing`). Where memory runs out all the same: half as
    many settings at once; then every block is computed again; then half as many prompts at once; a warning each time.
    """
    batch = batch.to(parts.model.device)
    limits = limits_of(parts)
    with frozen(parts.model), torch.no_grad():
        found = _in_pieces(parts, batch, gates, fallback, metric, limits)
    return torch.cat([value for value, _ in found]), torch.cat([slope for _, slope in found])


def _in_pieces(
    parts: "Gated", batch: Batch, gates: Tensor, fallback: Fallback, metric: Metric, limits: Limits
) -> list[tuple[Tensor, Tensor]]:
    """Values and slopes of some settings after others."""
    if limits.examples is not None and limits.examples < len(batch):
        return [_by_examples(parts, batch, gates, fallback, metric, limits)]
    start, asked = _behind(parts, batch, gates, fallback, metric)
    plain = start.logits if metric.reference else None
    if metric.reference and plain is None:
        plain = parts.model.target_logits(batch, parts.base())[0]
    found: list[tuple[Tensor, Tensor]] = []
    rows, columns = len(batch.tokens), batch.tokens.shape[1] - start.column
    while (done := sum(len(value) for value, _ in found)) < len(gates):
        some = gates[done : done + limits.together(parts.memory, rows, columns)]
        room = Room(parts.memory, limits.every)
        try:
            found.append(_pass(parts, batch, asked, some, fallback, metric, plain, start, room))
            limits.saw(room, len(some) * rows, columns)
            continue
        except RuntimeError as error:
            if not ran_out(error) or not limits.tighten(len(some), len(batch)):
                raise
        if parts.model.device.type == "cuda":  # behind the except clause, which holds what the failed pass made
            torch.cuda.empty_cache()
        if limits.examples is not None:
            return [*found, _by_examples(parts, batch, gates[done:], fallback, metric, limits)]
    return found


def _by_examples(
    parts: "Gated", batch: Batch, gates: Tensor, fallback: Fallback, metric: Metric, limits: Limits
) -> tuple[Tensor, Tensor]:
    """Values and slopes of every setting, some prompts after others."""
    assert limits.examples is not None
    values: list[Tensor] = []
    found: list[Tensor] = []
    for of, some, mine in pieces(parts, batch, gates, limits.examples):
        made = _in_pieces(of, some, mine, fallback, metric, limits)
        values.append(torch.cat([value for value, _ in made]))
        found.append(torch.cat([slope for _, slope in made]))
    return torch.cat(values, 1), torch.cat(found, 1)


def _behind(parts: "Gated", batch: Batch, gates: Tensor, fallback: Fallback, metric: Metric) -> tuple[Start, Batch]:
    """Where the passes start, and the batch, its tokens numbered as in the logits.

    They start at the first block and column at which any gate can make a difference, where the model's own run, which that
    takes, costs less than it spares; in the last block, they compute the targets' columns alone.
    """
    model, width, routed, normed = parts.model, batch.tokens.shape[1], parts.routing == "frozen", parts.norm == "frozen"
    frozen = routed or normed
    if parts.added is not None or why_plain(model):
        with model.editing(parts.base(), batch):
            plain = partial(reference, model, batch, inputs=False, prefix=False, routed=routed, normed=normed)
            return plain() if frozen else Start(), batch
    columns = [0 if (at := site.position) is None else _first(batch, at) for site in parts.labels]
    column = min(max(fallback.since(batch), min(columns)), int(batch.target_position.min()))
    if 4 * column < width or not model.anatomy.causal:
        column = 0  # keys and values of few columns cost more than they spare; where attention looks both ways, none are final
    first = _first_block(parts)
    behind = 1 - first / model.layers
    spares = len(gates) * (1 + behind - 2 * behind * (1 - column / width)) > 1.1  # forward passes, of which a reference takes one
    start = Start()
    if spares or frozen:
        column = column if spares else 0
        start = reference(model, batch, spares and first > 0, column > 0, routed=routed, normed=normed).behind(column)
    if not any(site.kind in ("neuron", "router", "expert") for site in parts.labels):
        start = trimmed(model, start, batch.target_position.unique() - start.column)
    if metric.answers_alone(batch) and Site("logits") not in parts.by_place and not why_whole_vocabulary(model.anatomy):
        tokens, asked = batch.numbered()
        return replace(start, tokens=tokens), asked
    return start, batch


def _first_block(parts: "Gated") -> int:
    """The first block in which, or at whose input, a gate acts."""
    place = parts.places[0]
    return place.layer if place.layer is not None else 0 if place.kind == "embed" else parts.model.layers - 1


def _side_by_side(start: Start, settings: int, first: int, layers: int) -> Start:
    """The same start, of so many settings that all begin at one block, if what they begin from is known."""
    if not start.inputs:
        return start
    patterns = [(0,) * (2 * first) + (setting + 1,) * (2 * (layers - first) + 1) for setting in range(settings)]
    return replace(start, tree=grow(patterns, [first] * settings))


def _first(batch: Batch, position: int | str) -> int:
    """The first column that a position covers in any row."""
    covered = batch.columns(position).any(0)
    return int(covered.int().argmax()) if bool(covered.any()) else batch.tokens.shape[1]


def _pass(
    parts: "Gated", batch: Batch, asked: Batch, gates: Tensor, fallback: Fallback, metric: Metric, plain: Tensor | None,
    start: Start, room: Room,
) -> tuple[Float[Tensor, "setting example"], Float[Tensor, "setting example *position part"]]:  # fmt: skip
    """One forward and one backward pass of settings side by side."""
    model, settings = parts.model, len(gates)
    start = _side_by_side(start, settings, _first_block(parts), model.layers)
    opened = (gates == 1).flatten(0, 2).all(0).tolist()
    with torch.enable_grad(), model.editing(parts.base(), batch, settings=settings):
        leaf = gates.detach().expand(-1, len(batch), -1, -1).clone().requires_grad_()
        visits = {
            place: _Gauge(edit, place, all(opened[number] for number in parts.by_place[place]), settings)
            for place, edit in parts.compiled(leaf, fallback, batch, start).items()
            if isinstance(edit, Mix)
        }
        # all of it is open until the backward pass has ended, which computes some blocks again
        with still(model.hf), start.standing(model.anatomy), Session(model.anatomy, visits).open():
            logits = model.target_logits(batch, None, settings, checkpointed(start, room))
            value = metric(logits, asked, plain)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope.squeeze(2) if slope.shape[2] == 1 else slope


@dataclass(frozen=True, eq=False)
class _Gauge:
    """Visits a place: mixes as `mix` does, or passes the value as it is where every gate is `opened`; slopes go to the gate."""

    mix: Mix
    place: Site
    opened: bool
    settings: int

    def __call__(self, value: Tensor) -> Tensor:
        if self.place.kind == "scores":  # what is masked has no difference to anything
            nothing = torch.empty(0, 0, device=value.device)
            return self.mix(value, Seen(self.place, MappingProxyType({}), nothing.bool(), nothing.long(), settings=self.settings))
        split = value.unflatten(0, (self.settings, -1))
        gate = self.mix.gate.to(value.device).unflatten(0, (self.settings, -1))
        return _Mixture.apply(split, gate, self.mix.fallback.to(value), self.opened).flatten(0, 1)  # type: ignore[no-untyped-call]


class _Mixture(torch.autograd.Function):
    """lerp(fallback, value, gate), which keeps the value and nothing else, and sums the gate's slope in float32 or wider."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: Tensor, fallback: Tensor, opened: bool) -> Tensor:
        ctx.save_for_backward(value, gate)
        ctx.fallback, ctx.opened = fallback, opened
        return value.view_as(value) if opened else torch.lerp(fallback, value, gate.to(value.dtype))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (slope,) = slopes
        value, gate = ctx.saved_tensors
        into_gate = None
        if ctx.needs_input_grad[1]:
            each = slope * (value - ctx.fallback)
            over = [axis for axis, size in enumerate(gate.shape) if size < each.shape[axis]]
            wide = torch.promote_types(each.dtype, torch.float32)
            into_gate = (each.sum(over, keepdim=True, dtype=wide) if over else each).to(gate.dtype)
        if not ctx.needs_input_grad[0]:
            return None, into_gate, None, None
        return slope if ctx.opened else slope * gate.to(slope.dtype), into_gate, None, None


@contextmanager
def frozen(model: Model) -> Generator[None]:
    """No weight requires a gradient while this is open, in any thread; what did before does again after it."""
    with HOLDER.hold(("frozen", id(model.hf)), partial(_freeze, model)):
        yield


def _freeze(model: Model) -> Undo:
    wanted = [weight for weight in model.hf.parameters() if weight.requires_grad]
    for weight in wanted:
        weight.requires_grad_(False)
    return partial(_thaw, wanted)


def _thaw(weights: Sequence[torch.nn.Parameter]) -> None:
    for weight in weights:
        weight.requires_grad_(True)
