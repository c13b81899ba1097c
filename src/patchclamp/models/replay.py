"""Replay: run gate settings from where they first differ from the model itself.

A gate in layer l changes nothing before layer l, and where it acts on columns from c on, nothing before c. So the model's own
run is kept (the residual stream into each block; keys and values of the columns before c), and a setting starts at its block
and column. Blocks before it are passed through, so that layer indices, masks and sliding windows stay right. What several
settings have in common runs once (`tree`); queries, keys and values of columns that have not changed are the model's own.

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
from patchclamp.models.norms import Scale, scale_of
from patchclamp.models.probe import probe_tokens
from patchclamp.models.recording import Recorder
from patchclamp.models.scope import OPEN, still
from patchclamp.models.standing import Start, projections, why_every_column
from patchclamp.models.tree import grow
from patchclamp.sites import Site
from patchclamp.tasks._batch import Batch


def reference(
    model: Model, batch: Batch, inputs: bool = True, prefix: bool = True, projected: bool = False, routed: bool = False,
    normed: bool = False,
) -> Start:  # fmt: skip
    """What the model's own run of a batch holds: the residual stream at every block, keys and values of every column, logits.

    Args:
        model: the model.
        batch: the prompts.
        inputs: keep the residual stream.
        prefix: keep keys and values.
        projected: keep what the maps to queries, keys and values give.
        routed: keep what routers give, and give it to every run that starts here: routing is frozen.
        normed: keep what the final norm divides by, and let it divide by that in every run that starts here: it is frozen.

    Cost: one forward pass over the batch.
    """
    from transformers import DynamicCache

    batch = batch.to(model.device)
    cache: Any = DynamicCache()
    sites = [*(Site("resid.pre", layer) for layer in range(model.layers)), Site("resid.post", model.layers - 1)]
    recorder, lengths, made = Recorder(model.anatomy, sites if inputs else []), [0] * model.layers, dict[int, Any]()
    session, columns, divided = recorder.session(), batch.target_position.unique(), dict[str, Tensor]()
    options: dict[str, Any] = {"use_cache": True, "past_key_values": cache} if prefix else {"use_cache": False}
    if model.anatomy.takes_positions:
        options["position_ids"] = batch.position_ids
    if model.anatomy.keeps_logits and len(columns):
        options["logits_to_keep"] = columns
    with torch.no_grad(), session.open(), still(model.hf):
        if normed:
            session.before(model.anatomy.norm, partial(_divided, divided, scale_of(model.anatomy.norm, model.width)))
        for number, layer in enumerate(model.anatomy.layers):
            session.rewrite(layer.block, partial(_measured, lengths, number))
            for module in projections(layer.attention, layer.output) if projected else ():
                session.rewrite(module, partial(_made, made, id(module)))
            if routed and layer.router is not None:
                session.rewrite(layer.router, partial(_made, made, id(layer.router)))
        logits = model.hf(input_ids=batch.tokens, attention_mask=batch.mask.long(), **options).logits
    logits = logits if model.anatomy.keeps_logits or not len(columns) else logits[:, columns]
    return Start(
        inputs=tuple(recorder.kept[site] for site in sites) if inputs else (),
        prefix=tuple((layer.keys, layer.values) for layer in cache.layers) if prefix else (),
        tuples=tuple(lengths),
        projected={name: value for name, value in made.items() if isinstance(value, Tensor) and value.dim() == 3},
        routed={name: value for name, value in made.items() if isinstance(value, tuple)},
        divisor=divided.get("divisor"),
        width=batch.tokens.shape[1],
        logits=model.at_targets(batch, logits)[0] if len(columns) else None,
    )


def _made(made: dict[int, Any], name: int, output: Any) -> Any:
    made[name] = output
    return output


def _divided(found: dict[str, Tensor], scale: Scale, value: Tensor) -> Tensor:
    found["divisor"] = scale(value)
    return value


def _measured(lengths: list[int], number: int, output: Any) -> Any:
    lengths[number] = len(output) if isinstance(output, tuple) else 0
    return output


_REASONS: "WeakKeyDictionary[Model, str]" = WeakKeyDictionary()
_CAPPED: "WeakKeyDictionary[Model, bool]" = WeakKeyDictionary()


def why_plain(model: Model) -> str:
    """Why runs of this model cannot start in the middle now, or nothing where they can.

    Proved once per model: parts scaled in the last blocks give the same logits from the middle as from the beginning.
    """
    if OPEN.get():
        return "other edits are on"
    if model not in _REASONS:
        _REASONS[model] = _disproof(model)
        if _REASONS[model]:
            warnings.warn(f"every run of {model.name} is a whole one: started in the middle, {_REASONS[model]}", stacklevel=2)
    return _REASONS[model]


def capped(model: Model) -> bool:
    """Whether the model does anything to its logits behind the unembedding (a cap, a scale), so that they do not stream."""
    if model not in _CAPPED:
        batch, final = token_batch(probe_tokens(model.anatomy)), Recorder(model.anatomy, [Site("final")])
        with torch.no_grad(), final.session().open():
            logits = model.forward(batch)
            unembedded = model.anatomy.unembed(final.kept[Site("final")])
        _CAPPED[model] = not torch.equal(logits, unembedded.to(logits.dtype))
    return _CAPPED[model]


def _halved(value: Tensor, seen: Seen, /) -> Tensor:
    return value / 2


def _negated(value: Tensor, seen: Seen, /) -> Tensor:
    return -value


def _disproof(model: Model) -> str:
    """Three runs that scale parts of the last block, from the first column and from a later one, in every way of starting.

    Where attention looks both ways every run starts at the first column: a later one changes those before it.
    """
    last, batch = model.layers - 1, token_batch(probe_tokens(model.anatomy))
    edits: Edits = {Site("z", last): _halved, Site("mlp.write", last): _negated}
    wanted, patterns = torch.tensor([3, 4], device=model.device), [(0,) * (2 * last + 1) + (kind, 0) for kind in (1, 2, 3)]
    try:
        with torch.no_grad():
            plain = model.forward(batch, edits)[:, 3:].repeat(3, 1, 1)
            kept, found = reference(model, batch, projected=True), list[Tensor]()
            for column in (0, 2) if model.anatomy.causal else (0,):
                for joins in ([0, last, last], [last, last, last], [0, 0, last]):
                    start = kept.behind(column, grow(patterns, joins))
                    found.append(model.forward(batch, edits, start=start)[:, 3 - column :])
                    start = trimmed(model, kept, wanted).behind(column, grow(patterns, joins))
                    found.append(model.forward(batch, edits, columns=wanted, start=start))
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    allowed = rounding(plain.dtype) * float(plain.abs().max().clamp(min=1))
    worst = max(float((other - plain).abs().max()) for other in found)
    return "" if worst <= allowed else f"logits differ by {worst:.1e}, where rounding allows {allowed:.1e}"


def trimmed(model: Model, start: Start, wanted: Int[Tensor, " column"]) -> Start:
    """The same start, where behind the last block's attention only the wanted columns are computed, if the model allows it."""
    return start if why_every_column(model.anatomy) else replace(start, wanted=wanted)
