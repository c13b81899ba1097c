"""What edges and neurons take: a screen, exact effects of what it ranks first, a search, and the circuit judged.

How many exact effects it takes until what may have been missed is bounded is not known before: expected is the first look, at most
the budget. Settings are counted as whole passes, at most; expected, from the block on that a part acts in.
"""

from collections.abc import Collection
from dataclasses import replace

from patchclamp.discover import sizes_of
from patchclamp.discover.acdc import ALL, FEWEST
from patchclamp.discover.neuron_paths import CANDIDATES as NEURONS
from patchclamp.discover.neuron_paths import DRAWS
from patchclamp.discover.order import stage
from patchclamp.discover.screen import planned
from patchclamp.methods import passes_of
from patchclamp.parts import Parts
from patchclamp.study.cost.job import Job, Line, line, total
from patchclamp.study.cost.work import Amount, Shape
from patchclamp.study.located import parts_of
from patchclamp.study.searches import CANDIDATES, PAIRS, SEEDS, mask_settings
from patchclamp.tasks import Examples
from patchclamp.trust import band_sizes, curve_sizes

KEPT = 0.1
"""Of the parts, how many are expected in a circuit of edges or neurons."""


def many(job: Job, do: Collection[str]) -> list[Line]:
    """The pieces of `attribute`, `discover` and `trust` on edges or neurons."""
    parts, confirm, select = parts_of(job.plan, job.model, job.parts.memory), job.split.confirm, job.split.select
    found: list[Line] = []
    if "attribute" in do:
        found.append(_screen(job, parts, "screened", confirm))
    if {"discover", "trust"} & set(do):
        found += [_screen(job, parts, "screened-select", select), search(job, parts)]
    if "trust" in do:
        size = round(KEPT * len(parts.counted))
        grid = curve_sizes(len(parts.counted), size)
        settings = 4 + 2 * len(grid) + size + job.plan.random_circuits + len(band_sizes(grid, size))
        found.append(_line(job, "trust", "circuit against random ones", confirm, settings, settings + len(parts.counted) - size))
    return found


def _screen(job: Job, parts: Parts, step: str, examples: Examples) -> Line:
    _, first, most = planned(len(parts.counted))
    forward, both = passes_of(job.plan.screen, job.model.layers, len(parts.counted))
    found = _line(job, step, "exact effects of what the screen ranks first", examples, first, most, _late(job, parts), both)
    prompts = sum(shape.prompts for shape in job.shapes(examples))
    cheap = Amount(
        plain_calls=float(forward - both), plain=(forward - both) * prompts, sloped_calls=float(both), sloped=both * prompts
    )
    return replace(found, expected=found.expected + cheap, most=found.most + cheap)


def search(job: Job, parts: Parts) -> Line:
    """The plan's search of a circuit."""
    count, select = len(parts.counted), job.split.select
    if job.plan.search == "threshold":
        sizes = len(sizes_of(count))
        return _line(job, "discover", "the circuit", select, sizes, sizes)
    if job.plan.search == "greedy":
        few = min(CANDIDATES, count)
        return _line(job, "greedy", "greedy search", select, few * (few + 1) // 4, few * (few + 1) // 2)
    if job.plan.search == "masks":
        return _masks(job)
    if job.plan.search == "codes":
        shapes = job.shapes(select.take(range(min(PAIRS, len(select)))))
        twice = total(Amount(plain_calls=2.0, plain=2.0 * shape.prompts) for shape in shapes)
        return line(job, "codes", "codes of heads", shapes, 1, twice)
    if job.plan.search == "path":
        return _path(job)
    visits = len(ALL) * count
    # edges that no longer lead to the logits are spared; of each group that runs together all but one may be thrown away
    return _line(job, "acdc", "parts closed one after the other", select, visits // 2, visits * FEWEST, _late(job, parts))


def _masks(job: Job) -> Line:
    """A forward and a backward pass over a batch per update of each mask."""
    settings = mask_settings(job.plan.seed, job.plan.updates)
    few = job.split.select.take(range(min(settings.batch, len(job.split.select))))
    shapes, runs = job.shapes(few), SEEDS * settings.updates
    amount = total(Amount(sloped_calls=float(runs), sloped=float(runs * shape.prompts)) for shape in shapes)
    return line(job, "masks", "masks learned", shapes, runs, amount, folded=1, backward=True)


def _path(job: Job) -> Line:
    """Per layer, slopes and the closing of each candidate; by itself, the slopes and activations of all; then the comparisons."""
    layers, shapes = job.model.layers, job.shapes(job.split.select)
    chosen = [_amount(shape, layers * (NEURONS + 1) + 2 * (DRAWS + 3) + 1, 1.0) for shape in shapes]
    slopes = [Amount(sloped_calls=layers + 1.0, sloped=(layers + 1.0) * shape.prompts) for shape in shapes]
    return line(
        job, "path", "neurons chosen layer by layer", shapes, layers * (NEURONS + 1), total([*chosen, *slopes]), folded=NEURONS + 1,
        backward=True,
    )  # fmt: skip


def _late(job: Job, parts: Parts) -> float:
    """The mean share of a pass that runs behind the block in which a part acts, that block with it."""
    blocks = job.engine.shares.blocks
    behind = [sum(blocks[max(0, stage(parts.labels[number])[0]) :]) for number in parts.counted]
    return sum(behind) / len(behind) + job.engine.shares.unembed


def _line(
    job: Job, step: str, title: str, examples: Examples, settings: int, most: int, share: float = 1.0, both: int = 0
) -> Line:
    shapes = job.shapes(examples)
    expected, worst = (total(_amount(shape, many, part) for shape in shapes) for many, part in ((settings, share), (most, 1.0)))
    return line(job, step, title, shapes, settings, expected, worst, backward=both > 0)


def _amount(shape: Shape, settings: int, share: float) -> Amount:
    """Settings that run whole or from a block on, a run of the model itself and one of the corrupt prompts."""
    calls = -(-settings // shape.fold)
    return Amount(plain_calls=2.0, plain=2 * shape.prompts, folded_calls=float(calls), folded=settings * share * shape.prompts)
