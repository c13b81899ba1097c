"""Reading: edits under which queries, keys, values and MLPs read a residual stream that is not the run's own.

The block that reads is called once more on the other stream (`edge_blocks`); what came of it is put in its place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.models.anatomy import Anatomy
from patchclamp.models.editing import Columns, Edit, Edits, Seen
from patchclamp.models.session import CALL, Call
from patchclamp.parts.edge_blocks import SLOTS, Streams, attention_reads, attention_writes, mlp_reads
from patchclamp.sites import Site


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
    own: dict[Site, Tensor] = field(default_factory=dict[Site, Tensor])
    """Queries, keys and values of the runs, where queries at some position read others: [run, row, position, ...]."""
    columns: Columns | None = None
    """Where positions and named spans are."""


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
        asked = [user for user in attention if user.destination.position is not None]
        for slot in SLOTS if asked else sorted({user.destination.kind for user in attention}):
            users = [user for user in attention if user.destination.kind == slot and user.destination.position is None]
            edits[Site(slot, layer)] = [_Put(desk, Site(slot, layer), users, bool(asked))]
        if asked:
            edits[Site("z", layer)] = [_Asked(desk, layer, asked)]
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
    kept: bool = False
    """Whether others ask for it, and for what was put, behind."""

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        found = self.desk.found[self.place] if self.kept else self.desk.found.pop(self.place)
        out = value.unflatten(0, (-1, self.desk.rows))
        out = out.clone() if self.users else out
        for user in self.users:
            index = user.destination.index
            unit: tuple[Any, ...] = () if index is None else (slice(None), slice(None), index)
            out[(user.run, *unit)] = found[(user.read, *unit)].to(out.dtype)
        if self.kept:
            self.desk.own[self.place] = out
        return out.flatten(0, 1) if self.users else value


@dataclass(frozen=True, eq=False)
class _Asked:
    """At z: queries at some position read other keys and values than the others do. Attention runs once more for each position."""

    desk: Desk
    layer: int
    users: Sequence[User]

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        desk, out = self.desk, value.unflatten(0, (-1, self.desk.rows)).clone()
        own = {slot: desk.own.pop(Site(slot, self.layer)) for slot in SLOTS}
        found = {slot: desk.found.pop(Site(slot, self.layer)) for slot in SLOTS}
        groups: dict[tuple[int, int | str | None], list[User]] = {}
        for user in self.users:
            groups.setdefault((user.run, user.destination.position), []).append(user)
        assert desk.columns is not None
        waiting, share = list(groups.items()), out.shape[3] // own["k"].shape[3]
        while waiting:
            some, waiting = waiting[: self.at_once(out)], waiting[self.at_once(out) :]
            runs = torch.tensor([run for (run, _), _ in some], device=out.device)
            given = {slot: one[runs] for slot, one in own.items()}
            for at, (_, users) in enumerate(some):
                for user in users:
                    slot, head = user.destination.kind, user.destination.index
                    given[slot][at, :, :, head] = found[slot][user.read, :, :, head].to(out.dtype)
            made = attention_writes(desk.anatomy, self.layer, desk.calls[self.layer], seen.settings, given)
            for at, ((run, position), users) in enumerate(some):
                assert position is not None
                where = desk.columns(position).to(out.device)
                for head in sorted({(user.destination.index or 0) * share + number for user in users for number in range(share)}):
                    out[run, :, :, head] = torch.where(where[..., None], made[at, :, :, head], out[run, :, :, head])
        return out.flatten(0, 1)

    def at_once(self, z: Tensor) -> int:
        """How many attentions memory allows at once."""
        _, rows, length, heads, width = z.shape
        return max(1, self.desk.memory // (4 * rows * length * heads * (8 * width + 4 * length)))


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
