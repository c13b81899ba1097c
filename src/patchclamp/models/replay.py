"""Replay: run gate settings from where they first differ from the model itself.

A gate in layer l changes nothing before layer l, and where it acts on columns from c on, nothing before c. So the model's own
run is kept (the residual stream into each block; keys and values of the columns before c), and a setting starts at its block
and column. Blocks before it are passed through, so that layer indices, masks and sliding windows stay right.

A reference lives as long as one `measure` or `gradient`: weights may change after it.
"""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from patchclamp.models.editing import Edits, Seen
from patchclamp.models.inputs import token_batch
from patchclamp.models.invariants import rounding
from patchclamp.models.model import Model
from patchclamp.models.probe import probe_tokens
from patchclamp.models.recording import Recorder
from patchclamp.models.scope import OPEN, still
from patchclamp.models.standing import Start, why_every_column
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch


def reference(model: Model, batch: Batch, inputs: bool = True, prefix: bool = True) -> Start:
    """What the model's own run of a batch holds: the residual stream at every block, and keys and values of every column.

    Cost: one forward pass over the batch.
    """
    from transformers import DynamicCache

    batch = batch.to(model.device)
    cache: Any = DynamicCache()
    sites = [*(Site("resid.pre", layer) for layer in range(model.layers)), Site("resid.post", model.layers - 1)]
    recorder, lengths = Recorder(model.anatomy, sites if inputs else []), [0] * model.layers
    session = recorder.session()
    options: dict[str, Any] = {"use_cache": True, "past_key_values": cache} if prefix else {"use_cache": False}
    if model.anatomy.takes_positions:
        options["position_ids"] = batch.position_ids
    if model.anatomy.keeps_logits:
        options["logits_to_keep"] = 1
    with torch.no_grad(), session.open(), still(model.hf):
        for number, layer in enumerate(model.anatomy.layers):
            session.rewrite(layer.block, partial(_measured, lengths, number))
        model.hf(input_ids=batch.tokens, attention_mask=batch.mask.long(), **options)
    return Start(
        inputs=tuple(recorder.kept[site] for site in sites) if inputs else (),
        prefix=tuple((layer.keys, layer.values) for layer in cache.layers) if prefix else (),
        tuples=tuple(lengths),
    )


def _measured(lengths: list[int], number: int, output: Any) -> Any:
    lengths[number] = len(output) if isinstance(output, tuple) else 0
    return output


_REASONS: "WeakKeyDictionary[Model, str]" = WeakKeyDictionary()


def why_plain(model: Model) -> str:
    """Why runs of this model cannot start in the middle now, or nothing where they can.

    Proved once per model: a part scaled in the last block gives the same logits from the middle as from the beginning.
    """
    if OPEN.get():
        return "other edits are on"
    if model not in _REASONS:
        _REASONS[model] = _disproof(model)
        if _REASONS[model]:
            warnings.warn(f"every run of {model.name} is a whole one: started in the middle, {_REASONS[model]}", stacklevel=2)
    return _REASONS[model]


def _halved(value: Tensor, seen: Seen, /) -> Tensor:
    return value / 2


def _negated(value: Tensor, seen: Seen, /) -> Tensor:
    return -value


def _disproof(model: Model) -> str:
    last, batch = model.layers - 1, token_batch(probe_tokens(model.anatomy))
    edits: Edits = {Site("z", last): _halved, Site("mlp.write", last): _negated}
    wanted = torch.tensor([3, 4], device=model.device)
    try:
        with torch.no_grad():
            plain = model.forward(batch, edits)[:, 3:].repeat(3, 1, 1)
            kept, found = reference(model, batch), list[Tensor]()
            for column in (0, 2):
                start = kept.rising(column, [0, last, last])
                found.append(model.forward(batch, edits, settings=3, start=start)[:, 3 - column :])
                start = trimmed(model, kept, wanted).rising(column, [0, 0, last])
                found.append(model.forward(batch, edits, settings=3, columns=wanted, start=start))
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    allowed = rounding(plain.dtype) * float(plain.abs().max().clamp(min=1))
    worst = max(float((other - plain).abs().max()) for other in found)
    return "" if worst <= allowed else f"logits differ by {worst:.1e}, where rounding allows {allowed:.1e}"


def trimmed(model: Model, start: Start, wanted: Int[Tensor, " column"]) -> Start:
    """The same start, where behind the last block's attention only the wanted columns are computed, if the model allows it."""
    return start if why_every_column(model.anatomy) else replace(start, wanted=wanted)
