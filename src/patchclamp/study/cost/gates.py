"""What learned gates take: fits with their nulls, refits at other lambdas, and what judges them."""

from itertools import combinations

from patchclamp.errors import TaskError
from patchclamp.gating.examples import balanced
from patchclamp.gating.nulls import REINITIALISED, SHUFFLED
from patchclamp.gating.objective import GatingSettings, Stage
from patchclamp.gating.roles import FACTORS
from patchclamp.gating.substitutes import PAIRS
from patchclamp.gating.toggle import ORDERS, POINTS
from patchclamp.gating.toggle import steps as sizes_of
from patchclamp.metrics import METRICS
from patchclamp.study.cost.job import Job, Line, line, total
from patchclamp.study.cost.work import Amount, Pattern, Shape
from patchclamp.tasks import Examples

HALF_OPEN = 0.2
"""Of the gates that a pressed descent leaves behind, how many are expected half open: .11 to .22 on three tasks of zoo/small."""
TURNS = 0.4
"""Likewise in that setting of many which has most: .22 to .44."""
CALLED = 0.4
"""Of the parts of a seed, how many are expected to be called facilitating or interfering: .28 to .47 there."""


def roles(job: Job) -> list[Line]:
    """`gating.roles`: the fit and its judgement, the nulls and theirs, other lambdas, substitutes, the toggle check."""
    settings, fit, select = job.settings, job.split.fit, job.split.select
    held = select.take(range(min(len(select), settings.held_out)))
    found = [*_fit(job, fit, settings, ""), _judge(job, held, settings.seeds, "judging")]
    if settings.null_seeds:
        found += _null(job, fit, held, settings.for_null())
    if settings.refits:
        few = min(2, settings.seeds)
        shape = _shape(job, fit, settings.null_batch, settings)
        stage = Stage(settings.refits, 0.0, 0.0)
        found.append(_descent(job, shape, 2 * few * len(FACTORS), stage, "other lambdas"))
    return [*found, _substitutes(job, held), _toggle(job, held)]


def _shape(job: Job, fit: Examples, size: int, settings: GatingSettings) -> Shape:
    """A batch of a descent; raises `TaskError` where answers are one-sided, as the fit would."""
    batch = next(balanced(fit, settings).batches(size, settings.seed, 0))
    return job.engine.shape(batch, job.kind, METRICS["nll"])


def _descent(job: Job, shape: Shape, settings: int, stage: Stage, title: str) -> Line:
    """One `gradient` of all settings per update, on a new batch each time; at most, for each may stand still before its end."""
    return line(
        job, "roles", title, [shape], stage.updates * settings, job.engine.gradient(shape, settings) * stage.updates, folded=settings,
        backward=True,
    )  # fmt: skip


def _fit(job: Job, fit: Examples, settings: GatingSettings, prefix: str) -> list[Line]:
    """G for every seed; then G+ and G-, and what they leave half open tried open and closed, one gate after the other."""
    shape, parts, seeds = _shape(job, fit, settings.batch, settings), len(job.engine.layers), settings.seeds
    found = [
        _descent(job, shape, seeds, settings.free, f"{prefix}G"),
        _descent(job, shape, 2 * seeds, settings.pressed, f"{prefix}G+ and G-"),
    ]
    if settings.settle:
        engine = job.engine
        record = engine.recording(shape) if shape.resamples else Amount()
        turns, each = max(1, round(TURNS * parts)), max(1, round(2 * seeds * HALF_OPEN / TURNS))

        def tried(turn: int, fits: int) -> Amount:
            """One gate of each fit, open and closed."""
            order = engine.order(turn)
            settings = [engine.closing([order[fit % parts]], of=(fit, way)) for fit in range(fits) for way in (0, 1)]
            return engine.measure(shape, settings, kept=True)

        expected = total(tried(turn, each) for turn in range(turns)) + record
        most = total(tried(turn, 2 * seeds) for turn in range(parts)) + record
        found.append(line(job, "roles", f"{prefix}half-open gates", [shape], 2 * turns * each, expected, most, folded=2 * each))
    return found


def _judge(job: Job, held: Examples, seeds: int, title: str) -> Line:
    """Every part closed alone; every seed's G+ and G-; and these with one called part toggled, for each part that is called."""
    engine, shapes, parts = job.engine, job.shapes(held, metric=METRICS["log_probability"]), len(job.engine.layers)
    called, order = round(CALLED * parts), engine.order()

    def settings(toggled: int) -> list[Pattern]:
        """By seed, G+ and G-, and each of `toggled` parts toggled in one of them."""
        found = engine.singles()
        for seed in range(seeds):
            found += [engine.closing([], of=(seed, sign)) for sign in (0, 1)]
            found += [engine.closing([part], of=(seed, part % 2)) for part in order[:toggled]]
        return found

    expected = total(engine.measure(shape, settings(called), opened=True) for shape in shapes)
    most = total(engine.measure(shape, settings(parts), opened=True) for shape in shapes)
    return line(job, "roles", title, shapes, 1 + parts + seeds * (2 + called), expected, most)


def _null(job: Job, fit: Examples, held: Examples, settings: GatingSettings) -> list[Line]:
    """The fit and its judgement with answers shuffled (not of plain text), and on weights drawn anew, a second model in memory."""
    found: list[Line] = []
    try:
        shuffled = fit.shuffled_answers(1000 + settings.seed)
        found += [*_fit(job, shuffled, settings, f"{SHUFFLED}: "), _judge(job, held, settings.seeds, f"{SHUFFLED}: judging")]
    except TaskError:
        pass
    again = [*_fit(job, fit, settings, f"{REINITIALISED}: "), _judge(job, held, settings.seeds, f"{REINITIALISED}: judging")]
    return found + [one.beside(job.weights) for one in again]


def _substitutes(job: Job, held: Examples) -> Line:
    """Pairs of kept parts, at most 60, and each of their parts alone."""
    engine, shapes, parts = job.engine, job.shapes(held, metric=METRICS["log_probability"]), len(job.engine.layers)
    order = engine.order()

    def settings(among: int) -> list[Pattern]:
        """Pairs of the first `among` parts, and these alone."""
        pairs = list(combinations(order[:among], 2))[:PAIRS]
        return [engine.closing(one) for one in [*pairs, *((part,) for part in sorted({part for pair in pairs for part in pair}))]]

    kept = settings(max(2, round(CALLED * parts)))
    expected = total(engine.measure(shape, kept, opened=True) for shape in shapes)
    most = total(engine.measure(shape, [*engine.singles(), *settings(parts)], opened=True) for shape in shapes)
    return line(job, "roles", "substitutes", shapes, 1 + len(kept), expected, most)


def _toggle(job: Job, held: Examples) -> Line:
    """By each of three orders, the first k parts closed."""
    engine, shapes, parts = job.engine, job.shapes(held, metric=METRICS["log_probability"]), len(job.engine.layers)
    closed = [engine.order(number)[:size] for number in range(len(ORDERS)) for size in sizes_of(parts, POINTS)]
    settings = [engine.closing(some) for some in closed if some]
    amount = total(engine.measure(shape, settings, opened=True) for shape in shapes)
    return line(job, "roles", "toggle check", shapes, len(closed), amount)
