"""Causal mediation: through which parts, at which positions, a change of operands or of the operator changes the answer.

P098, Stolfo, Belinkov and Sachan 2023, https://arxiv.org/abs/2305.15054. r is the clean prompt's answer, r' the corrupt prompt's, P the
clean run's probabilities, P* those with a part's value put in from the corrupt prompt:

    IE = 1/2 [ (P*(r') - P(r')) / P(r')  +  (P(r) - P*(r)) / P*(r) ]         how far the answer goes over, relative to where it was
    RI = sum of log(IE + 1) over some parts / the same over all              relative importance

Side by side for several changes (operands, operator; number retrieval) RI says which parts serve which.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.methods import groups_of
from patchclamp.metrics import METRICS
from patchclamp.models.model import Model
from patchclamp.parts import Fallback, Parts, gated
from patchclamp.scores import Part, Scores
from patchclamp.sites import Site
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch


@dataclass(frozen=True, eq=False)
class Mediated:
    """Indirect effects of one change.

    Attributes:
        effects: IE per part, with intervals over groups of prompts.
        task: of the change.
    """

    effects: Scores
    task: str

    def importance(self, among: Callable[[Part], bool]) -> float:
        """RI of the parts that `among` takes; parts whose IE is below 0 count as 0."""
        logs = np.log1p(np.maximum(self.effects.values(), 0))
        mine = np.array([among(part) for part in self.effects.sites])
        return float(logs[mine].sum() / logs.sum()) if logs.sum() > 0 else 0.0

    def grid(self) -> dict[str, list[tuple[int, float]]]:
        """By position, the effect of each layer: what the paper's heat maps show."""
        found: dict[str, list[tuple[int, float]]] = {}
        for site, value in zip(self.effects.sites, self.effects.values(), strict=True):
            assert isinstance(site, Site)
            found.setdefault(f"{site.kind}@{site.position}", []).append((site.layer or 0, float(value)))
        return found


def mediation(
    model: Model,
    examples: Examples,
    sites: Sequence[Site | str] = ("L*.mlp", "L*.attn"),
    positions: Sequence[int | str] = ("end",),
    *,
    batch_size: int = 64,
    seed: int = 0,
) -> Mediated:
    """Indirect effect of each part on a change of the answer.

    Args:
        model: the model.
        examples: pairs whose corrupt prompt has an answer of its own ('wrong'): operands exchanged, the operator exchanged.
        sites: the parts.
        positions: where each is patched: positions or named spans.
        batch_size: examples at once.
        seed: of the intervals.

    Cost: two forward passes over the examples per part and position.

    Raises:
        GateError: pairs without an answer to the corrupt prompt.
    """
    if any(not example.wrong or example.corrupt is None for example in examples) or not len(examples):
        raise GateError(
            "mediation follows an answer into another: give pairs whose 'wrong' is what the corrupt prompt's answer is"
        )
    parts = gated(model, sites, positions)
    rule, pieces = parts.fallback("resample"), list[Tensor]()
    turned = replace(examples, items=tuple(replace(item, answers=item.wrong, wrong=item.answers) for item in examples))
    for batch, other in zip(examples.batches(batch_size), turned.batches(batch_size), strict=True):
        right, wrong = (_log_probabilities(parts, one, rule) for one in (batch, other))
        pieces.append(0.5 * (torch.expm1(wrong[1:] - wrong[0]) + torch.expm1(right[0] - right[1:])))
    table = torch.cat(pieces, 1).double().cpu().numpy()
    about = {"method": "causal mediation", "metric": "relative probability", "fallback": "resample", "n": len(examples), "seed": seed,
             "model": model.name, "task": examples.task}  # fmt: skip
    return Mediated(Scores.from_samples(parts.labels, table, about, groups=groups_of(examples), seed=seed), examples.task)


def _log_probabilities(parts: Parts, batch: Batch, rule: Fallback) -> Float[Tensor, "setting example"]:
    """Of the answer: in the clean run, then with each part patched."""
    gates = torch.cat([parts.open(), *(parts.without([part]) for part in parts.labels)])
    return parts.measure(batch, gates, rule, METRICS["log_probability"]).double()


def contrast(found: Collection[Mediated], among: Callable[[Part], bool]) -> dict[str, float]:
    """Relative importance of the same parts in several changes, by task."""
    return {one.task: one.importance(among) for one in found}
