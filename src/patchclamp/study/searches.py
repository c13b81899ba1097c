"""Searches of a circuit: which one a plan asks for, what it keeps in the run, and what is said of it besides the circuit.

threshold  parts in order of their effects            greedy  the part that helps most, one after the other
acdc       parts closed for good, in three orders     masks   gates learned by descent, from three seeds
codes      heads whose output takes other values where the behaviour is present; nothing is closed
path       neurons, one a layer, chosen together
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from patchclamp.discover import discover
from patchclamp.discover.acdc import Acdc, acdc
from patchclamp.discover.codes import Codes, codes
from patchclamp.discover.greedy import greedy
from patchclamp.discover.masks import Mask, MaskSettings, probe, prune
from patchclamp.discover.neuron_paths import NeuronPath, neuron_path
from patchclamp.discover.threshold import ranked
from patchclamp.errors import PatchclampError, TaskError
from patchclamp.parts import Fallback, Gated, Parts
from patchclamp.scores import Scores
from patchclamp.store.record import Claim
from patchclamp.study.work import Work
from patchclamp.tasks import Examples

CANDIDATES = 60
"""Parts, those that the screen ranks first, among which a greedy search looks."""
STABLE = 0.8
"""Mean overlap of the circuits of several orders, or seeds, from which on one is said not to depend on them."""
SEEDS = 3
"""Masks that are learned."""
SPARSITY = 0.9
"""The share of parts that a mask closes, where neither that nor a price is asked for."""
PAIRS = 12
"""Pairs that codes are read from: of so many every way of swapping is tried, and with more of them codes are rarely apart."""
ALPHA = 0.05


def check(work: Work) -> None:
    """Refuse, before anything is measured, a search that the task cannot serve."""
    if work.plan.search == "codes" and work.split.select[0].corrupt is None:
        raise TaskError(
            f"codes compare prompts with and without a behaviour, and {work.task.name!r} has no corrupt prompts: give pairs, or another "
            "--search"
        )


def require(found: Mapping[str, Any]) -> None:
    """Refuse to judge a circuit where none was found."""
    if found["circuit"] is None:
        raise PatchclampError(
            f"there is no circuit to judge: {found['findings'][0].evidence}. Choose another --search, or pairs that differ in whether "
            "the behaviour is there"
        )


def mask_settings(seed: int, updates: int | None) -> MaskSettings:
    """How a mask is learned."""
    plain = MaskSettings(seed=seed)
    return plain if updates is None else replace(plain, updates=updates)


def searched(work: Work, parts: Parts, select: Examples, fallback: Fallback, ranking: Scores) -> dict[str, Any]:
    """The circuit, by the plan's search (None where nothing passes), and `findings`: claims about the search, without a scope."""
    plan, run = work.plan, work.run
    if plan.search == "threshold":
        circuit, _ = run.step(
            "discover", discover, parts, select, fallback, ranking, faithfulness=plan.faithfulness, by=plan.order, metric=work.metric
        )  # fmt: skip
        return {"circuit": circuit, "findings": ()}
    if plan.search == "greedy":
        among = ranked(ranking, plan.order)[:CANDIDATES]
        grown = run.step(
            "greedy", greedy, parts, select, fallback, faithfulness=plan.faithfulness, among=among, metric=work.metric,
            progress=work.progress("greedy search"),
        )  # fmt: skip
        return {"circuit": grown.circuit, "findings": ()}
    if plan.search == "masks":
        return _masks(work, parts, select, fallback)
    if plan.search == "codes":
        return _codes(work, select)
    if plan.search == "path":
        return _path(work, parts, select, fallback)
    found: Acdc = run.step(
        "acdc", acdc, parts, select, fallback, plan.threshold, objective=plan.metric or "kl",
        progress=work.progress("parts closed one after the other"),
    )  # fmt: skip
    if found.stability is None:
        return {"circuit": found.circuit, "findings": ()}
    same = Claim(
        "The circuit does not depend on the order in which parts were visited", "", str(found),
        "visit the parts in another order and find another circuit", _verdict(found.stability >= STABLE),
    )  # fmt: skip
    return {"circuit": found.circuit, "findings": (same,)}


def _masks(work: Work, parts: Parts, select: Examples, fallback: Fallback) -> dict[str, Any]:
    """A mask from each of several seeds; the circuit is the first one's, so that none is picked for its looks."""
    plan, told = work.plan, work.progress("masks learned")

    def learned() -> tuple[Mask, ...]:
        made: list[Mask] = []
        for number in range(SEEDS):
            settings = mask_settings(plan.seed + number, plan.updates)

            def progress(done: int, of: int, number: int = number) -> None:
                told(number * of + done, SEEDS * of)

            common: dict[str, Any] = {"objective": plan.metric or "kl", "settings": settings, "progress": progress}
            made.append(
                prune(parts, select, fallback, plan.sparsity or SPARSITY, **common)
                if plan.mask_price is None
                else probe(parts, select, fallback, plan.mask_price, **common)
            )
        return tuple(made)

    masks: tuple[Mask, ...] = work.run.step("masks", learned)
    overlap = float(np.mean([a.circuit.jaccard(b.circuit) for a, b in combinations(masks, 2)]))
    sizes = ", ".join(str(len(mask.circuit)) for mask in masks)
    how = f"a price of {plan.mask_price:g}" if plan.mask_price is not None else f"a sparsity of {plan.sparsity or SPARSITY:g}"
    same = Claim(
        "The circuit does not depend on the seed that its mask was learned with", "",
        f"Jaccard {overlap:.2f} between {SEEDS} masks at {how}, which keep {sizes} of {len(parts.counted)} parts",
        "learn the mask from another seed and find another circuit", _verdict(overlap >= STABLE),
    )  # fmt: skip
    return {"circuit": masks[0].circuit, "findings": (same,)}


def _codes(work: Work, select: Examples) -> dict[str, Any]:
    """Heads by discrete codes, on a few pairs; no gate closes."""
    found: Codes = work.run.step("codes", codes, work.model, select.take(range(min(PAIRS, len(select)))), seed=work.plan.seed)
    table, circuit = found.scores.table, found.circuit(p=ALPHA)
    best = table.sort("p", "score", descending=[False, True]).row(0, named=True)
    told = (
        f"{len(circuit)} of {table.height} heads take a value in half of the prompts with it that they take in none without it (p at most "
        f"{ALPHA:g} each, so up to {ALPHA * table.height:.1f} of them by chance); smallest p {best['p']:.2g} ({best['site']}), "
        f"times {table.height} heads {min(1.0, best['p'] * table.height):.2g}; {found.scores.about['n']} pairs"
    )
    apart = Claim(
        "What some heads write takes other values where the behaviour is present than where it is absent", "", told,
        "close the heads and see the behaviour stay", _verdict(bool(len(circuit)) and best["p"] * table.height <= ALPHA),
    )  # fmt: skip
    return {"circuit": circuit if len(circuit) else None, "findings": (apart,)}


def _path(work: Work, parts: Parts, select: Examples, fallback: Fallback) -> dict[str, Any]:
    """A neuron a layer, chosen on the select set and held against others on the confirm set."""
    assert isinstance(parts, Gated)  # a plan with a path asks for neurons
    found: NeuronPath = work.run.step(
        "path", neuron_path, parts, select, fallback, work.split.confirm, metric=work.metric, seed=work.plan.seed,
        progress=work.progress("neurons chosen layer by layer"),
    )  # fmt: skip
    removal = {row["choice"]: row["removal"] for row in found.judged.iter_rows(named=True)}
    told = (
        f"closing it takes {removal['path']:+.3g} of {work.metric} on prompts that chose nothing; the neurons of largest slope "
        f"{removal['slope']:+.3g}, of largest activation {removal['activation']:+.3g}, random ones {removal['random']:+.3g} "
        f"(p = {found.p:.2g})"
    )
    more = Claim(
        "The path matters more than random neurons of the same layers", "", told,
        "find random neurons, one a layer, whose closing takes as much", _verdict(found.p <= ALPHA and removal["path"] > 0),
    )  # fmt: skip
    return {"circuit": found.circuit, "findings": (more,)}


def _verdict(holds: bool) -> Any:
    return "supported" if holds else "not supported"
