"""What a plan asks of a model: which parts, and what a closed gate passes."""

import warnings

from patchclamp.errors import PatchclampError
from patchclamp.models.memory import budget
from patchclamp.models.model import Model
from patchclamp.parts import Fallback, Nodes, Tied, nodes, tied
from patchclamp.study.plan import Plan
from patchclamp.tasks import Examples

Whole = Nodes | Tied
"""Heads and MLPs, or a mixture of parts of any kind."""


def parts_of(plan: Plan, model: Model, memory: int | str | None = None) -> Whole:
    """Heads and MLPs, or the mixture that the plan names; the embedding is there in both, open and never counted.

    Raises:
        SiteError: a pattern of the mixture fits nothing in the model, or what cannot be written.
        GateError: two parts of the mixture are the same sites.
    """
    room = budget(model.device, memory)
    if plan.tied:
        return tied(model, ["embed", *plan.tied], memory=room, routing=plan.routing)
    return nodes(model, memory=room, routing=plan.routing)


def check_other(plan: Plan, other: Model | None) -> None:
    """Refuse another model without a fallback that takes its values, and the reverse.

    Raises:
        PatchclampError: one without the other.
    """
    wanted = "model" in (plan.fallback, plan.second)
    if wanted and other is None:
        raise PatchclampError("the fallback 'model' takes another model's values, and none was given: name it (--other MODEL)")
    if other is not None and not wanted:
        raise PatchclampError(
            f"another model was given ({other.name}), and no fallback takes its values: ask for one (--fallback model)"
        )


def rule_of(parts: Whole, kind: str, fit: Examples, other: Model | None) -> tuple[Fallback, tuple[str, ...]]:
    """The fallback called `kind`, and what the reader must know of it.

    Raises:
        GateError: see `Gated.fallback`.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        rule = parts.fallback(kind, fit, other if kind == "model" else None)
    return rule, tuple(str(one.message) for one in said)


def told(kind: str, other: Model | None) -> str:
    """The fallback in a reader's words: another model is named."""
    return kind if kind != "model" or other is None else f"model ({other.name.rstrip('/').rpartition('/')[2] or other.name})"
