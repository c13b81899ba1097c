"""Redundancy: parts that gating keeps and whose single ablation does nothing, tested jointly with what may stand in for them."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import torch

from patchclamp.gating.fit import Gated, full_gates
from patchclamp.gating.judge import Evidence, Flags, clear
from patchclamp.methods import groups_of
from patchclamp.metrics import METRICS
from patchclamp.parts import Fallback, Parts, benefits
from patchclamp.tasks import Examples

PAIRS = 60  # tested at most; those that seeds keep in turn come first


def substitutes(
    parts: Parts, gated: Gated, evidence: Evidence, examples: Examples, fallback: Fallback, seed: int = 0
) -> Mapping[int, tuple[int, ...]]:
    """For each redundant part, the parts that take over from it.

    Candidates are kept in some seed's G- and, closed alone, cost less than the pressure. Two of them are redundant where
    closing both costs more than twice what each costs alone, taken together, and more than that by the pressure, with
    q < .05 over the pairs tested (at most 60: first pairs that seeds keep in turn, then those kept most often).

    Cost: one forward pass over the examples per pair.
    """
    kept = evidence.calls.facilitating
    idle = np.flatnonzero(kept.any(0) & ~costly(evidence)).tolist()
    pairs = sorted(combinations(idle, 2), key=lambda pair: (-_turns(kept, *pair), -kept[:, pair].sum()))[:PAIRS]
    if not pairs:
        return {}
    rows = np.ones((1 + len(idle) + len(pairs), len(gated.labels)))
    for number, part in enumerate(idle):
        rows[1 + number, part] = 0
    for number, pair in enumerate(pairs):
        rows[1 + len(idle) + number, list(pair)] = 0
    values = benefits(parts, examples, full_gates(parts, torch.from_numpy(rows)), fallback, METRICS["log_probability"])
    lost = (values[:1] - values[1:]).double().numpy()
    alone = {part: lost[number] for number, part in enumerate(idle)}
    joint = lost[len(idle) :]
    single = np.stack([alone[a] + alone[b] for a, b in pairs])
    costs = np.array([abs(alone[a].mean()) + abs(alone[b].mean()) for a, b in pairs])
    together = clear(joint - single, groups_of(examples), seed) & (joint.mean(1) > 2 * costs + evidence.pressure)
    found: dict[int, tuple[int, ...]] = {}
    for pair, redundant in zip(pairs, together, strict=True):
        if redundant:
            for one, other in (pair, pair[::-1]):
                found[int(one)] = (*found.get(int(one), ()), int(other))
    return found


def costly(evidence: Evidence) -> Flags:
    """Parts that matter when closed alone: the exact effect differs from zero and is at least the pressure."""
    return (evidence.exact_sign != 0) & (np.abs(evidence.exact.values()) >= evidence.pressure)


def _turns(kept: np.ndarray, one: int, other: int) -> int:
    """In how many seeds exactly one of the two is kept."""
    return int((kept[:, one] != kept[:, other]).sum())
