"""Redundancy: parts that gating keeps and whose single ablation does nothing, tested jointly with what may stand in for them."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import torch

from patchclamp.gating.descent import full_gates
from patchclamp.gating.fit import Gated
from patchclamp.gating.judge import Calls, Evidence, clear
from patchclamp.methods import groups_of
from patchclamp.metrics import METRICS
from patchclamp.parts import Fallback, Parts, benefits
from patchclamp.tasks import Examples

PAIRS = 60  # tested at most; those that seeds keep in turn come first


def substitutes(
    parts: Parts, gated: Gated, evidence: Evidence, examples: Examples, fallback: Fallback, seed: int = 0
) -> Mapping[int, tuple[int, ...]]:
    """For each redundant part, the parts that take over from it.

    Candidates are kept in some seed's G- and, closed alone, change the log-probability by less than the pressure. Their
    substitutes are kept in some seed too. A candidate is redundant with another part where closing both costs more, by the
    pressure, than twice what each changes alone, taken together, and clearly more than the sum (q < .05 over the pairs
    tested: at most 60, first those that seeds keep in turn, then those worth most in the fitted circuits).

    Cost: one forward pass over the examples per pair, and one per part in them.
    """
    kept, worth = evidence.calls.facilitating, evidence.facilitating.mean
    single = evidence.exact.values()
    everyone = np.flatnonzero(kept.any(0)).tolist()
    idle = {part for part in everyone if abs(single[part]) < evidence.pressure}
    pairs = [pair for pair in combinations(everyone, 2) if idle & set(pair)]
    pairs = sorted(pairs, key=lambda pair: (-_turns(kept, *pair), -worth[list(pair)].sum()))[:PAIRS]
    if not pairs:
        return {}
    single_rows = sorted({part for pair in pairs for part in pair})
    rows = np.ones((1 + len(single_rows) + len(pairs), len(gated.labels)))
    for number, parts_closed in enumerate([*((part,) for part in single_rows), *pairs]):
        rows[1 + number, list(parts_closed)] = 0
    values = benefits(parts, examples, full_gates(parts, torch.from_numpy(rows)), fallback, METRICS["log_probability"])
    lost = (values[:1] - values[1:]).double().numpy()
    alone, joint = dict(zip(single_rows, lost, strict=False)), lost[len(single_rows) :]
    total = np.stack([alone[a] + alone[b] for a, b in pairs])
    size = np.array([abs(alone[a].mean()) + abs(alone[b].mean()) for a, b in pairs])
    together = clear(joint - total, groups_of(examples), seed) & (joint.mean(1) > 2 * size + evidence.pressure)
    found: dict[int, tuple[int, ...]] = {}
    for pair, much_more in zip(pairs, together, strict=True):
        for one, other in (pair, pair[::-1]):
            if much_more and one in idle:
                found[one] = (*found.get(one, ()), other)
    return found


def _turns(kept: Calls, one: int, other: int) -> int:
    """In how many seeds exactly one of the two is kept."""
    return int((kept[:, one] != kept[:, other]).sum())
