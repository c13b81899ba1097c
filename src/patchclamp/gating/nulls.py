"""Nulls: the same fit where there is nothing to find. What gates still say there, they say of noise."""

import copy
import warnings
from typing import Any

import torch

from patchclamp.models.model import Model
from patchclamp.parts import Fallback, Gated, Parts, Tied
from patchclamp.parts.fallbacks import Mean
from patchclamp.parts.other import Other
from patchclamp.tasks import Examples

SHUFFLED, REINITIALISED = "shuffled answers", "re-initialised weights"
PROMPTS = 64  # on which the logits of the model and of its twin are compared


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


def twin_of(model: Model, examples: Examples, seed: int) -> tuple[Model, float]:
    """A re-initialised copy whose logits are spread no wider than the model's, and by how much they had to be shrunk (1: not).

    A null is to say what gates find of noise in nats, so its logits must be of the model's scale. Weights of few large entries,
    drawn anew, give logits thousands wide: a gate then moves the answer by hundreds of nats, and the bar is about nothing. Where
    the standard deviation over tokens, at the prompts' targets, is larger than the model's, the copy's unembedding is divided by
    the ratio. Cost: two forward passes over at most 64 prompts.
    """
    twin, batch = reinitialised(model, seed), examples.take(range(min(PROMPTS, len(examples)))).batch()
    ratio = _spread(twin, batch) / max(_spread(model, batch), 1e-12)
    if ratio <= 1:
        return twin, 1.0
    unembed: Any = twin.anatomy.unembed
    with torch.no_grad():  # a parameter of its own: where it is tied to the embedding, that stays
        unembed.weight = torch.nn.Parameter(unembed.weight / ratio)
        if getattr(unembed, "bias", None) is not None:
            unembed.bias = torch.nn.Parameter(unembed.bias / ratio)
    return Model.load(twin.hf, tokenizer=model.tokenizer), ratio


def _spread(model: Model, batch: Any) -> float:
    with torch.no_grad():
        return float(model.target_logits(batch)[0].double().std(-1).mean())


def on_twin(parts: Parts, twin: Model, fit: Examples, fallback: Fallback, seed: int) -> tuple[Parts, Fallback]:
    """The same parts of a re-initialised copy of their model, and the same rule of what a closed gate passes, learned there.

    Another model whose values are put in is re-initialised too, with other draws.
    """
    there = parts.on(twin)
    if isinstance(fallback, Other):
        assert isinstance(there, Gated | Tied)  # no other parts have that rule
        with warnings.catch_warnings():  # of what no gate sees: of two draws of all weights that is said of everything
            warnings.simplefilter("ignore")
            return there, there.fallback("model", other=reinitialised(fallback.model, seed + 1))
    kind = ":".join([fallback.kind, *([fallback.by] if isinstance(fallback, Mean) else [])])
    return there, there.fallback(kind, fit=fit)


def on_reinitialised(parts: Parts, fit: Examples, fallback: Fallback, seed: int) -> tuple[Parts, Fallback]:
    """`on_twin` of `twin_of`: parts and rule on a copy whose weights are drawn anew."""
    return on_twin(parts, twin_of(parts.model, fit, seed)[0], fit, fallback, seed)
