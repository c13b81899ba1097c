"""Path patching: what a sender does to the metric through what certain receivers read, and through nothing else.

Wang et al. 2211.00593, Goldowsky-Dill et al. 2304.05969.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchclamp.errors import GateError
from patchclamp.methods import Direction, groups_of
from patchclamp.metrics import Metric, metric_named
from patchclamp.models.editing import Edits, Seen
from patchclamp.models.memory import budget
from patchclamp.models.model import Model
from patchclamp.models.scope import OPEN
from patchclamp.models.standing import Start
from patchclamp.models.tree import Pattern
from patchclamp.parts.edge_blocks import Streams, reads_at
from patchclamp.parts.edge_ends import comes_before, destinations_of, sources_of
from patchclamp.parts.edge_gates import level_of
from patchclamp.parts.edge_reading import Changed, Desk, User, reading
from patchclamp.parts.edge_runs import at_once, ground_of, measured, replays_pay
from patchclamp.paths.first import First, Route, first_run
from patchclamp.scores import Scores
from patchclamp.sites import Edge, Site, select
from patchclamp.tasks import Examples
from patchclamp.tasks._batch import Batch

BETWEEN = ("frozen", "mlps", "recomputed")
"""What may follow from the sender in the first run."""


def path_patching(
    model: Model,
    examples: Examples,
    senders: Sequence[Site | str] = ("L*.h*",),
    receivers: Sequence[Site | str] = ("logits",),
    *,
    between: str = "frozen",
    joint: bool = False,
    fallback: str = "resample",
    fit: Examples | None = None,
    metric: str | Metric | None = None,
    direction: Direction = "noising",
    batch_size: int = 16,
    seed: int = 0,
    memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Give each sender its fallback, let receivers read what follows from that, and nobody else.

    Two runs of each prompt: in the first the sender has its fallback and the streams that receivers read are kept; in the
    second, nothing is changed but that the receivers read those streams. What is behind them is always computed anew.
    score = benefit(the model itself) - benefit(second run).

    Args:
        model: the model.
        examples: the prompts.
        senders: sites or patterns among `embed`, heads (`L*.h*`) and MLPs (`L*.mlp`).
        receivers: sites or patterns among `L9.h6.q`, `L9.kv2.k`, `L9.kv2.v`, `L9.mlp` and `logits`.
        between: what may follow from the sender in the first run. "frozen": nothing, so that the direct edge alone is meant
            (one closed gate of `edges`; of a head behind a post-norm, its share of what attention writes). "mlps": MLPs, while
            all other heads keep their own z: the choice of Wang et al. "recomputed": everything, so all paths from the sender
            to the receivers are meant.
        joint: all receivers at once, a score per sender, instead of a score per sender and receiver.
        fallback: resample, mean or zero: what the sender gets.
        fit: where the mean is learned.
        metric: by default the task's.
        direction: "noising" as above; "denoising" runs the corrupt prompts, where the sender gets its clean value, and
            score = benefit(second run) - benefit(the model itself).
        batch_size: examples at once.
        seed: of the bootstrap.
        memory: bytes that one folded pass may take; by default a share of what is free (`models.memory`).
        progress: told how many examples of how many are done.

    Returns:
        A row per edge `sender>receiver` (or, joint, per sender), with intervals over examples.

    Cost: per batch two passes, or what else the fallback costs, and one for the model itself; per sender, unless frozen, one
    pass up to the last receiver; per sender and receiver (joint: per sender) one pass, and what the receiver's norm and
    projections (or MLP) cost once more. Settings are folded into the rows.

    Raises:
        SiteError: a pattern that fits nothing.
        GateError: no sender comes before any receiver, a variant that there is not, or other edits are on.
    """
    _check(between)
    here = select([str(site) for site in senders], sources_of(model))
    there = select([str(site) for site in receivers], destinations_of(model))
    routes = _routes(model, here, there, joint)
    memory = budget(model.device) if memory is None else memory
    which = metric if isinstance(metric, Metric) else metric_named(metric or examples.metric)
    first = first_run(model, routes, between, fallback, fit, memory)
    table = _samples(model, examples, which, routes, first, direction, batch_size, memory, progress)
    about = {"method": "path patching", "between": between, "metric": which.name, "fallback": fallback, "n": len(examples),
             "seed": seed, "direction": direction, "model": model.name, "task": examples.task}  # fmt: skip
    about |= {"through": [str(site) for site in there]} if joint else {}
    labels = [route.sender if joint else Edge(route.sender, route.receivers[0]) for route in routes]
    return Scores.from_samples(labels, table.double().numpy(), about, groups=groups_of(examples), seed=seed)


def _check(between: str) -> None:
    """Raise `GateError` for a variant that there is not, or where other edits are on."""
    if between not in BETWEEN:
        raise GateError(f"between sender and receiver there may be {', '.join(BETWEEN)}, not {between!r}")
    if OPEN.get():
        raise GateError("other edits are on, and what receivers read would not follow them: patch paths outside of them")


def _routes(model: Model, senders: Sequence[Site], receivers: Sequence[Site], joint: bool) -> list[Route]:
    """In the order of the receivers, then of the senders (joint: of the senders); raises `GateError` where there is none."""
    if joint:
        reached = {one: tuple(site for site in receivers if comes_before(model, one, site)) for one in senders}
        routes = [Route(sender, found) for sender, found in reached.items() if found]
    else:
        routes = [Route(sender, (site,)) for site in receivers for sender in senders if comes_before(model, sender, site)]
    if not routes:
        raise GateError(
            f"no path leads from {', '.join(map(str, senders))} to {', '.join(map(str, receivers))}: nothing there comes before it"
        )
    return routes


def _samples(
    model: Model, examples: Examples, metric: Metric, routes: Sequence[Route], first: First, direction: Direction,
    batch_size: int, memory: int, progress: Callable[[int, int], None] | None,
) -> Float[Tensor, "route example"]:  # fmt: skip
    """Scores by route and example, some prompts after others."""
    pieces, done = list[Tensor](), 0
    sign = metric.sign * (-1.0 if direction == "denoising" else 1.0)
    for whole in examples.batches(batch_size):
        batch = (whole.swapped() if direction == "denoising" else whole).to(model.device)
        pieces.append(sign * _effects(model, batch, metric, routes, first, memory).cpu())
        done += len(whole)
        if progress is not None:
            progress(done, len(examples))
    return torch.cat(pieces, 1)


def _effects(
    model: Model, batch: Batch, metric: Metric, routes: Sequence[Route], first: First, memory: int
) -> Float[Tensor, "route example"]:
    """The metric of the model itself less that of the second run, by route; a few senders after others."""
    with torch.no_grad():
        patterns = [_pattern(number, route, model.layers) for number, route in enumerate(routes, 1)]
        ground = ground_of(model, batch, metric, (), memory, replays_pay(patterns))
        assert ground.itself is not None
        out = ground.itself.new_zeros(len(routes), len(ground.itself))
        senders = sorted({route.sender for route in routes})
        most = at_once(model, batch, memory // 2)
        for start in range(0, len(senders), most):
            some = senders[start : start + most]
            streams = first.streams(batch, some)
            mine = [number for number, route in enumerate(routes) if route.sender in some]
            chosen = [routes[number] for number in mine]

            def edits_of(settings: Sequence[int], start: Start, some: Sequence[Site] = some, chosen: Sequence[Route] = chosen,
                         streams: Mapping[Site, Tensor] = streams) -> Edits:  # fmt: skip
                return _second(model, batch, [chosen[number] for number in settings], start, some, streams, memory)

            out[mine] = ground.itself - measured(ground, [patterns[number] for number in mine], edits_of, most)
    return out


def _pattern(number: int, route: Route, layers: int) -> Pattern:
    """What a route does at each stage (`models.tree`): some of its receivers read there, or none."""
    stages = {2 * layers if one.kind == "logits" else 2 * (one.layer or 0) + 1 for one in route.receivers}
    return tuple(number if stage in stages else 0 for stage in range(2 * layers + 1))


def _second(
    model: Model, batch: Batch, routes: Sequence[Route], start: Start, senders: Sequence[Site], streams: Mapping[Site, Tensor],
    memory: int,
) -> Edits:  # fmt: skip
    """The edits of the second run: receivers read the streams of the first."""
    at: dict[Site, dict[tuple[int, Site], int]] = {}
    users: dict[Site, list[User]] = {}
    for setting, route in enumerate(routes):
        for receiver in route.receivers:
            place = reads_at(model.anatomy, receiver)
            # a route has a run to itself wherever one of its receivers reads
            run = setting if start.tree is None else start.tree.levels[level_of(place)].settings.index(setting)
            read = at.setdefault(place, {}).setdefault((setting, route.sender), len(at[place]))
            users.setdefault(place, []).append(User(receiver, run, read))
    changed: dict[Site, Changed] = {
        place: _Given(streams[place][[senders.index(sender) for _, sender in reads]], users[place]) for place, reads in at.items()
    }
    return reading(Desk(model.anatomy, len(batch.tokens), memory // 2), changed)


@dataclass(frozen=True, eq=False)
class _Given:
    """Streams that are known, as `Changed`."""

    known: Streams
    users: Sequence[User]
    reads: tuple[Site, ...] = ()

    def streams(self, own: Float[Tensor, "run row position width"], seen: Seen) -> Streams:
        return self.known
