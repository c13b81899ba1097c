"""Clamps to what another model computes: a checkpoint, another run at the same step, or this model itself unclamped."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from patchclamp.errors import ModelError, TrainingError
from patchclamp.files import sha256
from patchclamp.models.editing import Edits, Seen
from patchclamp.models.model import Model
from patchclamp.sites import Site
from patchclamp.training.checkpoint import folder_of, steps_of
from patchclamp.training.clamp import Clamp
from patchclamp.training.clamps.places import Place, Sites, places, plain, toward
from patchclamp.training.clamps.schedule import ALWAYS, Schedule
from patchclamp.training.data import Rows


def digest_of(folder: str | Path) -> str:
    """The beginning of the SHA-256 of a checkpoint's weights.

    Raises:
        TrainingError: there is no checkpoint.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    weights = [file for file in files if file.name.startswith(("model", "adapter"))]
    if not weights:
        raise TrainingError(
            f"{folder} is no checkpoint (it holds no model.safetensors): give a folder such as RUN/checkpoints/step-0000100"
        )
    return "+".join(_hashed(str(file.resolve()), file.stat().st_mtime_ns)[:12] for file in weights)


@lru_cache(maxsize=256)
def _hashed(path: str, changed: int) -> str:
    return sha256(Path(path))


@lru_cache(maxsize=4)
def _loaded(folder: str, digest: str, device: torch.device, dtype: torch.dtype) -> Model:
    model = Model.load(folder, device=device, dtype=dtype)
    model.hf.requires_grad_(False)
    return model


def loaded(folder: str | Path, like: Model) -> Model:
    """A checkpoint as a model beside another: same device and precision, no gradients. The last four stay in memory.

    Raises:
        TrainingError: it cannot be loaded.
    """
    try:
        return _loaded(str(Path(folder).resolve()), digest_of(folder), like.device, like.dtype)
    except ModelError as error:
        raise TrainingError(f"the checkpoint {folder} cannot be loaded: {error}") from None


@dataclass(frozen=True, repr=False)
class Preserve(Clamp):
    """A part's output, pattern, query, key or value as it is at a checkpoint, on the same rows:

        value' = value + s(t) * (value of the checkpoint's model - value)

    The checkpoint's model runs on the same rows without gradient and unclamped; its value is a constant in the graph. Without
    a checkpoint it is the learning model itself, unclamped, at the same step: with an ablation of an earlier part beside it,
    what is preserved is as it would be without the ablation.

    Args:
        sites: L0.h1 (a head's output), L0.h1.pattern, L0.h1.q, L0.kv0.k, L0.kv0.v, L0.mlp, resid.post, or any site that can be
            written; patterns of sites, or several.
        checkpoint: a folder that `Model.load` loads; None: the model itself.
        schedule: when and how strongly.

    Cost: one forward pass without gradient at each step in which it acts, for each `Preserve`.

    Raises:
        TrainingError: no such checkpoint; when it runs: values of other shapes.
        SiteError: when it runs: no such site, in this model or in the checkpoint's.

    Paper: https://arxiv.org/abs/2404.07129 (preserved patterns, queries, keys and values).
    """

    sites: Sites
    checkpoint: str | Path | None = None
    schedule: Schedule = ALWAYS

    def __post_init__(self) -> None:
        if self.checkpoint is not None:
            digest_of(self.checkpoint)

    def __repr__(self) -> str:
        as_in = "itself" if self.checkpoint is None else f"{Path(self.checkpoint).name}:{digest_of(self.checkpoint)}"
        return f"Preserve({', '.join(plain(self.sites))} as in {as_in}, {self.schedule!r})"

    def edits(self, model: Model, step: int, rows: Rows) -> Edits:
        """The reference's values of these rows, mixed in at this step's strength."""
        strength = self.schedule(step)
        if not strength:
            return {}
        reference = model if self.checkpoint is None else loaded(self.checkpoint, model)
        return as_in(model, reference, plain(self.sites), rows, strength)


@dataclass(frozen=True, repr=False)
class Match(Clamp):
    """A part held to another run as it learns: to that run's last checkpoint at or before this step, on the same rows:

        value'   = value + s(t) * (value of the other run's model - value)
        pattern' = pattern + s(t) * (p^(1/T) / sum of p^(1/T) - pattern),   p: the other run's pattern, T: temperature

    The other model runs without gradient and unclamped; what it gives is a constant in the graph. T below 1 sharpens its
    patterns (0: all weight on the largest), above 1 flattens them. There is no penalty on the distance: strength below 1 holds
    half-way instead, and shows in the forward pass what it does.

    Args:
        sites: as in `Preserve`.
        run: a run's folder with checkpoints from step 0 on.
        schedule: when and how strongly.
        temperature: of patterns; 1: as they are.

    Cost: one forward pass without gradient at each step in which it acts; each checkpoint is loaded once.

    Raises:
        TrainingError: no such run, a temperature below 0, a temperature for what is no pattern; when it runs: no checkpoint at
            or before the step, values of other shapes.
        SiteError: when it runs: no such site.

    Paper: https://arxiv.org/abs/2404.07129 (patterns rescaled by a temperature).
    """

    sites: Sites
    run: str | Path
    schedule: Schedule = ALWAYS
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not steps_of(Path(self.run)):
            raise TrainingError(f"{self.run} was to be matched and holds no checkpoints: give the folder of a run")
        if not self.temperature >= 0:
            raise TrainingError(f"a temperature of {self.temperature} was given: choose 0 or more")
        if self.temperature != 1 and not all(
            site.endswith("pattern") for site in (s.partition("@")[0] for s in plain(self.sites))
        ):
            raise TrainingError(f"a temperature is for patterns (L0.h0.pattern), not for {', '.join(plain(self.sites))}")

    def __repr__(self) -> str:
        run = Path(self.run)
        kept = " ".join(f"{step}:{digest_of(folder_of(run, step))}" for step in steps_of(run))
        return f"Match({', '.join(plain(self.sites))} to [{kept}], {self.schedule!r}, temperature={self.temperature})"

    def edits(self, model: Model, step: int, rows: Rows) -> Edits:
        """The other run's values of these rows, mixed in at this step's strength."""
        strength = self.schedule(step)
        if not strength:
            return {}
        before = [at for at in steps_of(Path(self.run)) if at <= step]
        if not before:
            raise TrainingError(
                f"{self.run} has no checkpoint at or before step {step}: match from a later step on, or keep step 0 there"
            )
        reference = loaded(folder_of(Path(self.run), before[-1]), model)
        return as_in(model, reference, plain(self.sites), rows, strength, self.temperature)


def as_in(model: Model, reference: Model, sites: tuple[str, ...], rows: Rows, strength: float, temperature: float = 1.0) -> Edits:
    """Edits that put a reference's values of the same rows at the sites.

    Raises:
        SiteError: the reference has no such site.
    """
    found = places(model, sites)
    at = {place: Site(place.site.kind, place.site.layer) for place in found}
    values = reference.record(rows.batch, set(at.values()))
    if temperature != 1:
        values = {site: sharpened(value, temperature) for site, value in values.items()}
    return {place.site: As(place, values[at[place]], strength) for place in found}


def sharpened(pattern: Tensor, temperature: float) -> Tensor:
    """p^(1/T), each row summing to what it did; at T = 0 all on the largest, shared where several are."""
    total = pattern.sum(-1, keepdim=True)
    if temperature == 0:
        power = (pattern >= pattern.amax(-1, keepdim=True)).to(pattern)
    else:
        power = (pattern / pattern.amax(-1, keepdim=True).clamp_min(torch.finfo(pattern.dtype).tiny)) ** (1 / temperature)
    return power / power.sum(-1, keepdim=True) * total


@dataclass(frozen=True, eq=False)
class As:
    """value + weight * (the reference's value - value)."""

    place: Place
    target: Tensor
    strength: float

    def __call__(self, value: Tensor, seen: Seen, /) -> Tensor:
        if value.shape != self.target.shape:
            raise TrainingError(
                f"{self.place.site} is {tuple(value.shape)} here and {tuple(self.target.shape)} in the reference: give a checkpoint of "
                "a model of the same sizes"
            )
        return toward(value, self.target, self.place.weight(self.strength, value.dim(), value), seen.site.kind)
