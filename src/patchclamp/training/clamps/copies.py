"""A clamp of copying: what a head attends to is said, whatever its values and output projection have learned."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.models.editing import Edits, Seen
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.training.clamp import Clamp
from patchclamp.training.clamps.patterns import maps
from patchclamp.training.clamps.places import Place, Sites, plain
from patchclamp.training.clamps.schedule import ALWAYS, Schedule
from patchclamp.training.data import Rows


@dataclass(frozen=True, repr=False)
class Copy(Clamp):
    """Ideal copying by heads: the tokens that they attend to are added to the logits, on a schedule:

        logits'[i, t] = logits[i, t] + s(t) * scale * sum over heads and j of pattern[i, j] * (x_j = t)

    So a head has the output that a perfect copying circuit would give it, and gradients reach its queries and keys through its
    pattern from the first update on. Its own values and output stay as they are and go on learning.

    Args:
        sites: patterns: "L1.h0.pattern", "L1.pattern", several.
        scale: logits for attention of 1.
        schedule: when and how strongly.

    Cost: one scattered sum over the layer's pattern.

    Raises:
        TrainingError: a scale that is not above 0; when it runs: a site that is no pattern, or one at a position.
        SiteError: when it runs: the model has no such site.

    Paper: the output read off a head's attention, https://arxiv.org/abs/2404.07129.
    """

    sites: Sites
    scale: float = 10.0
    schedule: Schedule = ALWAYS

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise TrainingError(f"copying with a scale of {self.scale} was asked: give a number of logits above 0")

    def __repr__(self) -> str:
        return f"Copy({', '.join(plain(self.sites))}: {self.scale}, {self.schedule!r})"

    def edits(self, model: Model, step: int, rows: Rows) -> Edits:
        """What is added to the logits at this step."""
        strength = self.schedule(step)
        if not strength:
            return {}
        found = maps(model, self.sites, "pattern")
        for place in found:
            if place.site.position is not None:
                raise TrainingError(f"{place.site}: copying is clamped at all positions; leave the position out")
        return {Site("logits"): Copied(found, strength * self.scale, rows.tokens)}


@dataclass(frozen=True, eq=False)
class Copied:
    """logits + scale * what the patterns of `places` point at."""

    places: tuple[Place, ...]
    scale: float
    tokens: Int[Tensor, "row position"]

    @property
    def reads(self) -> tuple[Site, ...]:
        """The patterns."""
        return tuple(place.site for place in self.places)

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        said = torch.zeros_like(value)
        for place in self.places:
            pattern = seen.values[place.site]
            chosen = pattern if place.chosen is None else pattern[:, list(place.chosen)]
            mass = chosen.sum(1).to(value)  # [row, query, key]
            said = said.scatter_add(2, self.tokens[:, None].expand_as(mass), mass)
        return value + self.scale * said
