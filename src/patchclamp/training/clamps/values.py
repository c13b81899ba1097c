"""Clamps of values: any edit at any site, and parts that are ablated, on a schedule."""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.models.editing import Edit, Edits, Seen
from patchclamp.models.model import Model
from patchclamp.training.clamp import Clamp
from patchclamp.training.clamps.places import Place, Sites, find, places, plain, toward
from patchclamp.training.clamps.schedule import ALWAYS, Schedule
from patchclamp.training.data import Rows


@dataclass(frozen=True, repr=False)
class Hold(Clamp):
    """Any edit at any site, on a schedule:

        value' = value + s(t) * (edit(value) - value)

    inside the autograd graph: gradients flow through the edit and, where s(t) < 1, past it.

    Args:
        sites: a site, a pattern ("L*.h*.z"), or several.
        edit: of `patchclamp.edits`, or your own.
        schedule: when and how strongly.
        name: what the edit is called in the run's identity; needed where its repr does not tell its numbers (edits that hold
            tensors).

    Cost: the edit's, and one elementwise product a site.

    Raises:
        TrainingError: an edit whose repr would not tell two runs apart, without a name.
        SiteError: when it runs: the model has no such site, with the reason.

    Paper: clamping while training, https://arxiv.org/abs/2404.07129.
    """

    sites: Sites
    edit: Edit
    schedule: Schedule = ALWAYS
    name: str | None = None

    def __post_init__(self) -> None:
        said = repr(self.edit)
        if self.name is None and (" object at 0x" in said or " at 0x" in said or "tensor(" in said):
            raise TrainingError(
                f"the edit {type(self.edit).__name__} at {', '.join(plain(self.sites))} has no repr that tells its numbers, which "
                "the run's identity needs: give Hold(..., name=...)"
            )

    def __repr__(self) -> str:
        return f"Hold({', '.join(plain(self.sites))}: {self.name or repr(self.edit)}, {self.schedule!r})"

    def edits(self, model: Model, step: int, rows: Rows) -> Edits:
        """The edit, mixed in at this step's strength."""
        strength = self.schedule(step)
        return {site: Mixed(self.edit, strength) for site in find(model, plain(self.sites))} if strength else {}


@dataclass(frozen=True, eq=False)
class Mixed:
    """value + strength * (edit(value) - value)."""

    edit: Edit
    strength: float

    @property
    def reads(self) -> tuple[object, ...]:
        """What the edit wants to see."""
        return tuple(getattr(self.edit, "reads", ()))

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        return toward(value, self.edit(value, seen), self.strength, seen.site.kind)


@dataclass(frozen=True, repr=False)
class Ablate(Clamp):
    """A part that gives nothing, or always its mean, on a schedule:

        value' = (1 - s(t)) * value + s(t) * fallback

    fallback is 0 ("zero"), or the mean of the value over the real tokens of the rows that run together ("mean": of one piece,
    where gradients are accumulated, and of one process' rows; a constant in the graph). The part's weights have a gradient of
    0 while it is wholly ablated; weight decay and momentum still move them (`Freeze` holds them).

    Args:
        sites: parts: "L1.h2" (a head's output, before the output projection), "L1.mlp", "L0.attn", or any site that is no
            pattern; a pattern of sites, or several.
        how: "zero" or "mean".
        schedule: when and how strongly.

    Cost: one elementwise product a layer.

    Raises:
        TrainingError: `how` is neither, or a mean is asked of attention scores or patterns.
        SiteError: when it runs: the model has no such site, with the reason.

    Paper: https://arxiv.org/abs/2404.07129 (heads' values set to zero).
    """

    sites: Sites
    how: str = "zero"
    schedule: Schedule = ALWAYS

    def __post_init__(self) -> None:
        if self.how not in ("zero", "mean"):
            raise TrainingError(f"a part was to be ablated by {self.how!r}: choose zero or mean")

    def __repr__(self) -> str:
        return f"Ablate({', '.join(plain(self.sites))}: {self.how}, {self.schedule!r})"

    def edits(self, model: Model, step: int, rows: Rows) -> Edits:
        """The part faded out at this step's strength."""
        strength = self.schedule(step)
        if not strength:
            return {}
        found = places(model, plain(self.sites))
        for place in found:
            if place.site.kind in ("scores", "pattern"):
                raise TrainingError(
                    f"{place.site} was to be ablated: attention has no value of nothing. Ablate the head (L{place.site.layer}.h0), or "
                    "force the pattern to uniform"
                )
        return {place.site: Faded(place, strength, self.how == "mean") for place in found}


@dataclass(frozen=True, eq=False)
class Faded:
    """(1 - strength) * value, with strength * mean beside it where a mean is asked."""

    place: Place
    strength: float
    mean: bool

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        weight = self.place.weight(self.strength, value.dim(), value)
        if not self.mean:
            return value * (1 - weight)
        with torch.no_grad():
            target = value[seen.mask].mean(0).expand_as(value)
        return toward(value, target, weight, seen.site.kind)
