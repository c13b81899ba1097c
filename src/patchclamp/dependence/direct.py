"""Direct effects: what each part writes, read off at the logits with everything between held at the model's own run.

With the final norm's scale held, the readout (right minus wrong logit; or the likeliest token's) is linear in the last residual
stream, so it has a direction u at every target, and part j's share of it is <what j writes at the target's position, u>.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.dependence.closings import closed_gates
from patchclamp.errors import GateError, MetricError
from patchclamp.metrics import per_example
from patchclamp.models.inputs import token_batch
from patchclamp.models.model import Model
from patchclamp.models.norms import held, scale_of
from patchclamp.models.probe import probe_tokens
from patchclamp.models.recording import Recorder, head_writes
from patchclamp.models.replay import reference, why_plain
from patchclamp.models.scope import unobserved
from patchclamp.models.standing import Start
from patchclamp.models.tree import grow
from patchclamp.parts import Fallback, Gated
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

Readout = Literal["difference", "likeliest"]
Closed = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Shares:
    """What every part's write gives to the readout, by setting of closed parts.

    Args:
        shares: of each counted part.
        total: of the whole last residual stream (under the held norm).
        moved: how far what the part writes at the targets is from the own run's: |difference| / |own| (0 where both are 0).
    """

    shares: Float[np.ndarray, "setting part example"]
    total: Float[np.ndarray, "setting example"]
    moved: Float[np.ndarray, "setting part example"]


@dataclass(frozen=True, eq=False)
class _Writes:
    """At the targets, by layer: what heads write and what the MLP writes; and the last residual stream."""

    heads: tuple[Float[Tensor, "setting target head width"], ...]
    mlps: tuple[Float[Tensor, "setting target width"], ...]
    last: Float[Tensor, "setting target width"]


def shares(
    parts: Gated, examples: Examples, fallback: Fallback, settings: Closed, readout: Readout = "difference", batch_size: int = 32
) -> Shares:
    """Shares of every counted part, in runs in which sets of parts are closed.

    Args:
        parts: heads and MLPs (`nodes`).
        examples: on which prompts.
        fallback: what a closed gate passes.
        settings: sets of indices into the counted parts; the first must be the empty one, the model itself.
        readout: "difference": the logit of the right answer minus that of the wrong one; "likeliest": the logit of the token
            that the model itself gives most, less the mean over the vocabulary.
        batch_size: examples at once.

    Cost: a forward pass per setting from its first block on, and of each layer one output projection per head at the targets.

    Raises:
        GateError: parts that are not whole heads and MLPs.
        MetricError: answers of which there is not one right and one wrong token each.
    """
    _require_nodes(parts)
    found = [_of_batch(parts, batch, fallback, settings, readout) for batch in examples.batches(batch_size)]
    return Shares(*(torch.cat(some, -1).cpu().double().numpy() for some in zip(*found, strict=True)))


def _require_nodes(parts: Gated) -> None:
    for number in parts.counted:
        site = parts.labels[number]
        if site.kind not in ("head", "mlp") or site.position is not None:
            raise GateError(f"direct effects are known of whole heads and MLPs (nodes), and {site} is neither")
    if parts.added is not None:
        raise GateError(
            "direct effects are of the model's own runs, and these parts add something to its embeddings: leave it out"
        )


def _of_batch(
    parts: Gated, batch: Batch, fallback: Fallback, settings: Closed, readout: Readout
) -> tuple[Tensor, Tensor, Tensor]:
    model = parts.model
    batch = batch.to(model.device)
    middle, routed = not why_plain(model), parts.routing == "frozen"
    start = reference(model, batch, inputs=middle, prefix=False, routed=routed) if middle or routed else Start()
    (own,) = _runs(parts, batch, fallback, [()], Start())
    direction = _direction(model, batch, own.last[0], readout)
    pieces: list[tuple[Tensor, Tensor, Tensor]] = []
    for first, some in _by_first_block(parts, settings):
        size = max(1, parts.fold(batch, backward=True))
        for at in range(0, len(some), size):
            numbers = some[at : at + size]
            for writes in _runs(parts, batch, fallback, [settings[number] for number in numbers], start, first):
                pieces.append(_read(parts, batch, writes, own, direction, readout, numbers))
    order = torch.tensor([number for _, some in _by_first_block(parts, settings) for number in some]).argsort()
    return tuple(torch.cat([piece[one] for piece in pieces])[order] for one in range(3))  # type: ignore[return-value]


def _by_first_block(parts: Gated, settings: Closed) -> list[tuple[int, list[int]]]:
    """Settings by the first block in which they close anything."""
    groups: dict[int, list[int]] = {}
    for number, shut in enumerate(settings):
        layers = [parts.labels[parts.counted[part]].layer or 0 for part in shut]
        groups.setdefault(min(layers, default=parts.model.layers - 1), []).append(number)
    return sorted(groups.items())


def _runs(parts: Gated, batch: Batch, fallback: Fallback, settings: Closed, start: Start, first: int = 0) -> list[_Writes]:
    """What is written at the targets in runs side by side, which begin at block `first` where `start` knows its input."""
    model, count = parts.model, len(settings)
    layers = model.layers
    if start.inputs:
        patterns = [(0,) * (2 * first) + (number + 1,) * (2 * (layers - first) + 1) for number in range(count)]
        start = start.behind(0, grow(patterns, [first] * count))
    begun = range(first if start.inputs else 0, layers)
    sites = [Site(kind, layer) for layer in begun for kind in ("z", "attn", "mlp.write")]
    recorder = Recorder(model.anatomy, [*sites, Site("resid.post", layers - 1)])
    edits = parts.compiled(closed_gates(parts, settings), fallback, batch, start)
    with torch.no_grad(), model.editing(edits, batch, settings=count), recorder.session().open():
        model.forward(batch, settings=count, columns=batch.target_position.unique(), start=start)
    at = {site: _at_targets(value, batch) for site, value in recorder.kept.items()}
    heads: list[Tensor] = []
    for layer in begun:
        z, attn = at[Site("z", layer)], at[Site("attn", layer)]
        with torch.no_grad(), unobserved():
            write = head_writes(model.anatomy.layers[layer], z.flatten(0, 1)[:, None], attn.flatten(0, 1)[:, None])
        heads.append(write[:, 0].unflatten(0, z.shape[:2]))
    return [_Writes(tuple(heads), tuple(at[Site("mlp.write", layer)] for layer in begun), at[Site("resid.post", layers - 1)])]


def _at_targets(value: Float[Tensor, "row position *any"], batch: Batch) -> Float[Tensor, "setting target *any"]:
    return value.unflatten(0, (-1, len(batch.tokens)))[:, batch.target_row, batch.target_position]


def _read(
    parts: Gated, batch: Batch, writes: _Writes, own: _Writes, direction: Tensor, readout: Readout, numbers: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Shares [setting, part, example], totals [setting, example], and how far writes have moved [setting, part, example]."""
    count, below = len(numbers), parts.model.layers - len(writes.heads)  # blocks below hold the own run's values
    found: list[Tensor] = []
    moved: list[Tensor] = []
    for number in parts.counted:
        site = parts.labels[number]
        layer = site.layer or 0
        mine, now = (
            None
            if (here := layer - skipped) < 0
            else (one.mlps[here] if site.kind == "mlp" else one.heads[here][:, :, site.index])
            for one, skipped in ((own, 0), (writes, below))
        )
        assert mine is not None
        now = mine.expand(count, -1, -1) if now is None else now
        found.append(_summed((now * direction).sum(-1), batch, readout))
        apart, size = (now - mine).norm(dim=-1), mine.norm(dim=-1)
        moved.append(_averaged(torch.where(apart == 0, apart, apart / size.clamp(min=torch.finfo(size.dtype).tiny)), batch))
    return torch.stack(found, 1), _summed((writes.last * direction).sum(-1), batch, readout), torch.stack(moved, 1)


def _summed(values: Float[Tensor, "setting target"], batch: Batch, readout: Readout) -> Float[Tensor, "setting example"]:
    return per_example(values, batch, contrast=readout == "difference")


def _averaged(values: Float[Tensor, "setting target"], batch: Batch) -> Float[Tensor, "setting example"]:
    return per_example(values, batch, contrast=False)


def _direction(
    model: Model, batch: Batch, last: Float[Tensor, "target width"], readout: Readout
) -> Float[Tensor, "target width"]:
    """u: the slope of the readout in the last residual stream, the norm's scale held at this run's."""
    norm, unembed = model.anatomy.norm, model.anatomy.unembed
    scale = scale_of(norm, model.width)
    kept = scale(last[:, None])
    with torch.enable_grad(), unobserved():
        leaf = last[:, None].detach().clone().requires_grad_()
        logits = unembed(held(norm.forward, scale, leaf, kept))[:, 0]
        if readout == "likeliest":
            likeliest = logits.detach().argmax(-1, keepdim=True)
            value = logits.gather(-1, likeliest)[:, 0] - logits.mean(-1)
        else:
            right, wrong = _tokens(batch)
            value = (logits.gather(-1, right) - logits.gather(-1, wrong))[:, 0]
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return slope[:, 0] * (factor(model) or 1.0)


def _tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    if batch.wrong is None or batch.answers.shape[1] != 1 or batch.wrong.shape[1] != 1:
        raise MetricError(
            "direct effects add up in a difference of two logits: the task must have one right and one wrong token each"
        )
    return batch.answers, batch.wrong


def factor(model: Model) -> float | None:
    """What the model multiplies its unembedding's output by; None where it does something else to it (a cap)."""
    batch, recorder = token_batch(probe_tokens(model.anatomy)), Recorder(model.anatomy, [Site("final")])
    with torch.no_grad(), recorder.session().open():
        logits: Any = model.forward(batch)
    with torch.no_grad(), unobserved():
        before = model.anatomy.unembed(recorder.kept[Site("final")]).double()
    ratio = float((logits.double() * before).sum() / before.square().sum())
    worst = float((logits.double() - ratio * before).abs().max())
    return ratio if worst <= 1e-4 * float(logits.abs().max()) else None
