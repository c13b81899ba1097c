"""Rules by name: what `parts.fallback(kind)` gives."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchclamp.errors import GateError
from patchclamp.models.model import Model
from patchclamp.parts.fallbacks import FALLBACKS, Fallback, Resample, Zero, learn_mean
from patchclamp.parts.optimal import Learner, learn_optimal
from patchclamp.parts.other import Other, check_alike, warn_of_unseen
from patchclamp.sites import Site
from patchclamp.tasks import Examples

if TYPE_CHECKING:
    from patchclamp.parts.gated import Gated


def rule(parts: "Gated", kind: str, fit: Examples | None = None, other: Model | None = None) -> Fallback:
    """The rule called `kind` for the places of some parts; see `Gated.fallback`."""
    if other is not None and kind != "model":
        raise GateError(f"another model was given ({other.name}), and the fallback {kind!r} takes none: ask for 'model'")
    if kind == "model":
        if other is None:
            raise GateError("the fallback 'model' takes another model's values: give it, other=Model.load(...)")
        check_alike(parts.model, other)
        warn_of_unseen(parts.places, parts.model, other)
        return Other(parts.on(other).record, other)
    return plain_rule(parts, parts.places, kind, fit, more=", model")


def plain_rule(parts: Learner, places: Sequence[Site], kind: str, fit: Examples | None, more: str = "") -> Fallback:
    """The rule called `kind` that needs no other model: of what `parts` record at some places; `more` are others by name."""
    if kind == "zero":
        return Zero(places, parts.model.device)
    if kind == "resample":
        return Resample(parts.record)
    if kind.partition(":")[0] == "mean":
        if fit is None or len(fit) == 0:
            raise GateError("the fallback 'mean' is learned: give the fit set, fit=")
        return learn_mean(parts.record, fit, by=kind.partition(":")[2] or None)
    if kind == "optimal":
        return learn_optimal(parts, fit)
    raise GateError(
        f"there is no fallback {kind!r}: choose from {', '.join(FALLBACKS)} (mean:position, mean:span, mean:all){more}"
    )
