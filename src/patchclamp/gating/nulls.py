"""Nulls: the same fit where there is nothing to find. What gates still say there, they say of noise."""

import copy

import torch

from patchclamp.models.model import Model
from patchclamp.parts import Fallback, Gated, Parts, Tied
from patchclamp.parts.fallbacks import Mean
from patchclamp.parts.other import Other
from patchclamp.tasks import Examples

SHUFFLED, REINITIALISED = "shuffled answers", "re-initialised weights"


def reinitialised(model: Model, seed: int) -> Model:
    """A copy of the model whose every weight tensor is drawn anew: normal, with that tensor's own mean and standard deviation.

    The model that is given is left as it is. Cost: the memory of a second model.
    """
    twin, draws = copy.deepcopy(model.hf), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in twin.parameters():
            if weight.is_floating_point():
                values = weight.float()
                noise = torch.randn(weight.shape, generator=draws).to(values.device)
                weight.copy_(values.mean() + values.std(correction=0) * noise)
    return Model.load(twin, tokenizer=model.tokenizer)


def on_reinitialised(parts: Parts, fit: Examples, fallback: Fallback, seed: int) -> tuple[Parts, Fallback]:
    """The same parts of a re-initialised copy of their model, and the same rule of what a closed gate passes, learned there.

    Another model whose values are put in is re-initialised too, with other draws.
    """
    if isinstance(fallback, Other):
        assert isinstance(parts, Gated | Tied)  # no other parts have that rule
        twin = parts.on(reinitialised(parts.model, seed))
        return twin, twin.fallback("model", other=reinitialised(fallback.model, seed + 1))
    kind = ":".join([fallback.kind, *([fallback.by] if isinstance(fallback, Mean) else [])])
    twin = parts.on(reinitialised(parts.model, seed))
    return twin, twin.fallback(kind, fit=fit)
