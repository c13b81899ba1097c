"""Clamps of weights: frozen, or grafted from a checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.models.model import Model
from patchclamp.training.clamp import Clamp
from patchclamp.training.clamps.places import Sites, plain
from patchclamp.training.clamps.reference import digest_of, loaded
from patchclamp.training.clamps.schedule import ALWAYS, Schedule
from patchclamp.training.clamps.slices import slices


@dataclass(frozen=True, repr=False)
class Freeze(Clamp):
    """Weights of parts that do not learn, on a schedule:

        w(t + 1) = w(t) + (1 - s(t)) * (what the optimizer made of w(t) - w(t))

    At strength 1 they stay bit for bit as they are, whatever weight decay, momentum and the optimizer's moments would do, and
    their gradients count as 0 (also in the norm that is clipped). Between 0 and 1 they learn more slowly.

    Args:
        parts: heads (L0.h2: its queries, its output, and the keys and values of its key/value head, which other heads share
            under grouped-query attention), L0.h2.q, L0.kv1.k, L0.kv1.v, L0.kv1, L0.h2.write (columns of the output projection),
            L0.attn, L0.mlp, L0.mlp.n5, L0.mlp.e3, L0.router, L0.block, embed, final, logits; patterns, or several. A matrix
            that embeds and unembeds is frozen by either name.
        schedule: when and how strongly.

    Cost: a copy of the parts' weights at each update.

    Raises:
        SiteError: when it runs: no such part, with the reason.
        TrainingError: when it runs: the part has no weights of its own.
    """

    parts: Sites
    schedule: Schedule = ALWAYS
    _held: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]], init=False, compare=False)

    def __repr__(self) -> str:
        return f"Freeze({', '.join(plain(self.parts))}, {self.schedule!r})"

    def gradients(self, model: Model, step: int) -> None:
        """Keep what the weights are, and take their gradients away."""
        strength = self.schedule(step)
        found = slices(model, plain(self.parts)) if strength else ()
        self._held["weights"] = [piece.of(piece.parameter) for piece in found]
        for piece in found if strength == 1 else ():
            gradient = piece.parameter.grad
            if gradient is not None:
                piece.put(gradient, torch.zeros_like(piece.of(gradient)))

    @torch.no_grad()
    def updated(self, model: Model, steps: int) -> None:
        """Put the weights back, or part of the way."""
        held = self._held.pop("weights", None)
        if steps == 0 or not held:
            return
        strength = self.schedule(steps - 1)
        for piece, before in zip(slices(model, plain(self.parts)), held, strict=True):
            after = piece.of(piece.parameter)
            piece.put(piece.parameter.data, before if strength == 1 else torch.lerp(after, before, strength))


@dataclass(frozen=True, repr=False)
class Graft(Clamp):
    """Weights of parts taken from a checkpoint behind `step` updates, free to learn from there on, or frozen:

        w(step) = w of the checkpoint

    Measures and checkpoints at that step see the grafted weights. The optimizer's moments stay as they are.

    Args:
        parts: as in `Freeze`.
        checkpoint: a folder that `Model.load` loads, of a model with the same shapes (another seed, another run, this one).
        step: 0 is before the first update.
        frozen: hold them there from then on.

    Cost: the checkpoint is loaded once.

    Raises:
        TrainingError: a negative step; no such checkpoint; when it runs: weights of other shapes.
        SiteError: when it runs: no such part.

    Paper: grafted layers in https://arxiv.org/abs/2404.07129.
    """

    parts: Sites
    checkpoint: str | Path
    step: int = 0
    frozen: bool = False
    _frozen: Freeze = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if self.step < 0:
            raise TrainingError(f"a graft at step {self.step} was asked: choose 0 (before the first update) or later")
        digest_of(self.checkpoint)
        object.__setattr__(self, "_frozen", Freeze(self.parts, Schedule(start=self.step)))

    def __repr__(self) -> str:
        said = f"{Path(self.checkpoint).name}:{digest_of(self.checkpoint)}"
        return f"Graft({', '.join(plain(self.parts))} from {said} at {self.step}, frozen={self.frozen})"

    def gradients(self, model: Model, step: int) -> None:
        """Where frozen: as `Freeze`."""
        if self.frozen:
            self._frozen.gradients(model, step)

    @torch.no_grad()
    def updated(self, model: Model, steps: int) -> None:
        """Put the checkpoint's weights there, once."""
        if self.frozen:
            self._frozen.updated(model, steps)
        if steps != self.step:
            return
        theirs = dict(loaded(self.checkpoint, model).anatomy.hf.named_parameters())
        for piece in slices(model, plain(self.parts)):
            other = theirs.get(piece.name)
            if other is None or other.shape != piece.parameter.shape:
                has = "nothing of that name" if other is None else f"shape {tuple(other.shape)}"
                raise TrainingError(
                    f"{piece.name} of shape {tuple(piece.parameter.shape)} was to be grafted, and {self.checkpoint} has {has}: give a "
                    "checkpoint of a model of the same sizes"
                )
            piece.put(piece.parameter.data, piece.of(other.to(piece.parameter)))
