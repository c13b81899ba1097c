"""Replay: run gate settings from where they first differ from the model itself.

A gate in layer l changes nothing before layer l, and where it acts on columns from c on, nothing before c. So the model's own
run is kept (the residual stream into each block; keys and values of the columns before c), and a setting starts at its block
and column. Blocks before it are passed through, so that layer indices, masks and sliding windows stay right.

A reference lives as long as one `measure` or `gradient`: weights may change after it.
"""

from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from patchclamp.models.editing import Edits, Seen
from patchclamp.models.inputs import token_batch
from patchclamp.models.invariants import rounding
from patchclamp.models.model import Model
from patchclamp.models.probe import probe_tokens
from patchclamp.models.recording import Recorder
from patchclamp.models.scope import OPEN, still
from patchclamp.models.standing import Start
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch


def reference(model: Model, batch: Batch, column: int, layers: bool) -> Start:
    """What the model's own run of a batch holds from `column` on; with `layers`, the residual stream into every block too.

    Cost: one forward pass over the columns before, and with `layers` one over the rest.
    """
    batch, start = batch.to(model.device), Start()
    with torch.no_grad():
        if column:
            start = Start(column, prefix=_prefix(model, batch, column))
        if layers:
            sites = [Site("resid.pre", layer) for layer in range(model.layers)]
            recorder, lengths = Recorder(model.anatomy, sites), [0] * model.layers
            session = recorder.session()
            with session.open():
                for number, layer in enumerate(model.anatomy.layers):
                    session.rewrite(layer.block, partial(_measured, lengths, number))
                model.forward(batch, columns=torch.tensor([batch.tokens.shape[1] - 1], device=model.device), start=start)
            start = replace(start, inputs=tuple(recorder.kept[site] for site in sites), tuples=tuple(lengths))
    return start


def _measured(lengths: list[int], number: int, output: Any) -> Any:
    lengths[number] = len(output) if isinstance(output, tuple) else 0
    return output


def _prefix(model: Model, batch: Batch, column: int) -> tuple[tuple[Tensor, Tensor], ...]:
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    options: dict[str, Any] = {"use_cache": True, "past_key_values": cache}
    if model.anatomy.takes_positions:
        options["position_ids"] = batch.position_ids[:, :column]
    if model.anatomy.keeps_logits:
        options["logits_to_keep"] = 1
    with still(model.hf):
        model.hf(input_ids=batch.tokens[:, :column], attention_mask=batch.mask[:, :column].long(), **options)
    return tuple((layer.keys, layer.values) for layer in cache.layers)


_REASONS: "WeakKeyDictionary[Model, str]" = WeakKeyDictionary()


def why_plain(model: Model) -> str:
    """Why runs of this model cannot start in the middle now, or nothing where they can.

    Proved once per model: a part scaled in the last block gives the same logits from the middle as from the beginning.
    """
    if OPEN.get():
        return "other edits are on"
    if model not in _REASONS:
        _REASONS[model] = _disproof(model)
    return _REASONS[model]


def _halved(value: Tensor, seen: Seen, /) -> Tensor:
    return value / 2


def _negated(value: Tensor, seen: Seen, /) -> Tensor:
    return -value


def _disproof(model: Model) -> str:
    last = model.layers - 1
    batch = token_batch(probe_tokens(model.anatomy))
    edits: Edits = {Site("z", last): _halved, Site("mlp.write", last): _negated}
    try:
        with torch.no_grad():
            plain = model.forward(batch, edits)[:, 2:]
            start = reference(model, batch, 2, layers=True)
            whole, part = (model.forward(batch, edits, start=start.at(layer)) for layer in (0, last))
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    allowed = rounding(plain.dtype) * float(plain.abs().max().clamp(min=1))
    worst = max(float((other - plain).abs().max()) for other in (whole, part))
    return "" if worst <= allowed else f"logits differ by {worst:.1e}, where rounding allows {allowed:.1e}"
