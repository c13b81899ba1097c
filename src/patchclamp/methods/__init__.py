"""Methods: how much each part matters, one method a file. The folder is the registry: `--method exact` finds methods/exact.py.

A method is a function `samples(parts, batch, fallback, metric, seed) -> [part, example]`: each counted part's effect on each
example's benefit (the metric, signed so that more is better). Positive: the part facilitates the behaviour.

Beside the methods: `compare` (methods beside the exact effects), `sanity` (does a method follow the weights?) and `largest_missed`
(how large an effect it may have missed).
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import MetricError, NumericsError
from patchclamp.methods._notes import noting
from patchclamp.metrics import Metric, metric_named
from patchclamp.parts import Fallback, Parts
from patchclamp.scores import Part, Scores
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

if TYPE_CHECKING:
    from patchclamp.methods._agreement import compare
    from patchclamp.methods._bound import largest_missed
    from patchclamp.methods._sanity import sanity

__all__ = [
    "Direction", "Samples", "attribute", "compare", "counted", "effects", "groups_of", "largest_missed", "method_named", "method_names",
    "name_of", "noise_floor", "passes_of", "sanity",
]  # fmt: skip
_HOMES = {"compare": "_agreement", "largest_missed": "_bound", "sanity": "_sanity"}
"""Names that stand on what is below, and so are loaded when they are first used. Their files begin with `_`: they are no methods."""

Samples = Callable[[Parts, Batch, Fallback, Metric, int], Float[Tensor, "part example"]]
Direction = Literal["noising", "denoising"]


def method_names() -> tuple[str, ...]:
    """The methods there are."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")))


def method_named(name: str) -> Samples:
    """The method called `name`; raises `MetricError` naming those there are."""
    if name not in method_names():
        raise MetricError(f"there is no method {name!r}: choose from {', '.join(method_names())}")
    return importlib.import_module(f"{__name__}.{name}").samples


def passes_of(name: str, layers: int, parts: int) -> tuple[int, int]:
    """(forward, backward) passes over a batch that the method called `name` takes of so many layers and parts, where it says so."""
    if name not in method_names():
        raise MetricError(f"there is no method {name!r}: choose from {', '.join(method_names())}")
    return importlib.import_module(f"{__name__}.{name}").passes(layers, parts)


def name_of(method: str | Samples) -> str:
    """What scores of a method are called: a function of the caller's own closes gates, so it is exact."""
    return method if isinstance(method, str) else "exact"


def effects(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    method: str | Samples = "exact",
    *,
    metric: str | Metric | None = None,
    direction: Direction = "noising",
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "part example"]:
    """What `attribute` is made of: each counted part's effect on each example's benefit, on the CPU."""
    chosen = metric if isinstance(metric, Metric) else metric_named(metric or examples.metric)
    samples, pieces, done = method_named(method) if isinstance(method, str) else method, [], 0
    for whole in examples.batches(batch_size):
        batch = whole.swapped() if direction == "denoising" else whole
        pieces.append(samples(parts, batch, fallback, chosen, seed).cpu())
        done += len(whole)
        if progress is not None:
            progress(done, len(examples))
    table = torch.cat(pieces, 1) * (-1.0 if direction == "denoising" else 1.0)
    if not bool(torch.isfinite(table).all()):
        raise NumericsError(
            f"the method {name_of(method)} gave values that are not finite: try float32, or another fallback than {fallback.kind}"
        )
    return table


def attribute(
    parts: Parts,
    examples: Examples,
    fallback: Fallback,
    method: str | Samples = "exact",
    *,
    metric: str | Metric | None = None,
    direction: Direction = "noising",
    batch_size: int = 64,
    seed: int = 0,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """How much each part matters, with intervals.

    Args:
        parts: which parts (`nodes(model)`).
        examples: on which prompts.
        fallback: what a closed gate passes (`parts.fallback(...)`).
        method: a file of methods/ (`method_names()`); or a function as methods have it, taken to be exact.
        metric: by default the task's.
        direction: "noising" closes a part on the clean prompt, score = benefit(open) - benefit(closed); "denoising" runs the
            corrupt prompt and a closed gate puts in the clean value, score = benefit(closed) - benefit(open). In both,
            positive means that the part's clean value helps.
        batch_size: examples at once.
        seed: of the bootstrap, and of methods that draw.
        about: provenance to add.
        progress: called with (examples done, examples in all).

    Cost: that of the method, per batch (see its file).
    """
    with noting() as notes:
        table = effects(
            parts,
            examples,
            fallback,
            method,
            metric=metric,
            direction=direction,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    noise = noise_floor(parts, examples, fallback, metric) if name_of(method) == "exact" else None
    name = metric.name if isinstance(metric, Metric) else metric or examples.metric
    facts = {"method": name_of(method), "metric": name, "fallback": fallback.kind, "n": len(examples), "seed": seed,
             "direction": direction, "model": parts.model.name, "task": examples.task}  # fmt: skip
    facts |= notes if noise is None else {**notes, "noise_floor": noise}
    groups = groups_of(examples)
    return Scores.from_samples(counted(parts), table.double().numpy(), {**facts, **(about or {})}, groups, seed=seed, noise=noise)


def noise_floor(
    parts: Parts, examples: Examples, fallback: Fallback, metric: str | Metric | None = None, tries: int = 4
) -> float:
    """What rounding alone can make of an effect: the same settings once more, alone and among other prompts.

    The largest difference between `tries` parts' effects on up to 4 examples together, and on each of these examples by
    itself, in whole runs each. An effect no larger than this is below noise.
    """
    some = examples.take(range(min(4, len(examples))))
    chosen = counted(parts)[:: max(1, len(counted(parts)) // tries)][:tries]
    which = metric if isinstance(metric, Metric) else metric_named(metric or examples.metric)
    gates = torch.cat([parts.open(), *(parts.without([site]) for site in chosen)])
    together = parts.measure(some.batch(), gates, fallback, which)
    alone = [
        torch.cat([parts.measure(batch, one[None], fallback, which) for one in gates])
        for batch in (some.batch([number]) for number in range(len(some)))
    ]
    differences = [one[:1] - one[1:] for one in (together, torch.cat(alone, 1))]
    return float((differences[0] - differences[1]).abs().max())


def counted(parts: Parts) -> list[Part]:
    """The parts that methods score, in order."""
    return [parts.labels[number] for number in parts.counted]


def groups_of(examples: Examples) -> list[str]:
    """Which examples belong together when intervals are drawn: those of a named group, else a pair and its mirror."""
    return [example.group or str(sorted(str(prompt) for prompt in (example.clean, example.corrupt))) for example in examples]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
