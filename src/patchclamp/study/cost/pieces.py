"""Pieces of a map, each with what it takes: gate settings, passes, memory. What the code does is counted here once more.

What depends on what will be found is given as expected and at most.
"""

import random
from itertools import combinations
from math import comb

import numpy as np

from patchclamp.dependence.shapley import ROUNDS, permutations
from patchclamp.discover import sizes_of
from patchclamp.errors import TaskError
from patchclamp.methods import passes_of
from patchclamp.methods.integrated import STEPS as MIDPOINTS
from patchclamp.parts.optimal import ROWS, SETTINGS, UPDATES
from patchclamp.study.cost.job import Job, Line, line, total
from patchclamp.study.cost.work import Amount
from patchclamp.study.relate import HUBS, screen_sizes
from patchclamp.tasks import Examples
from patchclamp.tasks._shift import shifted
from patchclamp.trust import band_sizes, curve_sizes

CIRCUIT = 0.5
"""Of the parts, how many are expected in the circuit: 18 of 36 for indirect object identification in zoo/small."""
TOP = 6
"""Parts that are measured behind random prefixes; prompts that the report shows."""


def learned(job: Job, kind: str, what: str) -> list[Line]:
    """A mean: the fit set's prompts, and the corrupt ones where there are pairs. Optimal constants: clean prompts twice, then descent."""
    fit = job.split.fit
    if kind == "optimal":
        return [_descent(job, what)]
    if kind.partition(":")[0] != "mean":
        return []
    shapes = job.shapes(fit, "zero")
    passes = 1 if fit[0].corrupt is None else 2
    return [line(job, "", f"mean for {what}", shapes, 0, total(job.engine.recording(shape) * passes for shape in shapes))]


def _descent(job: Job, what: str) -> Line:
    """Per update the model's own run and a forward and backward pass of each setting; four batches held to choose by, every 25."""
    fit, shapes = job.split.fit, job.shapes(job.split.fit, "zero")
    rows, looks = min(ROWS, len(fit)), 4 * (UPDATES // 25 + 1)
    moved = Amount(
        plain_calls=UPDATES + looks, plain=(UPDATES + looks) * rows, folded_calls=looks, folded=looks * rows * SETTINGS,
        sloped_calls=UPDATES, sloped=UPDATES * rows * SETTINGS,
    )  # fmt: skip
    recorded = total(job.engine.recording(shape) * 2 for shape in shapes)
    return line(job, "", f"optimal constants for {what}", shapes, SETTINGS, recorded + moved, backward=True)


def baseline(job: Job) -> Line:
    """Open and closed; open again for accuracy (with wrong answers) and for top-1."""
    engine, shapes = job.engine, job.shapes(job.split.confirm)
    more = 1 + bool(job.split.confirm[0].wrong)
    amounts = (
        engine.measure(shape, [engine.drawn(len(engine.layers), 0)], opened=True) + engine.plain(shape, more) for shape in shapes
    )
    return line(job, "baseline", "baseline", shapes, 2 + more, total(amounts))


def exact(job: Job, step: str, examples: Examples, kind: str, noise: bool = True) -> Line:
    """Every part closed alone; and the noise floor."""
    engine, shapes = job.engine, job.shapes(examples, kind)
    amount = total(engine.measure(shape, engine.singles(), opened=True) for shape in shapes)
    if noise:
        amount += noise_floor(job, examples, kind)
    return line(job, step, "exact effects", shapes, len(engine.layers) + 1, amount)


def noise_floor(job: Job, examples: Examples, kind: str) -> Amount:
    """Four parts on four prompts together, and on each prompt by itself, whole."""
    engine, some = job.engine, examples.take(range(min(4, len(examples))))
    tries = engine.singles()[:: max(1, len(engine.layers) // 4)][:4]
    together = engine.shape(some.batch(), kind, job.metric)
    alone = engine.shape(some.batch([0]), kind, job.metric)
    once = engine.plain(alone) + engine.measure(alone, tries[:1]) + engine.measure(alone, tries[:1], kept=True) * (len(tries) - 1)
    return engine.measure(together, tries, opened=True) + once * len(some)


def attributions(job: Job, names: tuple[str, ...]) -> Line:
    """One setting for gradient, as many as there are midpoints for integrated, exact effects again; of others what their files say."""
    engine, shapes = job.engine, job.shapes(job.split.confirm)
    settings = {"gradient": 0 if job.metric.reference else 1, "integrated": MIDPOINTS}
    amount, count = Amount(), 0
    for name in names:
        if name == "exact":
            again = exact(job, "", job.split.confirm, job.kind)
            amount, count = amount + again.expected, count + again.settings
        elif name in settings:
            amount += total(engine.gradient(shape, settings[name]) for shape in shapes if settings[name])
            count += settings[name]
        else:
            forward, backward = passes_of(name, job.model.layers, len(job.parts.counted))
            amount += total(_whole(shape.prompts, forward - backward, backward) for shape in shapes)
            count += backward
    return line(job, "-".join(("attribution", *names)), "attribution", shapes, count, amount, backward=True)


def _whole(prompts: float, forward: int, both: int) -> Amount:
    """Whole passes over some prompts: forward alone, and forward and backward."""
    return Amount(plain_calls=float(forward), plain=forward * prompts, sloped_calls=float(both), sloped=both * prompts)


def behind_prefixes(job: Job) -> list[Line]:
    """The top parts, as if all were in the first block, on moved prompts; a mean is learned on these anew."""
    longest = getattr(job.model.anatomy.config, "max_position_embeddings", None) or getattr(
        job.model.anatomy.config, "n_positions", None
    )
    try:
        moved = shifted(job.split.confirm, longest, job.plan.seed)
    except TaskError:
        return []
    engine, shapes, top = job.engine, job.shapes(moved), min(TOP, len(job.engine.layers))
    learned = total(engine.recording(shape) * 2 for shape in shapes) if job.kind.partition(":")[0] == "mean" else Amount()
    singles = [*engine.singles()[: top - 1], engine.singles()[-1]]  # one later: what starts from the model's own run
    amount = total(engine.measure(shape, singles, opened=True) for shape in shapes)
    return [line(job, "shifted", "behind random prefixes", shapes, top + 1, amount + learned)]


def discover(job: Job) -> Line:
    """The first k parts open, for every size k: the rest closed."""
    engine, shapes, count = job.engine, job.shapes(job.split.select), len(job.engine.layers)

    def amount(late: bool) -> Amount:
        order = engine.order(late=late)
        settings = [engine.closing(order[size:]) for size in sizes_of(count) if size < count]
        return total(engine.measure(shape, settings, opened=True) for shape in shapes)

    expected, most = amount(True), amount(False)
    most = max(expected, most, key=lambda one: one.forward)
    return line(job, "discover", "the circuit", shapes, len(sizes_of(count)), expected, most)


def trust(job: Job) -> Line:
    """Both ends, the circuit and the rest; the curve both ways; the circuit less each part; random circuits; the band."""
    engine, shapes, count = job.engine, job.shapes(job.split.confirm), len(job.engine.layers)

    def amount(size: int) -> tuple[Amount, int]:
        grid, order = curve_sizes(count, size), engine.order()
        closed = [order, order[size:], order[:size], *(order[k:] for k in grid), *(order[:k] for k in grid)]
        closed += [[part, *order[size:]] for part in order[:size]]
        closed += [engine.order(1 + draw)[size:] for draw in range(job.plan.random_circuits)]
        closed += [engine.order(-1 - draw)[k:] for draw, k in enumerate(band_sizes(grid, size))]
        settings = [engine.closing(parts) for parts in closed if parts]
        return total(engine.measure(shape, settings, opened=True) for shape in shapes), len(closed) + 1

    expected, settings = amount(max(1, round(CIRCUIT * count)))
    most = max((amount(max(1, round(eighth * count / 8)))[0] for eighth in range(9)), key=lambda one: one.forward)
    return line(job, "trust", "circuit against random ones", shapes, settings, expected, most)


def relate(job: Job) -> list[Line]:
    """Each part and each pair closed, three times; every part twice again for self-repair; outputs; hubs against random sets."""
    engine, confirm, select = job.engine, job.shapes(job.split.confirm), job.shapes(job.split.select)
    count = min(job.plan.pairs_of, len(engine.layers))
    parts = [round(number * (len(engine.layers) - 1) / max(1, count - 1)) for number in range(count)]  # as if spread evenly
    early = sorted(range(len(engine.layers)), key=engine.layers.__getitem__)[:count]
    settings, first = (
        [engine.closing(some) for some in [*([part] for part in those), *map(list, combinations(those, 2))]]
        for those in (parts, early)
    )
    held = total(engine.plain(shape) for shape in confirm)  # what the final norm divides by
    found: list[Line] = []
    ways = (("pairs", job.kind, Amount()), ("pairs-second", job.second, Amount()), ("pairs-held", job.kind, held))
    for step, kind, own in ways:
        shapes, more = job.shapes(job.split.confirm, kind), own + noise_floor(job, job.split.confirm, kind)
        expected, most = (
            total(engine.measure(shape, some, opened=True) for shape in shapes) + more for some in (settings, first)
        )
        most = max(expected, most, key=lambda one: one.forward)
        found.append(line(job, step, "pairs of parts", shapes, len(settings) + 1, expected, most))
    alone = total(engine.measure(shape, settings[:count], opened=True) * 2 for shape in confirm)
    found += [line(job, step, "self-repair", confirm, 2 * count, alone) for step in ("self-repair", "self-repair-second")]
    found.append(line(job, "outputs", "what parts put out", confirm, 0, total(engine.recording(shape) for shape in confirm)))
    chance = random.Random(job.plan.seed)
    drawn = [engine.closing(chance.sample(parts, min(HUBS, count - 1))) for _ in range(200)]
    found += [_shapley(job, parts)] if job.plan.shapley else []
    found += [_screen(job)] if job.plan.screen_pairs else []
    return [
        *found,
        line(job, "hubs", "hubs", select, len(drawn) + 2, total(engine.measure(shape, drawn, opened=True) for shape in select)),
    ]


def _shapley(job: Job, players: list[int]) -> Line:
    """Two rounds of walks through all players, each with its prefixes and exchanges; every walk is a measurement of its own."""
    engine, confirm, n = job.engine, job.shapes(job.split.confirm), len(players)
    orders = [path.tolist() for path, _ in permutations(n, np.random.default_rng(job.plan.seed).permutation(n + n % 2))]
    walk = [order[k:] for order in orders[:2] for k in range(n)]
    walk += [[order[k], *order[k + 2 :]] for order in orders[:2] for k in range(n - 1)]
    settings = [engine.closing([players[number] for number in some]) for some in walk]
    amount = total(engine.measure(shape, settings, opened=True) for shape in confirm) * (ROUNDS * len(orders) / 2)
    return line(job, "shapley", "permutations", confirm, ROUNDS * len(orders) * 2 * n, amount)


def _screen(job: Job) -> Line:
    """Masks of their own for every prompt, which run whole; then the pairs that they point to, and as many at random."""
    engine, select, confirm, count = (
        job.engine,
        job.shapes(job.split.select),
        job.shapes(job.split.confirm),
        len(job.engine.layers),
    )
    top, sample, passes = screen_sizes(comb(count, 2), len(job.split.select))
    masks = [engine.closing([], of=number) for number in range(passes)]
    drawn = random.Random(job.plan.seed).sample(list(combinations(range(count), 2)), top + sample)
    used = sorted({part for pair in drawn for part in pair})
    settings = [engine.closing(some) for some in [*([part] for part in used), *map(list, drawn)]]
    amount = total(engine.measure(shape, masks, opened=True) for shape in select)
    amount += total(engine.measure(shape, settings, opened=True) for shape in confirm)
    return line(job, "screen-pairs", "pairs", confirm, passes + len(settings) + 2, amount)


def prompts(job: Job) -> Line:
    """The first prompts one by one: logits everywhere, those at the answer, and those before each token of a longer answer."""
    confirm, engine = job.split.confirm, job.engine
    shapes = [engine.shape(confirm.batch([number]), job.kind, job.metric) for number in range(min(TOP, len(confirm)))]
    sides = [side[0] for side in (confirm[0].answers, confirm[0].wrong) if side]
    longer = 0 if confirm[0].targets else sum(len(side) > 1 for side in sides)
    at_targets = 0 if confirm[0].targets else 1
    amounts = (engine.everywhere(shape) * (1 + longer) + engine.plain(shape) * at_targets for shape in shapes)
    return line(job, "prompts", "prompts", shapes, 0, total(amounts))


def patterns(job: Job) -> Line:
    """One prompt."""
    shapes = job.shapes(job.split.confirm.take([0]))
    return line(job, "patterns-all", "patterns", shapes, 0, total(job.engine.everywhere(shape) for shape in shapes))
