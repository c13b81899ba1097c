"""Blocks called once more, on another residual stream than the run's own: what queries, keys, values and MLPs make of it.

A block is called with everything else it was called with in the run, and left as soon as what was wanted is known. So its own
norms, projections, rotary embeddings and experts do the work, in every family.
"""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.models.anatomy import Anatomy
from patchclamp.models.scope import unobserved
from patchclamp.models.session import Call, Session
from patchclamp.models.stand_ins import themselves
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


def attention_writes(
    anatomy: Anatomy, layer: int, call: Call, copies: int, given: Mapping[str, Float[Tensor, "read row position head head_width"]]
) -> Float[Tensor, "read row position head head_width"]:
    """z of a layer whose queries, keys and values (after norms and rotary embedding) are given."""
    return _attention(anatomy, layer, call, copies, given, Site("z", layer))


def attention_patterns(
    anatomy: Anatomy, layer: int, call: Call, copies: int, given: Mapping[str, Float[Tensor, "read row position head head_width"]]
) -> Float[Tensor, "read row head query key"]:
    """Attention weights of a layer whose queries, keys and values are given; `call` must be that of a run with eager attention."""
    return _attention(anatomy, layer, call, copies, given, Site("pattern", layer))


def _attention(anatomy: Anatomy, layer: int, call: Call, copies: int, given: Mapping[str, Tensor], wanted: Site) -> Tensor:
    """What stands at a place of a layer whose queries, keys and values are given."""
    found: list[Tensor] = []
    like = given["q"]

    def put(slot: str, value: Tensor) -> Tensor:
        return given[slot].flatten(0, 1).to(value.dtype)

    def keep(value: Tensor) -> Tensor:
        found.append(value)
        raise _Read

    session = Session(anatomy, {**{Site(slot, layer): partial(put, slot) for slot in SLOTS}, wanted: keep})
    with unobserved(), session.open():
        _again(anatomy, layer, call, copies, like.new_zeros(*like.shape[:3], int(anatomy.config.hidden_size)))
    return found[0].unflatten(0, like.shape[:2])


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
    with themselves(), suppress(_Read):
        if args:
            anatomy.layers[layer].block(stream, *args[1:], **kwargs)
        else:
            anatomy.layers[layer].block(**kwargs | {"hidden_states": stream})
    # a block that comes to its end has been read, too: whoever asked finds nothing and fails


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
