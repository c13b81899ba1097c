"""Pieces: the share of one plan's examples that one worker scores, and how the shares become the same map again.

Whatever gives each part a number on each example asks `parts.measure` or `parts.gradient` for whole batches of examples. A piece
asks the same of some of these batches and notes the answers; the map then runs as always, and finds the answers where it asks
for them. What no piece was asked (a circuit's curve, learned gates) is computed there. So nothing is joined by rules of its
own, and since pieces are whole batches, numbers are those of an undivided map bit for bit on the same kind of machine.
"""

import hashlib
import inspect
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from patchclamp.methods import effects
from patchclamp.metrics import Metric, metric_named
from patchclamp.models.model import Model
from patchclamp.parts import Fallback
from patchclamp.store import Run
from patchclamp.study import Work, begin, score
from patchclamp.sweep.case import Case
from patchclamp.tasks import Examples, Task
from patchclamp.tasks._batch import Batch
from patchclamp.tasks._split import Split

Answers = Mapping[str, Any]
"""By the hash of what was asked: values [setting, example], or (values, slopes)."""
BATCH: int = inspect.signature(effects).parameters["batch_size"].default
"""Examples that are scored at once: the size of what is dealt out."""
ON_CONFIRM, ON_SELECT = ("gate", "attribute", "verify"), ("discover", "trust")
"""Which steps score the confirm set, and which the select set."""
P = TypeVar("P")


def noting(parts: P, answers: MutableMapping[str, Any] | Answers, note: bool = False) -> P:
    """The same parts, which look answers up before they compute them, and where `note` keep what they compute.

    Parts that are made from these (of another model, under noise) know nothing of the answers.
    """
    kind = type(parts)
    made: Any = object.__new__(type(kind.__name__, (_Noting, kind), {"_kind": kind}))
    made.__dict__.update({**vars(parts), "_answers": answers, "_note": note})
    return made


class _Noting:
    """What stands before the class of the parts."""

    def measure(self, batch: Batch, gates: Tensor, fallback: Fallback, metric: Metric | None = None) -> Any:
        return self._ask("measure", batch, gates, fallback, metric)

    def gradient(self, batch: Batch, gates: Tensor, fallback: Fallback, metric: Metric | None = None) -> Any:
        return self._ask("gradient", batch, gates, fallback, metric)

    def _ask(self, what: str, batch: Batch, gates: Tensor, fallback: Fallback, metric: Metric | None) -> Any:
        me: Any = self
        key = _key(what, batch, gates, fallback, metric or metric_named(batch.metric))
        if key in me._answers:
            return _moved(me._answers[key], me.model.device)
        found = getattr(super(), what)(batch, gates, fallback, metric)
        if me._note:
            me._answers[key] = _moved(found, torch.device("cpu"))
        return found

    def __copy__(self) -> Any:
        me: Any = self
        plain = object.__new__(me._kind)
        plain.__dict__.update({name: value for name, value in vars(self).items() if name not in ("_answers", "_note")})
        return plain


def _moved(answer: Any, device: torch.device) -> Any:
    return tuple(value.to(device) for value in answer) if isinstance(answer, tuple) else answer.to(device)


def _key(what: str, batch: Batch, gates: Tensor, fallback: Fallback, metric: Metric) -> str:
    """SHA-256 of all that an answer depends on within one plan of one model."""
    state = hashlib.sha256(f"{what} {fallback.kind} {metric.name} {metric.sign}".encode())
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    for name, value in sorted({**tensors, **batch.spans, "gates": gates}.items()):
        plain = value.detach().cpu().contiguous()
        state.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
        state.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def batches_of(model: Model, task: Task, case: Case) -> int:
    """How many batches the larger of the scored sets has: there is nothing to gain from more pieces."""
    split = task.split(model.tokenizer, case.plan.n, seed=case.plan.seed)
    asked = [split.confirm] * _any(case, ON_CONFIRM) + [split.select] * _any(case, ON_SELECT)
    return max(-(-len(examples) // BATCH) for examples in asked)


def answers(model: Model, task: Task, case: Case, number: int, of: int) -> dict[str, Any]:
    """What piece `number` of `of` finds. Cost: its share of the map's scoring, and the baseline."""
    work = begin(model, task, case.plan, Run.unsaved())
    fit, select, confirm = work.split
    mine = Split(fit, share(select, number, of), share(confirm, number, of))
    do = [step for step in case.steps if len(mine.confirm if step in ON_CONFIRM else mine.select)]
    noted: dict[str, Any] = {}
    part: Work = replace(work, split=mine, parts=noting(work.parts, noted, note=True), run=Run.unsaved(), found={})
    score(part, do)
    return noted


def share(examples: Examples, number: int, of: int) -> Examples:
    """The whole batches of `examples` that belong to piece `number` of `of`, as even as batches go."""
    total = -(-len(examples) // BATCH)
    first, last = (total * end // of for end in (number, number + 1))
    return examples.take(range(first * BATCH, min(last * BATCH, len(examples))))


def _any(case: Case, steps: Sequence[str]) -> bool:
    return bool(set(case.steps) & set(steps))
