"""Clamps from text, as the command line gives them, and a trial of whether they fit a model."""

from collections.abc import Callable, Iterable, Mapping

import torch

from patchclamp.errors import TrainingError
from patchclamp.models.model import Model
from patchclamp.training.clamp import Clamp, joined
from patchclamp.training.clamps.copies import Copy
from patchclamp.training.clamps.patterns import Forbid, Force
from patchclamp.training.clamps.reference import Match, Preserve
from patchclamp.training.clamps.schedule import ALWAYS, Schedule
from patchclamp.training.clamps.slices import slices
from patchclamp.training.clamps.values import Ablate
from patchclamp.training.clamps.weights import Freeze, Graft
from patchclamp.training.data import Rows
from patchclamp.training.forward import logits_of

FORMS: Mapping[str, str] = {
    "force": "SITE=TARGET, such as L0.h0.pattern=previous",
    "forbid": "SITE=RELATION, such as L0.h*.pattern=previous",
    "ablate": "SITE or SITE=mean, such as L1.h2",
    "copy": "SITE, such as L1.h0.pattern",
    "freeze": "PART, such as L0.h0",
    "preserve": "SITE=CHECKPOINT, or SITE=itself for the model unclamped",
    "match": "SITE=RUN, such as L0.h0.pattern=runs/other",
    "graft": "PART=CHECKPOINT (the weights are taken when the schedule starts)",
}
"""What each kind of clamp is written as."""


def read(kind: str, text: str, schedule: Schedule = ALWAYS) -> Clamp:
    """A clamp from its kind and its text (`FORMS`).

    Raises:
        TrainingError: a kind that there is not, or a text that does not read; what the clamp refuses.
    """
    site, equals, value = (piece.strip() for piece in text.partition("="))
    made: dict[str, Callable[[], Clamp]] = {
        "force": lambda: Force(site, value, schedule),
        "forbid": lambda: Forbid(site, value, schedule),
        "ablate": lambda: Ablate(site, value or "zero", schedule),
        "copy": lambda: Copy(site, schedule=schedule),
        "freeze": lambda: Freeze(site, schedule),
        "preserve": lambda: Preserve(site, None if value == "itself" else value, schedule),
        "match": lambda: Match(site, value, schedule),
        "graft": lambda: Graft(site, value, schedule.start),
    }
    if kind not in made:
        raise TrainingError(f"there is no clamp {kind!r}: choose {', '.join(made)}")
    must = kind not in ("ablate", "copy", "freeze")
    if not site or (must and not value) or (kind in ("copy", "freeze") and equals) or (equals and not value):
        raise TrainingError(f"--{kind} {text!r} does not read: give {FORMS[kind]}")
    return made[kind]()


def require_fit(model: Model, clamps: Iterable[Clamp], rows: Rows) -> None:
    """Try clamps on a model before anything is trained: one forward pass over some rows with each at the step where it starts.

    Raises:
        SiteError, TrainingError, GateError: what a clamp asks for and the model (or a reference) has not.
    """
    rows = rows.to(model.device)
    for clamp in clamps:
        parts = getattr(clamp, "parts", None)
        if parts is not None:
            slices(model, (parts,) if isinstance(parts, str) else tuple(map(str, parts)))
        edits = clamp.edits(model, getattr(clamp, "schedule", ALWAYS).start, rows)
        with torch.no_grad(), joined(model, [edits], rows):
            logits_of(model, rows)
