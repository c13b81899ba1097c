"""Clamps of attention: a pattern forced to an ideal one, or kept from one, on a schedule."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchclamp.errors import TrainingError
from patchclamp.models.editing import Edits, Seen
from patchclamp.models.model import Model
from patchclamp.training.clamp import Clamp
from patchclamp.training.clamps.places import Place, Sites, places, plain, toward
from patchclamp.training.clamps.schedule import ALWAYS, Schedule
from patchclamp.training.clamps.targets import RELATIONS, TARGETS, hits, keys, pattern, similar
from patchclamp.training.data import Rows

OTHERWISE: tuple[str, ...] = ("first", "free")


@dataclass(frozen=True, repr=False)
class Force(Clamp):
    """Attention forced to an ideal pattern, on a schedule:

        pattern' = pattern + s(t) * (target - pattern)

    with target, by query i:

        previous    1 at i - 1 (the first query: at itself)
        induction   1 at k + 1, where k is the last position before i that holds the token of i; where there is none: at the
                    first token (otherwise="first"), or nothing is forced (otherwise="free")
        match       softmax over j <= i, behind a token, of cos(e(x_i), e(x_(j-1))) / temperature, of the model's own token
                    embeddings: an induction head that matches what is alike; temperature 0 is a hard maximum
        first       1 at the first token
        self        1 at i
        uniform     the same on all that i sees

    Padding is never attended to. The target knows nothing of windows: a forced head looks as far back as the target says. Its
    queries and keys have no gradient from attention that is wholly forced; its values and output have.

    Args:
        sites: patterns: "L0.h0.pattern", "L0.h*.pattern", "L0.pattern", several, or at a position.
        target: one of the above.
        schedule: when and how strongly.
        otherwise: for induction, where the token is new.
        temperature: for match.

    Cost: one mixture of the layer's patterns, whatever the number of heads; for induction a comparison of tokens with
    tokens, for match of embeddings with embeddings.

    Raises:
        TrainingError: no such target, or a temperature below 0.
        SiteError, TrainingError: when it runs: no such site, or a site that is no pattern.

    Paper: https://arxiv.org/abs/2404.07129 (perfect previous-token, induction and match heads).
    """

    sites: Sites
    target: str
    schedule: Schedule = ALWAYS
    otherwise: str = "first"
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise TrainingError(f"attention was to be forced to {self.target!r}: choose {', '.join(TARGETS)}")
        if self.otherwise not in OTHERWISE:
            raise TrainingError(f"otherwise={self.otherwise!r} was given: choose {' or '.join(OTHERWISE)}")
        if not self.temperature >= 0:
            raise TrainingError(f"a temperature of {self.temperature} was given: choose 0 or more")

    def __repr__(self) -> str:
        more = {"induction": f", otherwise={self.otherwise}", "match": f", temperature={self.temperature}"}.get(self.target, "")
        return f"Force({', '.join(plain(self.sites))}: {self.target}{more}, {self.schedule!r})"

    def edits(self, model: Model, step: int, rows: Rows) -> Edits:
        """The target, mixed in at this step's strength."""
        strength = self.schedule(step)
        if not strength:
            return {}
        target, held = self._target(model, rows)
        return {place.site: Forced(place, strength, target, held) for place in maps(model, self.sites, "pattern")}

    def _target(self, model: Model, rows: Rows) -> tuple[Float[Tensor, "#row query key"], Bool[Tensor, "row query"] | None]:
        """The pattern, and which queries are forced where not all are."""
        tokens, real = rows.tokens, rows.real
        if self.target == "match":
            return similar(tokens, real, model.hf.get_input_embeddings().weight, self.temperature), None
        free = self.target == "induction" and self.otherwise == "free"
        return pattern(self.target, tokens, real, model.anatomy.causal), keys("induction", tokens, real) >= 0 if free else None


def maps(model: Model, sites: Sites, kind: Literal["pattern", "scores"]) -> tuple[Place, ...]:
    """Places of attention patterns (or of the scores behind the same patterns)."""
    found = places(model, plain(sites))
    for place in found:
        if place.site.kind != "pattern":
            raise TrainingError(f"{place.site} is no attention pattern: name one, such as L0.h0.pattern")
    if kind == "pattern":
        return found
    return tuple(Place(type(p.site)(kind, p.site.layer, position=p.site.position), p.chosen, p.of) for p in found)


@dataclass(frozen=True, eq=False)
class Forced:
    """pattern + weight * (target - pattern), at the queries that are held."""

    place: Place
    strength: float
    target: Float[Tensor, "#row query key"]
    held: Bool[Tensor, "row query"] | None

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        weight = self.place.weight(self.strength, value.dim(), value)
        if self.held is not None:
            weight = self.held[:, None, :, None].to(value) * weight
        return toward(value, self.target[:, None], weight, "pattern")


@dataclass(frozen=True, repr=False)
class Forbid(Clamp):
    """Attention kept from one position, the rest renormalised, on a schedule:

        pattern'[i, j] = pattern[i, j] * (1 - s(t) * m[i, j]) / sum over k of pattern[i, k] * (1 - s(t) * m[i, k])

    where m is 1 at the position that `relation` names (as in `Force`; induction: where there is one). It is done to the
    scores, as score + log(1 - s m), so that softmax renormalises. A query that sees no other position keeps it.

    Args:
        sites: patterns, as in `Force`.
        relation: "previous", "induction", "first" or "self".
        schedule: when and how strongly.

    Cost: one addition to the layer's scores.

    Raises:
        TrainingError: no such relation; when it runs: a site that is no pattern.
        SiteError: when it runs: the model has no such site.

    Paper: https://arxiv.org/abs/2404.07129 (heads that may not attend to the previous token).
    """

    sites: Sites
    relation: str
    schedule: Schedule = ALWAYS

    def __post_init__(self) -> None:
        if self.relation not in RELATIONS:
            raise TrainingError(f"attention was to be kept from {self.relation!r}: choose {', '.join(RELATIONS)}")

    def __repr__(self) -> str:
        return f"Forbid({', '.join(plain(self.sites))}: {self.relation}, {self.schedule!r})"

    def edits(self, model: Model, step: int, rows: Rows) -> Edits:
        """What is taken from the scores at this step."""
        strength = self.schedule(step)
        if not strength:
            return {}
        hit = hits(self.relation, rows.tokens, rows.real, model.anatomy.causal)
        return {place.site: Forbidden(place, strength, hit) for place in maps(model, self.sites, "scores")}


@dataclass(frozen=True, eq=False)
class Forbidden:
    """scores + log(1 - weight) where it hits."""

    place: Place
    strength: float
    hit: Bool[Tensor, "#row query key"]

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        least = torch.finfo(value.dtype).min
        weight = self.place.weight(self.strength, value.dim(), value)
        kept = torch.as_tensor(1 - weight, dtype=value.dtype, device=value.device)
        taken = torch.where(kept > 0, kept.clamp_min(torch.finfo(value.dtype).tiny).log(), torch.full_like(kept, least))
        return torch.where(self.hit[:, None] & (taken < 0), (value + taken).clamp_min(least), value)
