"""Reading: what queries, keys, values and MLPs make of a residual stream that is not the run's own.

A block is called once more, on the other stream, with everything else it was called with, and left as soon as what was wanted
is known. So its own norms, projections, rotary embeddings and experts do the work, in every family.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.models.anatomy import Anatomy
from patchclamp.models.editing import Edit, Edits, Seen
from patchclamp.models.scope import unobserved
from patchclamp.models.session import CALL, Call, Session
from patchclamp.models.standing import STANDING
from patchclamp.sites import Site

SLOTS = ("q", "k", "v")
Streams = Float[Tensor, "read row position width"]


class _Read(Exception):
    """What was wanted is known: the rest of the block need not run."""


def reads_at(anatomy: Anatomy, destination: Site) -> Site:
    """Where the residual stream is that a destination reads."""
    if destination.kind == "logits":
        return Site("resid.post", len(anatomy.layers) - 1)
    if destination.kind == "mlp" and not anatomy.parallel:
        return Site("resid.mid", destination.layer)
    return Site("resid.pre", destination.layer)


def attention_reads(
    anatomy: Anatomy, layer: int, call: Call, copies: int, streams: Streams
) -> dict[str, Float[Tensor, "read row position head head_width"]]:
    """Queries, keys and values (after norms and rotary embedding) of a layer that reads each of `streams`.

    Args:
        anatomy: the model's.
        layer: which.
        call: what its block was called with in the run.
        copies: how many times the batch's rows stand side by side in that call.
        streams: in place of the block's own input.
    """
    found: dict[str, Tensor] = {}

    def keep(slot: str, value: Tensor) -> Tensor:
        found[slot] = value
        if len(found) == len(SLOTS):
            raise _Read
        return value

    session = Session(anatomy, {Site(slot, layer): partial(keep, slot) for slot in SLOTS})
    with unobserved(), session.open():
        _again(anatomy, layer, call, copies, streams)
    return {slot: found[slot].unflatten(0, streams.shape[:2]) for slot in SLOTS}


def mlp_reads(anatomy: Anatomy, layer: int, call: Call, copies: int, streams: Streams) -> Streams:
    """What a layer's MLP module returns that reads each of `streams`.

    Attention writes nothing in this call, so that the MLP's norm reads the stream itself.
    """
    found: list[Tensor] = []
    here = anatomy.layers[layer]

    def keep(value: Tensor) -> Tensor:
        found.append(value)
        raise _Read

    session = Session(anatomy, {})
    with unobserved(), session.open():
        session.after(here.attn_post or here.attn, torch.zeros_like)
        session.after(here.mlp, keep)
        _again(anatomy, layer, call, copies, streams)
    return found[0].reshape(streams.shape)


def _again(anatomy: Anatomy, layer: int, call: Call, copies: int, streams: Streams) -> None:
    """Call a block on other streams, side by side; what it was called with is repeated for each."""
    reads, rows = streams.shape[:2]
    args, kwargs = (_repeated(given, rows, copies, reads) for given in call)
    stream = streams.flatten(0, 1)
    token = STANDING.set(MappingProxyType({}))  # the block itself runs, whatever stands in for it in the run
    try:
        with suppress(_Read):
            if args:
                anatomy.layers[layer].block(stream, *args[1:], **kwargs)
            else:
                anatomy.layers[layer].block(**kwargs | {"hidden_states": stream})
        # a block that comes to its end has been read, too: whoever asked finds nothing and fails
    finally:
        STANDING.reset(token)


def detached(given: Any) -> Any:
    """What a block was called with, without what autograd knows of it."""
    if isinstance(given, dict):
        return {name: detached(one) for name, one in given.items()}
    if isinstance(given, tuple | list):
        return type(given)(map(detached, given))
    return given.detach() if isinstance(given, Tensor) else given


def _repeated(given: Any, rows: int, copies: int, reads: int) -> Any:
    """Whatever has all rows (a mask, rotary embeddings, position ids, a bias by row and head), with one copy of them per read."""
    if isinstance(given, dict):
        return {name: _repeated(one, rows, copies, reads) for name, one in given.items() if name != "hidden_states"}
    if isinstance(given, tuple | list):
        return type(given)(_repeated(one, rows, copies, reads) for one in given)
    total = rows * copies
    if not isinstance(given, Tensor) or given.dim() < 2 or len(given) < total or len(given) % total:
        return given
    own = given[: rows * (len(given) // total)]
    return own.repeat(reads, *[1] * (own.dim() - 1))


@dataclass(frozen=True)
class User:
    """A destination that reads, in one of the runs at its place, one of the place's streams."""

    destination: Site
    run: int
    read: int


@runtime_checkable
class Changed(Protocol):
    """What destinations of some runs read in place of the run's own residual stream, at one place."""

    @property
    def users(self) -> Sequence[User]:
        """Who reads which stream."""
        ...

    @property
    def reads(self) -> tuple[Site, ...]:
        """Earlier places whose values the streams are made of."""
        ...

    def streams(self, own: Float[Tensor, "run row position width"], seen: Seen) -> Streams:
        """The streams, given the own ones of the runs at the place."""
        ...


@dataclass(frozen=True, eq=False)
class Desk:
    """What the edits of one pass leave for those behind them."""

    anatomy: Anatomy
    rows: int
    """Rows of the batch: those of a pass are as many for each setting."""
    memory: int
    """Bytes that reading may take at once."""
    calls: dict[int, Call] = field(default_factory=dict[int, Call])
    found: dict[Site, Tensor] = field(default_factory=dict[Site, Tensor])
    """By place that is put in (q, k, v, mlp): [read, row, position, ...]."""


def reading(desk: Desk, changed: Mapping[Site, Changed]) -> Edits:
    """The edits of a pass in which destinations read what `changed` says, by the place of the stream that they read."""
    edits: dict[Site, list[Edit]] = {}
    for place, one in changed.items():
        layer = place.layer
        assert layer is not None
        behind = [user for user in one.users if user.destination.kind == "logits"]
        if behind:
            edits.setdefault(place, []).append(_Behind(desk, one, behind))
            continue
        edits.setdefault(Site("resid.pre", layer), []).insert(0, _Called(desk, layer))
        attention = [user for user in one.users if user.destination.kind in SLOTS]
        mlp = [user for user in one.users if user.destination.kind == "mlp"]
        edits.setdefault(place, []).append(_Reads(desk, layer, one, bool(attention), bool(mlp)))
        for slot in sorted({user.destination.kind for user in attention}):
            users = [user for user in attention if user.destination.kind == slot]
            edits[Site(slot, layer)] = [_Put(desk, Site(slot, layer), users)]
        if mlp:
            edits[Site("mlp", layer)] = [_Put(desk, Site("mlp", layer), mlp)]
    return dict(edits)


@dataclass(frozen=True, eq=False)
class _Called:
    """At a block's input: keeps what the block is called with."""

    desk: Desk
    layer: int

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        args, kwargs = CALL.get()
        cached = any(hasattr(one, "get_seq_length") for one in (*args, *kwargs.values()))
        if cached or seen.phase == "generation" or len(value) % self.desk.rows:
            raise GateError("gates on edges act on the prompts of the batch that they were made for: measure it, or run it whole")
        self.desk.calls[self.layer] = args, kwargs
        return value


@dataclass(frozen=True, eq=False)
class _Reads:
    """Where a stream is read: lets attention or MLP read the changed ones."""

    desk: Desk
    layer: int
    changed: Changed
    attention: bool
    mlp: bool

    @property
    def reads(self) -> tuple[Site, ...]:
        return self.changed.reads

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        desk = self.desk
        streams = self.changed.streams(value.unflatten(0, (-1, desk.rows)), seen)
        found: dict[Site, list[Tensor]] = {}
        for some in streams.split(self.at_once(streams)):
            given = (desk.anatomy, self.layer, desk.calls[self.layer], seen.settings, some)
            if self.attention:
                for slot, one in attention_reads(*given).items():
                    found.setdefault(Site(slot, self.layer), []).append(one)
            if self.mlp:
                found.setdefault(Site("mlp", self.layer), []).append(mlp_reads(*given))
        desk.found.update({place: torch.cat(parts) for place, parts in found.items()})
        return value

    def at_once(self, streams: Streams) -> int:
        """How many streams memory allows at once."""
        sizes, width = self.desk.anatomy.sizes[self.layer], streams.shape[-1]
        per_token = 8 * width + 6 * sizes.heads * sizes.head_width + 3 * (sizes.neurons or 4 * width) * self.mlp
        return max(1, self.desk.memory // (4 * per_token * max(1, streams[0].numel() // width)))


@dataclass(frozen=True, eq=False)
class _Put:
    """Where what was read is used: each user gets what it made of its stream."""

    desk: Desk
    place: Site
    users: Sequence[User]

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        found = self.desk.found.pop(self.place)
        out = value.unflatten(0, (-1, self.desk.rows)).clone()
        for user in self.users:
            index = user.destination.index
            unit: tuple[Any, ...] = () if index is None else (slice(None), slice(None), index)
            out[(user.run, *unit)] = found[(user.read, *unit)].to(out.dtype)
        return out.flatten(0, 1)


@dataclass(frozen=True, eq=False)
class _Behind:
    """Behind the last block, whose output the final norm alone reads: the stream itself."""

    desk: Desk
    changed: Changed
    users: Sequence[User]

    @property
    def reads(self) -> tuple[Site, ...]:
        return self.changed.reads

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        own = value.unflatten(0, (-1, self.desk.rows))
        streams, out = self.changed.streams(own, seen), own.clone()
        for user in self.users:
            out[user.run] = streams[user.read].to(out.dtype)
        return out.flatten(0, 1)
