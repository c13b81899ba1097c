"""What is kept of one pass of the model so that slopes in the gates of edges can be had from it."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.models.session import CALL, Call, Session
from patchclamp.parts.edge_blocks import SLOTS
from patchclamp.parts.edge_gates import Readers
from patchclamp.parts.edge_maps import Maps
from patchclamp.parts.edge_sources import Sources
from patchclamp.sites import Site


@dataclass(frozen=True, eq=False)
class Asked:
    """Which edges' slopes.

    Args:
        sources: what they lead from.
        readers: what they lead to.
        count: how many there are.
        memory: bytes that activations may take.
        added: what is added to the embeddings.
    """

    sources: Sources
    readers: Sequence[Readers]
    count: int
    memory: int
    added: Float[Tensor, "row position width"] | None = None


@dataclass(frozen=True, eq=False)
class _Wanted:
    """What a run has to keep: places with and without slopes, blocks' calls, modules' outputs and inputs."""

    places: set[Site] = field(default_factory=set[Site])
    slopes: set[Site] = field(default_factory=set[Site])
    calls: set[int] = field(default_factory=set[int])
    outputs: dict[int, torch.nn.Module] = field(default_factory=dict[int, torch.nn.Module])
    inputs: dict[int, torch.nn.Module] = field(default_factory=dict[int, torch.nn.Module])


def _wanted(sources: Sources, readers: Sequence[Readers], maps: Maps) -> _Wanted:
    found = _Wanted({*sources.sites, *(one.place for one in readers)})
    for one in readers:
        layer = one.place.layer or 0
        attention, mlp = maps.attention[layer], maps.mlp[layer]
        for site in one.destinations:
            if site.kind == "logits":
                found.slopes.add(one.place)
            elif site.position is not None:
                found.slopes.add(Site("z", layer))
                found.places.update(Site(slot, layer) for slot in SLOTS)
                found.calls.add(layer)
            elif site.kind in SLOTS and attention is not None:
                module = attention.slots[site.kind].module
                found.outputs[id(module)] = module
            elif site.kind == "mlp" and mlp is not None:
                found.inputs[id(mlp.entry)] = mlp.entry
            else:
                found.slopes.add(Site(site.kind, layer))
                found.calls.add(layer)
    return found


class Watch:
    """Keeps, of one pass of the model, what slopes in the gates of edges are made of.

    Args:
        asked: the edges.
        maps: how the stream is read.
    """

    def __init__(self, asked: Asked, maps: Maps) -> None:
        self.anatomy, self.want = asked.sources.model.anatomy, _wanted(asked.sources, asked.readers, maps)
        self.order = sorted(self.want.slopes)
        self.kept: dict[Site, Tensor] = {}
        self.calls: dict[int, Call] = {}
        self.nodes: dict[int, Tensor] = {}

    @property
    def asked(self) -> list[Tensor]:
        """At which values slopes are wanted: at places, in `order`, then at modules, as `nodes` has them."""
        return [*(self.kept[place] for place in self.order), *self.nodes.values()]

    @contextmanager
    def open(self) -> Generator[None]:
        """While open, passes of this thread are watched."""
        want = self.want
        places = want.places | want.slopes | {Site("resid.pre", layer) for layer in want.calls}
        watching = Session(self.anatomy, {place: partial(self._keep, place) for place in places})
        with watching.open():
            for name, module in want.outputs.items():
                watching.after(module, partial(self._leave, name))
            for name, module in want.inputs.items():
                watching.before(module, partial(self._enter, name))
            yield

    def _keep(self, place: Site, value: Tensor) -> Tensor:
        if place.kind == "resid.pre" and place.layer in self.want.calls:
            self.calls.setdefault(place.layer or 0, CALL.get())
        self.kept.setdefault(place, value)  # a block that is computed again is the same once more
        return value

    def _enter(self, name: int, value: Tensor) -> Tensor:
        alias = value.view_as(value)
        self.nodes.setdefault(name, alias)
        return alias

    def _leave(self, name: int, value: Tensor) -> Tensor:
        self.nodes.setdefault(name, value)
        return value
